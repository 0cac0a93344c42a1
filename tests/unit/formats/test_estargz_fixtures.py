"""eStargz images made by the reference tools, down to the last attribute and byte."""

from typing import Any

import pytest

from agent.formats import estargz
from agent.formats.members import PieceDecoder
from agent.formats.model import ChunkTable, FormatError, PieceTable, digest_of

TAGS = ["esgz", "esgz-minchunk", "esgz-chunk64k"]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("layer", [1, 2])
def test_layer_equals_its_source(images: Any, tag: str, layer: int) -> None:
    fixture = images.layers(tag)[layer - 1]
    index = images.read_toc(fixture.blob, fixture.toc_digest)
    found = images.describe(index, images.read_volume(index, fixture.blob))
    truth = images.truth(layer, is_json=True)
    assert found.keys() == truth.keys()
    assert {key: value for key, value in found.items() if value != truth[key]} == {}
    assert index.warnings == ()
    assert index.prefetch_stop == 0
    assert index.codec == "gzip"


@pytest.mark.parametrize("layer", [1, 2])
def test_external_toc(images: Any, layer: int) -> None:
    fixture = images.layers("esgz-exttoc")[layer - 1]
    (toc_layer,) = (
        toc
        for toc in images.layers("esgz-exttoc-esgztoc")
        if toc.annotations["containerd.io/snapshot/stargz/layer.digest"] == digest_of(fixture.blob)
    )
    footer = estargz.parse_footer(fixture.blob[-200:], len(fixture.blob))
    assert footer == estargz.Footer(estargz.EXTERNAL, 46)
    toc = estargz.unpack_toc(toc_layer.blob, fixture.toc_digest)
    index = estargz.parse_toc(toc, blob_size=len(fixture.blob), toc_offset=footer.toc_offset, toc_digest=fixture.toc_digest)
    assert images.describe(index, images.read_volume(index, fixture.blob)) == images.truth(layer, is_json=True)
    assert index.pieces.index_piece == -1
    assert index.pieces.blob_size == len(fixture.blob)


@pytest.mark.parametrize("tag", TAGS)
def test_pieces_cover_the_blob_and_hold_whole_members(images: Any, tag: str) -> None:
    blob = images.layers(tag)[0].blob
    index = images.read_toc(blob, images.layers(tag)[0].toc_digest)
    pieces, chunks = index.pieces, index.chunks
    assert pieces.starts[0] == 0
    assert pieces.starts[-1] == len(blob)
    assert list(pieces.starts) == sorted(set(pieces.starts))
    assert pieces.index_piece == len(pieces) - 1
    assert not pieces.chunks_of(pieces.index_piece)
    for piece in range(len(pieces)):
        start, stop = pieces.extent(piece)
        for number in pieces.chunks_of(piece):
            assert start <= chunks.blob_offset[number]
            assert chunks.blob_offset[number] + chunks.blob_length[number] <= stop
            assert pieces.piece_of_chunk(number) == piece
        if piece != pieces.index_piece and len({chunks.blob_offset[n] for n in pieces.chunks_of(piece)}) > 1:
            assert stop - start <= 1 << 20
    assert len(pieces) > 3


def test_tables_survive_the_disk(images: Any) -> None:
    fixture = images.layers("esgz-minchunk")[0]
    index = images.read_toc(fixture.blob, fixture.toc_digest)
    assert ChunkTable.from_bytes(index.chunks.to_bytes()).to_bytes() == index.chunks.to_bytes()
    assert PieceTable.from_bytes(index.pieces.to_bytes()) == index.pieces


def test_equal_files_share_one_extent(images: Any) -> None:
    fixture = images.layers("esgz")[0]
    index = images.read_toc(fixture.blob, fixture.toc_digest)
    sizes = index.root.children[b"sizes"].children
    duplicates = index.root.children[b"dup"].children
    assert duplicates[b"a"].volume_offset == sizes[b"1048576"].volume_offset
    assert duplicates[b"a"] is not sizes[b"1048576"]
    links = index.root.children[b"links"].children
    assert links[b"hard0"] is links[b"hard1"]
    assert index.chunks.volume_offset[duplicates[b"a"].first_chunk] == duplicates[b"a"].volume_offset


def test_a_flipped_byte_is_noticed_wherever_it_is(images: Any) -> None:
    fixture = images.layers("esgz-minchunk")[1]
    index = images.read_toc(fixture.blob, fixture.toc_digest)
    first, last = index.chunks.blob_offset[0], index.chunks.blob_offset[len(index.chunks) - 1]
    end = last + index.chunks.blob_length[len(index.chunks) - 1]
    good = PieceDecoder(index.chunks, "gzip", 0, len(index.chunks), 0).feed(fixture.blob)
    ignored = set()
    for at in range(first, end):
        bad = bytearray(fixture.blob[:end])
        bad[at] ^= 0x10
        decoder = PieceDecoder(index.chunks, "gzip", 0, len(index.chunks), 0)
        try:
            assert decoder.feed(bad) == good
        except FormatError:
            continue
        ignored.add(at - first)
    # gzip has no check over its header's time, flags and system, nor do readers look at what lies behind a member's end.
    assert len(ignored) < 40


def test_a_wrong_toc_digest_is_refused(images: Any) -> None:
    blob = images.layers("esgz")[1].blob
    with pytest.raises(FormatError, match="manifest says"):
        images.read_toc(blob, digest_of(b""))
