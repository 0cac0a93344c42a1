"""zTOCs that were damaged: refused, or an index that keeps every promise of `model`, in bounded memory."""

import functools
import io
import random
import struct
import tarfile
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.formats.model import FormatError, InodeKind, LayerIndex, MemberTable, PieceTable, digest_of
from agent.formats.tree import walk
from agent.formats.ztoc import Ztoc
from tests.soci_writer import Built, build_ztoc, compress_members

SPAN = 16 << 10


@functools.cache
def sample(*, is_gzip: bool = True) -> tuple[bytes, Built]:
    noise = random.Random(3)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(5):
            member = tarfile.TarInfo(f"folder/{number}")
            member.size, member.mtime = noise.randrange(20_000), 1_700_000_000 + number / 8
            member.pax_headers = {"SCHILY.xattr.user.number": str(number)}
            archive.addfile(member, io.BytesIO(noise.randbytes(member.size)))
        for name, kind in (("link", tarfile.SYMTYPE), ("same", tarfile.LNKTYPE), ("node", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.devmajor = kind, "folder/3", 5
            archive.addfile(member)
    blob = compress_members(buffer.getvalue(), 50_000) if is_gzip else buffer.getvalue()
    return blob, build_ztoc(blob, SPAN)


def check_index(index: LayerIndex, blob_size: int) -> None:
    chunks, pieces = index.chunks, index.pieces
    assert pieces.starts[0] == 0
    assert list(pieces.starts) == sorted(set(pieces.starts))
    assert pieces.blob_size >= blob_size
    assert pieces.first_chunk[-1] == len(chunks)
    assert PieceTable.from_bytes(pieces.to_bytes()) == pieces
    if index.parts:
        assert sum(part.size for part in index.parts) == pieces.blob_size
        assert all(0 <= part.start < part.start + part.size <= part.blob_size == blob_size for part in index.parts)
        at = 0
        for part in index.parts:
            assert at in pieces.starts
            at += part.size
    else:
        assert pieces.blob_size == blob_size
    members = index.members
    if index.codec == "deflate":
        assert members is not None
        MemberTable.from_bytes(members.to_bytes())
    top = (-1, 0)
    for number in range(len(chunks)):
        chunk = chunks[number]
        piece = pieces.piece_of_chunk(number)
        start, stop = pieces.extent(piece)
        assert start <= chunk.blob_offset < chunk.blob_offset + chunk.blob_length <= stop
        assert pieces.digest(piece)
        assert (chunk.blob_offset, chunk.inner_offset) >= top
        top = (chunk.blob_offset, chunk.inner_offset + chunk.size)
        if members is not None:
            row = members.find(chunk.blob_offset)
            assert row >= 0
            assert chunk.inner_offset + chunk.size <= members.size[row]
    cursor = 0
    seen = set()
    for _, inode in walk(index.root):
        if inode.kind is InodeKind.FILE and inode.size and id(inode) not in seen:
            seen.add(id(inode))
            assert inode.volume_offset % 4096 == 0
            at = inode.volume_offset
            for number in range(inode.first_chunk, inode.first_chunk + inode.chunk_count):
                assert chunks.volume_offset[number] == at
                at += chunks.size[number]
            assert at == inode.volume_offset + inode.size <= index.volume_size
            cursor += -(-inode.size // 4096) * 4096
    assert cursor == index.volume_size


def try_ztoc(ztoc: bytes, blob: bytes) -> bool:
    try:
        opened = Ztoc(ztoc, digest_of(b""), len(blob))
        index = opened.read(blob[:100] if opened.needs_header else b"")
    except FormatError:
        return False
    check_index(index, len(blob))
    return True


def structure(built: Built) -> list[int]:
    """Where everything lies but the windows of the checkpoints, which say nothing about the index."""
    size = len(built.data)
    zinfo = built.root[5][3]
    start = built.data.index(zinfo)
    windows = set()
    if len(zinfo) > 1000:
        for at in range(start + 12, start + len(zinfo), 32785):
            windows |= set(range(at + 17, at + 32785))
    return [at for at in range(size) if at not in windows]


def test_every_byte_flipped() -> None:
    for is_gzip in (True, False):
        blob, built = sample(is_gzip=is_gzip)
        assert try_ztoc(built.data, blob)
        damaged = bytearray(built.data)
        refused = 0
        for at in structure(built):
            for change in (0xFF, 0x01, 0x80):
                damaged[at] ^= change
                refused += not try_ztoc(bytes(damaged), blob)
                damaged[at] ^= change
        assert refused > 100


def test_cut_short_anywhere() -> None:
    blob, built = sample(is_gzip=False)
    for stop in range(len(built.data) - 1):
        try_ztoc(built.data[:stop], blob)
    assert not try_ztoc(built.data[: len(built.data) // 2], blob)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_numbers_replaced(data: st.DataObject) -> None:
    blob, built = sample(is_gzip=data.draw(st.booleans()))
    places = structure(built)
    damaged = bytearray(built.data)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(places))
        value = data.draw(st.sampled_from([0, 1, 8, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(damaged), at]))
        struct.pack_into("<I", damaged, min(at, len(damaged) - 4), value)
    try_ztoc(bytes(damaged), blob)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_garbage(data: bytes) -> None:
    assert not try_ztoc(data, b"\0" * 10)


def test_absurd_counts_take_no_memory() -> None:
    blob, built = sample(is_gzip=False)
    tracemalloc.start()
    try:
        damaged = bytearray(built.data)
        for at in structure(built)[:: len(built.data) // 500]:
            old = damaged[at : at + 4]
            struct.pack_into("<I", damaged, min(at, len(damaged) - 4), 0x7FFFFFF0)
            try_ztoc(bytes(damaged), blob)
            damaged[at : at + 4] = old
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
