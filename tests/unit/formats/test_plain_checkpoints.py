"""Gzip as encoders of all kinds make it, hostile gzip, and layers of it; Python's zlib as oracle."""

import gzip
import hashlib
import io
import random
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from agent.formats import checkpoints, plain
from agent.formats.checkpoints import (
    MAX_CHECKPOINTS,
    MAX_SPAN_OUTPUT,
    SPAN_BYTES,
    SPAN_OUTPUT,
    Checkpoint,
    SeekableGzip,
    SeekableInflater,
    SeekableRaw,
)
from agent.formats.inflate import GzipInflater
from agent.formats.members import PieceDecoder
from agent.formats.model import FormatError
from agent.formats.plain import PlainLayer, PlainLayerParser
from agent.formats.resume import filler


def some_text(size: int, seed: int = 1) -> bytes:
    """Compressible to about a third, without repeats far apart."""
    words = [random.Random(n).randbytes(2 + n % 9) for n in range(3000)]
    return b" ".join(random.Random(seed).choices(words, k=size // 6))[:size]


def deflate(data: bytes, level: int = 6, strategy: int = zlib.Z_DEFAULT_STRATEGY, mem_level: int = 8) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, 31, mem_level, strategy)
    return packer.compress(data) + packer.flush()


def flushed(data: bytes, step: int, mode: int) -> bytes:
    """Blocks that end after every `step` bytes."""
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    parts = [packer.compress(data[at : at + step]) + packer.flush(mode) for at in range(0, len(data), step)]
    return b"".join([*parts, packer.flush()])


def read_all(inflater: SeekableInflater, blob: bytes, step: int = 1 << 16) -> tuple[bytes, list[Checkpoint]]:
    out, view = bytearray(), memoryview(blob)
    found: list[Checkpoint] = []
    for at in range(0, len(blob), step):
        for part in inflater.feed(view[at : at + step]):
            for checkpoint in inflater.checkpoints[len(found) :]:
                assert checkpoint.out_offset == len(out)
                found.append(checkpoint)
            out += part
    inflater.finish()
    return bytes(out), list(inflater.checkpoints)


def resume(blob: bytes, checkpoint: Checkpoint, size: int) -> bytes:
    """Output from a checkpoint on, up to the end of its gzip member or `size` bytes."""
    stream = zlib.decompressobj(-15, zdict=checkpoint.window)
    start = filler(checkpoint.bits, checkpoint.prime) if checkpoint.bits else b""
    return stream.decompress(start + blob[checkpoint.in_offset :], size)


TEXT = some_text(9 << 20)
NOISE = random.Random(3).randbytes(5 << 20)
STREAMS: dict[str, Callable[[], tuple[bytes, bytes]]] = {
    "text": lambda: (TEXT, deflate(TEXT)),
    "fast": lambda: (TEXT, deflate(TEXT, 1)),
    "noise": lambda: (NOISE, deflate(NOISE)),
    "stored": lambda: (NOISE, deflate(NOISE, 0)),
    "fixed": lambda: (TEXT[: 6 << 20], deflate(TEXT[: 6 << 20], 6, zlib.Z_FIXED)),
    "huffman": lambda: (TEXT[: 6 << 20], deflate(TEXT[: 6 << 20], 6, zlib.Z_HUFFMAN_ONLY)),
    "small blocks": lambda: (TEXT[: 5 << 20], deflate(TEXT[: 5 << 20], 6, mem_level=1)),
    "pigz": lambda: (TEXT, flushed(TEXT, 128 << 10, zlib.Z_SYNC_FLUSH)),
    "partial": lambda: (TEXT[: 5 << 20], flushed(TEXT[: 5 << 20], 3001, zlib.Z_PARTIAL_FLUSH)),
    "members": lambda: (NOISE, b"".join(deflate(NOISE[at : at + 300_000]) for at in range(0, len(NOISE), 300_000))),
    "mixed": lambda: (NOISE + TEXT, deflate(NOISE) + deflate(b"") + deflate(TEXT) + bytes(777)),
    "zeros": lambda: (bytes(40 << 20), deflate(bytes(40 << 20), 9)),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_every_checkpoint_resumes(kind: str) -> None:
    data, blob = STREAMS[kind]()
    inflater = SeekableGzip()
    out, found = read_all(inflater, blob)
    assert out == data
    assert inflater.is_seekable
    assert len(found) > 2
    first = found[0]
    assert (first.in_offset, first.out_offset, first.bits, first.window) == (10, 0, 0, b"")
    for checkpoint, following in zip(found, [*found[1:], None], strict=True):
        start = checkpoint.out_offset
        assert checkpoint.window == data[start - len(checkpoint.window) : start]
        assert len(checkpoint.window) == 32768 or not checkpoint.window or kind in ("members", "mixed")
        assert not checkpoint.prime or checkpoint.prime == blob[checkpoint.in_offset - 1]
        got = resume(blob, checkpoint, 300_000)
        assert got == data[start : start + len(got)]
        assert len(got) == 300_000 or kind in ("members", "mixed") or start + len(got) == len(data)
        if following is not None:
            passed, inflated = following.in_offset - checkpoint.in_offset, following.out_offset - start
            assert passed >= SPAN_BYTES or inflated >= SPAN_OUTPUT
            assert passed < 2 * SPAN_BYTES
            assert inflated <= 14 << 20


def test_all_phases_of_a_byte_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SPAN_BYTES", 20_000)
    blob = deflate(TEXT)
    found = read_all(SeekableGzip(), blob)[1]
    assert {checkpoint.bits for checkpoint in found} == set(range(8))
    for checkpoint in found:
        start = checkpoint.out_offset
        assert TEXT.startswith(resume(blob, checkpoint, 5000), start)


@pytest.mark.parametrize("kind", ["text", "partial", "members", "mixed", "zeros"])
def test_the_cut_of_the_input_changes_nothing(kind: str) -> None:
    _, blob = STREAMS[kind]()
    expected = read_all(SeekableGzip(), blob, len(blob))
    for step in (997, 8192, 100_001):
        assert read_all(SeekableGzip(), blob, step) == expected


def test_raw_blobs_are_entered_anywhere() -> None:
    for step in (1000, 1 << 20, 3 << 20):
        out, found = read_all(SeekableRaw(), NOISE, step)
        assert out == NOISE
        assert [c.in_offset for c in found] == [c.out_offset for c in found] == list(range(0, len(NOISE), SPAN_BYTES))


def header(flags: int, middle: bytes = b"") -> bytes:
    return b"\x1f\x8b\x08" + bytes([flags]) + b"\0\0\0\0\0\xff" + middle


def test_headers_with_everything() -> None:
    body = deflate(b"content")[10:]
    full = header(31, struct.pack("<H", 300) + bytes(300) + b"name\0" + b"comment\0")
    full += struct.pack("<H", zlib.crc32(full) & 0xFFFF)
    for blob in (full + body, header(4, b"\0\0") + body + full + body, header(8, b"\0") + body, header(16, b"x\0") + body):
        for step in (1, 7, 1000):
            out, found = read_all(SeekableGzip(), blob, step)
            assert out == gzip.decompress(blob)
            assert [c.out_offset for c in found] == [0]


def patched(blob: bytes, at: int, patch: bytes) -> bytes:
    return blob[:at] + patch + blob[at + len(patch) :]


SMALL = deflate(some_text(30_000))
BROKEN = {
    "cut by one": SMALL[:-1],
    "no trailer": SMALL[:-8],
    "no end": SMALL[:-9],
    "half a header": SMALL[:5],
    "a second header": SMALL + SMALL[:10],
    "half a second header": SMALL + SMALL[:3],
    "garbage behind": SMALL + b"garbage",
    "half a magic behind": SMALL + b"\x1f",
    "garbage behind padding": SMALL + bytes(5) + b"x",
    "a member behind padding": SMALL + bytes(5) + SMALL,
    "checksum": patched(SMALL, len(SMALL) - 8, b"\x55\xaa"),
    "length": patched(SMALL, len(SMALL) - 4, b"\x55\xaa"),
    "data": patched(SMALL, 5000, b"\xff\xff\xff\xff"),
    "block type": patched(SMALL, 10, b"\x07"),
    "method": patched(SMALL, 2, b"\x07"),
    "flags": patched(SMALL, 3, b"\x80"),
    "header checksum": header(2, b"\0\0") + SMALL[10:],
    "endless name": header(8, b"n" * (300 << 10)),
    "stored length": header(0) + b"\x01\x05\0\x05\0hello",
    "too far back": header(0) + b"\x03\x02\0" + bytes(8),
    "empty": b"",
    "magic": b"\x1f\x8b",
    "zeros": bytes(100),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_gzip_is_refused(kind: str) -> None:
    blob = BROKEN[kind]
    for step in (1 << 20, 1000, 1):
        if step > 1 or len(blob) < 50_000:
            with pytest.raises(FormatError):
                read_all(SeekableGzip(), blob, step)


def bits_to_bytes(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))


def test_a_giant_block_is_not_worth_it() -> None:
    # One block with fixed codes: a zero, then matches of 258 bytes at distance 1, 13 bits each.
    count = 180_000
    body = bits_to_bytes("110" + "00110000" + ("11000101" + "00000") * count + "0000000")
    size = 1 + 258 * count
    blob = header(0) + body + struct.pack("<II", zlib.crc32(bytes(size)), size)
    assert size > MAX_SPAN_OUTPUT
    for step in (1000, 1 << 20):
        inflater = SeekableGzip()
        assert size == sum(
            len(part) for at in range(0, len(blob), step) for part in inflater.feed(memoryview(blob)[at : at + step])
        )
        inflater.finish()
        assert not inflater.is_seekable
        assert not inflater.checkpoints


def test_no_endless_number_of_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "MAX_CHECKPOINTS", 8)
    found = read_all(SeekableGzip(), deflate(NOISE * 4, 0))[1]
    spans = [after.in_offset - before.in_offset for before, after in pairwise(found)]
    assert 4 < len(found) <= 8
    assert spans[-1] > 2 * spans[0]
    monkeypatch.setattr(checkpoints, "SPAN_BYTES", 1000)
    inflater = SeekableGzip()
    assert b"".join(inflater.feed(memoryview(deflate(NOISE, 0)))) == NOISE
    assert not inflater.is_seekable
    assert MAX_CHECKPOINTS * 32768 <= 64 << 20


# --- plain layers ----------------------------------------------------------------------------------------------------------


def make_tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


FILES = {
    "big": TEXT,
    **{f"small-{n}": some_text(n * 37, n) for n in range(1, 300)},
    "noise": NOISE,
    "twin": TEXT,
    "zeros": bytes(10 << 20),
    "end": NOISE[:70_000],
}
TAR = make_tar(FILES)
BLOBS: dict[str, Callable[[], bytes]] = {
    "gzip": lambda: deflate(TAR, 1),
    "pigz": lambda: flushed(TAR, 128 << 10, zlib.Z_SYNC_FLUSH),
    "members": lambda: b"".join(deflate(TAR[at : at + 777_777], 1) for at in range(0, len(TAR), 777_777)),
    "stored": lambda: deflate(TAR, 0),
    "none": lambda: TAR,
}


def parse(blob: bytes, step: int = 1 << 20) -> tuple[PlainLayer, bytes]:
    parser = PlainLayerParser()
    volume = bytearray()
    for at in range(0, len(blob), step):
        for offset, data in parser.feed(blob[at : at + step]):
            volume.extend(bytes(max(0, offset + len(data) - len(volume))))
            volume[offset : offset + len(data)] = data
    layer = parser.finish()
    return layer, bytes(volume[: layer.index.volume_size].ljust(layer.index.volume_size, b"\0"))


def read_pieces(layer: PlainLayer, blob: bytes) -> bytes:
    """The volume, from each piece on its own."""
    index = layer.index
    volume, seen = bytearray(index.volume_size), 0
    for piece in range(len(index.pieces)):
        start, stop = index.pieces.extent(piece)
        assert hashlib.sha256(blob[start:stop]).digest() == index.pieces.digest(piece)
        numbers = index.pieces.chunks_of(piece)
        decoder = PieceDecoder(index.chunks, index.codec, numbers.start, numbers.stop, start, index.members)
        for number, data in decoder.feed(blob[start:stop]):
            place = index.chunks.volume_offset[number]
            volume[place : place + len(data)] = data
            seen += 1
        assert decoder.is_complete
    assert seen == len(index.chunks)
    return bytes(volume)


@pytest.mark.parametrize("kind", BLOBS)
def test_every_piece_of_a_layer_stands_alone(kind: str) -> None:
    blob = BLOBS[kind]()
    layer, volume = parse(blob)
    index = layer.index
    assert index.codec == ("raw" if kind == "none" else "deflate")
    assert read_pieces(layer, blob) == volume
    assert index.pieces.starts[0] == 0
    assert index.pieces.blob_size == len(blob)
    sizes = [stop - start for start, stop in map(index.pieces.extent, range(len(index.pieces)))]
    assert all(SPAN_BYTES <= size < 3 * SPAN_BYTES for size in sizes[:-1])
    assert sizes[-1] > 0
    root = index.root.children
    for name, data in FILES.items():
        inode = root[name.encode()]
        assert volume[inode.volume_offset : inode.volume_offset + inode.size] == data
    assert root[b"big"].volume_offset == root[b"twin"].volume_offset
    rows = list(zip(index.chunks.blob_offset, index.chunks.inner_offset, strict=True))
    assert rows == sorted(rows)
    assert max(index.chunks.inner_offset) < 14 << 20
    if index.members is not None:
        assert set(index.chunks.blob_offset) <= set(index.members.blob_offset)


def test_fixture_layers_through_their_pieces(images: Any) -> None:
    for fixture in [*images.layers("oci"), images.layers("esgz")[0]]:
        layer, volume = parse(fixture.blob)
        assert layer.index.codec == "deflate"
        assert read_pieces(layer, fixture.blob) == volume


def test_without_zlib_a_layer_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = deflate(TAR, 1)
    expected = parse(blob)[1]
    monkeypatch.setattr(plain, "open_seekable", lambda _compression: GzipInflater())
    layer, volume = parse(blob)
    assert volume == expected
    assert layer.index.codec == "whole"
    assert layer.index.members is None
    assert not layer.index.pieces.digests
    assert not any(layer.index.chunks.blob_offset)


def test_checkpoints_that_are_given_up_leave_a_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = deflate(TAR, 1)
    lazy, expected = parse(blob)
    monkeypatch.setattr(checkpoints, "MAX_CHECKPOINTS", 8)
    monkeypatch.setattr(checkpoints, "SPAN_BYTES", 1000)
    whole, volume = parse(blob)
    assert volume == expected
    assert (whole.index.codec, lazy.index.codec) == ("whole", "deflate")
    assert not any(whole.index.chunks.blob_length)
    assert not whole.index.pieces.digests
    assert (whole.diff_id, whole.blob_digest) == (lazy.diff_id, lazy.blob_digest)


def test_a_bomb_costs_no_memory() -> None:
    blob = deflate(make_tar({"zeros": bytes(100 << 20)}), 9)
    parser = PlainLayerParser()
    tracemalloc.start()
    for at in range(0, len(blob), 4096):
        parser.feed(blob[at : at + 4096])
    layer = parser.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
    assert layer.index.codec == "deflate"
    assert max(layer.index.chunks.inner_offset) < 14 << 20


def test_equal_sparse_files_cost_what_they_store() -> None:
    size, map_ = 200 << 30, "0,512,107374182400,512"

    def sparse(name: str, data: bytes) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.pax_headers = {"GNU.sparse.map": map_, "GNU.sparse.size": str(size), "GNU.sparse.name": name}
        return info.tobuf(tarfile.PAX_FORMAT) + data

    parser = PlainLayerParser()
    runs = parser.feed(sparse("a", b"a" * 1024) + sparse("b", b"a" * 1024) + sparse("c", b"c" * 1024) + bytes(1024))
    layer = parser.finish()
    files = layer.index.root.children
    assert files[b"a"].volume_offset == files[b"b"].volume_offset != files[b"c"].volume_offset
    assert sum(len(data) for _, data in runs) <= 4 * 1024
    assert len(layer.index.chunks) == 4
