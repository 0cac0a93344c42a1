"""TOCs and footers that lie, and old or odd ones that do not."""

import base64
import hashlib
import io
import json
import tarfile
import time
import zlib
from typing import Any

import pytest

from agent.formats import estargz
from agent.formats.members import PieceDecoder
from agent.formats.model import ChunkTable, FormatError, InodeKind, LayerIndex, digest_of
from agent.formats.pieces import cut_fixed, cut_pieces

ZERO = "sha256:" + "0" * 64
TAIL = bytes.fromhex("010000ffff") + bytes(8)


def reg(name: str = "f", size: int = 10, offset: int = 100, **fields: Any) -> dict[str, Any]:
    return {"name": name, "type": "reg", "size": size, "offset": offset, "chunkDigest": ZERO, **fields}


def parse(*entries: Any, toc: Any = None, blob_size: int = 100_000, toc_offset: int = 90_000) -> LayerIndex:
    raw = json.dumps({"version": 1, "entries": list(entries)} if toc is None else toc).encode()
    return estargz.parse_toc(raw, blob_size=blob_size, toc_offset=toc_offset, toc_digest=digest_of(raw))


def test_footers() -> None:
    head = bytes.fromhex("1f8b08040000000000ff")
    current = head + bytes.fromhex("1a00") + b"SG\x16\0" + b"%016x" % 1234 + b"STARGZ" + TAIL
    legacy = head + bytes.fromhex("1600") + b"%016x" % 1234 + b"STARGZ" + TAIL
    external = head + bytes.fromhex("1500") + b"SG\x11\0STARGZEXTERNALTOC" + TAIL
    assert (len(current), len(legacy), len(external)) == (51, 47, 46)
    assert estargz.parse_footer(b"x" * 50 + current, 5000) == estargz.Footer(1234, 51)
    assert estargz.parse_footer(legacy, 5000) == estargz.Footer(1234, 47)
    assert estargz.parse_footer(b"x" + external, 5000) == estargz.Footer(estargz.EXTERNAL, 46)
    for footer in (current, legacy):
        with pytest.raises(FormatError):
            estargz.parse_footer(footer, 1234)
        with pytest.raises(FormatError):
            estargz.parse_footer(footer, 1234 + len(footer))
        for bad in (b"+", b"_", b" ", b"-", b"g", b"\0"):
            at = footer.index(b"00000000000004d2")
            assert estargz.parse_footer(footer[:at] + bad + footer[at + 1 :], 5000) is None
    zstd_chunked = b"\x50\x2a\x4d\x18\x40\0\0\0" + bytes(56) + b"GNUlInUx"
    stargz_zstd = b"\x50\x2a\x4d\x18\x28\0\0\0" + bytes(32) + b"GnUlInUx"
    for other in (zstd_chunked, stargz_zstd, b"", b"short", zlib.compress(b"plain", wbits=31), external[:-1], current[:-1]):
        assert estargz.parse_footer(other, 5000) is None


def test_tail_guess_is_within_the_blob() -> None:
    assert estargz.TAIL_GUESS(1000) == 1000
    assert estargz.TAIL_GUESS(1 << 20) == 128 << 10
    assert estargz.TAIL_GUESS(64 << 20) == 1 << 20
    assert estargz.TAIL_GUESS(1 << 40) == 2 << 20


