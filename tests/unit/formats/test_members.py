"""Every codec: chunks come out right whatever the cuts of the input, wrong bytes never do, and nothing is decoded without bound."""

import hashlib
import random
import zlib
from collections.abc import Callable

import lz4.block
import pytest
import zstandard

from agent.formats.members import PieceDecoder
from agent.formats.model import PRIME_IN_MEMBER, ChunkTable, FormatError, MemberTable
from agent.formats.resume import filler, resume_deflate

RANDOM = random.Random(5)
CONTENTS = [b"".join(b"%d line of text\n" % (number * size) for number in range(size)) for size in (3, 400, 5000)] + [
    RANDOM.randbytes(3000)
]


def pack(codec: str, data: bytes) -> bytes:
    form, _, stored = codec.partition("/")
    packers: dict[str, Callable[[bytes], bytes]] = {
        "raw": bytes,
        "zstd": zstandard.ZstdCompressor().compress,
        "gzip": lambda content: zlib.compress(content, 6, 31),
        "lz4": lambda content: lz4.block.compress(content, store_size=False),
    }
    packed = packers[form](data)
    return data if stored and len(packed) >= len(data) else packed


def blob_of(codec: str, digester: str = "sha256") -> tuple[bytes, ChunkTable]:
    """One member for each of CONTENTS, with junk between members where the codec allows that."""
    chunks = ChunkTable(digester)  # type: ignore[arg-type]
    blob = b"some bytes before"
    for content in CONTENTS:
        member = pack(codec, content)
        at = len(blob)
        blob += member
        digest = hashlib.sha256(content).digest()
        if codec in {"gzip", "zstd"}:
            blob += b"tail"
        chunks.append(at, len(blob) - at, 0, len(content), digest)
    return blob, chunks


