"""SOCI: fixture layers and others through zTOCs that the test's own builder makes, down to the last attribute and byte."""

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable
from random import Random
from typing import Any

import attrs
import pytest

from agent.formats import soci
from agent.formats.flatbuffer import FlatBuffer
from agent.formats.members import PieceDecoder
from agent.formats.model import (
    PRIME_IN_MEMBER,
    FormatError,
    LayerIndex,
    MemberTable,
    NoIndex,
    PieceTable,
    digest_of,
)
from agent.formats.opening import BlobRange, LayerFacts, ManifestBytes, ReferrersOf
from agent.formats.tree import walk
from agent.formats.ztoc import MAX_SPAN_BYTES, Ztoc
from tests.soci_writer import (
    Built,
    Scalar,
    build_index,
    build_ztoc,
    compress_members,
    digest_text,
    find_points,
    inflate_from,
    pack_points,
    write_flatbuffer,
)

SPAN = 256 << 10
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


def read_ztoc(ztoc: bytes, blob: bytes) -> LayerIndex:
    opened = Ztoc(ztoc, digest_of(blob), len(blob))
    return opened.read(blob[:4096] if opened.needs_header else b"")


def spliced(index: LayerIndex, blob: bytes) -> bytes:
    """The blob as the rest of Shoal sees it."""
    if not index.parts:
        return blob
    assert {(part.digest, part.blob_size) for part in index.parts} == {(digest_of(blob), len(blob))}
    return b"".join(blob[part.start : part.start + part.size] for part in index.parts)


def decode_volume(index: LayerIndex, blob: bytes, step: int) -> bytes:
    """As nodes do it, with `step` bytes at a time."""
    volume = bytearray(index.volume_size)
    whole, pieces = spliced(index, blob), index.pieces
    for piece in range(len(pieces)):
        start, stop = pieces.extent(piece)
        numbers = pieces.chunks_of(piece)
        decoder = PieceDecoder(index.chunks, index.codec, numbers.start, numbers.stop, start, index.members)
        decoder.is_vouched = True
        for at in range(start, stop, step):
            for number, data in decoder.feed(whole[at : min(at + step, stop)]):
                place = index.chunks.volume_offset[number]
                volume[place : place + len(data)] = data
        assert decoder.is_complete
    return bytes(volume)


def read_volume(index: LayerIndex, blob: bytes) -> bytes:
    """Every chunk out of its own piece, which must be right by its digest; libz decodes."""
    volume = bytearray(index.volume_size)
    whole, pieces, chunks = spliced(index, blob), index.pieces, index.chunks
    assert len(whole) == pieces.blob_size
    for piece in range(len(pieces)):
        start, stop = pieces.extent(piece)
        numbers = pieces.chunks_of(piece)
        if not numbers:
            continue
        assert digest_text(whole[start:stop]) == "sha256:" + pieces.digest(piece).hex()
        for number in numbers:
            at = chunks.blob_offset[number]
            assert start <= at < at + chunks.blob_length[number] <= stop
        if index.codec == "raw":
            places = {number: chunks.blob_offset[number] for number in numbers}
            outputs = {number: whole[place : place + chunks.blob_length[number]] for number, place in places.items()}
        else:
            assert index.members is not None
            row = index.members.find(start)
            bits = index.members.bits[row]
            assert bits == 0 or bits & PRIME_IN_MEMBER
            size = index.members.size[row]
            out = inflate_from(whole[start:stop], bits & 7, index.members.window(row), size)
            outputs = {
                number: out[chunks.inner_offset[number] : chunks.inner_offset[number] + chunks.size[number]] for number in numbers
            }
        for number, data in outputs.items():
            assert len(data) == chunks.size[number]
            place = chunks.volume_offset[number]
            volume[place : place + len(data)] = data
    return bytes(volume)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("form", ["gzip", "one span", "members", "stored", "uncompressed"])
