"""The store on a real file system: what goes in comes out, now and after it was opened again."""

import errno
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from agent.errors import StoreError
from agent.formats.model import BLOCK_SIZE, Digest, FormatError
from agent.store import Store, StoredLayer, open_store
from fsmount.bitmap import Bitmap
from tests.store_samples import Sample, make_sample, usual_sample


async def create(store: Store, sample: Sample) -> StoredLayer:
    return await store.create_layer(sample.digest, sample.index, sample.meta, {"image": "sample"})


def fill(layer: StoredLayer, sample: Sample) -> None:
    for piece in range(len(layer.pieces)):
        start, stop = layer.pieces.extent(piece)
        for at in range(start, stop, 65536):
            layer.write_blob(at, sample.blob[at : min(stop, at + 65536)])
        for chunk in layer.pieces.chunks_of(piece):
            layer.write_chunk(chunk, sample.contents[chunk])
        layer.mark_piece(piece)


def assert_holds(layer: StoredLayer, sample: Sample) -> None:
    assert layer.complete
    assert [layer.read_chunk(number) for number in range(len(layer.chunks))] == list(sample.contents)
    assert layer.read_blob(0, layer.blob_size) == sample.blob
    blocks = Bitmap.open(layer.blocks_path)
    assert blocks.all_set(0, blocks.bits)
    blocks.close()
    assert layer.image_path.read_bytes() == sample.meta


