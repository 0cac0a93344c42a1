"""The rules of the tree: names, duplicates, implied parents, whiteouts, hard links, xattrs."""

import pytest

from agent.formats import tree as tree_module
from agent.formats.model import FormatError, Inode, InodeKind
from agent.formats.tree import TreeBuilder, check_xattrs, walk


def file(**fields: int) -> Inode:
    return Inode(InodeKind.FILE, **fields)


def directory(**fields: int) -> Inode:
    return Inode(InodeKind.DIRECTORY, **fields)


def paths(root: Inode) -> dict[str, str]:
    return {path.decode() or "/": inode.kind.name for path, inode in walk(root)}


def build(*entries: tuple[str, Inode | str]) -> TreeBuilder:
    tree = TreeBuilder()
    for path, inode in entries:
        if isinstance(inode, str):
            tree.link(path.encode(), inode.encode())
        else:
            tree.add(path.encode(), inode)
    return tree


@pytest.mark.parametrize("path", ["a/b/c", "./a/b/c", "/a/b/c", "//a///b/./c", "a/./b/c", "././a/b/c", "x/../a/b/c"])
def test_spellings_of_one_path(path: str) -> None:
    root = build((path, file())).finish()
    assert {"/a", "/a/b", "/a/b/c"} <= set(paths(root))
    assert root.children[b"a"].mode == 0o755


@pytest.mark.parametrize("path", ["../../etc/passwd", "/../etc/passwd", "a/../../../etc/passwd", "../etc/passwd"])
def test_names_that_leave_the_root_stay_inside(path: str) -> None:
    tree = build((path, file()))
    assert "/etc/passwd" in paths(tree.finish())
    assert len(tree.warnings) == 1
    assert not any(name in (b"..", b".", b"") for _, inode in walk(tree.root) for name in inode.children)


def test_every_odd_entry_is_reported_not_only_the_first() -> None:
    tree = build(("../a/x", file()), ("../a/y", file()), ("a/..", directory(mode=0o700)))
    assert len(tree.warnings) == 3
    assert tree.finish().mode == 0o700


@pytest.mark.parametrize("path", ["a" * 256, "d/" + "a" * 256, "a" * 256 + "/f", "nul\0", "nul\0/f", "a/" * 3000 + "f"])
def test_impossible_names_are_refused(path: str) -> None:
    with pytest.raises(FormatError):
        build((path, file()))


def test_the_root_may_be_named_but_must_be_a_directory() -> None:
    for name in ("./", ".", "/", ""):
        assert build((name, directory(mode=0o711, uid=7))).finish().mode == 0o711
        with pytest.raises(FormatError):
            build((name, file()))
        with pytest.raises(FormatError):
            build(("a", file()), (name, "a"))


def test_the_last_entry_of_a_path_wins() -> None:
    one, two = file(size=1), file(size=2)
    tree = build(("f", one), ("f", two))
    assert tree.finish().children[b"f"] is two
    assert tree.has_replaced


def test_directories_merge_and_everything_else_replaces() -> None:
    root = build(("d/", directory(mode=0o700)), ("d/x", file()), ("d", directory(mode=0o750)), ("d/y", file())).finish()
    assert root.children[b"d"].mode == 0o750
    assert set(root.children[b"d"].children) == {b"x", b"y"}
    root = build(("d/x", file()), ("d", file()), ("d/y", file())).finish()
    assert paths(root) == {"/": "DIRECTORY", "/d": "DIRECTORY", "/d/y": "FILE"}


def test_symlinks_of_the_archive_are_not_followed() -> None:
    tree = build(("lib", Inode(InodeKind.SYMLINK, target=b"/etc")), ("lib/passwd", file()))
    assert paths(tree.finish()) == {"/": "DIRECTORY", "/lib": "DIRECTORY", "/lib/passwd": "FILE"}
    assert tree.warnings


