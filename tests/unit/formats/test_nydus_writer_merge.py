"""Merging layers against a model of one line for each rule: a dictionary of paths."""

import io
import tarfile

from hypothesis import example, given
from hypothesis import strategies as st

from agent.formats.model import InodeKind
from agent.formats.nydus_writer import write_blob
from agent.formats.nydus_writer.merge import merge_layers
from agent.formats.tree import walk

_NAMES = st.sampled_from(["a", "b", "c"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)
_ENTRIES = st.tuples(st.sampled_from(["file", "folder", "whiteout", "opaque"]), _PATHS, st.integers(1, 99))
_LAYERS = st.lists(st.lists(_ENTRIES, max_size=8), min_size=1, max_size=4)

Layer = list[tuple[str, str, int]]
Tree = dict[str, tuple[str, int]]
"""By path: "file" or "folder", and a time that tells one entry from another (0: nobody said)."""


def tar_of(layer: Layer) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for kind, path, time in layer:
            folder, _, name = path.rpartition("/")
            info = tarfile.TarInfo(
                {"whiteout": f"{folder}/.wh.{name}", "opaque": f"{path}/.wh..wh..opq"}.get(kind, path).removeprefix("/")
            )
            info.type = tarfile.DIRTYPE if kind == "folder" else tarfile.REGTYPE
            info.mtime = time
            archive.addfile(info)
    return out.getvalue()


def below(tree: Tree, path: str) -> list[str]:
    return [other for other in tree if other.startswith(path + "/")]


def put(tree: Tree, path: str, kind: str, time: int) -> None:
    """Something at a path, parents made as needed; a folder over a folder merges."""
    parts = path.split("/")
    for depth in range(1, len(parts)):
        parent = "/".join(parts[:depth])
        if tree.get(parent, ("", 0))[0] != "folder":
            tree[parent] = ("folder", 0)
    if kind == "file":
        for other in below(tree, path):
            del tree[other]
    # A folder that is only implied takes nothing from the one below.
    if kind == "folder" and not time and tree.get(path, ("", 0))[0] == "folder":
        return
    tree[path] = (kind, time)


def apply(tree: Tree, layer: Layer) -> None:
    for kind, path, _ in layer:
        removed = below(tree, path) if kind in ("whiteout", "opaque") else []
        for other in [*removed, *([path] if kind == "whiteout" else [])]:
            tree.pop(other, None)
    own: Tree = {}
    for kind, path, time in layer:
        if kind in ("file", "folder"):
            put(own, path, kind, time)
        else:
            parent = path if kind == "opaque" else path.rpartition("/")[0]
            if parent:
                put(own, parent, "folder", 0)
    for path in sorted(own):
        put(tree, path, *own[path])


def is_plain(layer: Layer) -> bool:
    """Whether the layer says each thing once: what several entries for one path make of each other is the tree builder's."""
    files = {path for kind, path, _ in layer if kind == "file"}
    said = [(kind == "whiteout", path) for kind, path, _ in layer if kind != "opaque"]
    opaque = {path for kind, path, _ in layer if kind == "opaque"}
    gone = {path for kind, path, _ in layer if kind == "whiteout"}
    inner = [path for _, path, _ in layer]
    is_below = any(other.startswith(path + "/") for path in files for other in inner)
    return len(said) == len(set(said)) and not is_below and not files & opaque and not gone & opaque


@given(_LAYERS)
@example([[("folder", "a", 5)], [("whiteout", "a", 1), ("file", "a/b", 2)]])
@example([[("folder", "a", 5), ("file", "a/c", 6)], [("opaque", "a", 1), ("file", "a/b", 2)]])
def test_merging_is_what_the_rules_say(layers: list[Layer]) -> None:
    layers = [layer for layer in layers if is_plain(layer)]
    tree: Tree = {}
    for layer in layers:
        apply(tree, layer)
    roots = [write_blob(io.BytesIO(tar_of(layer)), io.BytesIO()).root for layer in layers]
    kinds = {InodeKind.FILE: "file", InodeKind.DIRECTORY: "folder"}
    found = {
        path[1:].decode(): (kinds[inode.kind], inode.mtime_ns // 10**9) for path, inode in walk(merge_layers(roots).root) if path
    }
    assert found == tree