def test_layer_equals_its_source(images: Any, layer: int, form: str) -> None:
    blob = images.layers("oci")[layer - 1].blob
    if form == "members":
        blob = compress_members(gzip.decompress(blob), 300_001)
    elif form == "stored":
        blob = compress_members(gzip.decompress(blob), 8 << 20, level=0, name=b"layer.tar")
    elif form == "uncompressed":
        blob = gzip.decompress(blob)
    built = build_ztoc(blob, 1 << 40 if form == "one span" else SPAN)
    index = read_ztoc(built.data, blob)
    volume = read_volume(index, blob)
    found = images.describe(index, volume)
    truth = images.truth(layer, is_json=False)
    assert found.keys() == truth.keys()
    assert {key: value for key, value in found.items() if value != truth[key]} == {}
    assert index.warnings == ()
    assert index.codec == ("raw" if form == "uncompressed" else "deflate")
    assert index.pieces.blob_size == len(blob) + max(0, len(index.parts) - 1)
    assert not any(index.chunks.digests)
    if layer == 1:
        assert (len(index.pieces) > 10) == (form != "one span")
        assert bool(index.parts) == (form in ("gzip", "members"))
    for step in (1 << 30, 4099):
        assert decode_volume(index, blob, step) == volume


def test_a_chunk_nobody_vouches_for_is_not_handed_out(sample: "Sample") -> None:
    index = read_ztoc(sample.built.data, sample.blob)
    numbers = index.pieces.chunks_of(1)
    decoder = PieceDecoder(index.chunks, index.codec, numbers.start, numbers.stop, index.pieces.starts[1], index.members)
    with pytest.raises(FormatError, match="does not match"):
        decoder.feed(spliced(index, sample.blob)[index.pieces.starts[1] :])


def test_a_span_too_large_for_memory_is_refused() -> None:
    tar = bytes(MAX_SPAN_BYTES + 1024)
    built = build_ztoc(tar, 1 << 30, entries=[])
    with pytest.raises(FormatError, match="spans of"):
        read_ztoc(built.data, tar)
    blob = compress_members(tar, len(tar), level=0)
    built = build_ztoc(blob, 1 << 30, entries=[])
    with pytest.raises(FormatError, match="a span of"):
        read_ztoc(built.data, blob)


def test_an_old_index_lacks_its_first_checkpoint(images: Any) -> None:
    tar = gzip.decompress(images.layers("oci")[0].blob)
    blob = compress_members(tar, len(tar), name=b"with-a-name.tar")
    built = build_ztoc(blob, SPAN, is_old=True)
    opened = Ztoc(built.data, digest_of(blob), len(blob))
    assert opened.needs_header
    index = opened.read(blob[:4096])
    assert index.pieces.starts[1] == 10 + len("with-a-name.tar") + 1
    assert images.describe(index, read_volume(index, blob)) == images.truth(1, is_json=False)
    for header in (b"", blob[:20], b"\x1f\x8b\x08\x04" + bytes(6), b"PK" + blob[2:]):
        with pytest.raises(FormatError, match="gzip"):
            Ztoc(built.data, digest_of(blob), len(blob)).read(header)


def test_tables_survive_the_disk(images: Any) -> None:
    blob = images.layers("oci")[0].blob
    index = read_ztoc(build_ztoc(blob, SPAN).data, blob)
    assert index.members is not None
    assert MemberTable.from_bytes(index.members.to_bytes()).to_bytes() == index.members.to_bytes()
    assert PieceTable.from_bytes(index.pieces.to_bytes()) == index.pieces


def small_tar(*, size: int = 100_000) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(4):
            member = tarfile.TarInfo(f"folder/{number}")
            member.size, member.mtime = size, 1_700_000_000 + number / 8
            member.pax_headers = {"SCHILY.xattr.user.number": str(number)}
            archive.addfile(member, io.BytesIO(bytes([number, 1, 2, 3]) + Random(number).randbytes(size - 4)))
    return buffer.getvalue()


@attrs.frozen
class Sample:
    blob: bytes
    built: Built

    def changed(self, change: Callable[[dict[int, Any]], None]) -> bytes:
        """The zTOC with something else in it."""
        built = build_ztoc(self.blob, 64 << 10)
        change(built.root)
        return write_flatbuffer(built.root)


@pytest.fixture(scope="module")
def sample() -> Sample:
    blob = compress_members(small_tar(), 1 << 20, level=1)
    return Sample(blob, build_ztoc(blob, 64 << 10))


