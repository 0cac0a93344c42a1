"""The writer alone and against the reader: limits, refusals, sizes, the superblock's sum."""

import struct
import time

import crc32c
import pytest

from agent.formats.model import Inode, InodeKind
from fsmount.erofs import ErofsError, ImageReader, write_image
from tests.erofs_trees import describe_image, describe_tree, odd_tree, wide_tree

DIRECTORY, FILE = InodeKind.DIRECTORY, InodeKind.FILE


def folder(**children: Inode) -> Inode:
    return Inode(DIRECTORY, children={name.encode(): inode for name, inode in children.items()})


def nid_of(reader: ImageReader, *names: bytes) -> int:
    nid = reader.root_nid
    for name in names:
        found = reader.lookup(nid, name)
        assert found is not None, name
        nid = found
    return nid


def test_a_tree_with_one_of_everything_reads_back_equal() -> None:
    root, size = odd_tree()
    warnings: list[str] = []
    reader = ImageReader(write_image(root, volume_size=size, warnings=warnings))
    shown = describe_image(reader)
    expected = describe_tree(root)
    assert shown.keys() == expected.keys()
    for path, entry in expected.items():
        assert shown[path] == entry, path
    assert warnings == []


def test_every_file_maps_to_its_place_in_the_volume() -> None:
    root, size = odd_tree()
    reader = ImageReader(write_image(root, volume_size=size))
    for name, inode in root.children.items():
        if inode.kind is FILE:
            nid = nid_of(reader, name)
            extents = [(0, inode.size, 1, inode.volume_offset)] if inode.size else []
            assert reader.map_range(nid, 0, 1 << 40) == extents
            if inode.size > 4097:
                assert reader.map_range(nid, 4000, 97) == [(4000, 97, 1, inode.volume_offset + 4000)]


def test_the_same_tree_gives_the_same_bytes() -> None:
    assert write_image(odd_tree()[0], volume_size=odd_tree()[1]) == write_image(odd_tree()[0], volume_size=odd_tree()[1])


def test_superblock() -> None:
    image = write_image(folder(), volume_size=4097, uuid=bytes(range(16)))
    assert len(image) == 4096
    magic, checksum, compat = struct.unpack_from("<III", image, 1024)
    assert (magic, compat) == (0xE0F5E1E2, 3)
    assert image[1024 + 48 : 1024 + 64] == bytes(range(16))
    struct.pack_into("<I", image, 1028, 0)
    assert checksum == crc32c.crc32c(image[1024:4096]) ^ 0xFFFFFFFF
    assert struct.unpack_from("<II", image, 1152 + 64) == (2, 1)
    assert ImageReader(image).device_sizes == (8192,)


def test_the_most_frequent_time_makes_inodes_compact() -> None:
    def size(times: list[int]) -> int:
        root = Inode(
            DIRECTORY, mtime_ns=times[0], children={b"%d" % n: Inode(InodeKind.FIFO, mtime_ns=t) for n, t in enumerate(times)}
        )
        image = write_image(root, volume_size=0)
        assert describe_image(ImageReader(image)) == describe_tree(root)
        return len(image)

    assert size([10**18 + 7] * 1000) + 1000 * 28 < size([10**18 + n for n in range(1000)])


def test_root_number_fits_16_bits_behind_nothing() -> None:
    root, size = wide_tree(3000)
    root.xattrs = {b"user.%d" % n: bytes(900) for n in range(200)}
    reader = ImageReader(write_image(root, volume_size=size))
    assert 0 < reader.root_nid < 1 << 16
    assert len(reader.xattrs(reader.root_nid)) == 200


def test_files_beyond_4_gib_and_holes() -> None:
    size = (5 << 30) + 3
    root = folder(
        big=Inode(FILE, size=size, volume_offset=4096),
        hole=Inode(FILE, size=(9 << 40) + 1),
        huge=Inode(FILE, size=9 << 40, volume_offset=6 << 30),
    )
    reader = ImageReader(write_image(root, volume_size=10 << 40))
    big = nid_of(reader, b"big")
    assert reader.inode(big).size == size
    assert reader.map_range(big, size - 10, 99) == [(size - 10, 10, 1, 4096 + size - 10)]
    assert reader.map_range(nid_of(reader, b"hole"), 0, 1 << 62) == [(0, (9 << 40) + 1, 0, 0)]
    assert reader.map_range(nid_of(reader, b"huge"), 0, 1 << 62) == [(0, 9 << 40, 1, 6 << 30)]


