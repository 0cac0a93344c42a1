"""Trees for the EROFS tests, and one shape in which a tree, an image and a kernel mount are compared."""

import errno
import os
import stat
from collections.abc import Iterator
from random import Random
from typing import Any

from hypothesis import strategies as st

from agent.formats.model import BLOCK_SIZE, Inode, InodeKind, LayerIndex
from fsmount.erofs import ImageReader

Description = dict[bytes, dict[str, Any]]

OPAQUE = {b"trusted.overlay.opaque": b"y", b"user.overlay.opaque": b"y"}
ACL = b"\2\0\0\0" + bytes.fromhex("01000600ffffffff04000400ffffffff20000400ffffffff")
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


def walk_tree(root: Inode) -> Iterator[tuple[bytes, Inode]]:
    yield b"/", root
    pending = [(b"/", root)]
    while pending:
        path, folder = pending.pop()
        for name, inode in folder.children.items():
            yield path + name, inode
            if inode.kind is InodeKind.DIRECTORY:
                pending.append((path + name + b"/", inode))


def link_groups(names: dict[Any, list[bytes]]) -> dict[bytes, bytes]:
    return {path: min(paths) for paths in names.values() for path in paths}


def describe_tree(root: Inode) -> Description:
    """What the image of the tree must show."""
    out: Description = {}
    names: dict[int, list[bytes]] = {}
    for path, inode in walk_tree(root):
        xattrs = dict(inode.xattrs)
        children = inode.children.values()
        if inode.is_opaque:
            xattrs |= OPAQUE
        if any(child.kind is InodeKind.CHAR and child.rdev == (0, 0) for child in children):
            xattrs[b"trusted.overlay.origin"] = b""
        entry: dict[str, Any] = {
            "kind": int(inode.kind),
            "mode": inode.mode,
            "uid": inode.uid,
            "gid": inode.gid,
            "mtime_ns": inode.mtime_ns,
            "xattrs": xattrs,
        }
        if inode.kind is InodeKind.FILE:
            entry["size"] = inode.size
        elif inode.kind is InodeKind.SYMLINK:
            entry["target"] = inode.target
        elif inode.kind in (InodeKind.CHAR, InodeKind.BLOCK):
            entry["rdev"] = inode.rdev
        if inode.kind is InodeKind.DIRECTORY:
            entry["nlink"] = 2 + sum(child.kind is InodeKind.DIRECTORY for child in children)
        else:
            names.setdefault(id(inode), []).append(path)
        out[path] = entry
    groups = link_groups(names)
    for path, first in groups.items():
        out[path]["same_as"] = first
    for paths in names.values():
        for path in paths:
            out[path]["nlink"] = len(paths)
    return out


def describe_image(reader: ImageReader) -> Description:
    out: Description = {}
    names: dict[int, list[bytes]] = {}
    for path, nid, view in reader.walk():
        entry: dict[str, Any] = {
            "kind": int(view.kind),
            "mode": view.mode & 0o7777,
            "uid": view.uid,
            "gid": view.gid,
            "mtime_ns": view.mtime_ns,
            "xattrs": reader.xattrs(nid),
            "nlink": view.nlink,
        }
        assert stat.S_IFMT(view.mode) == _KIND_BITS[view.kind]
        if view.kind == InodeKind.FILE:
            entry["size"] = view.size
        elif view.kind == InodeKind.SYMLINK:
            entry["target"] = reader.readlink(nid)
            assert len(entry["target"]) == view.size
        elif view.kind in (InodeKind.CHAR, InodeKind.BLOCK):
            entry["rdev"] = view.rdev
        if view.kind != InodeKind.DIRECTORY:
            names.setdefault(nid, []).append(path)
        out[path] = entry
    for path, first in link_groups(names).items():
        out[path]["same_as"] = first
    return out


