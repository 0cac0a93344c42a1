"""Checkpoints of plain layers: each lets the blob be entered, and none depends on how the blob was cut."""

import gzip
import hashlib
import io
import random
import tarfile
import zlib

import pytest

from agent.formats.checkpoints import Checkpoint, SeekableGzip
from agent.formats.members import PieceDecoder
from agent.formats.model import FormatError
from agent.formats.plain import PlainLayer, PlainLayerParser
from agent.formats.resume import resume_deflate


def sample(size: int) -> bytes:
    source = random.Random(7)
    words = [source.randbytes(12) for _ in range(5000)]
    return b"".join(source.choices(words, k=size // 12))


DATA = sample(9 << 20)
BLOBS = {
    "one member": gzip.compress(DATA, 6, mtime=0),
    "stored blocks": gzip.compress(random.Random(3).randbytes(3 << 20), 0, mtime=0),
    "members": b"".join(gzip.compress(DATA[at : at + 700_000], 1, mtime=0) for at in range(0, len(DATA), 700_000)),
}


def inflate(blob: bytes, step: int) -> tuple[bytes, list[Checkpoint]]:
    inflater = SeekableGzip()
    out: list[bytes] = []
    found: list[Checkpoint] = []
    for at in range(0, len(blob), step):
        out += inflater.feed(memoryview(blob)[at : at + step])
        found += inflater.checkpoints
        inflater.checkpoints.clear()
    inflater.finish()
    return b"".join(out), found


@pytest.mark.parametrize("name", BLOBS)
def test_every_checkpoint_is_an_entrance(name: str) -> None:
    blob = BLOBS[name]
    out, found = inflate(blob, 1 << 20)
    assert out == gzip.decompress(blob)
    assert len(found) > 1
    for point in found:
        stream = resume_deflate(point.bits, point.prime, point.window)
        part = stream.decompress(blob[point.in_offset :], 50_000)
        assert part
        assert part == out[point.out_offset : point.out_offset + len(part)]


@pytest.mark.parametrize("name", BLOBS)
@pytest.mark.parametrize("step", [997, 65_536, 1 << 30])
def test_the_cut_of_the_input_changes_nothing(name: str, step: int) -> None:
    assert inflate(BLOBS[name], step) == inflate(BLOBS[name], 1 << 20)


@pytest.mark.parametrize("at", [3, 5000, -6, -2])
def test_a_damaged_stream_is_refused(at: int) -> None:
    blob = bytearray(BLOBS["one member"])
    blob[at] ^= 0xFF
    with pytest.raises(FormatError):
        inflate(bytes(blob), 1 << 20)


def test_a_stream_cut_short_is_refused() -> None:
    with pytest.raises(FormatError, match="cut short"):
        inflate(BLOBS["one member"][:-1], 1 << 20)


def parse(blob: bytes, step: int) -> tuple[PlainLayer, bytearray]:
    parser, volume = PlainLayerParser(), bytearray(32 << 20)
    for at in range(0, len(blob), step):
        for offset, run in parser.feed(blob[at : at + step]):
            volume[offset : offset + len(run)] = run
    return parser.finish(), volume


@pytest.mark.parametrize("codec", ["deflate", "raw"])
def test_each_piece_gives_its_chunks_alone(codec: str) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in (("a", DATA), ("b", b"b" * 5000), ("again", DATA), ("c", DATA[::-1])):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    blob = file.getvalue() if codec == "raw" else zlib_gzip(file.getvalue())
    layer, volume = parse(blob, 1 << 20)
    index = layer.index
    assert index.codec == codec
    assert len(index.pieces) > 3
    seen = 0
    for piece in range(len(index.pieces)):
        start, stop = index.pieces.extent(piece)
        assert hashlib.sha256(blob[start:stop]).digest() == index.pieces.digest(piece)
        wanted = index.pieces.chunks_of(piece)
        decoder = PieceDecoder(index.chunks, index.codec, wanted.start, wanted.stop, start, index.members)
        for number, chunk in decoder.feed(blob[start:stop]):
            at = index.chunks.volume_offset[number]
            assert bytes(chunk) == bytes(volume[at : at + len(chunk)])
            seen += 1
    assert seen == len(index.chunks)
    other = parse(blob, 4099)[0].index
    assert other.chunks.to_bytes() == index.chunks.to_bytes()
    assert other.pieces.to_bytes() == index.pieces.to_bytes()
    assert (other.members and other.members.to_bytes()) == (index.members and index.members.to_bytes())


def zlib_gzip(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush()
