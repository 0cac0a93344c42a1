"""Laying the trees of an image's layers over each other, as a container sees them.

Layers go lowest first. A whiteout removes what lower layers have under its name, an opaque directory what they have in it; a
directory over a directory merges and gives its attributes, unless the layer only implied it; all else replaces. What comes out
has no whiteouts and no opaque marks. The layers' own trees stay as they are: directories are new objects, other inodes shared.
"""

from collections.abc import Sequence

import attrs

from agent.formats.model import Inode, InodeKind
from agent.formats.nydus_writer.blob import IMPLIED

_WHITEOUT = (0, 0)


@attrs.frozen(eq=False)
class MergedTree:
    """One tree of many layers. `layers` has, by `id`, the number of the layer that each file with chunks is from."""

    root: Inode
    layers: dict[int, int]


def merge_layers(roots: Sequence[Inode]) -> MergedTree:
    """Apply the layers' trees in order, the lowest first."""
    merged = MergedTree(Inode(InodeKind.DIRECTORY), {})
    for number, root in enumerate(roots):
        _apply(merged, root, number)
    return merged


def _apply(merged: MergedTree, root: Inode, number: int) -> None:
    _take_attributes(merged.root, root)
    pending = [(merged.root, root)]
    while pending:
        lower, upper = pending.pop()
        if upper.is_opaque:
            lower.children.clear()
        for name, child in upper.children.items():
            if child.kind is InodeKind.CHAR and child.rdev == _WHITEOUT:
                lower.children.pop(name, None)
            elif child.kind is not InodeKind.DIRECTORY:
                lower.children[name] = child
                if child.chunk_count:
                    merged.layers[id(child)] = number
            else:
                old = lower.children.get(name)
                if old is None or old.kind is not InodeKind.DIRECTORY:
                    old = lower.children[name] = Inode(InodeKind.DIRECTORY)
                _take_attributes(old, child)
                pending.append((old, child))


def _take_attributes(old: Inode, new: Inode) -> None:
    if new.first_chunk != IMPLIED:
        old.mode, old.uid, old.gid, old.mtime_ns, old.xattrs = new.mode, new.uid, new.gid, new.mtime_ns, new.xattrs