_KIND_BITS = {
    1: stat.S_IFREG,
    2: stat.S_IFDIR,
    3: stat.S_IFCHR,
    4: stat.S_IFBLK,
    5: stat.S_IFIFO,
    6: stat.S_IFSOCK,
    7: stat.S_IFLNK,
}
_BITS_KIND = {bits: kind for kind, bits in _KIND_BITS.items()}


def describe_mount(top: bytes) -> Description:
    """What the kernel shows, through directory file descriptors as paths may be longer than PATH_MAX."""
    out: Description = {}
    names: dict[int, list[bytes]] = {}
    pending: list[tuple[bytes, int]] = [(b"/", os.open(top, os.O_RDONLY | os.O_DIRECTORY))]
    out[b"/"] = _describe_open(pending[0][1], None)
    while pending:
        path, folder = pending.pop()
        try:
            for name in map(os.fsencode, os.listdir(folder)):
                entry = _describe_open(folder, name)
                ino = entry.pop("ino")
                out[path + name] = entry
                if entry["kind"] == InodeKind.DIRECTORY:
                    pending.append((path + name + b"/", os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)))
                else:
                    names.setdefault(ino, []).append(path + name)
        finally:
            os.close(folder)
    out[b"/"].pop("ino")
    for path, first in link_groups(names).items():
        out[path]["same_as"] = first
    return out


def _describe_open(folder: int, name: bytes | None) -> dict[str, Any]:
    place = b"/proc/self/fd/%d/%s" % (folder, name or b".")
    info = os.lstat(place)
    xattrs = {}
    for key in os.listxattr(place, follow_symlinks=False):
        try:
            xattrs[os.fsencode(key)] = os.getxattr(place, key, follow_symlinks=False)
        except OSError as error:
            # Linux gives user attributes of files and directories only.
            if error.errno != errno.ENODATA or not key.startswith("user."):
                raise
    kind = _BITS_KIND[stat.S_IFMT(info.st_mode)]
    entry: dict[str, Any] = {
        "kind": kind,
        "mode": stat.S_IMODE(info.st_mode),
        "uid": info.st_uid,
        "gid": info.st_gid,
        "mtime_ns": info.st_mtime_ns,
        "xattrs": xattrs,
        "nlink": info.st_nlink,
        "ino": info.st_ino,
    }
    if kind == InodeKind.FILE:
        entry["size"] = info.st_size
    elif kind == InodeKind.SYMLINK:
        entry["target"] = os.readlink(place)
    elif kind in (InodeKind.CHAR, InodeKind.BLOCK):
        entry["rdev"] = (os.major(info.st_rdev), os.minor(info.st_rdev))
    return entry


def as_kernel_shows(expected: Description) -> Description:
    """Less the attributes that Linux never hands out."""
    return {
        path: entry
        if entry["kind"] in (InodeKind.FILE, InodeKind.DIRECTORY)
        else {**entry, "xattrs": {k: v for k, v in entry["xattrs"].items() if not k.startswith(b"user.")}}
        for path, entry in expected.items()
    }


