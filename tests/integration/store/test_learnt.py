"""Chunks of which the index does not say the digest: what was written is remembered, and only that is good later."""

from pathlib import Path

import attrs
import pytest

from agent.formats.model import ChunkTable, FormatError, digest_of
from agent.store import Store, StoredLayer, open_store
from tests.store_samples import Sample, usual_sample


def without_digests(sample: Sample) -> Sample:
    chunks = ChunkTable.from_bytes(sample.index.chunks.to_bytes())
    chunks.digests = bytearray(len(chunks.digests))
    pieces = sample.index.pieces
    digests = b"".join(bytes.fromhex(digest_of(sample.blob_of(number))[7:]) for number in range(len(pieces)))
    return attrs.evolve(sample, index=attrs.evolve(sample.index, chunks=chunks, pieces=attrs.evolve(pieces, digests=digests)))


async def fill(store: Store, sample: Sample) -> StoredLayer:
    layer = await store.create_layer(sample.digest, sample.index, sample.meta, {})
    for number, content in enumerate(sample.contents):
        layer.write_chunk(number, content)
    return layer


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def forget_boot(state: Path) -> None:
    """Make it look as if the machine had gone down under another boot."""
    (state / "boot").write_text("00000000-0000-0000-0000-000000000000 running\n")


async def test_a_scrub_knows_what_was_written(tmp_path: Path) -> None:
    sample = without_digests(usual_sample())
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await fill(store, sample)
        assert (await store.scrub(share=1)).bad == ()
        flip(layer.data_path, layer.chunks.volume_offset[4] + 9)
        report = await store.scrub(share=1)
        assert [(spot.kind, spot.number) for spot in report.bad] == [("chunk", 4)]
        assert not layer.has_chunk(4)
        assert layer.has_chunk(3)


async def test_a_power_cut_leaves_what_was_learnt(tmp_path: Path) -> None:
    sample = without_digests(usual_sample())
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await fill(store, sample)
        layer.checkpoint()
        damaged, forgotten = layer.root / "data", layer.root / "chunks.learnt"
        place = layer.chunks.volume_offset[3]
    forget_boot(tmp_path)
    flip(damaged, place)
    with forgotten.open("r+b") as file:
        file.seek(32 * 5)
        file.write(bytes(32))
    async with open_store(tmp_path, quota_bytes=None) as store:
        (layer,) = store.layers()
        doubtful = layer.doubtful_chunks()
        assert 5 in doubtful
        assert [number for number in doubtful if not layer.verify_chunk(number)] == [3, 5]


async def test_nobody_finds_a_chunk_by_the_digest_that_it_lacks(tmp_path: Path) -> None:
    sample = without_digests(usual_sample())
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await fill(store, sample)
        assert await store.find_chunk(bytes(32)) is None
        layer.forget_chunk(1)
        assert not layer.copy_chunk(layer, 0, 1)


async def test_a_lost_file_quarantines_the_layer(tmp_path: Path) -> None:
    sample = without_digests(usual_sample())
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await fill(store, sample)
        path = layer.root / "chunks.learnt"
    path.write_bytes(b"")
    async with open_store(tmp_path, quota_bytes=None) as store:
        assert store.layers() == []
        await fill(store, sample)
    path.unlink()
    async with open_store(tmp_path, quota_bytes=None) as store:
        assert store.layers() == []


async def test_pieces_are_judged_by_their_own_digests(tmp_path: Path) -> None:
    sample = without_digests(usual_sample())
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await fill(store, sample)
        layer.write_blob(0, sample.blob)
        for number in range(len(layer.pieces)):
            layer.mark_piece(number)
        assert (await store.scrub(share=1)).bad == ()
        flip(layer.blob_path, layer.pieces.starts[1] + 7)
        report = await store.scrub(share=1)
        assert [(spot.kind, spot.number) for spot in report.bad] == [("piece", 1)]


async def test_something_must_vouch_for_a_chunk(tmp_path: Path) -> None:
    sample = without_digests(usual_sample())
    pieces = sample.index.pieces
    async with open_store(tmp_path, quota_bytes=None) as store:
        for digests in (b"", pieces.digests[:32] + bytes(32) + pieces.digests[64:]):
            index = attrs.evolve(sample.index, pieces=attrs.evolve(pieces, digests=digests))
            with pytest.raises(FormatError, match="neither piece"):
                await store.create_layer(sample.digest, index, sample.meta, {})


async def test_a_layer_with_all_digests_learns_nothing(tmp_path: Path) -> None:
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await fill(store, usual_sample())
        assert not (layer.root / "chunks.learnt").exists()