async def test_a_layer_is_the_same_after_reopening(tmp_path: Path) -> None:
    sample = usual_sample()
    async with open_store(tmp_path / "store", quota_bytes=None) as store:
        layer = await create(store, sample)
        assert await create(store, sample) is layer
        assert not layer.complete
        assert layer.possession() == bytes(-(-len(layer.pieces) // 8))
        fill(layer, sample)
        assert_holds(layer, sample)
        assert store.usage() >= len(sample.blob)
    async with open_store(tmp_path / "store", quota_bytes=None) as store:
        (layer,) = store.layers()
        assert store.layer(sample.digest) is layer
        assert (layer.codec, layer.extra, layer.volume_size) == ("gzip", {"image": "sample"}, sample.index.volume_size)
        assert_holds(layer, sample)
        await store.remove_layer(sample.digest)
        assert store.layer(sample.digest) is None
        with pytest.raises(StoreError, match="removed"):
            layer.read_chunk(0)
    async with open_store(tmp_path / "store", quota_bytes=None) as store:
        assert store.layers() == []


async def test_presence_by_chunk_piece_and_block(tmp_path: Path) -> None:
    sample = make_sample([[6000, 6000], [100], [4096, 10]], twins=[1])
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await create(store, sample)
        blocks = Bitmap.open(layer.blocks_path)
        assert layer.missing_chunks(0, layer.volume_size) == [0, 1, 2, 3, 4]
        layer.write_chunk(0, sample.contents[0])
        assert [blocks.test(block) for block in range(blocks.bits)] == [True, False, False, False, False, False]
        layer.write_chunk(1, sample.contents[1])
        assert [blocks.test(block) for block in range(blocks.bits)] == [True, True, True, False, False, False]
        layer.write_chunk(5, sample.contents[5])  # the twin of chunk 2
        assert layer.has_chunk(2)
        assert layer.read_chunk(2) == sample.contents[2]
        assert blocks.test(3)
        assert layer.missing_chunks(0, layer.volume_size) == [3, 4]
        assert layer.missing_chunks(2 * BLOCK_SIZE, 4 * BLOCK_SIZE) == []
        layer.forget_chunk(0)
        assert [blocks.test(block) for block in range(3)] == [False, False, True]
        with pytest.raises(StoreError, match="not in the store"):
            layer.read_chunk(0)
        blocks.close()


async def test_a_piece_needs_its_bytes(tmp_path: Path) -> None:
    sample = usual_sample()
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await create(store, sample)
        assert len(layer.pieces) > 3
        with pytest.raises(StoreError, match="before its bytes"):
            layer.mark_piece(1)
        start, stop = layer.pieces.extent(1)
        assert not layer.blob_has_data(start, stop)
        layer.write_blob(start, sample.blob_of(1))
        assert layer.blob_has_data(start, stop)
        assert layer.read_blob(start, stop) is None
        assert layer.peek_blob(start, stop) == sample.blob_of(1)
        layer.mark_piece(1)
        assert layer.read_blob(start, stop) == sample.blob_of(1)
        assert layer.read_blob(start, stop + 1) is None
        assert layer.possession()[0] == 2
        with pytest.raises(StoreError, match="blob range"):
            layer.write_blob(len(sample.blob) - 1, b"12")
        layer.forget_piece(1)
        assert layer.read_blob(start, stop) is None


@pytest.mark.parametrize("is_whole", [True, False])
async def test_the_block_map_follows_the_chunk_map_after_a_kill(tmp_path: Path, is_whole: bool) -> None:
    sample = usual_sample()
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await create(store, sample)
        fill(layer, sample)
        if not is_whole:
            layer.forget_chunk(4)
        expected = Bitmap.open(layer.blocks_path).to_bytes()
        path = layer.blocks_path
    blocks = Bitmap.open(path)  # as if the agent had died between the two maps, both ways
    blocks.clear(0, blocks.bits // 2)
    blocks.set(blocks.bits // 2, blocks.bits)
    blocks.close()
    async with open_store(tmp_path, quota_bytes=None) as store:
        blocks = Bitmap.open(path)
        assert blocks.to_bytes() == expected
        blocks.close()


async def test_an_index_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    async with open_store(tmp_path, quota_bytes=None) as store:
        for break_it in ("overlap", "outside"):
            sample = make_sample([[5000, 5000]])
            sample.index.chunks.volume_offset[1] = {"overlap": 100, "outside": 1 << 40}[break_it]
            with pytest.raises(FormatError):
                await create(store, sample)
        assert store.layers() == []
        assert list((tmp_path / "layers").iterdir()) == list((tmp_path / "temporary").iterdir()) == []


async def test_content_is_found_in_other_layers(tmp_path: Path) -> None:
    one, two = usual_sample(1), usual_sample(2)
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer, other = await create(store, one), await create(store, two)
        wanted = layer.chunks.digest(4)
        assert await store.find_chunk(wanted) is None
        layer.write_chunk(4, one.contents[4])
        with trio.fail_after(5):
            while await store.find_chunk(wanted) is None:  # filed in the background
                await trio.lowlevel.checkpoint()
        found = await store.find_chunks([bytes(32), wanted, other.chunks.digest(4)])
        assert found == [None, (layer, 4), None]
        assert not other.copy_chunk(layer, 4, 4)  # its content is another
        assert other.missing_chunks(0, other.volume_size)[4] == 4


async def test_copy_between_layers(tmp_path: Path) -> None:
    one, two = make_sample([[9000], [100]], seed=3), make_sample([[9000]], seed=3)
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer, other = await create(store, one), await create(store, two)
        layer.write_chunk(0, one.contents[0])
        assert other.copy_chunk(layer, 0, 0)
        assert other.complete
        assert other.read_chunk(0) == two.contents[0]


async def test_thirteen_thousand_chunks_are_filed_quickly(tmp_path: Path) -> None:
    sample = make_sample([[64]] * 13_000)
    async with open_store(tmp_path, quota_bytes=None) as store:
        started = time.perf_counter()
        layer = await create(store, sample)
        assert time.perf_counter() - started < 2  # a busy machine; about 0.1 s on an idle one
        with trio.fail_after(5):
            layer.write_chunk(12_999, sample.contents[12_999])
            while await store.find_chunk(layer.chunks.digest(12_999)) is None:
                await trio.lowlevel.checkpoint()


async def test_pins_and_documents_last(tmp_path: Path) -> None:
    digest = Digest("sha256:" + "0" * 64)
    async with open_store(tmp_path, quota_bytes=None) as store:
        await store.pin(digest, "one")
        await store.pin(digest, "two")
        await store.unpin(digest, "one")
        await store.put_document("manifest", "a", b"1")
        await store.put_document("manifest", "a", b"2")
        await store.put_document("config", "b", b"3")
    async with open_store(tmp_path, quota_bytes=None) as store:
        assert store.pins(digest) == {"two"}
        assert await store.get_document("manifest", "a") == b"2"
        assert await store.get_document("manifest", "b") is None
        assert await store.list_documents("config") == ["b"]
        await store.delete_document("config", "b")
        assert await store.list_documents("config") == []


async def test_eviction_keeps_the_store_below_its_quota(tmp_path: Path) -> None:
    samples = [usual_sample(seed) for seed in range(4)]
    lost: list[tuple[Digest, bool]] = []
    quota = 4 * (len(samples[0].blob) + samples[0].index.volume_size)
    async with open_store(
        tmp_path, quota_bytes=quota, on_pieces=lambda digest, _pieces, held: lost.append((digest, held))
    ) as store:
        layers = [await create(store, sample) for sample in samples]
        await store.pin(samples[0].digest, "container")
        for at, (layer, sample) in enumerate(zip(layers, samples, strict=True)):
            fill(layer, sample)
            layer.last_used_s = float(at)
        usage = store.usage()
        freed = await store.evict(sum(layer.part_bytes()[0] for layer in layers[1:]) + 1)
        assert store.usage() == usage - freed
        assert_holds(layers[0], samples[0])
        assert all(layer.complete for layer in layers[2:])
        assert not layers[1].complete
        assert lost == [(samples[number].digest, False) for number in (1, 2, 3)]
        assert layers[1].disk_bytes() == 0
        blocks = Bitmap.open(layers[1].blocks_path)
        assert blocks.count() == 0
        assert blocks.generation > 0
        blocks.close()
        fill(layers[1], samples[1])
        assert_holds(layers[1], samples[1])


async def test_what_is_being_written_is_not_evicted(tmp_path: Path) -> None:
    sample = usual_sample()
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await create(store, sample)
        start, stop = layer.pieces.extent(2)
        layer.write_blob(start, sample.blob_of(2)[:-10])
        layer.write_blob(0, sample.blob_of(0))
        layer.mark_piece(0)
        await store.evict(1 << 40)
        layer.write_blob(stop - 10, sample.blob_of(2)[-10:])
        layer.mark_piece(2)
        assert layer.read_blob(start, stop) == sample.blob_of(2)
        assert not layer.has_piece(0)
        assert layer.peek_blob(0, 10) == bytes(10)


async def test_quota_is_kept_without_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.store.store.QUOTA_LOOK_BYTES", 1 << 16)
    samples = [usual_sample(seed) for seed in range(3)]
    async with open_store(tmp_path, quota_bytes=1 << 19) as store:
        with trio.fail_after(10):
            for sample in samples:
                fill(await create(store, sample), sample)
                while store.usage() > 1 << 19:  # noqa: ASYNC110  # the store has no event for it
                    await trio.sleep(0.01)


async def test_two_agents_cannot_share_a_store(tmp_path: Path) -> None:
    child = (
        "import sys, trio; from pathlib import Path; from agent.store import open_store\n"
        "async def main():\n"
        "    async with open_store(Path(sys.argv[1]), quota_bytes=None):\n"
        "        print('open', flush=True); await trio.to_thread.run_sync(sys.stdin.read)\n"
        "trio.run(main)"
    )
    with subprocess.Popen(  # noqa: ASYNC220  # takes no time worth a thread
        [sys.executable, "-c", child, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() not in {b"open", b""}:
            pass
        with pytest.raises(StoreError, match=f"process {process.pid}") as caught:
            async with open_store(tmp_path, quota_bytes=None):
                pytest.fail("opened twice")
        assert caught.value.errno == errno.EBUSY
        process.communicate(timeout=20)
    async with open_store(tmp_path, quota_bytes=None) as store:
        assert store.layers() == []


async def test_errors_of_the_block_are_not_wrapped(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="own"):
        async with open_store(tmp_path, quota_bytes=None):
            raise KeyError("own")


FILES = [
    "header",
    "chunks.table",
    "pieces.table",
    "blocks.map",
    "chunks.map",
    "pieces.map",
    "chunks.doubt",
    "data",
    "blob",
    "meta.erofs",
]
DAMAGES = [(name, damage) for name in FILES for damage in ("missing", "truncated", "longer", "directory")]
DAMAGES += [(name, "garbage") for name in FILES[:-3]]  # garbage in data is found by a scrub, not by opening


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
async def test_a_broken_layer_is_set_aside(tmp_path: Path, name: str, damage: str) -> None:
    good, bad = usual_sample(1), usual_sample(2)
    async with open_store(tmp_path, quota_bytes=None) as store:
        for sample in (good, bad):
            fill(await create(store, sample), sample)
    path = tmp_path / "layers" / bad.digest.removeprefix("sha256:") / name
    size = path.stat().st_size
    if damage == "missing":
        path.unlink()
    elif damage == "directory":
        path.unlink()
        path.mkdir()
    elif damage == "garbage":
        path.write_bytes(b"\xa5" * size)
    else:
        os.truncate(path, size // 2 if damage == "truncated" else size + 4096)
    async with open_store(tmp_path, quota_bytes=None) as store:
        assert store.layer(bad.digest) is None
        layer = store.layer(good.digest)
        assert layer is not None
        assert_holds(layer, good)
        again = await create(store, bad)
        fill(again, bad)
        assert_holds(again, bad)


async def test_a_broken_catalogue_is_made_again(tmp_path: Path) -> None:
    sample = usual_sample()
    async with open_store(tmp_path, quota_bytes=None) as store:
        fill(await create(store, sample), sample)
    (tmp_path / "catalogue.sqlite").write_bytes(b"\xa5" * 65536)
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = store.layer(sample.digest)
        assert layer is not None
        assert_holds(layer, sample)
        with trio.fail_after(5):
            while await store.find_chunk(hashlib.sha256(sample.contents[0]).digest()) is None:
                await trio.lowlevel.checkpoint()