@pytest.mark.parametrize(
    "entry",
    [
        None,
        1,
        [],
        "text",
        {},
        {"name": "x"},
        {"name": 5, "type": "reg"},
        {"name": "x", "type": "what"},
        {"name": "x", "type": ["reg"]},
        {"name": "x", "type": "chunk"},
        {"name": "x", "type": "symlink"},
        {"name": "x", "type": "symlink", "linkName": ""},
        {"name": "x", "type": "symlink", "linkName": "t" * 5000},
        {"name": "x", "type": "symlink", "linkName": "nul\0"},
        {"name": "x", "type": "hardlink", "linkName": "y"},
        {"name": "x", "type": "hardlink"},
        {"name": "x", "type": "dir", "mode": "755"},
        {"name": "x", "type": "dir", "mode": 1.5},
        {"name": "x", "type": "dir", "uid": -1},
        {"name": "x", "type": "dir", "uid": 1 << 32},
        {"name": "x", "type": "dir", "modtime": "yesterday"},
        {"name": "x", "type": "dir", "modtime": 5},
        {"name": "x", "type": "dir", "modtime": "2023-02-30T00:00:00Z"},
        {"name": "x", "type": "dir", "modtime": "2023-01-01T25:00:00Z"},
        {"name": "x", "type": "dir", "xattrs": [1]},
        {"name": "x", "type": "dir", "xattrs": {"user.a": "no base64!"}},
        {"name": "x", "type": "dir", "xattrs": {"user.a": 5}},
        {"name": "x", "type": "char", "devMajor": -1},
        {"name": "x", "type": "char", "devMinor": 1 << 40},
        {"name": "a" * 300, "type": "dir"},
        {"name": "nul\0", "type": "dir"},
        {"name": "./", "type": "reg"},
        reg(size=-1),
        reg(size=1 << 62),
        reg(size=2.0),
        reg(size="10"),
        reg(offset=-1),
        reg(offset=90_000),
        reg(offset=1 << 70),
        reg(offset=None, innerOffset=-5),
        reg(innerOffset=1 << 33),
        reg(innerOffset=1 << 31),
        reg(chunkSize=11),
        reg(chunkSize=-1),
        reg(chunkSize=9),
        reg(chunkOffset=1),
        reg(size=65 << 20),
        reg(size=64 << 20, offset=89_990),
        reg(chunkDigest="sha256:xyz"),
        reg(chunkDigest="md5:" + "0" * 32),
        reg(chunkDigest=None),
        reg(chunkDigest=7),
        {"name": ".prefetch.landmark", "type": "reg", "size": 1, "offset": -4},
        {"name": ".prefetch.landmark", "type": "reg", "size": 1, "offset": 1 << 50},
    ],
)
def test_entries_that_cannot_be_true(entry: Any) -> None:
    with pytest.raises(FormatError):
        parse(entry)


@pytest.mark.parametrize(
    "toc", [[], 1, {}, {"version": 2, "entries": []}, {"version": 1, "entries": {}}, {"version": 1, "entries": 5}, "x", None]
)
def test_documents_that_are_no_toc(toc: Any) -> None:
    raw = json.dumps(toc).encode()
    with pytest.raises(FormatError):
        estargz.parse_toc(raw, blob_size=10, toc_offset=5, toc_digest=None)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[" * 200_000, b"\xff\xfe", b'{"version":1,"entries":[' + b"9" * 10_000 + b"]}", b"\0"]
)
def test_bytes_that_are_no_json(raw: bytes) -> None:
    with pytest.raises(FormatError):
        estargz.parse_toc(raw, blob_size=10, toc_offset=5, toc_digest=None)


def test_offsets_outside_the_blob() -> None:
    for offset in (-2, 11):
        with pytest.raises(FormatError):
            estargz.parse_toc(b'{"version":1,"entries":[]}', blob_size=10, toc_offset=offset, toc_digest=None)


def test_an_empty_layer_is_an_index_piece_alone() -> None:
    for entries in (None, []):
        index = parse(toc={"version": 1, "entries": entries}, blob_size=400, toc_offset=0)
        assert (len(index.chunks), index.volume_size, index.prefetch_stop) == (0, 0, -1)
        assert list(index.pieces.starts) == [0, 400]
        assert index.pieces.index_piece == 0
    assert list(parse(blob_size=400, toc_offset=30).pieces.starts) == [0, 30, 400]
    assert parse(blob_size=400, toc_offset=estargz.EXTERNAL).pieces.index_piece == -1


