"""Properties of the formats: garbage raises FormatError and nothing else, any cut of the input gives the same result, and what
is written is read back.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import json
import random
import tarfile
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.formats import checkpoints, estargz
from agent.formats.estargz_writer import write_estargz
from agent.formats.members import PieceDecoder
from agent.formats.model import ChunkTable, FormatError, Inode, InodeKind, LayerIndex
from agent.formats.plain import PlainLayer, PlainLayerParser
from agent.formats.resume import filler
from agent.formats.tar import TarEntry, TarParser, encode_acl
from agent.formats.tar_headers import encode_header
from agent.formats.tree import TreeBuilder, walk


def check_index(index: LayerIndex) -> None:
    """What every parser guarantees, whatever it was fed (model.py)."""
    chunks, pieces = index.chunks, index.pieces
    seen: dict[int, Inode] = {}
    for path, inode in walk(index.root):
        assert len(path) < 1 << 20
        seen[id(inode)] = inode
        for name in inode.children:
            assert 0 < len(name) <= 255
            assert name not in (b".", b"..")
            assert b"/" not in name
            assert b"\0" not in name
            assert inode.kind is InodeKind.DIRECTORY
    for inode in seen.values():
        if inode.kind is InodeKind.FILE and inode.size:
            numbers = range(inode.first_chunk, inode.first_chunk + inode.chunk_count)
            at = inode.volume_offset
            assert at % 4096 == 0
            for number in numbers:
                # A sparse file of a tar has holes, which no chunk covers.
                assert chunks.volume_offset[number] == at or (index.format == "tar" and chunks.volume_offset[number] > at)
                at = chunks.volume_offset[number] + chunks.size[number]
            assert at == inode.volume_offset + inode.size or (index.format == "tar" and at < inode.volume_offset + inode.size)
            assert inode.volume_offset + inode.size <= index.volume_size
    assert pieces.starts[0] == 0
    assert list(pieces.starts) == sorted(pieces.starts)
    assert pieces.first_chunk[len(pieces)] == (len(chunks) if index.codec != "whole" else 0)
    places: set[int] = set()
    for offset in chunks.volume_offset:
        assert offset in places or not places or offset > max(places)
        places.add(offset)


# --- footer and TOC --------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=120), st.integers(0, 1 << 40))
def test_any_footer(tail: bytes, blob_size: int) -> None:
    try:
        footer = estargz.parse_footer(tail, blob_size)
    except FormatError:
        return
    assert footer is None or footer.toc_offset < blob_size


@given(st.integers(0, 50), st.binary(min_size=1, max_size=4), st.integers(60, 1 << 40))
def test_mutated_footers(at: int, patch: bytes, blob_size: int) -> None:
    footer = bytearray(b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0%016xSTARGZ\x01\0\0\xff\xff" % 1000 + bytes(8))
    footer[at : at + len(patch)] = patch
    try:
        found = estargz.parse_footer(bytes(footer), blob_size)
    except FormatError:
        return
    assert found is None or -1 <= found.toc_offset < blob_size


@given(st.binary(max_size=300))
def test_any_toc_member(data: bytes) -> None:
    for attempt in (data, zlib.compress(data, wbits=31), zlib.compress(b"stargz.index.json" + data, wbits=31)):
        try:
            estargz.unpack_toc(attempt)
        except FormatError:
            continue


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(
    [
        "a",
        "./a",
        "a/b",
        "a/b/",
        "/a",
        "../a",
        "..",
        ".",
        "",
        "./",
        ".wh.a",
        "a/.wh..wh..opq",
        ".wh..wh.plnk/x",
        "stargz.index.json",
        ".prefetch.landmark",
        "é",
        "\ud800",
        "n" * 300,
        "a\0",
    ]
) | st.text(max_size=12)
numbers = st.integers(-2, 40) | st.sampled_from([1 << 20, 1 << 31, 1 << 32, 1 << 63, 1 << 64])
fields: dict[str, st.SearchStrategy[Any]] = {
    "size": numbers,
    "offset": numbers,
    "chunkOffset": numbers,
    "chunkSize": numbers,
    "innerOffset": numbers,
    "chunkDigest": st.sampled_from(["sha256:" + "a" * 64, "sha256:" + "b" * 64, "", "x"]),
    "digest": st.sampled_from(["sha256:" + "a" * 64, ""]),
    "mode": numbers,
    "uid": numbers,
    "gid": numbers,
    "linkName": names,
    "modtime": st.sampled_from(["2020-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999999-23:59", "x"]),
    "xattrs": st.dictionaries(
        st.sampled_from(["user.a", "trusted.overlay.opaque", "é"]), st.sampled_from(["", "YQ==", "%"]), max_size=2
    ),
    "devMajor": numbers,
}
entries = st.fixed_dictionaries(
    {"name": names, "type": st.sampled_from(["reg", "reg", "reg", "chunk", "dir", "symlink", "hardlink", "char", "fifo"])},
    optional={key: value | json_values if key == "mode" else value for key, value in fields.items()},
)


@given(st.lists(entries, max_size=8), st.integers(0, 100), st.integers(0, 50))
@settings(max_examples=400)
def test_any_toc(toc_entries: list[Any], toc_offset: int, more: int) -> None:
    raw = json.dumps({"version": 1, "entries": toc_entries}).encode()
    try:
        index = estargz.parse_toc(raw, blob_size=toc_offset + more, toc_offset=toc_offset, toc_digest=None)
    except FormatError:
        return
    check_index(index)


@given(json_values)
def test_any_json(value: Any) -> None:
    with contextlib.suppress(FormatError):
        estargz.parse_toc(json.dumps(value).encode(), blob_size=100, toc_offset=50, toc_digest=None)
    with contextlib.suppress(FormatError):
        estargz.parse_toc(json.dumps({"version": 1, "entries": [value]}).encode(), blob_size=100, toc_offset=50, toc_digest=None)


@functools.cache
def sample_toc() -> tuple[bytes, bytes, int]:
    blob = make_blob(7, 12, 0)
    footer = estargz.parse_footer(blob[-51:], len(blob))
    assert footer is not None
    return blob, estargz.unpack_toc(blob[footer.toc_offset : -51]), footer.toc_offset


@given(st.data())
@settings(max_examples=300)
def test_mutated_toc(data: st.DataObject) -> None:
    blob, toc, toc_offset = sample_toc()
    changed = bytearray(toc)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(toc) - 1))
        changed[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"9", b"99999", b"-", b"../", b"chunk"])
        )
    try:
        index = estargz.parse_toc(bytes(changed), blob_size=len(blob), toc_offset=toc_offset, toc_digest=None)
    except FormatError:
        return
    check_index(index)


# --- members ---------------------------------------------------------------------------------------------------------------


def make_tar(seed: int, count: int) -> bytes:
    dice = random.Random(seed)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=dice.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as archive:
        for number in range(count):
            info = tarfile.TarInfo("d" * dice.randrange(1, 90) + f"/f{number}")
            info.size = dice.choice([0, 1, 511, 512, 513, 3000, dice.randrange(20_000)])
            info.mtime = dice.randrange(1 << 31)
            content = dice.randbytes(info.size // 2) + b"t" * (info.size - info.size // 2)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


@functools.lru_cache(20)
def make_blob(seed: int, count: int, min_chunk: int, chunk_size: int = 4096) -> bytes:
    out = io.BytesIO()
    write_estargz(io.BytesIO(make_tar(seed, count)), out, min_chunk=min_chunk, chunk_size=chunk_size)
    return out.getvalue()


def read_index(blob: bytes) -> LayerIndex:
    footer = estargz.parse_footer(blob[-51:], len(blob))
    assert footer is not None
    toc = estargz.unpack_toc(blob[footer.toc_offset : -51])
    return estargz.parse_toc(toc, blob_size=len(blob), toc_offset=footer.toc_offset, toc_digest=None)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in cuts)})
    return [data[start:stop] for start, stop in itertools.pairwise(places)]


many_cuts = st.lists(st.integers(0, 1 << 30), max_size=30)


@given(st.integers(0, 3), st.sampled_from([0, 2000, 100_000]), many_cuts, st.integers(0, 100), st.integers(0, 100))
def test_any_cut_of_a_blob_gives_the_same_chunks(seed: int, min_chunk: int, cuts: list[int], low: int, high: int) -> None:
    blob = make_blob(seed, 15, min_chunk)
    index = read_index(blob)
    chunks = index.chunks
    first, stop = sorted((low % (len(chunks) + 1), high % (len(chunks) + 1)))
    base = chunks.blob_offset[first] if first < len(chunks) else len(blob)
    decoder = PieceDecoder(chunks, "gzip", first, stop, base)
    found = [pair for part in cut(blob[base:], cuts) for pair in decoder.feed(part)]
    assert [number for number, _ in found] == list(range(first, stop))
    assert decoder.is_complete
    for number, data in found:
        assert hashlib.sha256(data).digest() == chunks.digest(number)
        assert len(data) == chunks.size[number]


@given(st.integers(0, 1 << 30), st.binary(min_size=1, max_size=3), many_cuts)
def test_changed_blobs_give_right_chunks_or_an_error(at: int, patch: bytes, cuts: list[int]) -> None:
    good = make_blob(1, 15, 2000)
    index = read_index(good)
    at %= len(good)
    blob = (good[:at] + patch + good[at + len(patch) :])[: len(good)]
    decoder = PieceDecoder(index.chunks, "gzip", 0, len(index.chunks), 0)
    try:
        for part in cut(blob, cuts):
            for number, data in decoder.feed(part):
                assert hashlib.sha256(data).digest() == index.chunks.digest(number)
    except FormatError:
        pass


@given(
    st.binary(max_size=200),
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 100), st.integers(0, 100), st.integers(1, 100)), max_size=4),
)
def test_any_bytes_for_any_table(blob: bytes, rows: list[tuple[int, int, int, int]]) -> None:
    chunks = ChunkTable()
    for offset, length, inner, size in rows:
        chunks.append(offset, length, inner, size, bytes(32))
    for data in (blob, zlib.compress(blob, wbits=31) + blob):
        try:
            decoder = PieceDecoder(chunks, "gzip", 0, len(chunks), 0)
            assert decoder.feed(data) == []
        except FormatError:
            continue


# --- plain layers ----------------------------------------------------------------------------------------------------------


def parse_plain(parts: list[bytes]) -> tuple[PlainLayer, bytes]:
    parser, volume = PlainLayerParser(1 << 24), bytearray()
    for part in parts:
        for offset, data in parser.feed(part):
            volume.extend(bytes(max(0, offset + len(data) - len(volume))))
            volume[offset : offset + len(data)] = data
    layer = parser.finish()
    return layer, bytes(volume[: layer.index.volume_size].ljust(layer.index.volume_size, b"\0"))


@given(st.integers(0, 5), st.sampled_from(["gzip", "zstd", "none"]), many_cuts)
def test_any_cut_of_a_plain_layer_gives_the_same(seed: int, compression: str, cuts: list[int]) -> None:
    import zstandard

    tar = make_tar(seed, 12)
    blob = {"gzip": zlib.compress(tar, 1, wbits=31), "zstd": zstandard.ZstdCompressor().compress(tar), "none": tar}[compression]
    layer, volume = parse_plain(cut(blob, cuts))
    whole, whole_volume = parse_plain([blob])
    check_index(layer.index)
    assert volume == whole_volume
    assert layer.index.chunks.to_bytes() == whole.index.chunks.to_bytes()
    assert layer.index.pieces == whole.index.pieces
    assert (layer.index.members is None) == (compression != "gzip")
    if layer.index.members is not None and whole.index.members is not None:
        assert layer.index.members.to_bytes() == whole.index.members.to_bytes()
    assert (layer.diff_id, layer.blob_digest, layer.blob_size) == (whole.diff_id, whole.blob_digest, len(blob))
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for info in archive:
            inode = layer.index.root
            for name in info.name.encode().split(b"/"):
                inode = inode.children[name]
            stream = archive.extractfile(info)
            assert stream is not None
            assert (volume[inode.volume_offset : inode.volume_offset + inode.size] if inode.size else b"") == stream.read()


@given(
    st.integers(0, 5), st.lists(st.tuples(st.integers(0, 1 << 30), st.binary(min_size=1, max_size=12)), max_size=4), st.booleans()
)
@settings(max_examples=300)
def test_any_mutation_of_a_tar(seed: int, patches: list[tuple[int, bytes]], is_fixed: bool) -> None:
    tar = bytearray(make_tar(seed, 4))
    for at, patch in patches:
        at %= min(len(tar), 4096)
        tar[at : at + len(patch)] = patch
    if is_fixed:  # let the change through the checksum, so that it meets what is behind it
        tar[148:156] = b"%06o\0 " % (sum(tar[:148]) + sum(tar[156:512]) + 256)
    try:
        layer, _ = parse_plain([bytes(tar)])
    except FormatError:
        return
    check_index(layer.index)


@given(st.binary(max_size=2000))
def test_any_bytes_as_a_layer(blob: bytes) -> None:
    for data in (blob, zlib.compress(blob, wbits=31), b"\x28\xb5\x2f\xfd" + blob, b"\x1f\x8b\x08" + blob):
        try:
            parse_plain([data])
        except FormatError:
            continue


@given(
    st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 9), st.booleans()), min_size=1, max_size=12),
    many_cuts,
    st.integers(1, 400),
    st.integers(1, 4000),
)
def test_any_gzip_resumes_at_its_checkpoints(
    members: list[tuple[bytes, int, bool]], cuts: list[int], span: int, quantum: int
) -> None:
    data = b"".join(text * 40 for text, _, _ in members)
    packed = []
    for text, level, is_flushed in members:
        packer = zlib.compressobj(level, zlib.DEFLATED, 31)
        for _ in range(40):
            packed.append(packer.compress(text))
            if is_flushed:
                packed.append(packer.flush(zlib.Z_PARTIAL_FLUSH))
        packed.append(packer.flush())
    blob = b"".join(packed)
    found: list[list[checkpoints.Checkpoint]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "SPAN_BYTES", span)
        patch.setattr(checkpoints, "_QUANTUM", quantum)
        for parts in ([blob], cut(blob, cuts)):
            inflater = checkpoints.SeekableGzip()
            assert b"".join(out for part in parts for out in inflater.feed(memoryview(part))) == data
            inflater.finish()
            found.append(inflater.checkpoints)
    assert found[0] == found[1]
    for checkpoint in found[0]:
        stream = zlib.decompressobj(-15, zdict=checkpoint.window)
        start = filler(checkpoint.bits, checkpoint.prime) if checkpoint.bits else b""
        out = stream.decompress(start + blob[checkpoint.in_offset :])
        assert stream.eof
        assert data.startswith(out, checkpoint.out_offset)


@given(st.integers(0, 5), st.lists(st.tuples(st.integers(0, 1 << 30), st.binary(min_size=1, max_size=3)), min_size=1, max_size=4))
@settings(max_examples=200)
def test_any_mutation_of_a_gzip_is_judged_like_zlib_does(seed: int, patches: list[tuple[int, bytes]]) -> None:
    blob = bytearray(zlib.compress(make_tar(seed, 4), wbits=31))
    for at, patch in patches:
        at %= len(blob)
        blob[at : at + len(patch)] = patch
    inflater = checkpoints.SeekableGzip()
    try:
        ours = b"".join(inflater.feed(memoryview(blob)))
        inflater.finish()
    except FormatError:
        if not blob[3] & 0xE2:  # the checksum of a header and flags that nobody has defined, which Python skips
            with pytest.raises((zlib.error, EOFError, OSError)):
                gzip.decompress(blob)
        return
    assert ours == gzip.decompress(blob)


# --- tar headers -----------------------------------------------------------------------------------------------------------


class _Sink:
    def __init__(self) -> None:
        self.entries: list[TarEntry] = []

    def entry(self, entry: TarEntry) -> None:
        self.entries.append(entry)

    def data(self, offset: int, view: memoryview) -> None:
        pass

    def end(self) -> None:
        pass


path_bytes = st.binary(min_size=1, max_size=300).map(lambda text: text.replace(b"\0", b"_"))


@given(
    path=path_bytes,
    link=path_bytes,
    kind=st.sampled_from([b"0", b"1", b"2", b"3", b"4", b"5", b"6"]),
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, 1 << 32),
    gid=st.integers(0, 1 << 32),
    mtime_ns=st.integers(-(1 << 62), 1 << 62),
    uname=st.binary(max_size=40).map(lambda text: text.replace(b"\0", b"_")),
    size=st.integers(0, 1 << 50),
    rdev=st.tuples(st.integers(0, 0o7777777), st.integers(0, 0o7777777)),
    xattrs=st.dictionaries(st.sampled_from([b"user.a", b"user.b\xff", b"security.x"]), st.binary(max_size=300), max_size=3),
)
@settings(max_examples=300)
def test_headers_survive(**fields: Any) -> None:
    entry = TarEntry(**fields)
    if entry.kind != b"0":
        entry.size = 0
    if entry.kind not in (b"3", b"4"):
        entry.rdev = (0, 0)
    if entry.kind != b"5" and entry.path.endswith(b"/"):
        with pytest.raises(FormatError, match="no directory"):
            encode_header(entry)
        return
    header = encode_header(entry)
    assert len(header) % 512 == 0
    sink = _Sink()
    TarParser(sink).feed(header)
    (found,) = sink.entries
    found.stored_size = found.data_offset = 0
    assert found == entry
    # Python's own reader sees the same (it keeps undecodable bytes as surrogates).
    with tarfile.open(fileobj=io.BytesIO(header), mode="r|", encoding="utf-8", errors="surrogateescape") as archive:
        info = next(iter(archive))
    assert info.name.encode("utf-8", "surrogateescape") == entry.path.rstrip(b"/") or entry.path.strip(b"/") == b""
    assert (info.mode, info.uid, info.gid, info.size) == (entry.mode, entry.uid, entry.gid, entry.size)


@given(
    st.binary(max_size=60)
    | st.lists(st.sampled_from(["user::rwx", "user:5:r", "group::r-x", "mask::rwx", "other::", "u:x:7"]), max_size=5).map(
        lambda items: ",".join(items).encode()
    )
)
def test_any_acl(text: bytes) -> None:
    value = encode_acl(text)
    assert value is None or (value[:4] == b"\2\0\0\0" and len(value) % 8 == 4)


# --- tree ------------------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.text("ab./", max_size=8) | st.sampled_from([".wh.a", "a/.wh.b", "a/.wh..wh..opq"]),
            st.sampled_from("fdlwa"),
            st.text("ab./", max_size=6),
        ),
        max_size=15,
    )
)
@settings(max_examples=300)
def test_any_tree(operations: list[tuple[str, str, str]]) -> None:
    tree = TreeBuilder()
    try:
        for path, what, target in operations:
            if what == "l":
                tree.link(path.encode(), target.encode())
            else:
                tree.add(path.encode(), Inode(InodeKind.DIRECTORY if what == "d" else InodeKind.FILE))
        root = tree.finish()
    except FormatError:
        return
    for _, inode in walk(root):
        assert type(inode) is Inode
        assert not inode.children or inode.kind is InodeKind.DIRECTORY
        assert not any(name.startswith(b".wh.") or name in (b"", b".", b"..") for name in inode.children)