def test_whiteouts_hide_lower_names_only() -> None:
    root = build(
        ("gone/.wh.file", file()),
        ("both/.wh.dir", file()),
        ("both/dir/new", file()),
        ("both/file", file()),
        ("both/.wh.file", file()),
        ("opaque/old-first", file()),
        ("opaque/.wh..wh..opq", file()),
        (".wh.top", file()),
    ).finish()
    gone = root.children[b"gone"].children[b"file"]
    assert (gone.kind, gone.rdev, gone.mode) == (InodeKind.CHAR, (0, 0), 0)
    both = root.children[b"both"].children
    assert both[b"dir"].is_opaque
    assert list(both[b"dir"].children) == [b"new"]
    assert both[b"file"].kind is InodeKind.FILE
    assert root.children[b"opaque"].is_opaque
    assert list(root.children[b"opaque"].children) == [b"old-first"]
    assert root.children[b"top"].kind is InodeKind.CHAR


def test_leftovers_of_aufs_and_empty_whiteouts_vanish() -> None:
    tree = build(
        (".wh..wh.aufs", file()),
        (".wh..wh.plnk/", directory()),
        (".wh..wh.plnk/1.2", file()),
        (".wh.", file()),
        (".wh..", file()),
        (".wh...", file()),
        (".wh.x/y", file()),
        (".wh.x/y/z", file()),
    )
    assert tree.finish().children == {}


def test_hard_links_are_one_inode() -> None:
    target = file()
    root = build(("b", "./a"), ("c", "/b"), ("a", target), ("d/e", "c"), ("a2", "a")).finish()
    assert all(root.children[name] is target for name in (b"a", b"b", b"c", b"a2"))
    assert root.children[b"d"].children[b"e"] is target


def test_a_hard_link_that_was_replaced_needs_no_target() -> None:
    real = file()
    assert build(("a", "missing"), ("a", real)).finish().children[b"a"] is real


def test_a_hard_link_to_itself_changes_nothing() -> None:
    real = file()
    assert build(("a", real), ("a", "a")).finish().children[b"a"] is real


@pytest.mark.parametrize(
    "entries",
    [
        [("a", "a")],
        [("a", "b"), ("b", "a")],
        [("a", "b"), ("b", "c"), ("c", "d"), ("d", "b")],
        [("a", "missing")],
        [("a", "d"), ("d/", directory())],
        [("d/", directory()), ("a", "d")],
        [("a", "f/x"), ("f", file())],
        [("a", "")],
        [("a", "../..")],
        [("d/a", "d")],
    ],
)
def test_hard_links_that_lead_nowhere_are_refused(entries: list[tuple[str, Inode | str]]) -> None:
    with pytest.raises(FormatError, match="hard link"):
        build(*entries).finish()


def test_a_long_chain_of_links_ends() -> None:
    tree = TreeBuilder()
    for number in range(3000):
        tree.link(b"l%d" % number, b"l%d" % (number + 1))
    target = file()
    tree.add(b"l3000", target)
    assert tree.finish().children[b"l0"] is target


def test_a_layer_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "MAX_INODES", 1000)
    with pytest.raises(FormatError, match="1000"):
        build(*((f"{number}/" * 100, directory()) for number in range(20)))


def test_warnings_do_not_grow_without_end() -> None:
    tree = build(*((f"../f{number}", file()) for number in range(1000)))
    assert len(tree.warnings) == tree_module.MAX_WARNINGS


def test_xattrs_that_no_file_system_keeps_are_dropped() -> None:
    tree = TreeBuilder()
    good = {
        b"user.a": b"",
        b"security.capability": b"\1\0",
        b"trusted.x": b"y",
        b"system.posix_acl_access": b"\2\0\0\0",
        b"user.big": b"v" * 65535,
        b"user.overlay.x": b"kept",
    }
    bad = {
        b"trusted.overlay.opaque": b"y",
        b"btrfs.x": b"",
        b"system.nfs4_acl": b"",
        b"user.": b"",
        b"user.huge": b"v" * 65536,
        b"user." + b"n" * 251: b"",
        b"": b"",
    }
    assert check_xattrs([*good.items(), *bad.items()], b"path", tree) == good
    assert len(tree.warnings) == len(bad)
    many = [(b"user.%d" % number, bytes(60_000)) for number in range(10)]
    assert 0 < len(check_xattrs(many, b"path", tree)) < 10
