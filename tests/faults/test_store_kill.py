"""A process that writes the store is killed at random moments: nothing that is marked is wrong, nothing verified is lost."""

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.formats.model import BLOCK_SIZE
from agent.store import StoredLayer, open_store
from fsmount.bitmap import HEADER_SIZE, Bitmap
from tests.store_samples import Sample, make_sample

FILES = [[4096] * 8 + [100], [10_000] * 6, [5], [65536, 65536, 30_000], [3000] * 7] * 4
TWINS = [1, 4]

WRITER = """
import os, random, sys, trio
from pathlib import Path
from agent.store import open_store
from tests.store_samples import make_sample
from tests.faults.test_store_kill import FILES, TWINS

sys.stdout = open(os.devnull, "w")  # logs; the pipe is for what is reported

async def main(path, mode, seed):
    dice = random.Random(seed)
    sample = make_sample(FILES, twins=TWINS)

    def write(layer, pieces):
        for piece in pieces:
            start, stop = layer.pieces.extent(piece)
            if not layer.has_piece(piece):
                layer.write_blob(start, sample.blob[start:stop])
                for chunk in layer.pieces.chunks_of(piece):
                    layer.write_chunk(chunk, sample.contents[chunk])
                    os.write(1, b"c%d\\n" % chunk)
                layer.mark_piece(piece)
                os.write(1, b"p%d\\n" % piece)

    async with open_store(path, quota_bytes=None, checkpoint_interval_s=0.02) as store:
        os.write(1, b"go\\n")
        if mode == "create":
            for number in range(seed * 1000, seed * 1000 + 1000):
                other = make_sample([[100, 50], [5000]], seed=number)
                await store.create_layer(other.digest, other.index, other.meta, {"number": number})
                os.write(1, b"l" + other.digest.encode() + b"\\n")
        layer = await store.create_layer(sample.digest, sample.index, sample.meta, {})
        while True:
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    pieces = list(range(len(layer.pieces)))
                    dice.shuffle(pieces)
                    nursery.start_soon(trio.to_thread.run_sync, write, layer, pieces)
                if mode == "evict":
                    for _ in range(5):
                        await store.evict(1 << 40)
            if mode == "write":
                os.write(1, b"done\\n")
                await trio.sleep_forever()

trio.run(main, Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
"""


def run_and_kill(path: Path, mode: str, seed: int, after_s: float) -> list[str]:
    """What the writer said it had done before it was killed, `after_s` seconds after it began to write."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", WRITER, str(path), mode, str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment) as process:
        assert process.stdout is not None
        said, deadline, kill_at = b"", time.monotonic() + 30, None
        while kill_at is None or time.monotonic() < kill_at:
            now = time.monotonic()
            assert now < deadline, "the writer did not start"
            if select.select([process.stdout], [], [], min(0.2, max(0, (kill_at or deadline) - now)))[0]:
                part = process.stdout.read(1 << 16)
                assert part or process.poll() is None, said[-300:]
                said += part
            if kill_at is None and b"go\n" in said:
                kill_at = time.monotonic() + after_s
        process.send_signal(signal.SIGKILL)
        said += process.stdout.read() or b""
        assert process.wait(10) == -signal.SIGKILL
    return said.decode().split("\n")[:-1]


def expected_volume(sample: Sample) -> bytes:
    volume = bytearray(-(-sample.index.volume_size // BLOCK_SIZE) * BLOCK_SIZE)
    for number, content in enumerate(sample.contents):
        at = sample.index.chunks.volume_offset[number]
        volume[at : at + len(content)] = content
    return bytes(volume)


def assert_served_is_right(root: Path, volume: bytes) -> int:
    """What fsmount would serve this moment, the agent being dead."""
    blocks = Bitmap.open(root / "blocks.map")
    data = (root / "data").read_bytes()
    served = [block for block in range(blocks.bits) if blocks.test(block)]
    for block in served:
        at = block * BLOCK_SIZE
        assert data[at : at + BLOCK_SIZE] == volume[at : at + BLOCK_SIZE], f"block {block} is wrong"
    blocks.close()
    return len(served)


def assert_marked_is_right(layer: StoredLayer, sample: Sample) -> None:
    for number, content in enumerate(sample.contents):
        if layer.has_chunk(number):
            assert layer.read_chunk(number) == content
        assert not layer.is_doubtful(number)
    for piece in range(len(layer.pieces)):
        if layer.has_piece(piece):
            assert layer.read_blob(*layer.pieces.extent(piece)) == sample.blob_of(piece)
    missing = set(layer.missing_chunks(0, layer.volume_size))
    blocks = Bitmap.open(layer.blocks_path)
    for number in range(len(layer.chunks)):
        if number not in missing and layer.has_chunk(number):
            continue
        offset = layer.chunks.volume_offset[number]
        assert not blocks.test(offset // BLOCK_SIZE)
    if not missing:
        assert blocks.all_set(0, blocks.bits)
    blocks.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", ["write", "evict"])
async def test_killed_while_writing(tmp_path: Path, mode: str) -> None:
    dice = random.Random(mode)
    sample = make_sample(FILES, twins=TWINS)
    volume = expected_volume(sample)
    root = tmp_path / "layers" / sample.digest.removeprefix("sha256:")
    verified: set[str] = set()
    served = 0
    for round_number in range(12):
        said = run_and_kill(tmp_path, mode, round_number, dice.uniform(0.0, 0.06))
        verified |= {word for word in said if word[0] in "cp"}
        if not root.exists():
            continue
        served += assert_served_is_right(root, volume)
        async with open_store(tmp_path, quota_bytes=None, settle_in_background=False) as store:
            layer = store.layer(sample.digest)
            assert layer is not None
            assert_marked_is_right(layer, sample)
            assert_served_is_right(root, volume)
            if mode == "write":
                assert all(layer.has_chunk(int(word[1:])) for word in verified if word[0] == "c"), "a verified chunk was lost"
                assert all(layer.has_piece(int(word[1:])) for word in verified if word[0] == "p"), "a verified piece was lost"
            if layer.complete:
                await store.remove_layer(sample.digest)
                verified.clear()
    assert served > 0


@pytest.mark.timeout(120)
async def test_killed_while_creating_layers(tmp_path: Path) -> None:
    dice = random.Random(7)
    for round_number in range(1, 6):
        said = run_and_kill(tmp_path, "create", round_number, dice.uniform(0.0, 0.2))
        async with open_store(tmp_path, quota_bytes=None) as store:
            known = {layer.digest for layer in store.layers()}
            assert {word[1:] for word in said if word[0] == "l"} <= known, "a layer that was reported is gone"
            for layer in store.layers():
                assert layer.verify_image()
                assert not layer.complete
                assert len(layer.missing_chunks(0, layer.volume_size)) == len(layer.chunks)
            assert list((tmp_path / "temporary").iterdir()) == []
            assert not any((tmp_path / "quarantine").iterdir())
    assert HEADER_SIZE == BLOCK_SIZE