def test_shared_attributes_are_stored_once() -> None:
    label = {b"security.selinux": b"system_u:object_r:usr_t:s0" * 20}
    root = Inode(DIRECTORY, children={b"%d" % n: Inode(InodeKind.FIFO, xattrs=dict(label)) for n in range(500)})
    image = write_image(root, volume_size=0)
    assert image.count(label[b"security.selinux"]) == 1
    assert describe_image(ImageReader(image)) == describe_tree(root)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"btrfs.compression", b"zstd"),
        (b"system.nfs4_acl", b"1"),
        (b"user.", b"1"),
        (b"user." + b"n" * 251, b"1"),
        (b"user.a\0b", b"1"),
        (b"user.big", bytes(65536)),
        (b"system.posix_acl_access", b"user::rw-"),
        (b"", b"1"),
        (b"\xff\xfe", b""),
    ],
)
def test_attributes_that_cannot_be_stored_are_dropped_and_told(name: bytes, value: bytes) -> None:
    warnings: list[str] = []
    root = Inode(DIRECTORY, xattrs={name: value, b"user.kept": b"1"})
    reader = ImageReader(write_image(root, volume_size=0, warnings=warnings))
    assert reader.xattrs(reader.root_nid) == {b"user.kept": b"1"}
    assert len(warnings) == 1
    assert "dropped" in warnings[0]


def test_more_attributes_than_an_area_holds() -> None:
    warnings: list[str] = []
    xattrs = {b"user.%03d" % n: bytes([n % 256]) * 65535 for n in range(270)}
    reader = ImageReader(write_image(Inode(DIRECTORY, xattrs=xattrs), volume_size=0, warnings=warnings))
    kept = reader.xattrs(reader.root_nid)
    assert len(kept) == 255 + 3
    assert kept.items() <= xattrs.items()
    assert len(warnings) == 270 - 258


def test_warnings_are_bounded() -> None:
    warnings: list[str] = []
    write_image(Inode(DIRECTORY, xattrs={b"x.%d" % n: b"" for n in range(1000)}), volume_size=0, warnings=warnings)
    assert len(warnings) == 101
    assert warnings[-1].startswith("900 more")


def test_numbers_out_of_range_are_replaced_and_told() -> None:
    warnings: list[str] = []
    root = folder(f=Inode(FILE, uid=-1, gid=2**32, mtime_ns=10**30), d=Inode(InodeKind.CHAR, rdev=(0, 2**20)))
    reader = ImageReader(write_image(root, volume_size=0, warnings=warnings))
    view = reader.inode(nid_of(reader, b"f"))
    assert (view.uid, view.gid, view.mtime_ns) == (65534, 65534, 0)
    assert reader.inode(nid_of(reader, b"d")).rdev == (4095, 1048575)
    assert len(warnings) == 4


def test_user_markers_can_be_left_out() -> None:
    reader = ImageReader(write_image(Inode(DIRECTORY, is_opaque=True), volume_size=0, user_markers=False))
    assert reader.xattrs(reader.root_nid) == {b"trusted.overlay.opaque": b"y"}


def looped() -> Inode:
    root = folder(a=folder())
    root.children[b"a"].children[b"up"] = root
    return root


def doubled() -> Inode:
    child = folder()
    return folder(a=child, b=child)


@pytest.mark.parametrize(
    "root",
    [
        Inode(FILE),
        *(Inode(DIRECTORY, children={name: Inode(FILE)}) for name in (b"", b".", b"..", b"a/b", b"a\0", b"n" * 256)),
        looped(),
        doubled(),
        folder(f=Inode(FILE, size=1, volume_offset=1)),
        folder(f=Inode(FILE, size=8193, volume_offset=0)),
        folder(f=Inode(FILE, size=1, volume_offset=8192)),
        folder(f=Inode(FILE, size=-1)),
        folder(f=Inode(FILE, size=1 << 60)),
        folder(s=Inode(InodeKind.SYMLINK, target=b"t" * 4096)),
        folder(s=Inode(InodeKind.SYMLINK, target=b"a\0b")),
    ],
)
def test_impossible_trees_are_refused(root: Inode) -> None:
    with pytest.raises(ErofsError):
        write_image(root, volume_size=8192)


@pytest.mark.parametrize("size", [-1, 1 << 44])
def test_impossible_volumes_are_refused(size: int) -> None:
    with pytest.raises(ErofsError):
        write_image(folder(), volume_size=size)


def test_70_000_links_and_70_000_subdirectories() -> None:
    linked = Inode(FILE, size=1, volume_offset=0)
    root = Inode(
        DIRECTORY, children={b"l%d" % n: linked for n in range(70_000)} | {b"d%d" % n: Inode(DIRECTORY) for n in range(70_000)}
    )
    reader = ImageReader(write_image(root, volume_size=1))
    assert reader.inode(reader.root_nid).nlink == 70_002
    assert reader.inode(nid_of(reader, b"l5")).nlink == 70_000


def test_deep_trees_need_no_recursion() -> None:
    root = node = Inode(DIRECTORY)
    for _ in range(20_000):
        node.children[b"d"] = node = Inode(DIRECTORY)
    reader = ImageReader(write_image(root, volume_size=0))
    assert sum(1 for _ in reader.walk()) == 20_001


def test_a_hundred_thousand_entries_in_linear_time() -> None:
    root, size = wide_tree(100_000)
    started = time.process_time()
    image = write_image(root, volume_size=size)
    # The target is 3 s of wall time; processor time keeps a busy machine out of the verdict.
    assert time.process_time() - started < 3
    assert len(image) < 135 * 100_000
    assert sum(1 for _ in ImageReader(image).walk()) > 100_000
