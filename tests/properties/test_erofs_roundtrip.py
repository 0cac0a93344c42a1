"""Any tree reads back as it was written, and an image with flipped bytes gives ErofsError or an answer, never more."""

from collections.abc import Callable
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from fsmount.erofs import ErofsError, FileKind, ImageReader, write_image
from tests.erofs_trees import describe_image, describe_tree, lay_out, odd_tree, trees, walk_tree


@given(trees())
@settings(max_examples=150)
def test_any_tree_reads_back(tree: tuple) -> None:
    root, size = tree
    warnings: list[str] = []
    image = write_image(root, volume_size=size, warnings=warnings)
    assert len(image) % 4096 == 0
    reader = ImageReader(image)
    assert describe_image(reader) == describe_tree(root)
    assert warnings == []
    for path, inode in walk_tree(root):
        nid = reader.root_nid
        for name in path.split(b"/")[1:] if path != b"/" else ():
            found = reader.lookup(nid, name)
            assert found is not None
            nid = found
        if inode.kind == FileKind.FILE:
            assert reader.map_range(nid, 0, 1 << 50) == ([(0, inode.size, 1, inode.volume_offset)] if inode.size else [])


def exercise(image: bytes) -> None:
    """Ask everything; refusals are fine, one at a time."""
    try:
        reader = ImageReader(image)
    except ErofsError:
        return
    found: dict[int, FileKind] = {}
    try:
        for _, nid, view in reader.walk():
            found[nid] = view.kind
    except ErofsError:
        found.setdefault(reader.root_nid, FileKind.DIRECTORY)
    for nid, kind in found.items():
        calls: list[Callable[[], object]] = [lambda nid=nid: reader.xattrs(nid)]
        if kind is FileKind.SYMLINK:
            calls.append(lambda nid=nid: reader.readlink(nid))
        elif kind is FileKind.FILE:
            calls.append(lambda nid=nid: reader.map_range(nid, 1000, 1 << 20))
            calls.append(lambda nid=nid: reader.map_range(nid, 0, 1 << 63))
        elif kind is FileKind.DIRECTORY:
            calls.append(lambda nid=nid: reader.lookup(nid, b"m"))
            calls.append(lambda nid=nid: list(reader.entries(nid, 4093)))
        for call in calls:
            try:
                call()
            except ErofsError:
                continue


@given(trees(), st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_flipped_bytes_never_get_out_of_hand(tree: tuple, random: Random) -> None:
    root, size = tree
    pristine = write_image(root, volume_size=size)
    for _ in range(5):
        image = bytearray(pristine)
        used = image.rstrip(b"\0")
        for _ in range(random.randint(1, 8)):
            at = random.randrange(1024, len(used))
            width = random.choice((1, 2, 4, 8))
            image[at : at + width] = random.choice((b"\xff" * width, bytes(width), random.randbytes(width)))
        exercise(
            bytes(image[: random.choice((len(image), random.randrange(len(image)))) if random.random() < 0.2 else len(image)])
        )


def test_flipped_bytes_in_a_big_image() -> None:
    root, size = odd_tree()
    pristine = write_image(root, volume_size=size)
    random = Random(11)
    for _ in range(25):
        image = bytearray(pristine)
        for _ in range(random.randint(1, 200)):
            image[random.randrange(1152, len(image))] = random.choice((0, 255, random.randrange(256)))
        exercise(image)


@given(st.binary(max_size=9000))
def test_garbage(data: bytes) -> None:
    exercise(data)


def test_layout_is_the_same_again() -> None:
    root, size = odd_tree()
    assert lay_out(root) == size