def test_a_path_that_comes_twice_and_what_is_hidden(sample: Sample) -> None:
    entries = sample.built.root[4][0]
    again = {**entries[3], 0: b"./folder/0", 13: []}
    hidden = {**entries[2], 0: b".no.prefetch.landmark"}
    index = read_ztoc(sample.changed(lambda root: root.update({4: {0: [*entries[:2], hidden, again]}})), sample.blob)
    assert sorted(path for path, _ in walk(index.root)) == [b"", b"/folder", b"/folder/0", b"/folder/1"]
    (first,) = (inode for path, inode in walk(index.root) if path == b"/folder/0")
    volume = read_volume(index, sample.blob)
    assert volume[first.volume_offset : first.volume_offset + 4] == b"\x03\x01\x02\x03"
    assert first.xattrs == {}
    assert sum(index.chunks.size) == 200_000


def first_entry(**fields: Any) -> Callable[[dict[int, Any]], None]:
    def change(root: dict[int, Any]) -> None:
        root[4][0][0].update({int(name[1:]): value for name, value in fields.items()})

    return change


def points(change: Callable[[list[tuple[int, int, int]]], Any]) -> Callable[[dict[int, Any]], None]:
    def apply(root: dict[int, Any]) -> None:
        zinfo = root[5][3]
        count = (len(zinfo) - 12) // 32785
        rows = [struct.unpack_from("<qqB", zinfo, 12 + 32785 * row) for row in range(count)]
        change(rows)
        root[5][3] = zinfo[:12] + b"".join(struct.pack("<qqB", *row) + bytes(32768) for row in rows)

    return apply


HOSTILE: dict[str, Callable[[dict[int, Any]], Any]] = {
    "another blob's size": lambda root: root.update({2: Scalar("q", 17)}),
    "no tar": lambda root: root.update({3: Scalar("q", 0)}),
    "an endless tar": lambda root: root.update({3: Scalar("q", 1 << 60)}),
    "a shorter tar": lambda root: root.update({3: Scalar("q", 100_000)}),
    "no contents": lambda root: root.pop(4),
    "no spans": lambda root: root.pop(5),
    "negative span count": lambda root: root[5].update({1: Scalar("i", -5)}),
    "absurd span count": lambda root: root[5].update({1: Scalar("i", 0x7FFFFFFF)}),
    "a digest too few": lambda root: root[5][2].pop(),
    "a digest that is none": lambda root: root[5][2].__setitem__(0, b""),
    "an unknown algorithm": lambda root: root[5].update({0: Scalar("b", 3)}),
    "another algorithm": lambda root: root[5].update({0: Scalar("b", 2)}),
    "no checkpoints": lambda root: root[5].update({3: b""}),
    "checkpoints cut short": lambda root: root[5].update({3: root[5][3][:-1]}),
    "checkpoints of another count": lambda root: root[5].update({3: b"\xff" + root[5][3][1:]}),
    "spans in reverse": points(list.reverse),
    "equal spans": points(lambda rows: rows.__setitem__(1, rows[0])),
    "nine bits": points(lambda rows: rows.__setitem__(1, (*rows[1][:2], 9))),
    "a span behind the end": points(lambda rows: rows.__setitem__(-1, (1 << 40, rows[-1][1], 0))),
    "a span before the start": points(lambda rows: rows.__setitem__(0, (-1, 0, 0))),
    "a first span that is not the first": points(lambda rows: rows.__setitem__(0, (rows[0][0], 5, 0))),
    "a span of nothing that becomes much": points(lambda rows: rows.__setitem__(1, (rows[0][0] + 1, rows[1][1], 0))),
    "an entry behind the end": first_entry(f2=Scalar("q", 1 << 50)),
    "a negative place": first_entry(f2=Scalar("q", -1)),
    "a file that overlaps": first_entry(f3=Scalar("q", 150_000)),
    "a file of negative size": first_entry(f3=Scalar("q", -1)),
    "an absurd file": first_entry(f3=Scalar("q", 1 << 62)),
    "an unknown type": first_entry(f1=b"socket"),
    "a link to nowhere": first_entry(f1=b"hardlink", f4=b"nowhere"),
    "a symlink without target": first_entry(f1=b"symlink", f4=b""),
    "a device out of range": first_entry(f1=b"char", f11=Scalar("q", -1)),
    "an impossible owner": first_entry(f6=Scalar("I", 0xFFFFFFFF)),
    "no time": first_entry(f10=b"yesterday"),
    "an impossible time": first_entry(f10=b"2024-13-01T00:00:00Z"),
    "a path with NUL": first_entry(f0=b"a\0b"),
    "a long path": first_entry(f0=b"a/" * 5000),
    "a sparse file": first_entry(f13=[{0: b"GNU.sparse.major", 1: b"1"}]),
    "an xattr that is no base64": first_entry(f13=[{0: b"LIBARCHIVE.xattr.user.a", 1: b"a"}]),
    "too many records": first_entry(f13=[{0: b"a", 1: b"b"}] * 10_001),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_true_is_refused(sample: Sample, name: str) -> None:
    with pytest.raises(FormatError):
        read_ztoc(sample.changed(HOSTILE[name]), sample.blob)


def test_another_layers_ztoc_is_refused(sample: Sample) -> None:
    with pytest.raises(FormatError, match="of a blob of"):
        read_ztoc(sample.built.data, sample.blob + b"\0")


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", bytes(100), b"\xff" * 100, struct.pack("<Ii", 4, 1 << 20), struct.pack("<IiHH", 4, -4, 0xFFFF, 4)],
)
def test_what_is_no_flatbuffer(data: bytes) -> None:
    with pytest.raises(FormatError):
        Ztoc(data, digest_of(b""), 0)


