"""tar-split: parts there and back, tars rebuilt bit for bit, lines that lie; and the CRC-64 in it."""

import base64
import gzip
import hashlib
import io
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import zstandard

from agent.formats.crc64 import Crc64
from agent.formats.model import FormatError
from agent.formats.tar_split import Payload, Segment, TarSplitWriter, decode_tar_split, rebuild_tar
from agent.formats.zstd_chunked import tar_split_position
from agent.formats.zstd_chunked_writer import write_zstd_chunked
from tests.zstd_chunked_samples import read_index, read_volume

PARTS = [
    Segment(b"header"),
    Payload(b"./name", 5, Crc64(b"hello").digest()),
    Segment(b"padding and header"),
    Payload(b"not utf-8 \xff", 0),
    Segment(b""),
]


def encode() -> tuple[bytes, int]:
    writer = TarSplitWriter(3)
    for part in PARTS:
        writer.add(part)
    packed, length, digest = writer.finish()
    assert digest == "sha256:" + hashlib.sha256(packed).hexdigest()
    assert list(decode_tar_split(packed, length, digest)) == PARTS
    return packed, length


def decode_lines(*lines: Any) -> list[Any]:
    plain = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    return list(decode_tar_split(zstandard.compress(plain), len(plain)))


def test_lines_are_those_of_the_reference_writer() -> None:
    packed, length = encode()
    plain = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    assert len(plain) == length
    checksum, middle = (base64.b64encode(data).decode() for data in (Crc64(b"hello").digest(), b"padding and header"))
    assert plain.decode().splitlines() == [
        '{"type":2,"payload":"aGVhZGVy","position":0}',
        f'{{"type":1,"name":"./name","size":5,"payload":"{checksum}","position":1}}',
        f'{{"type":2,"payload":"{middle}","position":2}}',
        '{"type":1,"name_raw":"bm90IHV0Zi04IP8=","payload":null,"position":3}',
        '{"type":2,"payload":"","position":4}',
    ]


def test_crc64_is_that_of_go() -> None:
    # The check value of CRC-64/GO-ISO in the catalogue of CRC algorithms.
    assert Crc64(b"123456789").digest().hex() == "b90956c775a41001"
    assert Crc64().value == 0
    dice = random.Random(1)
    for size in [*range(70), 1000, 65535, 65536, 65537, 200_000]:
        data = dice.randbytes(size)
        assert Crc64(data).value == slow_crc64(data)
        parts = Crc64(data[: size // 3])
        parts.update(data[size // 3 :])
        assert parts.value == slow_crc64(data)


def slow_crc64(data: bytes) -> int:
    table = []
    for entry in range(256):
        for _ in range(8):
            entry = (entry >> 1) ^ (0xD800000000000000 if entry & 1 else 0)
        table.append(entry)
    state = (1 << 64) - 1
    for byte in data:
        state = table[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state ^ ((1 << 64) - 1)


@pytest.mark.parametrize("layer", [1, 2])
def test_tar_is_rebuilt_from_the_mounted_contents(images: Any, layer: int) -> None:
    fixture = images.layers("oci")[layer - 1]
    out = io.BytesIO()
    written = write_zstd_chunked(io.BytesIO(gzip.decompress(fixture.blob)), out, level=1)
    blob = out.getvalue()
    index = read_index(blob, written.annotations)
    volume = read_volume(index, blob)

    def open_file(name: bytes) -> Iterator[bytes]:
        at = index.root
        for part in name.decode("utf-8", "replace").encode().split(b"/"):
            at = at.children[part] if part not in (b"", b".") else at
        yield volume[at.volume_offset : at.volume_offset + at.size]

    position = tar_split_position(written.annotations, len(blob))
    assert position is not None
    parts = decode_tar_split(blob[position.offset : position.stop], position.plain_length)
    digest = hashlib.sha256()
    for data in rebuild_tar(parts, open_file):
        digest.update(data)
    assert written.diff_id == "sha256:" + digest.hexdigest()
    if written.is_tar_kept:
        assert written.diff_id == fixture.diff_id


def test_wrong_contents_are_noticed() -> None:
    packed, length = encode()

    def rebuild(content: list[bytes]) -> bytes:
        return b"".join(rebuild_tar(decode_tar_split(packed, length), lambda name: content))

    assert rebuild([b"he", b"", b"llo"]) == b"headerhellopadding and header"
    for wrong in ([b"hellO"], [b"hell"], [b"hello", b"!"], []):
        with pytest.raises(FormatError):
            rebuild(wrong)


@pytest.mark.parametrize(
    "line",
    [
        b"{\n",
        b"[]\n",
        b"5\n",
        b"null\n",
        b"[" * 100_000,
        {},
        {"type": 3, "payload": ""},
        {"type": True, "payload": ""},
        {"type": "2", "payload": ""},
        {"type": 2, "payload": "no base64"},
        {"type": 2, "payload": 5},
        {"type": 1, "name": 5},
        {"type": 1, "name": "a", "size": -1},
        {"type": 1, "name": "a", "size": 1 << 60},
        {"type": 1, "name": "a", "size": 1.5},
        {"type": 1, "name": "a", "payload": "AAAA"},
        {"type": 1, "name_raw": "x"},
        b"x" * (17 << 20),
    ],
)
def test_lines_that_are_no_parts(line: Any) -> None:
    with pytest.raises(FormatError):
        decode_lines({"type": 2, "payload": ""}, line)


def test_bounds_and_digest() -> None:
    packed, length = encode()
    with pytest.raises(FormatError, match="digest"):
        list(decode_tar_split(packed + b"x", length, encode_digest(packed)))
    for data, limit in ((packed, length - 1), (packed[:-1], length), (b"no zstd", 100), (packed, 1 << 40)):
        with pytest.raises(FormatError):
            list(decode_tar_split(data, limit))
    bomb = zstandard.compress(bytes(64 << 20))
    with pytest.raises(FormatError):
        list(decode_tar_split(bomb, 64 << 20))
    assert decode_lines(b"\n", {"type": 1}, b"  \n", {"type": 2}) == [Payload(b"", 0), Segment(b"")]


def encode_digest(packed: bytes) -> Any:
    return "sha256:" + hashlib.sha256(packed).hexdigest()