def decode(decoder: PieceDecoder, blob: bytes, step: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for at in range(0, len(blob), step):
        for number, data in decoder.feed(blob[at : at + step]):
            assert number not in found
            found[number] = bytes(data)
    return found


CODECS = ["gzip", "zstd", "raw", "zstd/raw", "lz4/raw", "gzip/raw"]


@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 20])
@pytest.mark.parametrize("codec", CODECS)
def test_every_cut_gives_the_chunks(codec: str, step: int) -> None:
    blob, chunks = blob_of(codec)
    decoder = PieceDecoder(chunks, codec, 0, len(chunks), 0)
    assert decode(decoder, blob, step) == dict(enumerate(CONTENTS))
    assert decoder.is_complete
    later = PieceDecoder(chunks, codec, 2, 4, 5)
    assert decode(later, blob[5:], step) == {2: CONTENTS[2], 3: CONTENTS[3]}


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_never_gives_a_wrong_chunk(codec: str) -> None:
    blob, chunks = blob_of(codec)
    for at in range(0, len(blob), max(1, len(blob) // 300)):
        bad = bytearray(blob)
        bad[at] ^= 1 << RANDOM.randrange(8)
        decoder = PieceDecoder(chunks, codec, 0, len(chunks), 0)
        try:
            found = decode(decoder, bytes(bad), 4096)
        except FormatError:
            continue
        assert all(CONTENTS[number] == data for number, data in found.items())


@pytest.mark.parametrize("codec", ["zstd/raw", "lz4/raw", "gzip/raw", "zstd", "gzip"])
def test_chunks_share_a_member(codec: str) -> None:
    # As in a batch of small files: several chunks of one member, one of them at two places of the volume.
    parts = [b"first " * 50, b"second " * 50, b"third " * 50]
    member = pack(codec, b"".join(parts))
    chunks, members = ChunkTable(), MemberTable()
    inner = 0
    for part in parts:
        for _place in range(2 if part is parts[1] else 1):
            chunks.append(0, len(member), inner, len(part), hashlib.sha256(part).digest())
        inner += len(part)
    members.append(0, inner)
    decoder = PieceDecoder(chunks, codec, 0, 4, 0, members)
    assert decode(decoder, member, 50) == {0: parts[0], 1: parts[1], 2: parts[1], 3: parts[2]}


def test_blake3() -> None:
    import blake3

    chunks = ChunkTable("blake3")
    chunks.append(0, 5, 0, 5, blake3.blake3(b"hello").digest())
    assert decode(PieceDecoder(chunks, "raw", 0, 1, 0), b"hello", 2) == {0: b"hello"}
    with pytest.raises(FormatError, match="does not match its digest"):
        PieceDecoder(chunks, "raw", 0, 1, 0).feed(b"hallo")


@pytest.mark.parametrize("codec", ["zstd/raw", "zstd", "gzip/raw", "gzip"])
def test_a_bomb_is_not_inflated(codec: str) -> None:
    import resource

    packer = (
        zstandard.ZstdCompressor(level=1).compressobj() if codec.startswith("zstd") else zlib.compressobj(1, zlib.DEFLATED, 31)
    )
    zeros = bytes(1 << 20)
    member = b"".join(packer.compress(zeros) for _ in range(300)) + packer.flush()
    chunks = ChunkTable()
    chunks.append(0, len(member), 0, 1000, hashlib.sha256(bytes(999) + b"x").digest())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError):
        decode(PieceDecoder(chunks, codec, 0, 1, 0), member, 1 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_sizes_that_no_member_can_have_are_refused() -> None:
    chunks = ChunkTable()
    chunks.append(0, 0xFFFFFFF0, 0, 10, bytes(32))
    with pytest.raises(FormatError, match="has 4294967280 bytes"):
        PieceDecoder(chunks, "zstd/raw", 0, 1, 0).feed(b"x" * 100)
    chunks = ChunkTable()
    chunks.append(0, 100, 0xFFFFFFF0, 10, bytes(32))
    with pytest.raises(FormatError, match="chunks reach to"):
        PieceDecoder(chunks, "lz4/raw", 0, 1, 0).feed(b"x" * 100)


def test_unknown_digests_are_taken_from_vouched_bytes_alone() -> None:
    chunks = ChunkTable()
    chunks.append(0, 5, 0, 5, bytes(32))
    with pytest.raises(FormatError, match="does not match its digest"):
        PieceDecoder(chunks, "raw", 0, 1, 0).feed(b"hello")
    decoder = PieceDecoder(chunks, "raw", 0, 1, 0)
    decoder.is_vouched = True
    assert [(number, bytes(data)) for number, data in decoder.feed(b"hello")] == [(0, b"hello")]


# --- deflate, resumed ------------------------------------------------------------------------------------------------------------


def shifted(stream: bytes, bits: int) -> bytes:
    """A deflate stream that begins with the `bits` high bits of its first byte; the low ones are another's."""
    number = int.from_bytes(stream, "little") << (8 - bits) | (1 << (8 - bits)) - 1
    return number.to_bytes(len(stream) + 1, "little")


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_stream_goes_on_at_any_bit(bits: int) -> None:
    window = CONTENTS[2][:32768]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=window)
    stream = packer.compress(window[100:9000]) + packer.flush()
    data = shifted(stream, bits)
    assert resume_deflate(bits, data[0], window).decompress(data[1:]) == window[100:9000]
    assert zlib.decompressobj(-15).decompress(filler(bits, 0)) == b""

    for prime_in_member in (False, True):
        chunks, members = ChunkTable(), MemberTable()
        for offset in (0, 5000):
            part = window[100 + offset : 100 + offset + 700]
            chunks.append(0, len(data), offset, len(part), hashlib.sha256(part).digest())
        members.append(0, 0, bits | PRIME_IN_MEMBER if prime_in_member else bits, 0 if prime_in_member else data[0], window)
        decoder = PieceDecoder(chunks, "deflate", 0, 2, 0, members)
        fed = data if prime_in_member else data[1:] + b"?"
        assert decode(decoder, fed, 3) == {0: window[100:800], 1: window[5100:5800]}


def test_a_deflate_member_runs_over_the_border_of_gzip_members() -> None:
    first, second = CONTENTS[1], CONTENTS[2]
    blob = zlib.compress(first, 6, 31) + zlib.compress(second, 6, 31) + zlib.compress(first, 6, 31)
    chunks, members = ChunkTable(), MemberTable()
    members.append(10)
    for inner, part in (
        (5, first[5:50]),
        (len(first) - 10, first[-10:] + second[:10]),
        (len(first) + len(second) + 3, first[3:60]),
    ):
        chunks.append(10, len(blob) - 10, inner, len(part), hashlib.sha256(part).digest())
    for step in (1, 9, 1000):
        decoder = PieceDecoder(chunks, "deflate", 0, 3, 0, members)
        assert decode(decoder, blob, step) == {0: first[5:50], 1: first[-10:] + second[:10], 2: first[3:60]}


def test_deflate_needs_its_checkpoints() -> None:
    chunks = ChunkTable()
    chunks.append(0, 5, 0, 5, bytes(32))
    with pytest.raises(FormatError, match="without a member table"):
        PieceDecoder(chunks, "deflate", 0, 1, 0)
    with pytest.raises(FormatError, match="no checkpoint"):
        PieceDecoder(chunks, "deflate", 0, 1, 0, MemberTable())
