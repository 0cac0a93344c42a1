"""From archive paths to a tree of inodes, by the rules that `model` states and OCI layers follow.

`TreeBuilder` takes entries in archive order. Names are cleaned like `clean("/" + name)`: leading slashes, empty components and
"." vanish, ".." goes up and stops at the root (reported). Symlinks of the archive are never followed. The last entry of a path
wins; a directory over a directory keeps the children and takes the new attributes. A parent that is missing, or is no
directory, becomes a directory 0755 root:root.

Whiteouts (`.wh.<name>`) touch lower layers only, so they are set aside and placed at the end: where the layer has a
directory of that name itself, the directory becomes opaque; where it has anything else, that hides the lower one already.

Hard links bind to their target when it is there, else at the end, through other links and with a guard against cycles.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import attrs

from agent.formats.model import FormatError, Inode, InodeKind

MAX_INODES: Final = 1 << 20
"""Entries and implied directories of one layer: three times the largest images of the field, and about 0.5 GB of inodes."""
MAX_PATH_BYTES: Final = 4096
"""Linux PATH_MAX: a longer path could not have been unpacked by any runtime."""
MAX_NAME_BYTES: Final = 255
MAX_WARNINGS: Final = 100
"""A hostile layer must not fill the memory with complaints; what is beyond it is counted by nobody."""
MAX_XATTR_VALUE: Final = 65535
"""Bytes of one value: the limit of an EROFS entry (formats.md 4.6), one below the kernel's."""
MAX_XATTR_AREA: Final = (65535 - 1) * 4
"""Bytes of all xattrs of one inode in EROFS."""

_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
_ACLS: Final = (b"system.posix_acl_access", b"system.posix_acl_default")
_STORABLE: Final = (b"user.", b"trusted.", b"security.")


@attrs.define(eq=False)
class _Link(Inode):
    """Holds the place of a hard link whose target has not come yet; `target` is the cleaned path of the target.

    `resolved` keeps what was found, so that a long chain of links is walked once and not once for each of its links.
    """

    resolved: Inode | None = None