def test_a_flatbuffer_gives_no_more_than_it_is_worth() -> None:
    body = struct.pack("<I", 5000) + bytes(5000)
    count = 500
    # root table, vtable behind it; then a vector of references that all lead to one table; then its string.
    root = struct.pack("<IiI", 4, -8, 12)
    vtable = struct.pack("<HHH2x", 6, 8, 4)
    vector_at = len(root) + len(vtable)
    table_at = vector_at + 4 + 4 * count
    vector = struct.pack("<I", count) + b"".join(struct.pack("<I", table_at - (vector_at + 4 + 4 * n)) for n in range(count))
    table = struct.pack("<iI", table_at - len(root), 4)
    data = root + vtable + vector + table + body
    data = data[:8] + struct.pack("<I", vector_at - 8) + data[12:]
    with pytest.raises(FormatError, match="many times over"):
        [found.string(0) for found in FlatBuffer(data).root().tables(0)]


# --- discovery ------------------------------------------------------------------------------------------------------------


def facts_of(sample: Sample, index: bytes, **changes: Any) -> LayerFacts:
    facts = LayerFacts(
        digest_of(sample.blob), len(sample.blob), GZIP, manifest_annotations={soci.INDEX_DIGEST: digest_text(index)}
    )
    return attrs.evolve(facts, **changes)


def converse(layer_format: soci.SociFormat, facts: LayerFacts, answers: dict[object, bytes]) -> LayerIndex:
    reader = layer_format.read_index(facts)
    answer: Any = None
    while True:
        try:
            want = reader.send(answer)
        except StopIteration as stop:
            index: LayerIndex = stop.value
            return index
        answer = answers.get(want, b"")


def answers_of(sample: Sample, index: bytes) -> dict[object, bytes]:
    ztoc = sample.built.data
    return {
        ManifestBytes(digest_of(index)): index,
        BlobRange(0, len(ztoc), blob=digest_of(ztoc), blob_size=len(ztoc)): ztoc,
        BlobRange(0, min(4096, len(sample.blob))): sample.blob[:4096],
    }


def test_the_index_that_the_manifest_names(sample: Sample) -> None:
    index = build_index({"sha256:" + "0" * 64: b"?", digest_text(sample.blob): sample.built.data})
    facts = facts_of(sample, index)
    assert soci.FORMAT.recognises(facts)
    found = converse(soci.FORMAT, facts, answers_of(sample, index))
    assert found.format == "soci"
    assert found.entry_count == 4
    assert not soci.FORMAT.recognises(attrs.evolve(facts, manifest_annotations={}))
    assert not soci.FORMAT.recognises(attrs.evolve(facts, media_type="application/vnd.oci.image.layer.v1.tar+zstd"))
    assert soci.FORMAT.recognises(attrs.evolve(facts, media_type="application/vnd.docker.image.rootfs.diff.tar.gzip"))
    assert soci.FORMAT.recognises(attrs.evolve(facts, media_type="application/vnd.oci.image.layer.v1.tar"))


