"""The zstd:chunked reader: the fixture made by stargz-snapshotter's converter, footers, annotations, and TOCs that lie."""

import hashlib
import json
import struct
from typing import Any

import pytest
import zstandard

from agent.formats import zstd_chunked
from agent.formats.model import FormatError, LayerIndex, digest_of
from agent.formats.opening import BlobRange, LayerFacts
from agent.formats.zstd_chunked import FORMAT, Footer, Position, parse_footer, parse_position
from tests.zstd_chunked_samples import read_index, read_volume

ZERO = "sha256:" + "0" * 64
NEW = "io.github.containers.zstd-chunked."
OLD = "io.containers.zstd-chunked."
STARGZ = "containerd.io/snapshot/stargz/toc.digest"


def facts_of(layer: Any) -> LayerFacts:
    return LayerFacts(digest_of(layer.blob), len(layer.blob), layer.media_type, layer.annotations)


@pytest.mark.parametrize("layer", [1, 2])
def test_fixture_equals_its_source(images: Any, layer: int) -> None:
    fixture = images.layers("zstdchunked")[layer - 1]
    index = read_index(fixture.blob, fixture.annotations, fixture.media_type)
    assert images.describe(index, read_volume(index, fixture.blob)) == images.truth(layer, is_json=True)
    assert index.codec == "zstd"
    assert index.warnings == ()
    assert index.prefetch_stop == 0
    position = parse_position(fixture.annotations[OLD + "manifest-position"], len(fixture.blob))
    assert index.pieces.starts[index.pieces.index_piece] == position.offset - 8
    assert index.pieces.index_piece == len(index.pieces) - 1


def test_the_footer_says_where_the_toc_is(images: Any) -> None:
    fixture = images.layers("zstdchunked")[0]
    size = len(fixture.blob)
    footer = parse_footer(fixture.blob[-72:], size)
    assert footer is not None
    assert footer == Footer(parse_position(fixture.annotations[OLD + "manifest-position"], size), None, 48)
    without = {key: value for key, value in fixture.annotations.items() if not key.endswith("position")}
    whole = read_index(fixture.blob, fixture.annotations)
    found = read_index(fixture.blob, without)
    assert found.chunks.to_bytes() == whole.chunks.to_bytes()
    assert found.pieces == whole.pieces
    # A guess that was too short, as the answer of a peer may be, is made good.
    assert read_index(fixture.blob, without, guess=100).chunks.to_bytes() == whole.chunks.to_bytes()


@pytest.mark.parametrize("changed", [STARGZ, OLD + "manifest-checksum"])
def test_every_digest_is_checked(images: Any, changed: str) -> None:
    fixture = images.layers("zstdchunked")[1]
    with pytest.raises(FormatError, match="the manifest says"):
        read_index(fixture.blob, {**fixture.annotations, changed: ZERO})
    left = {key: value for key, value in fixture.annotations.items() if key != changed}
    assert read_index(fixture.blob, left).entry_count == 14
    with pytest.raises(FormatError, match="not a sha256 digest"):
        read_index(fixture.blob, {**fixture.annotations, changed: "md5:1234"})


def test_who_is_recognised() -> None:
    def recognised(media_type: str, *keys: str) -> bool:
        return FORMAT.recognises(LayerFacts(digest_of(b""), 1, media_type, dict.fromkeys(keys, "x")))

    assert recognised("", NEW + "manifest-checksum")
    assert recognised("", OLD + "manifest-checksum")
    assert recognised("application/vnd.oci.image.layer.v1.tar+zstd", STARGZ)
    assert recognised("", STARGZ, OLD + "manifest-position")
    assert not recognised("application/vnd.oci.image.layer.v1.tar+gzip", STARGZ)
    assert not recognised("application/vnd.oci.image.layer.v1.tar+zstd")
    assert not recognised("application/vnd.oci.image.layer.v1.tar+zstd", NEW + "manifest-position")


def test_two_kinds_of_digests_are_an_error() -> None:
    with pytest.raises(FormatError, match="for one layer"):
        make({"entries": [], "version": 1}, {STARGZ: ZERO})


# --- footers and positions ----------------------------------------------------------------------------------------------------


