"""A byte flipped on the disk is found, forgotten, and reported with its place."""

import hashlib
import json
from pathlib import Path

import attrs
import pytest
import trio

from agent.formats import estargz
from agent.formats.members import PieceDecoder
from agent.formats.model import LayerIndex, digest_of
from agent.formats.pieces import cut_fixed
from agent.store import BadSpot, ScrubProgress, Store, StoredLayer, open_store
from tests.store_samples import usual_sample


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x10]))


async def fill(store: Store, blob: bytes, index: LayerIndex, extra: dict[str, str | int]) -> StoredLayer:
    layer = await store.create_layer(digest_of(blob), index, b"meta" * 3000, extra)
    for piece in range(len(layer.pieces)):
        start, stop = layer.pieces.extent(piece)
        layer.write_blob(start, blob[start:stop])
        chunks = layer.pieces.chunks_of(piece)
        for number, data in PieceDecoder(index.chunks, index.codec, chunks.start, chunks.stop, start).feed(blob[start:stop]):
            layer.write_chunk(number, data)
        layer.mark_piece(piece)
    return layer


async def test_flipped_bytes_are_found(tmp_path: Path) -> None:
    sample = usual_sample()
    lost: list[tuple[list[int], bool]] = []
    progress: list[ScrubProgress] = []
    async with open_store(
        tmp_path, quota_bytes=None, on_pieces=lambda _digest, pieces, held: lost.append((list(pieces), held))
    ) as store:
        layer = await fill(store, sample.blob, sample.index, {})
        report = await store.scrub(progress.append, share=1)
        assert report.bad == ()
        assert (report.layers, report.chunks, report.pieces) == (1, len(layer.present_chunks()), len(layer.pieces))
        assert progress[-1].done_bytes == progress[-1].total_bytes == report.size_bytes
        place = layer.chunks.volume_offset[4]
        flip(layer.data_path, place + 17)
        flip(layer.blob_path, layer.pieces.starts[2] + 40)
        flip(layer.image_path, 4097)
        report = await store.scrub(share=1)
        start, stop = layer.pieces.extent(2)
        assert set(report.bad) == {
            BadSpot(layer.digest, "chunk", 4, place, layer.chunks.size[4]),
            BadSpot(layer.digest, "piece", 2, start, stop - start),
            BadSpot(layer.digest, "image", 0, 0, 12_000),
        }
        assert layer.missing_chunks(0, layer.volume_size) == [4]
        assert not layer.has_piece(2)
        assert lost == [([2], False)]
        assert not layer.repair_image(b"other")
        assert layer.repair_image(b"meta" * 3000)
        layer.write_chunk(4, sample.contents[4])
        assert (await store.scrub(share=1)).bad == ()


async def test_a_scrub_can_be_cancelled(tmp_path: Path) -> None:
    sample = usual_sample()
    async with open_store(tmp_path, quota_bytes=None) as store:
        await fill(store, sample.blob, sample.index, {})
        with trio.move_on_after(5) as scope:
            await store.scrub(lambda _progress: scope.cancel())
            pytest.fail("went on")
        assert (await store.scrub()).bad == ()


async def test_a_blob_without_random_access_is_judged_whole(tmp_path: Path) -> None:
    sample = usual_sample()
    index = attrs.evolve(sample.index, codec="whole", pieces=cut_fixed(len(sample.blob), 1 << 16))
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await store.create_layer(sample.digest, index, sample.meta, {})
        layer.write_blob(0, sample.blob)
        for number, content in enumerate(sample.contents):
            layer.write_chunk(number, content)
        for piece in range(len(layer.pieces)):
            layer.mark_piece(piece)
        assert (await store.scrub(share=1)).bad == ()
        assert layer.read_blob(0, len(sample.blob)) == sample.blob
        flip(layer.blob_path, 70_000)
        report = await store.scrub(share=1)
        assert {spot.kind for spot in report.bad} == {"piece"}
        assert layer.possession() == bytes(len(layer.possession()))
        assert layer.complete


async def test_a_real_layer_with_its_index(tmp_path: Path, shared_fixtures: Path) -> None:
    blobs = shared_fixtures / "images" / "blobs" / "sha256"
    index_json = json.loads((shared_fixtures / "images" / "index.json").read_bytes())
    (found,) = (m for m in index_json["manifests"] if m["annotations"]["org.opencontainers.image.ref.name"] == "esgz")
    manifest = json.loads((blobs / found["digest"].removeprefix("sha256:")).read_bytes())
    if "manifests" in manifest:
        manifest = json.loads((blobs / manifest["manifests"][0]["digest"].removeprefix("sha256:")).read_bytes())
    described = manifest["layers"][1]
    blob = (blobs / described["digest"].removeprefix("sha256:")).read_bytes()
    toc_digest = described["annotations"]["containerd.io/snapshot/stargz/toc.digest"]
    footer = estargz.parse_footer(blob[-100:], len(blob))
    assert footer is not None
    toc = estargz.unpack_toc(blob[footer.toc_offset : len(blob) - footer.footer_size], toc_digest)
    index = estargz.parse_toc(toc, blob_size=len(blob), toc_offset=footer.toc_offset, toc_digest=toc_digest)
    pieces = index.pieces
    start, stop = pieces.extent(pieces.index_piece)
    digests = bytes(32 * pieces.index_piece) + hashlib.sha256(blob[start:stop]).digest()  # as who reads the index notes it
    index = attrs.evolve(index, pieces=attrs.evolve(pieces, digests=digests.ljust(32 * len(pieces), b"\0")))
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await fill(store, blob, index, {})
        assert "sha256:" + hashlib.sha256(layer.read_blob(0, len(blob)) or b"").hexdigest() == layer.digest
        assert (await store.scrub(share=1)).bad == ()
        flip(layer.blob_path, footer.toc_offset + 200)
        report = await store.scrub(share=1)
        assert [(spot.kind, spot.number) for spot in report.bad] == [("piece", index.pieces.index_piece)]
