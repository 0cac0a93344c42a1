"""Readers that follow fsmount's protocol while the volume is filled and evicted: no byte of a hole is ever taken for data."""

import os
import threading
import time
from pathlib import Path

import trio

from agent.formats.model import BLOCK_SIZE
from agent.store import open_store
from fsmount.bitmap import Bitmap
from tests.store_samples import make_sample


async def test_readers_against_eviction(tmp_path: Path) -> None:
    sample = make_sample([[4096 * 3], [10_000, 10_000], [65536] * 2])
    volume = bytearray(sample.index.volume_size)
    for number, content in enumerate(sample.contents):
        at = sample.index.chunks.volume_offset[number]
        volume[at : at + len(content)] = content
    stop = threading.Event()
    counts = {"served": 0, "repeated": 0, "wrong": 0}

    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await store.create_layer(sample.digest, sample.index, sample.meta, {})

        def read() -> None:
            blocks, fd = Bitmap.open(layer.blocks_path), os.open(layer.data_path, os.O_RDONLY)
            try:
                while not stop.is_set():
                    for block in range(blocks.bits):
                        generation = blocks.generation
                        if not blocks.test(block):
                            continue
                        data = os.pread(fd, BLOCK_SIZE, block * BLOCK_SIZE)
                        if blocks.generation != generation:
                            counts["repeated"] += 1
                            continue
                        counts["served"] += 1
                        counts["wrong"] += data != volume[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
            finally:
                os.close(fd)
                blocks.close()

        def write() -> None:
            while not stop.is_set():
                for number, content in enumerate(sample.contents):
                    layer.write_chunk(number, content)

        async with trio.open_nursery() as nursery:
            for work in (read, write, write):
                nursery.start_soon(trio.to_thread.run_sync, work)
            until = time.monotonic() + 1.5
            rounds = 0
            while rounds < 50 and time.monotonic() < until + 10:
                await store.evict(1 << 40)
                rounds += 1
            while time.monotonic() < until and not counts["served"]:
                await trio.lowlevel.checkpoint()
            stop.set()
        assert rounds >= 50
        assert counts["wrong"] == 0
        assert counts["served"] > 0
        for number in layer.present_chunks():
            assert layer.read_chunk(number) == sample.contents[number]