def test_the_index_that_refers_to_the_image(sample: Sample) -> None:
    old = attrs.evolve(sample, built=build_ztoc(sample.blob, 64 << 10, is_old=True))
    index = build_index({digest_text(old.blob): old.built.data}, is_v1=True)
    facts = facts_of(old, index, manifest_annotations={})
    assert soci.FORMAT_V1.recognises(facts)
    listed = {
        "manifests": [
            {"artifactType": "application/vnd.example", "digest": digest_text(b"")},
            {"artifactType": soci.INDEX_V1, "digest": digest_text(index)},
        ]
    }
    answers = answers_of(old, index)
    with pytest.raises(NoIndex, match="no SOCI index"):
        converse(soci.FORMAT_V1, facts, answers)
    with pytest.raises(NoIndex, match="no SOCI index"):
        converse(soci.FORMAT_V1, facts, {ReferrersOf(soci.INDEX_V1): b'{"manifests": []}'})
    answers[ReferrersOf(soci.INDEX_V1)] = json.dumps(listed).encode()
    assert converse(soci.FORMAT_V1, facts, answers).entry_count == 4


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{}", "no zTOC"),
        (b"[]", "no object"),
        (b"[" * 100_000, "no JSON"),
        (b'{"layers": 5}', "no zTOC"),
        (b'{"layers": [5, {"annotations": 5}]}', "no zTOC"),
    ],
)
def test_an_index_without_the_layer(sample: Sample, index: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        converse(soci.FORMAT, facts_of(sample, index), {ManifestBytes(digest_of(index)): index})
    assert isinstance(caught.value, NoIndex) == (message == "no zTOC")


def test_what_is_not_vouched_for_is_refused(sample: Sample) -> None:
    index = build_index({digest_text(sample.blob): sample.built.data})
    facts = facts_of(sample, index)
    answers = answers_of(sample, index)
    with pytest.raises(FormatError, match="does not have"):
        converse(soci.FORMAT, facts, {})
    with pytest.raises(FormatError, match="other bytes"):
        converse(soci.FORMAT, facts, {**answers, ManifestBytes(digest_of(index)): index + b" "})
    ztoc = sample.built.data
    want = BlobRange(0, len(ztoc), blob=digest_of(ztoc), blob_size=len(ztoc))
    with pytest.raises(FormatError, match="not what the SOCI index says"):
        converse(soci.FORMAT, facts, {**answers, want: ztoc[:-1] + b"?"})
    huge = json.loads(index)
    huge["layers"][0]["size"] = 1 << 40
    raw = json.dumps(huge).encode()
    with pytest.raises(FormatError, match="a blob of"):
        converse(soci.FORMAT, facts_of(sample, raw), {ManifestBytes(digest_of(raw)): raw})


@pytest.mark.parametrize(
    ("spans", "pieces"),
    [
        ([{"start_span": 3, "end_span": 3}, {"start_span": 1, "end_span": 2}, {"start_span": 2, "end_span": 3}], (4, 2, 3)),
        ([{"start_span": -5, "end_span": 1 << 62}] * 10_000, (1, 2, 3, 4, 5, 6, 7)),
        ([{"start_span": 5, "end_span": 3}], ()),
        ([{"start_span": "1", "end_span": 3}], None),
    ],
)
def test_spans_to_fetch_first(sample: Sample, spans: list[Any], pieces: tuple[int, ...] | None) -> None:
    hints = json.dumps({"version": "1.0", "prefetch_spans": spans}).encode()
    document = json.loads(build_index({digest_text(sample.blob): sample.built.data}))
    annotations = document["layers"][0]["annotations"]
    document["layers"].insert(
        0, {"mediaType": soci.PREFETCH, "digest": digest_text(hints), "size": len(hints), "annotations": annotations}
    )
    index = json.dumps(document).encode()
    answers = answers_of(sample, index)
    answers[BlobRange(0, len(hints), blob=digest_of(hints), blob_size=len(hints))] = hints
    found = converse(soci.FORMAT, facts_of(sample, index), answers)
    assert len(found.pieces) == 8
    assert found.prefetch_pieces == (pieces or ())
    assert len(found.warnings) == (pieces is None)


def test_the_builder_of_these_tests_agrees_with_itself(sample: Sample) -> None:
    found, tar = find_points(sample.blob, 64 << 10)
    assert tar == gzip.decompress(sample.blob)
    assert len(pack_points(found, 64 << 10)) == 12 + 32785 * len(found)
    assert len(pack_points(found, 64 << 10, is_old=True)) == 12 + 32785 * (len(found) - 1)
