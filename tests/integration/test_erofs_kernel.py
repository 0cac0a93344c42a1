"""The kernel and fsck.erofs against our images: every attribute of every entry, and file bytes from the volume.

File-backed mounts want their metadata image on a file system that can read pages by itself: not tmpfs, not overlayfs.
Debian's fsck.erofs (1.5) checks inodes, directory order, links, and with `--extract` that all data can be read from
`--device`; it does not look at xattrs of kinds it does not know, and a wrong checksum is only a warning to it.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings

from agent.formats.model import Inode, InodeKind
from fsmount.erofs import ImageReader, write_image
from tests.erofs_trees import (
    as_kernel_shows,
    describe_image,
    describe_mount,
    describe_tree,
    make_volume,
    odd_tree,
    trees,
    walk_tree,
    wide_tree,
)
from tests.unit.formats.conftest import FixtureImages, read_volume

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: sudo make test")

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2
_RDONLY = 1


def _call(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def mounted(source: str, target: Path, kind: str, options: str) -> Iterator[Path]:
    _call(_libc.mount(source.encode(), os.fsencode(target), kind.encode(), _RDONLY, options.encode()))
    try:
        yield target
    finally:
        _call(_libc.umount2(os.fsencode(target), _MNT_DETACH))


@contextlib.contextmanager
def presented(image: bytes, volume: bytes = b"", volume_size: int = 0) -> Iterator[Path]:
    """The image mounted over its volume, both as plain files; the files lie beside the mount as `meta` and `volume`."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="shoal-erofs-") as name:
        folder = Path(name)
        (folder / "meta").write_bytes(image)
        with (folder / "volume").open("wb") as file:
            file.write(volume)
            file.truncate(-(-max(volume_size, len(volume)) // 4096) * 4096)
        (folder / "top").mkdir()
        with mounted(str(folder / "meta"), folder / "top", "erofs", f"device={folder / 'volume'}") as top:
            yield top


def fsck(folder: Path) -> None:
    tool = shutil.which("fsck.erofs")
    if tool is None:
        pytest.skip("fsck.erofs is missing: apt-get install erofs-utils")
    done = subprocess.run(
        [tool, f"--device={folder / 'volume'}", "--extract", str(folder / "meta")], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert b"rror" not in done.stderr, done.stderr


def same_descriptions(shown: dict, expected: dict) -> None:
    assert shown.keys() == expected.keys()
    for path, entry in expected.items():
        assert shown[path] == entry, path


def same_bytes(top: Path, root: Inode, volume: bytes) -> None:
    view = memoryview(volume)
    for path, inode in walk_tree(root):
        if inode.kind is InodeKind.FILE and len(path) < 4000:
            with open(os.fsencode(top) + path, "rb") as file:
                data = file.read()
            expected = view[inode.volume_offset :][: inode.size] if inode.volume_offset >= 0 else bytes(inode.size)
            assert data == expected, path


def check_all(root: Inode, size: int) -> None:
    image, volume = write_image(root, volume_size=size), make_volume(size)
    with presented(image, volume) as top:
        shown = describe_mount(os.fsencode(top))
        same_descriptions(shown, as_kernel_shows(describe_tree(root)))
        same_descriptions(as_kernel_shows(describe_image(ImageReader(image))), shown)
        same_bytes(top, root, volume)
        fsck(top.parent)


def test_one_of_everything() -> None:
    check_all(*odd_tree())


@given(trees())
@settings(max_examples=40)
def test_any_tree(tree: tuple) -> None:
    check_all(*tree)


def test_an_empty_tree_over_an_empty_volume() -> None:
    check_all(Inode(InodeKind.DIRECTORY), 0)


def test_every_name_is_found_by_lookup() -> None:
    names = {b"%c%c" % (a, b) for a in range(1, 256, 7) for b in range(1, 256, 7)} | {bytes([a]) for a in range(1, 256)}
    names -= {name for name in names if b"/" in name} | {b".", b".."}
    root = Inode(InodeKind.DIRECTORY, children={name: Inode(InodeKind.FIFO) for name in names})
    with presented(write_image(root, volume_size=0)) as top:
        for name in names:
            os.lstat(os.fsencode(top) + b"/" + name)
        for name in (b"\xff\xfe\xfd", b"zzzz", b"!!!!!", b"-0-"):
            with pytest.raises(FileNotFoundError):
                os.lstat(os.fsencode(top) + b"/" + name)


def test_files_beyond_4_gib() -> None:
    size = (5 << 30) + 3
    root = Inode(
        InodeKind.DIRECTORY,
        children={
            b"before": Inode(InodeKind.FILE, size=4096, volume_offset=0),
            b"big": Inode(InodeKind.FILE, size=size, volume_offset=4096),
            b"hole": Inode(InodeKind.FILE, size=(9 << 40) + 5),
        },
    )
    with presented(write_image(root, volume_size=size + 4096), volume_size=size + 4096) as top:
        with (top.parent / "volume").open("r+b") as volume:
            for place in (0, (4 << 30) - 3, size - 3):
                volume.seek(4096 + place)
                volume.write(b"abc")
        with (top / "big").open("rb") as big:
            assert os.fstat(big.fileno()).st_size == size
            for place in (0, (4 << 30) - 3, size - 3):
                assert os.pread(big.fileno(), 3, place) == b"abc"
            assert os.pread(big.fileno(), 9, 3 << 30) == bytes(9)
        with (top / "hole").open("rb") as hole:
            assert os.pread(hole.fileno(), 99, 9 << 40) == bytes(5)


def test_a_hundred_thousand_entries() -> None:
    root, size = wide_tree(100_000)
    with presented(write_image(root, volume_size=size), volume_size=size) as top:
        found = subprocess.run(["find", str(top), "-printf", "%y\n"], capture_output=True, timeout=60, check=True).stdout
        assert len(found.splitlines()) == sum(1 for _ in walk_tree(root))
        fsck(top.parent)


@pytest.mark.parametrize("is_user", [False, True])
def test_overlayfs_obeys_whiteouts_and_opaque_directories(is_user: bool) -> None:
    kind = InodeKind
    lower = Inode(
        kind.DIRECTORY,
        children={
            b"gone": Inode(kind.FIFO),
            b"stays": Inode(kind.FIFO),
            b"opaque": Inode(kind.DIRECTORY, children={b"old": Inode(kind.FIFO)}),
            b"merged": Inode(kind.DIRECTORY, children={b"old": Inode(kind.FIFO), b"gone": Inode(kind.DIRECTORY)}),
        },
    )
    upper = Inode(
        kind.DIRECTORY,
        children={
            b"gone": Inode(kind.CHAR, mode=0),
            b"opaque": Inode(kind.DIRECTORY, is_opaque=True, children={b"new": Inode(kind.FIFO)}),
            b"merged": Inode(kind.DIRECTORY, children={b"new": Inode(kind.FIFO), b"gone": Inode(kind.CHAR, mode=0)}),
            b"only-here": Inode(kind.DIRECTORY, children={b"phantom": Inode(kind.CHAR, mode=0), b"real": Inode(kind.FIFO)}),
        },
    )
    with contextlib.ExitStack() as stack:
        tops = [stack.enter_context(presented(write_image(root, volume_size=0, user_markers=is_user))) for root in (upper, lower)]
        target = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp", prefix="shoal-erofs-")))
        options = f"lowerdir={tops[0]}:{tops[1]}" + (",userxattr" if is_user else "")
        merged = stack.enter_context(mounted("overlay", target, "overlay", options))
        assert sorted(os.listdir(merged)) == ["merged", "only-here", "opaque", "stays"]
        assert sorted(os.listdir(merged / "merged")) == ["new", "old"]
        assert os.listdir(merged / "opaque") == ["new"]
        if not is_user:
            # The origin mark that hides phantoms is a trusted one.
            assert os.listdir(merged / "only-here") == ["real"]
            assert os.listxattr(merged / "opaque") == []


@pytest.mark.parametrize("tag", ["esgz", "esgz-minchunk", "esgz-chunk64k"])
def test_fixture_layers(tag: str, shared_fixtures: Path) -> None:
    images = FixtureImages(shared_fixtures)
    for layer in images.layers(tag):
        index = images.read_toc(layer.blob, layer.toc_digest)
        volume, warnings = read_volume(index, layer.blob), []
        image = write_image(index.root, volume_size=index.volume_size, warnings=warnings)
        assert warnings == []
        with presented(image, volume, index.volume_size) as top:
            same_descriptions(describe_mount(os.fsencode(top)), as_kernel_shows(describe_tree(index.root)))
            same_bytes(top, index.root, volume)
            fsck(top.parent)