def lay_out(root: Inode) -> int:
    """Give each file with a size its place in the volume; the result is the volume's size."""
    size, seen = 0, set()
    for _, inode in walk_tree(root):
        if inode.kind is InodeKind.FILE and inode.size and id(inode) not in seen:
            seen.add(id(inode))
            inode.volume_offset = size
            size += -(-inode.size // BLOCK_SIZE) * BLOCK_SIZE
    return size


def make_volume(size: int) -> bytes:
    """Bytes whose every block differs."""
    return b"".join(b"%015d\n" % number * 256 for number in range(-(-size // BLOCK_SIZE)))


# -- trees --


def wide_tree(entries: int, per_folder: int = 30) -> tuple[Inode, int]:
    """A tree shaped like a distribution's: folders of some thirty entries, a tenth of them symlinks."""
    root, count, random = Inode(InodeKind.DIRECTORY), 0, Random(5)
    while count < entries:
        folder = Inode(InodeKind.DIRECTORY, mtime_ns=(1_700_000_000 + random.randrange(100)) * 10**9)
        root.children[b"folder-%d" % count] = folder
        for number in range(per_folder):
            if number % 10 == 9:
                inode = Inode(InodeKind.SYMLINK, mode=0o777, target=b"../some/where/libexample-%d.so" % number)
            else:
                inode = Inode(InodeKind.FILE, mode=0o644, mtime_ns=random.randrange(2**31) * 10**9, size=random.randrange(20_000))
            folder.children[b"a-file-with-some-name-%d.py" % number] = inode
        count += 1 + per_folder
    return root, lay_out(root)


def odd_tree() -> tuple[Inode, int]:
    """One of everything: kinds, names around ".", ids, times, attributes, sizes, markers, links, depth."""
    file, folder = InodeKind.FILE, InodeKind.DIRECTORY
    root = Inode(folder, mode=0o1777, mtime_ns=-1)
    add = root.children
    for name in (
        b"!",
        b"#x",
        b"-",
        b"+.",
        b"...",
        b"..a",
        b".a",
        b"/".replace(b"/", b"0"),
        b"\xff",
        b"\n",
        b"\x01" * 255,
        "ü".encode(),
    ):
        add[name] = Inode(file, mode=0o600, size=len(name) * 100)
    for size in (0, 1, 511, 4095, 4096, 4097, 65536, 1 << 20, (1 << 20) + 1):
        add[b"size-%d" % size] = Inode(file, size=size)
    for number, time_ns in enumerate((0, -1, -86400 * 10**9, 5 * 10**18, 2**33 * 10**9 + 1, 1_234_567_890_123_456_789)):
        add[b"time-%d" % number] = Inode(file, mtime_ns=time_ns)
    for uid, gid in ((65535, 65535), (65536, 0), (0, 65536), (2**31 + 5, 2**32 - 2)):
        add[b"owner-%d-%d" % (uid, gid)] = Inode(file, mode=0o4755, uid=uid, gid=gid)
    for length in (1, 59, 60, 2000, 3000, 4000, 4031, 4032, 4033, 4064, 4065, 4095):
        add[b"link-%d" % length] = Inode(InodeKind.SYMLINK, mode=0o777, target=b"t" * length)
        add[b"link-x-%d" % length] = Inode(
            InodeKind.SYMLINK, mode=0o777, target=b"t" * length, xattrs={b"trusted.t": b"v" * (length % 300)}
        )
    add[b"chr"] = Inode(InodeKind.CHAR, rdev=(4095, 1048575))
    add[b"blk"] = Inode(InodeKind.BLOCK, rdev=(7, 200), xattrs={b"trusted.d": b"1"})
    add[b"fifo"] = Inode(InodeKind.FIFO)
    add[b"sock"] = Inode(InodeKind.SOCKET)
    add[b"gone"] = Inode(InodeKind.CHAR, mode=0)
    linked = Inode(file, size=10_000)
    for number in range(5):
        add[b"linked-%d" % number] = linked
    add[b"acl"] = Inode(folder, xattrs={b"system.posix_acl_default": ACL, b"system.posix_acl_access": ACL})
    add[b"cap"] = Inode(file, size=1, xattrs={b"security.capability": CAPABILITY})
    add[b"opaque"] = Inode(folder, is_opaque=True, children={b"whiteout": Inode(InodeKind.CHAR, mode=0), b"link": linked})
    for number, size in enumerate((0, 1, 256, 900, 1100, 3000, 3900, 5000, 20_000, 60_000)):
        name = b"user.note-%d" % number
        add[b"x-file-%d" % number] = Inode(
            file, size=5, xattrs={name: b"v" * size, b"security.label": b"system_u:object_r:usr_t"}
        )
        add[b"x-folder-%d" % number] = Inode(folder, xattrs={name: b"w" * size}, children={b"c" * 200: linked})
    add[b"many"] = Inode(folder, xattrs={b"user.%d" % n: b"%d" % n * 30 for n in range(300)})
    for entries in (1, 10, 14, 15, 16, 120, 600, 2500):
        add[b"folder-%d" % entries] = Inode(
            folder, children={b"%d-" % n + b"n" * (n % 250): Inode(file, size=n % 3) for n in range(entries)}
        )
    deep = add[b"deep"] = Inode(folder)
    for _ in range(400):
        deep.children[b"d" * 100] = deep = Inode(folder)
    return root, lay_out(root)


def index_tree(index: LayerIndex) -> tuple[Inode, int]:
    return index.root, index.volume_size


_names = (
    st.binary(min_size=1, max_size=255)
    .map(lambda n: n.replace(b"/", b"|").replace(b"\0", b"~"))
    .filter(lambda n: n not in (b".", b".."))
)
_near_dot = st.text(alphabet="!-+.,a0", min_size=1, max_size=4).map(str.encode).filter(lambda n: n not in (b".", b".."))
_times = st.one_of(st.sampled_from((0, 10**18, 17 * 10**17)), st.integers(-(2**40) * 10**9, 2**40 * 10**9))
_ids = st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 2))
_xattr_names = st.sampled_from((b"user.", b"trusted.", b"security.x")).flatmap(
    lambda prefix: st.binary(min_size=1, max_size=40).map(lambda rest: prefix + rest.replace(b"\0", b"0"))
)
_xattrs = st.one_of(
    st.just({}),
    st.just({b"security.selinux": b"system_u:object_r:bin_t:s0"}),
    st.dictionaries(_xattr_names, st.one_of(st.binary(max_size=60), st.integers(0, 9000).map(lambda n: b"x" * n)), max_size=6),
)
_devices = st.tuples(st.integers(0, 4095), st.integers(0, 1048575))


@st.composite
def inodes(draw: st.DrawFn, kind: InodeKind) -> Inode:
    inode = Inode(
        kind,
        mode=draw(st.integers(0, 0o7777)),
        uid=draw(_ids),
        gid=draw(_ids),
        mtime_ns=draw(_times),
        xattrs=dict(draw(_xattrs)),
    )
    if kind is InodeKind.FILE:
        inode.size = draw(st.one_of(st.integers(0, 100_000), st.sampled_from((0, 4095, 4096, 4097, 8192))))
    elif kind is InodeKind.SYMLINK:
        inode.target = draw(st.one_of(st.binary(min_size=1, max_size=60), st.integers(1, 4095).map(lambda n: b"t" * n))).replace(
            b"\0", b"0"
        )
    elif kind in (InodeKind.CHAR, InodeKind.BLOCK):
        inode.rdev = draw(_devices)
    elif kind is InodeKind.DIRECTORY:
        inode.is_opaque = draw(st.booleans())
    return inode


@st.composite
def trees(draw: st.DrawFn) -> tuple[Inode, int]:
    """A tree with its volume's size."""
    root = draw(inodes(InodeKind.DIRECTORY))
    folders, files = [root], []
    for name in draw(st.lists(st.one_of(_names, _near_dot), max_size=25)):
        folder = draw(st.sampled_from(folders))
        if name in folder.children:
            continue
        if files and draw(st.integers(0, 5)) == 0:
            folder.children[name] = draw(st.sampled_from(files))
            continue
        inode = folder.children[name] = draw(inodes(draw(st.sampled_from(InodeKind))))
        (folders if inode.kind is InodeKind.DIRECTORY else files).append(inode)
    if draw(st.booleans()):
        # A directory that fills its blocks in a way of its own.
        crowd, length = draw(st.integers(1, 300)), draw(st.integers(1, 240))
        draw(st.sampled_from(folders)).children |= {b"%06d" % n + b"c" * length: Inode(InodeKind.FIFO) for n in range(crowd)}
    return root, lay_out(root)
