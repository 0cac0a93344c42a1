"""The disk is full: an errno for the writer, nothing marked, and the store goes on as soon as there is room."""

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from agent.errors import StoreError
from agent.store import StoredLayer, open_store
from tests.store_samples import Sample, make_sample


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    mountpoint = tmp_path / "disk"
    mountpoint.mkdir()
    if request.param == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(mountpoint)]
    else:
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(8 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)], check=True, timeout=20)
        command = ["mount", "-o", "loop", str(image), str(mountpoint)]
    subprocess.run(command, check=True, timeout=20)
    try:
        yield mountpoint / "store"
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True, timeout=20)


def write_until_full(layer: StoredLayer, sample: Sample) -> tuple[int, StoreError]:
    """The piece at which the disk was full, and what the writer got."""
    for piece in range(len(layer.pieces)):
        start, _stop = layer.pieces.extent(piece)
        try:
            layer.write_blob(start, sample.blob_of(piece))
            for chunk in layer.pieces.chunks_of(piece):
                layer.write_chunk(chunk, sample.contents[chunk])
        except StoreError as exc:
            return piece, exc
        layer.mark_piece(piece)
    pytest.fail("the disk did not fill")


def assert_right(layer: StoredLayer, sample: Sample) -> int:
    present = layer.present_chunks()
    assert all(layer.read_chunk(number) == sample.contents[number] for number in present)
    held = [piece for piece in range(len(layer.pieces)) if layer.has_piece(piece)]
    assert all(layer.read_blob(*layer.pieces.extent(piece)) == sample.blob_of(piece) for piece in held)
    return len(present)


async def test_full_disk(small_disk: Path) -> None:
    victim, big = (
        make_sample([[65536]] * 8, seed=1, piece_bytes=65536),
        make_sample([[65536] * 3] * 50, seed=2, piece_bytes=65536),
    )
    async with open_store(small_disk, quota_bytes=None) as store:
        await store.pin(big.digest, "test")
        await store.pin(victim.digest, "test")
        old = await store.create_layer(victim.digest, victim.index, victim.meta, {})
        for piece in range(len(old.pieces)):
            old.write_blob(old.pieces.starts[piece], victim.blob_of(piece))
            for chunk in old.pieces.chunks_of(piece):
                old.write_chunk(chunk, victim.contents[chunk])
            old.mark_piece(piece)
        layer = await store.create_layer(big.digest, big.index, big.meta, {})
        piece, error = write_until_full(layer, big)
        assert error.errno == errno.ENOSPC
        assert not layer.has_piece(piece)
        before = assert_right(layer, big)
        assert before > 0
        for attempt in range(3):
            other = make_sample([[100] * 20], seed=attempt)
            with pytest.raises(StoreError):
                await store.create_layer(other.digest, other.index, bytes(1 << 22), {})
        with pytest.raises(StoreError) as caught:
            await store.put_document("manifest", "large", bytes(4 << 20))
        assert caught.value.errno == errno.ENOSPC
        assert list((small_disk / "temporary").iterdir()) == []

        await store.unpin(victim.digest, "test")  # now there is something to evict: the store makes room by itself
        with trio.fail_after(10):
            while True:
                again, error = write_until_full(layer, big)
                # A note gives a block or two back when it is made, which may be all that the piece lacked.
                if again > piece and not (old.complete and any(old.possession())):
                    break  # its blob goes first; that may have been enough
                await trio.sleep(0.02)  # the loop must run for the store to evict
        assert assert_right(layer, big) > before
        assert await store.get_document("manifest", "large") is None
    async with open_store(small_disk, quota_bytes=None) as store:
        reopened = store.layer(big.digest)
        assert reopened is not None
        assert_right(reopened, big)