def frame(body: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("magic", [b"GNUlInUx", b"GnUlInUx"])
def test_footers(magic: bytes) -> None:
    long = frame(struct.pack("<7Q", 1000, 20, 300, 1, 1028, 30, 400) + magic)
    short = frame(struct.pack("<4Q", 1000, 20, 300, 1) + magic)
    assert parse_footer(b"x" * 9 + long, 5000) == Footer(Position(1000, 20, 300), Position(1028, 30, 400), 72)
    assert parse_footer(b"x" * 30 + short, 5000) == Footer(Position(1000, 20, 300), None, 48)
    no_split = frame(struct.pack("<7Q", 1000, 20, 300, 1, 0, 0, 0) + magic)
    assert parse_footer(no_split, 5000) == Footer(Position(1000, 20, 300), None, 72)
    for other in (long[1:], long[:-1], short[1:], b"", b"GNUlInUx", frame(b"x" * 56 + b"GNUlInUX")):
        assert parse_footer(other, 5000) is None
    for blob_size in (1000, 1019, 1019 + 48):
        with pytest.raises(FormatError):
            parse_footer(short, blob_size)


@pytest.mark.parametrize(
    "numbers",
    [
        (7, 20, 300, 1),
        (1000, 0, 300, 1),
        (1000, 151 << 20, 300, 1),
        (1000, 20, 151 << 20, 1),
        (1000, 20, 300, 2),
        (1 << 63, 1 << 63, 300, 1),
    ],
)
def test_footers_and_positions_that_cannot_be(numbers: tuple[int, ...]) -> None:
    with pytest.raises(FormatError):
        parse_footer(frame(struct.pack("<4Q", *numbers) + b"GNUlInUx"), 1 << 40)
    with pytest.raises(FormatError):
        parse_position(":".join(map(str, numbers)), 1 << 40)


@pytest.mark.parametrize(
    "text", ["", "1:2", "10:2:3:1:5", "10:2:-3:1", "10:2:3:1 ", "10:2:٣:1", "10:2:3:1\n", "a:b:c:d", "1" * 30]
)
def test_positions_that_are_none(text: str) -> None:
    with pytest.raises(FormatError):
        parse_position(text, 1 << 40)


# --- TOCs ---------------------------------------------------------------------------------------------------------------------


def make(toc: Any, more: dict[str, str] | None = None, *, plain_length: int | None = None, start: int = 100_000) -> LayerIndex:
    """The index of a blob of `start` bytes of data and this TOC."""
    plain = toc if isinstance(toc, bytes) else json.dumps(toc, separators=(",", ":")).encode()
    packed = zstandard.compress(plain)
    blob = bytes(start) + frame(packed)
    annotations = {
        NEW + "manifest-checksum": "sha256:" + hashlib.sha256(packed).hexdigest(),
        NEW + "manifest-position": f"{start + 8}:{len(packed)}:{len(plain) if plain_length is None else plain_length}:1",
        **(more or {}),
    }
    return read_index(blob, annotations)


def entries(*entries: Any) -> dict[str, Any]:
    return {"version": 1, "entries": list(entries)}


def reg(name: str = "f", size: int = 10, offset: int = 100, **fields: Any) -> dict[str, Any]:
    return {"name": name, "type": "reg", "size": size, "offset": offset, "endOffset": offset + 50, "digest": ZERO, **fields}


def chunk(at: int, size: int, offset: int, name: str = "f", **fields: Any) -> dict[str, Any]:
    sized = {"chunkOffset": at, "chunkSize": size, "offset": offset, "chunkDigest": ZERO}
    return {"name": name, "type": "chunk", **sized, **fields}


def test_holes_have_no_chunk() -> None:
    whole = {"name": "f", "type": "reg", "size": 9000, "endOffset": 400, "digest": ZERO}
    index = make(
        entries(
            {**whole, "offset": 100, "chunkSize": 1000, "chunkDigest": ZERO},
            chunk(1000, 5000, 200, chunkType="zeros"),
            chunk(6000, 3000, 230),
            reg("g", 4097, 400, chunkType="zeros"),
            {**reg("h", 5, 500), "modtime": "2023-11-14T22:13:20.123456789Z"},
        )
    )
    chunks, file = index.chunks, index.root.children[b"f"]
    assert [list(column) for column in (chunks.blob_offset, chunks.blob_length, chunks.size)] == [
        [100, 230, 500],
        [100, 170, 50],
        [1000, 3000, 5],
    ]
    assert file.size == 9000
    assert list(chunks.volume_offset)[:2] == [file.volume_offset, file.volume_offset + 6000]
    hole, last = index.root.children[b"g"], index.root.children[b"h"]
    assert len({file.volume_offset, hole.volume_offset, last.volume_offset}) == 3
    assert last.mtime_ns % 10**9 == 123456789
    assert index.volume_size >= 9000 + 4097 + 5


def test_files_that_differ_in_holes_only_do_not_share() -> None:
    def holed(name: str, at: int, offset: int) -> list[dict[str, Any]]:
        first = reg(name, 3000, offset, chunkSize=at, chunkDigest=ZERO, chunkType="zeros", endOffset=offset + 90)
        return [first, chunk(at, 1000, offset + 10, name), chunk(at + 1000, 2000 - at, offset + 60, name, chunkType="zeros")]

    index = make(entries(*holed("a", 1000, 100), *holed("b", 500, 200), *holed("c", 1000, 300)))
    places = [index.root.children[name].volume_offset for name in (b"a", b"b", b"c")]
    assert places[0] == places[2] != places[1]


@pytest.mark.parametrize(
    "entry",
    [
        reg(endOffset=100),
        reg(endOffset=-1),
        reg(endOffset=1 << 70),
        reg(endOffset="5"),
        reg(endOffset=100_001),
        reg(chunkType="data"),
        reg(chunkType=5),
        reg(chunkType="zeros", chunkSize=4),
        reg(digest=None),
        reg(size=65 << 20),
        reg(offset=100_000),
    ],
)
def test_entries_that_cannot_be(entry: Any) -> None:
    with pytest.raises(FormatError):
        make(entries(entry))


@pytest.mark.parametrize(
    "toc",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"5",
        b'{"version":1,"entries":{}}',
        b'{"version":2,"entries":[]}',
        b'{"version":true,"entries":[]}',
        b'{"version":1,"entries":[]}x',
        b'{"version":1,"entries":[],"entries":[]}',
        b'{"version":1,"entries":[],}',
        b'{"version":1 "entries":[]}',
        b'{"version":1,"entries":[{}]}',
        b'{"version":1,"entries":[,]}',
        b'{"version":1,"entries":[' + b"[" * 200_000,
        b'{"version":1,"entries":["' + b"x" * (6 << 20),
        b'{"version":1,"prefetchStop":-1,"entries":[]}',
        b'{"version":1,"prefetchStop":100001,"entries":[]}',
        json.dumps(entries(reg("a"), reg("a", offset=300))).encode(),
        json.dumps(entries({"name": "a", "type": "dir"}, {"name": "a", "type": "dir"})).encode(),
    ],
)
def test_tocs_that_are_none(toc: bytes) -> None:
    with pytest.raises(FormatError):
        make(toc)