def test_chunks_must_follow_one_another() -> None:
    chunk = {"name": "f", "type": "chunk", "chunkDigest": ZERO}
    good = [
        reg(size=25, chunkSize=10),
        chunk | {"offset": 200, "chunkOffset": 10, "chunkSize": 10},
        chunk | {"offset": 300, "chunkOffset": 20},
    ]
    index = parse(*good)
    assert list(index.chunks.size) == [10, 10, 5]
    assert list(index.chunks.volume_offset) == [0, 10, 20]
    assert list(index.chunks.blob_length) == [100, 100, 89_700]
    inode = index.root.children[b"f"]
    assert (inode.first_chunk, inode.chunk_count, inode.volume_offset) == (0, 3, 0)
    bad = [
        [good[0], good[2]],
        [good[0], good[1]],
        [good[0], good[1], good[1], good[2]],
        [*good, good[2]],
        [good[0], {"name": "d", "type": "dir"}, good[1], good[2]],
        [good[0], good[1] | {"offset": 50}, good[2]],
        [good[0], good[1] | {"offset": 100}, good[2]],
        [good[0], good[1] | {"offset": 100, "innerOffset": 9}, good[2]],
        [good[0], good[1] | {"chunkDigest": ""}, good[2]],
    ]
    for entries in bad:
        with pytest.raises(FormatError):
            parse(*entries)
    assert len(parse(good[0], good[1] | {"offset": 100, "innerOffset": 10}, good[2]).chunks) == 3


def test_files_need_not_be_in_blob_order_but_must_not_overlap() -> None:
    index = parse(reg("b", offset=500), reg("a", offset=100))
    assert list(index.chunks.blob_offset) == [100, 500]
    assert index.root.children[b"a"].first_chunk == 0
    assert index.root.children[b"b"].first_chunk == 1
    with pytest.raises(FormatError):
        parse(reg("a", offset=100), reg("b", size=11, offset=100))
    with pytest.raises(FormatError):
        parse(reg("a", offset=100), reg("b", offset=100, innerOffset=9))


def test_two_files_may_share_all_of_their_chunks() -> None:
    index = parse(reg("a"), reg("b"), reg("c", offset=300))
    assert len(index.chunks) == 2
    assert index.root.children[b"a"].first_chunk == index.root.children[b"b"].first_chunk == 0
    assert index.root.children[b"c"].first_chunk == 1


def test_a_whole_file_digest_stands_in_for_a_missing_chunk_digest() -> None:
    digest = "sha256:" + "ab" * 32
    index = parse(reg(chunkDigest="", digest=digest))
    assert index.chunks.digest(0).hex() == "ab" * 32


def test_duplicates_keep_the_last_and_drop_its_chunks() -> None:
    index = parse(reg("a", offset=100), reg("keep", offset=200), reg("a", size=20, offset=300))
    assert index.root.children[b"a"].size == 20
    assert list(index.chunks.blob_offset) == [200, 300]
    assert list(index.chunks.blob_length) == [100, 89_700]
    assert index.root.children[b"a"].first_chunk == 1


def test_hidden_names_bound_members_and_are_not_in_the_tree() -> None:
    landmark = {"name": "./.prefetch.landmark", "type": "reg", "size": 1, "offset": 400}
    index = parse(
        reg("a"),
        landmark,
        reg("b", offset=500),
        {"name": "stargz.index.json", "type": "reg"},
        reg("d/.prefetch.landmark", offset=600),
    )
    assert set(index.root.children) == {b"a", b"b", b"d"}
    assert index.prefetch_stop == 400
    assert index.chunks.blob_length[0] == 300
    assert list(index.pieces.starts) == [0, 400, 90_000, 100_000]
    assert parse(landmark, landmark | {"name": ".no.prefetch.landmark"}).prefetch_stop == 0


