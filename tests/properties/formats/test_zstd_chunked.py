"""Properties of zstd:chunked: whatever is flipped, cut or made up gives FormatError or the same result; any tar survives."""

import functools
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from typing import Any

import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.formats import zstd_chunked
from agent.formats.content_chunks import cut_chunks
from agent.formats.crc64 import Crc64
from agent.formats.model import FormatError, InodeKind, LayerIndex
from agent.formats.tar_split import Payload, Segment, TarSplitWriter, decode_tar_split
from agent.formats.tree import walk
from agent.formats.zstd_chunked_writer import write_zstd_chunked
from tests.zstd_chunked_samples import read_index, read_volume

PREFIX = "io.github.containers.zstd-chunked."


@functools.cache
def sample() -> tuple[bytes, dict[str, str], bytes]:
    """A small blob, its annotations, and what must be read from it."""
    out, tar = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("a", b"content"), ("d/b", bytes(3000) + b"x" + bytes(2000)), ("empty", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    written = write_zstd_chunked(io.BytesIO(tar.getvalue()), out, level=1)
    blob = out.getvalue()
    return blob, written.annotations, fingerprint(read_index(blob, written.annotations))


def fingerprint(index: LayerIndex) -> bytes:
    tree = [(path, inode.kind, inode.mode, inode.size, inode.volume_offset) for path, inode in sorted(walk(index.root), key=str)]
    return repr(tree).encode() + index.chunks.to_bytes() + index.pieces.to_bytes()


def read_or_refuse(blob: bytes, annotations: dict[str, str]) -> bytes | None:
    try:
        return fingerprint(read_index(blob, annotations))
    except FormatError:
        return None


def test_every_byte_of_the_index_flipped() -> None:
    blob, annotations, expected = sample()
    footer = zstd_chunked.parse_footer(blob[-72:], len(blob))
    assert footer is not None
    by_footer = {key: value for key, value in annotations.items() if not key.endswith("position")}
    for at in range(footer.toc.offset - 8, len(blob)):
        for flip in (0x01, 0x80, 0xFF):
            bad = bytearray(blob)
            bad[at] ^= flip
            assert read_or_refuse(bytes(bad), annotations) in (None, expected)
            assert read_or_refuse(bytes(bad), by_footer) in (None, expected)


def test_every_length_that_is_left() -> None:
    blob, annotations, expected = sample()
    by_footer = {key: value for key, value in annotations.items() if not key.endswith("position")}
    for stop in range(len(blob)):
        assert read_or_refuse(blob[:stop], by_footer) is None
        found = read_or_refuse(blob[:stop], annotations)
        # What is behind the TOC is needed by nobody; the cut shows in the pieces alone.
        assert found is None or stop > int(annotations[PREFIX + "manifest-position"].split(":")[0])
    assert read_or_refuse(blob, by_footer) == expected


def test_every_character_of_the_annotations_changed() -> None:
    blob, annotations, expected = sample()
    for key, value in annotations.items():
        for at in range(len(value)):
            for other in ("0", "9", ":", "x", ""):
                bad = {**annotations, key: value[:at] + other + value[at + 1 :]}
                assert read_or_refuse(blob, bad) in (None, expected)


def test_every_byte_of_the_chunks_flipped() -> None:
    blob, annotations, _ = sample()
    index = read_index(blob, annotations)
    right = read_volume(index, blob)
    for at in range(index.pieces.starts[index.pieces.index_piece]):
        bad = bytearray(blob)
        bad[at] ^= 0x41
        try:
            assert read_volume(index, bytes(bad)) == right
        except (AssertionError, zstandard.ZstdError):
            continue


@given(st.binary(max_size=90), st.integers(0, 1 << 62))
def test_any_footer(tail: bytes, blob_size: int) -> None:
    for attempt in (tail, tail + b"GNUlInUx", tail + b"GnUlInUx"):
        try:
            footer = zstd_chunked.parse_footer(attempt, blob_size)
        except FormatError:
            continue
        assert footer is None or 8 <= footer.toc.offset < footer.toc.stop < blob_size


@given(st.lists(st.integers(0, 1 << 64) | st.integers(-5, 200), max_size=6), st.text(max_size=5))
def test_any_position(numbers: list[int], noise: str) -> None:
    text = ":".join(map(str, numbers))
    for attempt in (text, text + noise, noise):
        try:
            position = zstd_chunked.parse_position(attempt, 1 << 40)
        except FormatError:
            continue
        assert 8 <= position.offset < position.stop <= 1 << 40


numbers = st.none() | st.integers(-2, 120) | st.integers(0, 1 << 66) | st.sampled_from([1.5, "7", True, []])
digests = st.sampled_from(["sha256:" + "0" * 64, "sha256:" + "1" * 64, "", None, "md5:0", 5])
toc_entries = st.fixed_dictionaries(
    {"type": st.sampled_from(["reg", "chunk", "dir", "symlink", "hardlink", "char", "fifo", "odd", 5])},
    optional={
        "name": st.sampled_from(["a", "b", "./a", "a/b", "../x", "", ".wh.a", ".prefetch.landmark", "\ud800", 5]),
        "linkName": st.sampled_from(["a", "b", "", 7]),
        "size": st.integers(0, 120) | numbers,
        "offset": st.integers(0, 120) | numbers,
        "endOffset": st.integers(0, 120) | numbers,
        "chunkOffset": numbers,
        "chunkSize": st.integers(0, 120) | numbers,
        "chunkType": st.sampled_from(["", "zeros", "data", 5, None]),
        "chunkDigest": digests,
        "digest": digests,
        "innerOffset": numbers,
        "mode": numbers,
        "uid": numbers,
        "modtime": st.sampled_from(["2023-11-14T22:13:20.000000001Z", "never", 5, None]),
        "xattrs": st.dictionaries(st.text(max_size=5), st.sampled_from(["", "eA==", "?", 5]), max_size=2) | numbers,
    },
)


@st.composite
def files(draw: Any) -> list[dict[str, Any]]:
    """A file whose chunks fit, more often than not."""
    name, at, records = draw(st.sampled_from(["f", "g", "h"])), 0, []
    place = draw(st.integers(0, 60))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    for size in sizes:
        place += draw(st.integers(0, 12))
        record = {
            "name": name,
            "type": "chunk",
            "offset": place,
            "chunkOffset": at,
            "chunkSize": size,
            "chunkDigest": "sha256:" + "0" * 64,
        }
        record["chunkType"] = draw(st.sampled_from(["", "", "zeros"]))
        records.append(record)
        at += size
    return [{**records[0], "type": "reg", "size": at, "endOffset": draw(st.just(place + 10) | st.integers(0, 110))}, *records[1:]]


def check(index: LayerIndex) -> None:
    """Chunks lie in their files, in blob order, before the index, and no two at one place are of different sizes."""
    chunks, pieces = index.chunks, index.pieces
    assert list(chunks.blob_offset) == sorted(chunks.blob_offset)
    data_stop = pieces.starts[pieces.index_piece]
    extents = sorted(
        {(inode.volume_offset, inode.size) for _, inode in walk(index.root) if inode.kind is InodeKind.FILE and inode.size}
    )
    for number in range(len(chunks)):
        start, size = chunks.volume_offset[number], chunks.size[number]
        assert any(low <= start and start + size <= low + length for low, length in extents)
        assert chunks.blob_length[number] > 0
        assert chunks.blob_offset[number] + chunks.blob_length[number] <= data_stop
    assert all(low % 4096 == 0 and low + length <= index.volume_size for low, length in extents)
    assert index.volume_size % 4096 == 0


@given(st.lists(toc_entries, max_size=4), st.lists(files(), max_size=3), st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_any_toc(loose: list[Any], whole: list[list[Any]], dice: Any) -> None:
    groups = [[entry] for entry in loose] + whole
    dice.shuffle(groups)
    plain = json.dumps({"version": 1, "entries": [entry for group in groups for entry in group]}).encode()
    for dialect in (PREFIX + "manifest-checksum", "containerd.io/snapshot/stargz/toc.digest"):
        try:
            index = read_made(plain, dialect)
        except FormatError:
            continue
        check(index)


def read_made(plain: bytes, dialect: str) -> LayerIndex:
    packed = zstandard.compress(plain)
    digest = hashlib.sha256(packed if dialect.startswith(PREFIX) else plain).hexdigest()
    blob = bytes(100) + b"\x50\x2a\x4d\x18" + len(packed).to_bytes(4, "little") + packed
    annotations = {dialect: "sha256:" + digest, PREFIX + "manifest-position": f"108:{len(packed)}:{len(plain)}:1"}
    return read_index(blob, annotations)


@given(st.binary(max_size=200))
def test_any_text_as_toc(noise: bytes) -> None:
    for plain in (noise, b'{"version":1,"entries":[' + noise, b'{"version":1,"entries":[]' + noise + b"}"):
        try:
            read_made(plain, PREFIX + "manifest-checksum")
        except FormatError:
            continue


@given(st.lists(st.binary(max_size=2500) | st.integers(0, 3000).map(bytes), max_size=12), st.data())
def test_any_cut_of_a_file_gives_the_same_chunks(parts: list[bytes], data: Any) -> None:
    whole = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    blocks = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    chunks = list(cut_chunks(blocks))
    assert chunks == list(cut_chunks([whole]))
    assert b"".join(chunk.data or bytes(chunk.size) for chunk in chunks) == whole
    assert all(chunk.size and chunk.is_hole == (not chunk.data) for chunk in chunks)


split_parts = st.binary(max_size=600).map(Segment) | st.builds(
    Payload, st.binary(min_size=1, max_size=20), st.integers(0, 1 << 40), st.just(b"") | st.binary(min_size=8, max_size=8)
)


@given(st.lists(split_parts, max_size=8), st.integers(0, 5000), st.binary(min_size=1, max_size=3))
def test_tar_split_there_and_back(parts: list[Any], at: int, patch: bytes) -> None:
    writer = TarSplitWriter(1)
    for part in parts:
        writer.add(part)
    packed, length, digest = writer.finish()
    assert list(decode_tar_split(packed, length, digest)) == parts
    refuse_or(lambda: list(decode_tar_split(packed[:at] + patch + packed[at + len(patch) :], length)))
    plain = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    bad = plain[:at] + patch + plain[at + len(patch) :]
    refuse_or(lambda: list(decode_tar_split(zstandard.compress(bad), len(bad))))


def refuse_or(attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except FormatError:
        return


@given(st.binary(max_size=300), st.integers(0, 300))
def test_crc64_does_not_care_for_cuts(data: bytes, at: int) -> None:
    parts = Crc64(data[:at])
    parts.update(data[at:])
    assert parts.value == Crc64(data).value


tar_members = st.lists(
    st.tuples(
        st.sampled_from(["a", "./a", "d/", "d/x", "d/y", "n" * 120, "é", "\udcff", "stargz.index.json"]),
        st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]),
        st.binary(max_size=40) | st.integers(1000, 1100).map(bytes),
        st.integers(-5, 1 << 33),
        st.dictionaries(st.sampled_from(["SCHILY.xattr.user.x", "atime", "GNU.odd"]), st.sampled_from(["1", "2.5"]), max_size=2),
    ),
    max_size=6,
)


@given(
    tar_members, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), st.lists(st.sampled_from(["a", "d/x"]), max_size=2)
)
@settings(deadline=None)
def test_any_tar_survives(members: list[Any], form: int, prioritized: list[str]) -> None:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=form) as archive:
        for name, kind, data, mtime, records in members:
            info = tarfile.TarInfo(name)
            info.type, info.mtime, info.linkname = kind, mtime, "a" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            info.pax_headers = records
            archive.addfile(info, io.BytesIO(data))
    out = io.BytesIO()
    written = write_zstd_chunked(tar, out, level=1, prioritized=prioritized)
    blob = out.getvalue()
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(blob), read_across_frames=True) as reader:
        plain = reader.read()
    assert written.diff_id == "sha256:" + hashlib.sha256(plain).hexdigest()
    assert written.is_tar_kept == (plain == tar.getvalue())
    try:
        index = read_index(blob, written.annotations)
    except FormatError as exc:
        # Of the input: links to nothing or in circles. Or two names that JSON makes one.
        assert "link" in str(exc) or "twice" in str(exc) or "root" in str(exc)  # noqa: PT017
        return
    check(index)
    read_volume(index, blob)