def test_the_promised_size_holds() -> None:
    toc = json.dumps(entries()).encode()
    assert make(toc).entry_count == 0
    for wrong in (len(toc) - 1, len(toc) + 1, 0):
        with pytest.raises(FormatError):
            make(toc, plain_length=wrong)


def test_a_bomb_stops_where_it_was_promised_to_end() -> None:
    with pytest.raises(FormatError, match="larger than promised"):
        make(b'{"version":1,"entries":[]}' + b" " * (40 << 20), plain_length=1 << 20)


def test_our_hint_is_the_prefetch_range() -> None:
    assert make({"version": 1, "prefetchStop": 250, "entries": [reg(), reg("g", offset=300)]}).prefetch_stop == 250
    assert make(entries(reg())).prefetch_stop == -1


def test_one_request_takes_the_index_piece_whole() -> None:
    position = f"{zstd_chunked.NAME}"
    facts = LayerFacts(
        digest_of(b""), 10_000, position, {NEW + "manifest-checksum": ZERO, NEW + "manifest-position": "108:50:90:1"}
    )
    assert next(FORMAT.read_index(facts)) == BlobRange(100, 10_000)
    far = LayerFacts(digest_of(b""), 1 << 40, position, facts.annotations)
    assert next(FORMAT.read_index(far)) == BlobRange(100, 158)
