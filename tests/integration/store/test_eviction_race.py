"""A reader that follows fsmount's protocol while the volume is filled and evicted: no byte of a hole is ever taken for data.

The reader is a process of its own, as fsmount is: threads would take turns and hide what happens between two instructions.
"""

import json
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import trio

from agent.formats.model import BLOCK_SIZE
from agent.store import open_store
from tests.store_samples import make_sample

READER = """
import json, os, sys
from pathlib import Path
from fsmount.bitmap import Bitmap

blocks, fd, volume = Bitmap.open(Path(sys.argv[1])), os.open(sys.argv[2], os.O_RDONLY), Path(sys.argv[3]).read_bytes()
expected = [volume[at : at + 4096] for at in range(0, len(volume), 4096)]
served = repeated = wrong = 0
os.write(1, b"ready")
while True:
    for block in range(blocks.bits):
        generation = blocks.generation
        if not blocks.test(block):
            continue
        data = os.pread(fd, 4096, block * 4096)
        if blocks.generation != generation:
            repeated += 1
            continue
        served += 1
        wrong += data != expected[block]
    if not os.path.exists(sys.argv[3]):
        os.write(1, json.dumps([served, repeated, wrong]).encode())  # one write, one read at the other end
        break
"""


@pytest.mark.timeout(60)
async def test_a_reader_against_eviction(tmp_path: Path) -> None:
    sample = make_sample([[4096 * 3], [10_000, 10_000], [65536] * 2], twins=[1])
    volume = bytearray(sample.index.volume_size)
    for number, content in enumerate(sample.contents):
        at = sample.index.chunks.volume_offset[number]
        volume[at : at + len(content)] = content
    assert len(volume) % BLOCK_SIZE == 0
    (tmp_path / "volume").write_bytes(volume)
    stop = threading.Event()

    async with open_store(tmp_path / "store", quota_bytes=None) as store:
        layer = await store.create_layer(sample.digest, sample.index, sample.meta, {})

        def write() -> None:
            while not stop.is_set():
                for number, content in enumerate(sample.contents):
                    layer.write_chunk(number, content)

        command = [sys.executable, "-c", READER, str(layer.blocks_path), str(layer.data_path), str(tmp_path / "volume")]
        async with trio.open_nursery() as nursery:
            process = await nursery.start(partial(trio.run_process, command, check=False, stdout=subprocess.PIPE))
            try:
                assert b"ready" in await process.stdout.receive_some(100)
                for _ in range(2):
                    nursery.start_soon(trio.to_thread.run_sync, write)
                until = time.monotonic() + 3
                rounds = 0
                while time.monotonic() < until:
                    await trio.to_thread.run_sync(layer.evict_data)
                    rounds += 1
                (tmp_path / "volume").unlink()
                with trio.fail_after(20):
                    served, repeated, wrong = json.loads(await process.stdout.receive_some(1000))
            finally:
                stop.set()
                process.kill()
        assert rounds > 50
        assert wrong == 0
        assert served > 100
        assert repeated > 0
        for number in layer.present_chunks():
            assert layer.read_chunk(number) == sample.contents[number]
