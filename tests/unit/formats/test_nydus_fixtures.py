"""Nydus images made by the format's own tools, down to the last attribute and byte."""

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import pytest

from agent.formats.members import PieceDecoder
from agent.formats.model import BlobPart, ChunkTable, FormatError, LayerIndex, PieceTable
from agent.formats.nydus import FORMAT
from agent.formats.nydus.blob_toc import read_toc
from agent.formats.nydus.packaging import unpack_layer
from agent.formats.opening import LayerFacts
from tests.nydus_images import Repository, facts_of, read_blobs, read_truth, read_volume, replace_bootstrap

CODECS = {
    "nydus-v6-zstd": ("nydus-v6", "zstd/raw"),
    "nydus-v6-lz4": ("nydus-v6", "lz4/raw"),
    "nydus-v6-none": ("nydus-v6", "raw"),
    "nydus-v6-batch": ("nydus-v6", "zstd/raw"),
    "nydus-v6-prefetch": ("nydus-v6", "zstd/raw"),
    "nydus-v5-zstd": ("nydus-v5", "zstd/raw"),
    "nydus-v5-lz4": ("nydus-v5", "lz4/raw"),
    "nydus-zran": ("nydus-zran", "deflate"),
}
TAGS = list(CODECS)


@pytest.fixture(scope="module")
def blobs(shared_fixtures: Path) -> dict[str, bytes]:
    return read_blobs(shared_fixtures)


@pytest.fixture(scope="module")
def truth(shared_fixtures: Path) -> dict[str, dict[str, Any]]:
    return read_truth(shared_fixtures)


def facts(images: Any, tag: str) -> LayerFacts:
    return facts_of(images.layers(tag))


def drive(images: Any, blobs: dict[str, bytes], tag: str) -> tuple[LayerIndex, Repository]:
    repository = Repository(blobs)
    return repository.drive(facts(images, tag)), repository


@pytest.mark.parametrize("tag", TAGS)
def test_image_equals_its_source(images: Any, blobs: dict[str, bytes], truth: dict[str, Any], tag: str) -> None:
    index, repository = drive(images, blobs, tag)
    found = images.describe(index, read_volume(index, repository.splice(index)))
    assert found.keys() == truth.keys()
    assert {key: value for key, value in found.items() if value != truth[key]} == {}
    assert (index.format, index.codec) == CODECS[tag]
    assert index.warnings == ()
    assert index.chunks.digester == ("sha256" if tag == "nydus-zran" else "blake3")
    assert index.entry_count == len(truth) - 1
    assert len(repository.wants) == 1  # all tables are in the bootstrap's own layer


@pytest.mark.parametrize("tag", TAGS)
def test_spliced_blob(images: Any, blobs: dict[str, bytes], tag: str) -> None:
    index, _ = drive(images, blobs, tag)
    pieces, chunks, own = index.pieces, index.chunks, facts(images, tag)
    assert index.parts[-1] == BlobPart(own.digest, own.size)
    assert pieces.index_piece == len(pieces) - 1
    assert pieces.extent(pieces.index_piece) == (pieces.blob_size - own.size, pieces.blob_size)
    ends = {0}
    for part in index.parts:
        ends.add(max(ends) + part.size)
    assert max(ends) == pieces.blob_size
    assert ends <= set(pieces.starts)
    assert list(pieces.starts) == sorted(set(pieces.starts))
    order = list(zip(chunks.blob_offset, chunks.inner_offset, chunks.volume_offset, strict=True))
    assert all(a < b for a, b in pairwise(order))
    for piece in range(len(pieces) - 1):
        numbers = pieces.chunks_of(piece)
        assert numbers
        if len({chunks.blob_offset[number] for number in numbers}) > 1:
            assert pieces.starts[piece + 1] - pieces.starts[piece] <= 1 << 20
    assert ChunkTable.from_bytes(chunks.to_bytes()).to_bytes() == chunks.to_bytes()
    assert PieceTable.from_bytes(pieces.to_bytes()) == pieces


@pytest.mark.parametrize("tag", TAGS)
def test_only_bootstrap_layers_are_recognised(images: Any, tag: str) -> None:
    last = facts(images, tag)
    assert FORMAT.recognises(last)
    for layer in last.siblings[:-1]:
        assert not FORMAT.recognises(attrs.evolve(layer, siblings=last.siblings))
    assert not FORMAT.recognises(attrs.evolve(last, annotations={}))


def test_prefetch_table_gives_pieces(images: Any, blobs: dict[str, bytes]) -> None:
    assert drive(images, blobs, "nydus-v6-prefetch")[0].prefetch_pieces != ()
    for tag in ("nydus-v6-zstd", "nydus-v5-zstd"):  # the root, which says nothing
        assert drive(images, blobs, tag)[0].prefetch_pieces == ()


def test_tables_are_read_from_the_blobs_where_no_copy_is_beside_the_bootstrap(
    images: Any, blobs: dict[str, bytes], truth: dict[str, Any]
) -> None:
    for tag, wants in (("nydus-v6-batch", 3), ("nydus-zran", 3)):
        stripped, repository = strip(images, blobs, tag)
        index = repository.drive(stripped)
        found = images.describe(index, read_volume(index, repository.splice(index)))
        assert found == truth
        assert len(repository.wants) == wants


