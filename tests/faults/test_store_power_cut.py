"""After a power cut nothing is served on trust, and nothing that survived is fetched again."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.formats.model import BLOCK_SIZE, Digest
from agent.store import Store, StoredLayer, open_store
from fsmount.bitmap import HEADER_SIZE, Bitmap
from tests.store_samples import Sample, usual_sample


def copy(path: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--sparse=always", str(path), str(target)], check=True, timeout=20)


async def make_store(path: Path, cut: Path, sample: Sample, *, checkpoint: bool = True) -> None:
    """A store in boot "one", and in `cut` what the disk holds if the power fails in the middle of it."""
    async with open_store(path, quota_bytes=None, boot_id="one") as store:
        layer = await store.create_layer(sample.digest, sample.index, sample.meta, {})
        for piece in range(len(layer.pieces)):
            layer.write_blob(layer.pieces.starts[piece], sample.blob_of(piece))
            for chunk in layer.pieces.chunks_of(piece):
                layer.write_chunk(chunk, sample.contents[chunk])
            layer.mark_piece(piece)
        if checkpoint:
            await store.checkpoint()
        copy(path, cut)


def root_of(path: Path, digest: Digest) -> Path:
    return path / "layers" / digest.removeprefix("sha256:")


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def served_blocks(layer: StoredLayer) -> set[int]:
    blocks = Bitmap.open(layer.blocks_path)
    served = {block for block in range(blocks.bits) if blocks.test(block)}
    blocks.close()
    return served


def the_layer(store: Store) -> StoredLayer:
    (layer,) = store.layers()
    return layer


@pytest.mark.parametrize("lost_map", [False, True])
async def test_good_chunks_are_kept_and_bad_ones_never_served(tmp_path: Path, lost_map: bool) -> None:
    sample = usual_sample()
    store_path, cut = tmp_path / "store", tmp_path / "cut"
    await make_store(store_path, cut, sample)
    bad = 6
    root = root_of(cut, sample.digest)
    flip(root / "data", sample.index.chunks.volume_offset[bad] + 1)
    flip(root / "blob", sample.index.pieces.starts[1] + 30)
    if lost_map:  # pages of the live maps that the kernel had not written yet
        for name in ("chunks.map", "blocks.map", "pieces.map"):
            with (root / name).open("r+b") as file:
                file.seek(HEADER_SIZE)
                file.write(bytes((root / name).stat().st_size - HEADER_SIZE))
    async with open_store(cut, quota_bytes=None, boot_id="two", settle_in_background=False) as store:
        layer = the_layer(store)
        assert served_blocks(layer) == set()
        assert not any(layer.has_chunk(number) for number in range(len(layer.chunks)))
        assert layer.possession() == bytes(len(layer.possession()))
        assert all(layer.is_doubtful(number) for number in range(len(layer.chunks)))
        assert layer.verify_chunk(0)
        assert layer.has_chunk(0)
        assert layer.read_chunk(0) == sample.contents[0]
        assert 0 in served_blocks(layer)
        assert not layer.verify_chunk(bad)
        assert not layer.is_doubtful(bad)
        report = await store.settle()
        assert [spot.kind for spot in report.bad] == ["piece"]  # the chunk was judged above
        assert not layer.has_doubts
        assert layer.missing_chunks(0, layer.volume_size) == [bad]
        assert [piece for piece in range(len(layer.pieces)) if not layer.has_piece(piece)] == [1]
        start = sample.index.chunks.volume_offset[bad] // BLOCK_SIZE
        stop = -(-(sample.index.chunks.volume_offset[bad] + len(sample.contents[bad])) // BLOCK_SIZE)
        assert served_blocks(layer) == set(range(layer.volume_size // BLOCK_SIZE)) - set(range(start, stop))
        layer.write_chunk(bad, sample.contents[bad])
        assert layer.complete
        assert [layer.read_chunk(number) for number in range(len(layer.chunks))] == list(sample.contents)


async def test_doubt_survives_being_killed_before_it_is_settled(tmp_path: Path) -> None:
    sample = usual_sample()
    await make_store(tmp_path / "store", tmp_path / "cut", sample)
    async with open_store(tmp_path / "cut", quota_bytes=None, boot_id="two", settle_in_background=False) as store:
        layer = the_layer(store)
        assert layer.verify_chunk(0)
        copy(tmp_path / "cut", tmp_path / "killed")
    for boot, first_is_here in (("two", True), ("three", False)):
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        shutil.copytree(tmp_path / "killed", tmp_path / "again")
        async with open_store(tmp_path / "again", quota_bytes=None, boot_id=boot, settle_in_background=False) as store:
            layer = the_layer(store)
            assert layer.has_chunk(0) == first_is_here
            assert layer.is_doubtful(0) != first_is_here
            assert all(layer.is_doubtful(number) for number in range(1, 8))
            assert len(layer.doubtful_pieces()) == len(layer.pieces)
            report = await store.settle()
            assert report.bad == ()
            assert layer.complete
            assert layer.read_blob(0, layer.blob_size) == sample.blob


async def test_data_that_never_reached_the_disk_is_forgotten(tmp_path: Path) -> None:
    sample = usual_sample()
    await make_store(tmp_path / "store", tmp_path / "cut", sample, checkpoint=False)
    root = root_of(tmp_path / "cut", sample.digest)
    for name in ("data", "blob"):
        size = (root / name).stat().st_size
        (root / name).write_bytes(b"")
        with (root / name).open("r+b") as file:
            file.truncate(size)
    told: list[bool] = []
    async with open_store(
        tmp_path / "cut",
        quota_bytes=None,
        boot_id="two",
        settle_in_background=False,
        on_pieces=lambda *told_of: told.append(told_of[2]),
    ) as store:
        layer = the_layer(store)
        report = await store.settle()
        assert len(report.bad) == report.chunks + report.pieces > 0
        assert layer.missing_chunks(0, layer.volume_size) == list(range(len(sample.contents) - 4))
        assert served_blocks(layer) == set()
        assert told == []


async def test_a_clean_end_leaves_no_doubt(tmp_path: Path) -> None:
    sample = usual_sample()
    await make_store(tmp_path / "store", tmp_path / "cut", sample)
    async with open_store(tmp_path / "store", quota_bytes=None, boot_id="two", settle_in_background=False) as store:
        layer = the_layer(store)
        assert layer.complete
        assert not layer.has_doubts


async def test_a_torn_metadata_image_is_noticed(tmp_path: Path) -> None:
    sample = usual_sample()
    await make_store(tmp_path / "store", tmp_path / "cut", sample)
    flip(root_of(tmp_path / "cut", sample.digest) / "meta.erofs", 5000)
    async with open_store(tmp_path / "cut", quota_bytes=None, boot_id="two") as store:
        assert store.layers() == []


@pytest.mark.parametrize("name", ["header", "chunks.table", "pieces.table", "meta.erofs"])
async def test_a_layer_torn_before_its_first_checkpoint_is_read_anew(tmp_path: Path, name: str) -> None:
    # Its folder has its name already, but what is in a file did not reach the disk.
    sample = usual_sample()
    await make_store(tmp_path / "store", tmp_path / "cut", sample, checkpoint=False)
    (root_of(tmp_path / "cut", sample.digest) / name).write_bytes(b"")
    async with open_store(tmp_path / "cut", quota_bytes=None, boot_id="two") as store:
        assert store.layers() == []
        layer = await store.create_layer(sample.digest, sample.index, sample.meta, {})
        assert layer.missing_chunks(0, layer.volume_size) == list(range(len(sample.contents) - 4))


async def test_a_new_layer_is_durable_from_the_first_checkpoint_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[Path] = set()
    fsync = os.fsync

    def note(fd: int) -> None:
        fsync(fd)
        synced.add(Path(os.readlink(f"/proc/self/fd/{fd}")))

    monkeypatch.setattr(os, "fsync", note)
    sample = usual_sample()
    async with open_store(tmp_path / "store", quota_bytes=None, boot_id="one") as store:
        layer = await store.create_layer(sample.digest, sample.index, sample.meta, {})
        assert not any(layer.root in (path, *path.parents) for path in synced)
        await store.checkpoint()
        index = [layer.root / name for name in ("header", "chunks.table", "pieces.table", "meta.erofs")]
        assert {*index, layer.root, layer.root.parent} <= synced
