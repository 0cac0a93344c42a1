"""The reader against images that lie."""

import mmap
import struct
import tempfile
from collections.abc import Callable

import pytest

from agent.formats.model import Inode, InodeKind
from fsmount.erofs import ErofsError, FileKind, ImageReader, write_image
from tests.erofs_trees import describe_image, odd_tree

DIRECTORY, FILE = InodeKind.DIRECTORY, InodeKind.FILE


@pytest.fixture(scope="module")
def crowd() -> ImageReader:
    children = {b"%05d" % n: Inode(FILE) for n in range(0, 10_000, 2)}
    return ImageReader(write_image(Inode(DIRECTORY, children=children), volume_size=0))


def test_lookup_finds_each_name_and_no_other(crowd: ImageReader) -> None:
    listed = {name: nid for name, nid, _, _ in crowd.entries(crowd.root_nid)}
    assert len(listed) == 5000
    for number in range(10_000):
        name = b"%05d" % number
        assert crowd.lookup(crowd.root_nid, name) == listed.get(name)
    for name in (b".", b"..", b"", b"\0", b"0", b"\xff" * 300, b"00000\0", b"00000/"):
        assert crowd.lookup(crowd.root_nid, name) is None


def test_listing_goes_on_where_it_stopped(crowd: ImageReader) -> None:
    whole = list(crowd.entries(crowd.root_nid))
    assert [e[0] for e in whole] == sorted(e[0] for e in whole)
    assert all(kind is FileKind.FILE for _, _, kind, _ in whole)
    places = [e[3] for e in whole]
    assert places == sorted(set(places))
    assert places[0] > 0
    for index in range(0, len(whole), 97):
        assert list(crowd.entries(crowd.root_nid, whole[index][3])) == whole[index + 1 :]
    assert list(crowd.entries(crowd.root_nid, 1 << 62)) == []


def test_reads_an_mmap() -> None:
    root, size = odd_tree()
    image = write_image(root, volume_size=size)
    with tempfile.TemporaryFile() as file:
        file.write(image)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert describe_image(ImageReader(mapped)) == describe_image(ImageReader(memoryview(image)))


def test_wrong_kinds_are_refused() -> None:
    root = Inode(DIRECTORY, children={b"f": Inode(FILE), b"l": Inode(InodeKind.SYMLINK, target=b"t")})
    reader = ImageReader(write_image(root, volume_size=0))
    file = reader.lookup(reader.root_nid, b"f")
    link = reader.lookup(reader.root_nid, b"l")
    assert file is not None
    assert link is not None
    for call in (
        lambda: reader.readlink(file),
        lambda: reader.lookup(link, b"x"),
        lambda: list(reader.entries(file)),
        lambda: reader.map_range(link, 0, 1),
        lambda: reader.map_range(file, -1, 5),
        lambda: reader.inode(-5),
        lambda: reader.inode(1 << 80),
    ):
        with pytest.raises(ErofsError):
            call()


def image_of(root: Inode, size: int = 0) -> bytearray:
    return write_image(root, volume_size=size)


def put(image: bytearray, at: int, layout: str, *values: int) -> bytearray:
    struct.pack_into(layout, image, at, *values)
    return image


ROOT_AT = 1280


@pytest.mark.parametrize(
    "spoil",
    [
        lambda image: image[:4000],
        lambda image: b"",
        lambda image: put(image, 1024, "<I", 0),
        lambda image: put(image, 1024 + 12, "<B", 9),
        lambda image: put(image, 1024 + 14, "<H", 65535),
        lambda image: put(image, 1024 + 32, "<I", 1 << 31),
        lambda image: put(image, 1024 + 40, "<I", 1 << 31),
        lambda image: put(image, 1024 + 80, "<I", 0x1C),
        lambda image: put(image, 1024 + 86, "<H", 65535),
        lambda image: put(image, 1024 + 88, "<H", 65535),
        lambda image: put(image, ROOT_AT, "<H", 0x20),
        lambda image: put(image, ROOT_AT, "<H", 3 << 1),
        lambda image: put(image, ROOT_AT + 2, "<H", 65535),
        lambda image: put(image, ROOT_AT + 4, "<H", 0o100644),
        lambda image: put(image, ROOT_AT + 4, "<H", 0),
    ],
)
def test_a_bad_superblock_or_root_is_refused(spoil: Callable[[bytearray], bytes]) -> None:
    with pytest.raises(ErofsError):
        ImageReader(spoil(image_of(Inode(DIRECTORY))))


def test_a_directory_that_contains_itself_ends_the_walk() -> None:
    root = Inode(DIRECTORY, children={b"sub": Inode(DIRECTORY)})
    image = image_of(root)
    reader = ImageReader(image)
    child = reader.lookup(reader.root_nid, b"sub")
    assert child is not None
    at = image.index(struct.pack("<Q", child), ROOT_AT)
    with pytest.raises(ErofsError):
        list(ImageReader(put(image, at, "<Q", reader.root_nid)).walk())


def test_directories_that_share_their_blocks_end_the_walk() -> None:
    # Each of many directories shows one big listing: walking all of it would be quadratic in the image's size.
    crowd = Inode(DIRECTORY, children={b"%04d" % n: Inode(InodeKind.FIFO) for n in range(3000)})
    root = Inode(DIRECTORY, children={b"crowd": crowd} | {b"d%d" % n: Inode(DIRECTORY) for n in range(1000)})
    image = image_of(root)
    reader = ImageReader(image)
    source = reader.lookup(reader.root_nid, b"crowd")
    assert source is not None
    for name, nid, _, _ in list(reader.entries(reader.root_nid)):
        if name != b"crowd":
            # The copy keeps its own tail, so only whole blocks are shown.
            image[nid * 32 : nid * 32 + 32] = image[source * 32 : source * 32 + 32]
            struct.pack_into("<H", image, nid * 32, 0)
            struct.pack_into("<I", image, nid * 32 + 8, 40960)
    with pytest.raises(ErofsError, match="overlap"):
        list(ImageReader(image).walk())


def test_data_outside_the_device_are_refused() -> None:
    root = Inode(DIRECTORY, children={b"f": Inode(FILE, size=5000, volume_offset=4096)})
    image = image_of(root, 12288)
    nid = ImageReader(image).lookup(40, b"f")
    assert nid is not None
    table = nid * 32 + 32
    assert struct.unpack_from("<HHI", image, table) == (0, 1, 1)
    for device, block in ((1, 2), (2, 0), (0, 0), (1, 1 << 31)):
        spoilt = put(bytearray(image), table, "<HHI", 0, device, block)
        with pytest.raises(ErofsError):
            ImageReader(spoilt).map_range(nid, 0, 5000)
    assert ImageReader(put(image, table, "<HHI", 0, 1, 0xFFFFFFFF)).map_range(nid, 0, 9000) == [(0, 5000, 0, 0)]