def strip(images: Any, blobs: dict[str, bytes], tag: str) -> tuple[LayerFacts, Repository]:
    """The image with nothing but the bootstrap in its bootstrap layer."""
    last = facts(images, tag)
    return replace_bootstrap(last, blobs, unpack_layer(blobs[last.digest]).bootstrap)


def test_digests_in_the_blob(images: Any, blobs: dict[str, bytes], truth: dict[str, Any]) -> None:
    """A bootstrap without a chunk table takes digests from the blobs, if it vouches for their TOC."""
    last = facts(images, "nydus-zran")
    bootstrap = bytearray(unpack_layer(blobs[last.digest]).bootstrap)
    struct.pack_into("<QQ", bootstrap, 1152 + 24, 0, 0)
    changed, repository = replace_bootstrap(last, blobs, bytes(bootstrap))
    index = repository.drive(changed)
    assert images.describe(index, read_volume(index, repository.splice(index))) == truth
    bootstrap[4096 + 136] ^= 1  # the digest of the first blob's TOC
    changed, repository = replace_bootstrap(last, blobs, bytes(bootstrap))
    with pytest.raises(FormatError, match="does not vouch"):
        repository.drive(changed)


@pytest.mark.parametrize("tag", ["nydus-v6-zstd", "nydus-v6-batch", "nydus-v5-lz4", "nydus-zran"])
def test_bootstrap_inline_in_a_blob(images: Any, blobs: dict[str, bytes], tag: str) -> None:
    last = facts(images, tag)
    data = attrs.evolve(last.siblings[1], siblings=last.siblings[:2])
    assert FORMAT.recognises(data)
    repository = Repository(blobs)
    index = repository.drive(data)
    found = images.describe(index, read_volume(index, repository.splice(index)))
    truth = images.truth(2, is_json=False)
    assert {key: entry["type"] for key, entry in found.items()} == {key: entry["type"] for key, entry in truth.items()}
    assert {key: entry.get("sha256") for key, entry in found.items()} == {
        key: entry.get("sha256") for key, entry in truth.items()
    }
    assert index.parts[-1] == BlobPart(data.digest, data.size)
    assert [part.digest for part in index.parts[:-1]] == [data.annotations.get("containerd.io/snapshot/nydus-ref", data.digest)]


def test_toc_of_a_blob(images: Any) -> None:
    blob = images.layers("nydus-zran")[0].blob
    toc = read_toc(blob[-4096:], len(blob))
    assert toc is not None
    assert list(toc.parts) == ["blob.meta", "blob.meta.header", "blob.digest", "image.boot"]
    assert read_toc(bytes(4096), 4096) is None


@pytest.mark.parametrize("tag", TAGS)
def test_pieces_are_decoded_each_on_its_own(images: Any, blobs: dict[str, bytes], tag: str) -> None:
    index, repository = drive(images, blobs, tag)
    blob, seen = repository.splice(index), []
    for piece in range(len(index.pieces)):
        start, stop = index.pieces.extent(piece)
        numbers = index.pieces.chunks_of(piece)
        decoder = PieceDecoder(index.chunks, index.codec, numbers.start, numbers.stop, start, index.members)
        for at in range(start, stop, 50_000):
            seen += [number for number, _ in decoder.feed(blob[at : min(stop, at + 50_000)])]
        assert decoder.is_complete
    assert seen == list(range(len(index.chunks)))


def root_entries(bootstrap: bytes) -> dict[bytes, int]:
    """Numbers of the inodes in a v6 bootstrap's root, by name."""
    (meta,), (nid,) = struct.unpack_from("<I", bootstrap, 1024 + 40), struct.unpack_from("<H", bootstrap, 1024 + 14)
    root = (meta << 12) + 32 * nid
    (layout,), (size,), (block,) = (
        struct.unpack_from(code, bootstrap, root + at) for code, at in (("<H", 0), ("<Q", 8), ("<I", 16))
    )
    start = root + 64 if layout == 5 else block << 12
    (names,) = struct.unpack_from("<H", bootstrap, start + 8)
    entries = [struct.unpack_from("<QH", bootstrap, at) for at in range(start, start + names, 12)]
    stops = [*(at for _, at in entries[1:]), size]
    return {bootstrap[start + at : start + stop]: number for (number, at), stop in zip(entries, stops, strict=True)}


def test_prefetch_of_a_directory_means_all_below_it(images: Any, blobs: dict[str, bytes]) -> None:
    last = facts(images, "nydus-v6-none")
    bootstrap = bytearray(unpack_layer(blobs[last.digest]).bootstrap)
    (table,) = struct.unpack_from("<Q", bootstrap, 1152 + 40)
    struct.pack_into("<I", bootstrap, table, root_entries(bytes(bootstrap))[b"sizes"])
    changed, repository = replace_bootstrap(last, blobs, bytes(bootstrap))
    index = repository.drive(changed)
    files = [inode for inode in index.root.children[b"sizes"].children.values() if inode.size]
    wanted = [
        index.pieces.piece_of_chunk(number)
        for inode in files
        for number in index.chunks.overlapping(inode.volume_offset, inode.volume_offset + inode.size)
    ]
    assert index.prefetch_pieces == tuple(dict.fromkeys(wanted))
    assert 2 < len(index.prefetch_pieces) < len(index.pieces) - 2