def test_attributes_of_every_kind() -> None:
    index = parse(
        {"name": "d", "type": "dir", "mode": 0o41777, "uid": 4294967294, "modtime": "2020-01-01T00:00:00.5+02:00"},
        {"name": "s", "type": "symlink", "linkName": "../ü", "modtime": "1969-12-31T23:59:59Z"},
        {"name": "c", "type": "char", "devMajor": 1, "devMinor": 300},
        {"name": "b", "type": "block", "devMajor": 7, "xattrs": {"user.x": base64.b64encode(b"\0\xff").decode()}},
        {"name": "p", "type": "fifo", "userName": "u", "groupName": "g", "NumLink": 3, "unknown": {}},
        {"name": "half\ud800", "type": "dir"},
    )
    root = index.root.children
    assert (root[b"d"].mode, root[b"d"].uid) == (0o1777, 4294967294)
    assert root[b"d"].mtime_ns == 1577829600_500_000_000
    assert (root[b"s"].target, root[b"s"].mtime_ns) == ("../ü".encode(), -1_000_000_000)
    assert root[b"c"].rdev == (1, 300)
    assert root[b"b"].xattrs == {b"user.x": b"\0\xff"}
    assert root[b"p"].kind is InodeKind.FIFO
    assert "half\ufffd".encode() in root
    assert index.entry_count == 6


def test_a_toc_bomb_is_refused_before_it_grows() -> None:
    bomb = zlib.compress(bytes(200 << 20), 9, wbits=31)
    with pytest.raises(FormatError, match="more than"):
        estargz.unpack_toc(bomb)