class TreeBuilder:
    """Builds one layer's tree; see the module's text."""

    def __init__(self) -> None:
        self.root = Inode(InodeKind.DIRECTORY)
        self.warnings: list[str] = []
        self.has_replaced = False
        """Whether some inode that was added is not in the tree any more."""
        # Keys are parent paths as the archive spells them: most entries find their parent with one lookup. None: dropped.
        self._parents: dict[bytes, Inode | None] = {b"": self.root}
        self._whiteouts: list[tuple[Inode, bytes]] = []
        self._links: list[tuple[Inode, bytes, _Link]] = []
        self._count = 1

    def warn(self, text: str) -> None:
        """Note one sentence for `LayerIndex.warnings`."""
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)

    def add(self, path: bytes, inode: Inode) -> None:
        """Put an inode at a path. A whiteout's name makes the whiteout, whatever the inode is.

        Raises:
            FormatError: the path is impossible (NUL, length), the root is no directory, or the layer is too large.
        """
        place = self._place(path)
        if place is None:
            return
        parent, name = place
        if not name:
            if inode.kind is not InodeKind.DIRECTORY:
                raise FormatError("the root of the layer is not a directory")
            _take_attributes(self.root, inode)
            return
        if name.startswith(_WHITEOUT):
            self._add_whiteout(parent, name)
            return
        children = parent.children
        old = children.get(name)
        if old is None:
            self._count_inode()
            children[name] = inode
            return
        if inode.kind is InodeKind.DIRECTORY and old.kind is InodeKind.DIRECTORY:
            _take_attributes(old, inode)
            self.has_replaced = True
        else:
            self._replace(parent, name, inode)

    def link(self, path: bytes, target: bytes) -> None:
        """Put a hard link to `target` (a path of the same layer) at a path.

        Raises:
            FormatError: one of the paths is impossible.
        """
        place = self._place(path)
        if place is None:
            return
        parent, name = place
        if not name:
            raise FormatError("the root of the layer is a hard link")
        if name.startswith(_WHITEOUT):
            self._add_whiteout(parent, name)
            return
        aim = b"/".join(self._clean(target))
        found = self._lookup(aim)
        if found is not None and found.kind is not InodeKind.DIRECTORY and not isinstance(found, _Link):
            inode = found
        else:
            inode = link = _Link(InodeKind.FIFO, target=aim)
            self._links.append((parent, name, link))
            self._count_inode()
        if name in parent.children:
            if parent.children[name] is not inode:
                self._replace(parent, name, inode)
        else:
            self._count_inode()
            parent.children[name] = inode

    def finish(self) -> Inode:
        """Resolve what was left for the end and give the root.

        Raises:
            FormatError: a hard link leads nowhere, to a directory, or in a circle.
        """
        for parent, name, link in self._links:
            if parent.children.get(name) is link:
                parent.children[name] = self._resolve(link)
        for parent, name in self._whiteouts:
            old = parent.children.get(name)
            if old is None:
                self._count_inode()
                parent.children[name] = Inode(InodeKind.CHAR, mode=0)
            elif old.kind is InodeKind.DIRECTORY:
                old.is_opaque = True
        return self.root

    # --- names ------------------------------------------------------------------------------------------------------------

    def _place(self, path: bytes) -> tuple[Inode, bytes] | None:
        """(parent, name) of a path, parents made as needed; name is empty for the root; None if the entry is to be dropped."""
        if path.startswith(b"./"):
            path = path[2:]
        directory, _, name = (path[:-1] if path.endswith(b"/") else path).rpartition(b"/")
        parent = self._parents.get(directory, self.root)
        if (parent is self.root and directory) or name in (b"", b".", b"..") or len(name) > MAX_NAME_BYTES or b"\0" in name:
            components = self._clean(path)
            if not components:
                return self.root, b""
            name = components.pop()
            parent = self._directory(components)
            if b".." not in directory:  # one spelling more for the next entry; ".." stays out so that it is always reported
                self._parents[directory] = parent
        return None if parent is None else (parent, name)

    def _clean(self, path: bytes) -> list[bytes]:
        if len(path) > MAX_PATH_BYTES:
            raise FormatError(f"a path of {len(path)} bytes: {path[:80]!r}…")
        if b"\0" in path:
            raise FormatError(f"a path with a NUL byte: {path[:80]!r}")
        components: list[bytes] = []
        is_outside = False
        for component in path.split(b"/"):
            if component in (b"", b"."):
                continue
            if component == b"..":
                is_outside = True
                if components:
                    components.pop()
                continue
            if len(component) > MAX_NAME_BYTES:
                raise FormatError(f"a name of {len(component)} bytes: {component[:80]!r}…")
            components.append(component)
        if is_outside:
            self.warn(f"path {path[:80]!r} has '..' and was kept inside the layer's root")
        return components

    def _directory(self, components: list[bytes]) -> Inode | None:
        """The directory at a clean path, made as needed; None inside what AUFS or a whiteout left."""
        at = self.root
        for name in components:
            if name.startswith(_WHITEOUT):
                return None
            child = at.children.get(name)
            if child is None:
                self._count_inode()
                child = at.children[name] = Inode(InodeKind.DIRECTORY)
            elif child.kind is not InodeKind.DIRECTORY:
                self.warn(f"{name[:80]!r} is the parent of an entry but no directory; it was replaced")
                child = Inode(InodeKind.DIRECTORY)
                self._replace(at, name, child)
            at = child
        return at

    def _lookup(self, path: bytes) -> Inode | None:
        at: Inode | None = self.root
        for name in path.split(b"/"):
            at = at.children.get(name) if at is not None and at.kind is InodeKind.DIRECTORY else None
        return at

    # --- changes ----------------------------------------------------------------------------------------------------------

    def _count_inode(self) -> None:
        self._count += 1
        if self._count > MAX_INODES:
            raise FormatError(f"more than {MAX_INODES} files and directories in one layer")

    def _replace(self, parent: Inode, name: bytes, inode: Inode) -> None:
        if parent.children[name].kind is InodeKind.DIRECTORY:
            self._parents = {b"": self.root}  # spellings that led into the old directory
        parent.children[name] = inode
        self.has_replaced = True

    def _add_whiteout(self, parent: Inode, name: bytes) -> None:
        if name == _OPAQUE:
            parent.is_opaque = True
        elif name.startswith(b".wh..wh."):
            self.warn(f"{name[:80]!r} is a leftover of AUFS and was dropped")
        elif name[4:] in (b"", b".", b".."):
            self.warn(f"whiteout {name!r} names nothing and was dropped")
        else:
            self._whiteouts.append((parent, name[4:]))

    def _resolve(self, link: _Link) -> Inode:
        chain: dict[int, _Link] = {}
        at: Inode = link
        while isinstance(at, _Link):
            if at.resolved is not None:
                at = at.resolved
                break
            if id(at) in chain:
                raise FormatError(f"hard links in a circle through {at.target[:200]!r}")
            chain[id(at)] = at
            at = self._follow(at.target)
        for passed in chain.values():
            passed.resolved = at
        return at

    def _follow(self, path: bytes) -> Inode:
        found = self._lookup(path)
        if found is None:
            raise FormatError(f"hard link to {path[:200]!r}, which is not in this layer")
        if found.kind is InodeKind.DIRECTORY:
            raise FormatError(f"hard link to the directory {path[:200]!r}")
        return found


def _take_attributes(old: Inode, new: Inode) -> None:
    old.mode, old.uid, old.gid, old.mtime_ns, old.xattrs = new.mode, new.uid, new.gid, new.mtime_ns, new.xattrs


def check_xattrs(pairs: Iterable[tuple[bytes, bytes]], path: bytes, tree: TreeBuilder) -> dict[bytes, bytes]:
    """The xattrs that a file system can hold; the others are dropped and reported.

    `trusted.overlay.*` is dropped too: overlayfs above us would obey it, and an image must not steer the stack it lies in.
    """
    kept: dict[bytes, bytes] = {}
    area = 0
    for name, value in pairs:
        area += 8 + len(name) + len(value)
        if name not in _ACLS and not (name.startswith(_STORABLE) and not name.startswith(b"trusted.overlay.")):
            reason = "its namespace cannot be kept"
        elif (
            len(name) > MAX_NAME_BYTES
            or len(value) > MAX_XATTR_VALUE
            or area > MAX_XATTR_AREA
            or b"\0" in name
            or name in _STORABLE
        ):
            reason = "its size or name is out of bounds"
        else:
            kept[name] = value
            continue
        tree.warn(f"xattr {name[:80]!r} of {path[:80]!r} was dropped: {reason}")
    return kept


def walk(root: Inode) -> Iterator[tuple[bytes, Inode]]:
    """Every (path, inode) of a tree, the root first with the path b""; a hard link comes once for each of its names."""
    stack: list[tuple[bytes, Inode]] = [(b"", root)]
    while stack:
        path, inode = stack.pop()
        yield path, inode
        for name, child in inode.children.items():
            stack.append((path + b"/" + name, child))