def toc_tar(name: str = "stargz.index.json", data: bytes = b"{}", kind: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size, info.type = len(data), kind
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_unpacking_a_toc() -> None:
    good = zlib.compress(toc_tar(), wbits=31)
    assert estargz.unpack_toc(good) == b"{}"
    assert estargz.unpack_toc(zlib.compress(toc_tar("other")[:1024] + toc_tar("./stargz.index.json"), wbits=31)) == b"{}"
    assert estargz.unpack_toc(good + zlib.compress(b"", wbits=31), digest_of(b"{}")) == b"{}"
    size = bytearray(toc_tar())
    size[124:136] = b"77777777777\0"
    garbage = bytearray(toc_tar())
    garbage[124:136] = b"not a number"
    for bad in (
        b"",
        b"x",
        good[:-20],
        good[:12],
        zlib.compress(toc_tar("other"), wbits=31),
        zlib.compress(bytes(size), wbits=31),
        zlib.compress(bytes(garbage), wbits=31),
    ):
        with pytest.raises(FormatError):
            estargz.unpack_toc(bad)
    with pytest.raises(FormatError):
        estargz.unpack_toc(good, digest_of(b"other"))


# --- decoding members ------------------------------------------------------------------------------------------------------


def member(data: bytes) -> bytes:
    return zlib.compress(data, wbits=31)


def table(blob: bytes, *rows: tuple[int, int, int, bytes]) -> ChunkTable:
    chunks = ChunkTable()
    for offset, length, inner, data in rows:
        chunks.append(offset, length, inner, len(data), hashlib.sha256(data).digest())
    return chunks


def test_a_member_bomb_behind_a_chunk_costs_no_memory() -> None:
    import tracemalloc

    blob = member(b"chunk" + bytes(100 << 20))
    chunks = table(blob, (0, len(blob), 0, b"chunk"))
    tracemalloc.start()
    decoder = PieceDecoder(chunks, "gzip", 0, 1, 0)
    assert decoder.feed(blob) == [(0, b"chunk")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert decoder.is_complete
    assert peak < 4 << 20


def test_a_member_may_be_followed_by_others_in_its_extent() -> None:
    first, second = member(b"header|content"), member(b" goes on|tail")
    blob = first + second + b"junk"
    chunks = table(blob, (0, len(blob), 7, b"content goes on"))
    for step in (1, 5, 1000):
        decoder = PieceDecoder(chunks, "gzip", 0, 1, 0)
        found = [pair for at in range(0, len(blob), step) for pair in decoder.feed(blob[at : at + step])]
        assert found == [(0, b"content goes on")]
        assert decoder.is_complete


def test_members_that_end_too_early_or_never() -> None:
    whole = member(b"content and more")
    for blob, chunk in (
        (member(b"cont"), b"content"),
        (whole[:-3], b"content"),
        (whole[:-9] + b"\0" * 9, b"content"),
        (b"x" * 50, b"content"),
    ):
        chunks = table(blob, (0, len(blob), 0, chunk))
        with pytest.raises(FormatError):
            PieceDecoder(chunks, "gzip", 0, 1, 0).feed(blob)


def test_a_wrong_digest_gives_nothing() -> None:
    blob = member(b"right") + member(b"wrong")
    cut = len(member(b"right"))
    chunks = table(blob, (0, cut, 0, b"right"), (cut, len(blob) - cut, 0, b"asked"))
    decoder = PieceDecoder(chunks, "gzip", 0, 2, 0)
    assert decoder.feed(blob[:cut]) == [(0, b"right")]
    with pytest.raises(FormatError, match="chunk 1"):
        decoder.feed(blob[cut:])


def test_decoding_can_start_at_any_member_and_stop_before_any() -> None:
    parts = [b"%d" % number * 50 for number in range(6)]
    blob, rows = b"gap", []
    for part in parts:
        rows.append((len(blob), len(member(part)), 0, part))
        blob += member(part)
    chunks = table(blob, *rows)
    for first in range(7):
        for stop in range(first, 7):
            base = chunks.blob_offset[first] - 1 if first < 6 else len(blob)
            decoder = PieceDecoder(chunks, "gzip", first, stop, base)
            assert decoder.feed(blob[base:]) == list(enumerate(parts))[first:stop]
            assert decoder.is_complete
    with pytest.raises(FormatError):
        PieceDecoder(chunks, "gzip", 0, 1, chunks.blob_offset[0] + 1)
    with pytest.raises(FormatError):
        PieceDecoder(chunks, "whole", 0, 1, 0)


def test_an_unordered_table_is_refused_not_misread() -> None:
    blob = member(b"one") + member(b"two")
    cut = len(member(b"one"))
    chunks = table(blob, (cut, len(blob) - cut, 0, b"two"), (0, cut, 0, b"one"))
    with pytest.raises(FormatError):
        PieceDecoder(chunks, "gzip", 0, 2, 0).feed(blob)


# --- pieces ----------------------------------------------------------------------------------------------------------------


def test_pieces_of_members_larger_and_smaller_than_the_target() -> None:
    chunks = ChunkTable()
    for offset, length in ((10, 40), (50, 30), (80, 500), (580, 10), (590, 95), (685, 15)):
        chunks.append(offset, length, 0, 1, bytes(32))
    pieces = cut_pieces(chunks, 1000, 700, target=100)
    assert list(pieces.starts) == [0, 80, 580, 590, 685, 700, 1000]
    assert list(pieces.first_chunk) == [0, 2, 3, 4, 5, 6, 6]
    assert pieces.index_piece == 5
    pieces = cut_pieces(chunks, 700, 700, target=100, prefetch_stop=50)
    assert list(pieces.starts) == [0, 50, 80, 580, 590, 685, 700]
    assert pieces.index_piece == -1


def test_fixed_pieces() -> None:
    pieces = cut_fixed((2 << 20) + 1)
    assert list(pieces.starts) == [0, 1 << 20, 2 << 20, (2 << 20) + 1]
    assert list(pieces.first_chunk) == [0, 0, 0, 0]
    assert list(cut_fixed(1 << 20).starts) == [0, 1 << 20]
    assert list(cut_fixed(0).starts) == [0, 0]


def test_a_hundred_thousand_entries_in_two_seconds() -> None:
    entries: list[dict[str, Any]] = []
    for number in range(100_000):
        digest = "sha256:" + hashlib.sha256(b"%d" % number).hexdigest()
        entries.append(
            reg(
                f"usr/share/d{number // 50}/file{number}",
                size=100 + number % 50,
                offset=100 + 50 * number,
                chunkDigest=digest,
                mode=420,
            )
        )
    raw = json.dumps({"version": 1, "entries": entries}).encode()
    start = time.process_time()
    index = estargz.parse_toc(raw, blob_size=6_000_000, toc_offset=5_500_000, toc_digest=digest_of(raw))
    # Twice the aim: the machine of a test run is shared.
    assert time.process_time() - start < 4
    assert len(index.chunks) == 100_000
