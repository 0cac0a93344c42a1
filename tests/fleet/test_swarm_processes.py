"""Nodes in processes of their own: what a fleet does when one of them dies, lies, or is not of it."""

import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import trio

NODE = Path(__file__).with_name("swarm_node.py")
ROOT = NODE.parents[2]
SECRET = "the secret of this fleet"
BLOB = "sha256:" + "ab" * 32
MEMORY_MIB = 110
"""A process with trio, the swarm, the data server and its client; hardly any state of its own."""


class Process:
    """One node."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process, self.stdin, self.stdout = process, process.stdin, process.stdout
        self.buffer = b""
        self.peer_id = ""
        self.address = ""

    async def line(self) -> Any:
        with trio.fail_after(20):
            while b"\n" not in self.buffer:
                data = await self.stdout.receive_some()
                assert data, "the node has ended"
                self.buffer += data
        text, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(text)

    async def call(self, name: str, *arguments: object) -> Any:
        await self.stdin.send_all(json.dumps([name, *arguments]).encode() + b"\n")
        return await self.line()

    async def until(self, condition: Callable[[Any], object], name: str, *arguments: object, timeout_s: float = 10) -> Any:
        """Ask until the answer is right."""
        with trio.fail_after(timeout_s):
            while not condition(answer := await self.call(name, *arguments)):  # noqa: ASYNC110 - it happens in another process
                await trio.sleep(0.01)
        return answer


@pytest.fixture
async def start(nursery: trio.Nursery) -> AsyncIterator[Any]:
    processes: list[trio.Process] = []

    async def start_node(*bootstrap: str, secret: str = SECRET) -> Process:
        process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, str(NODE), secret, *bootstrap],
                stdin=PIPE,
                stdout=PIPE,
                check=False,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        )
        processes.append(process)
        node = Process(process)
        hello = await node.line()
        node.peer_id, node.address = hello["peer_id"], hello["address"]
        return node

    yield start_node
    for process in processes:
        if process.returncode is None:
            process.kill()


@asynccontextmanager
async def measured(limit_s: float) -> AsyncIterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < limit_s


async def test_pieces_travel_and_deaths_are_seen_at_once(start: Any) -> None:
    first = await start()
    second, third = await start(first.address), await start(first.address)
    for node in (first, second, third):
        await node.until(lambda peers: len(peers) == 2, "peers")
    await first.call("hold", BLOB, 8, [0, 1, 2, 3])
    await second.call("hold", BLOB, 8, [3, 4])
    assert sorted(await third.call("want", BLOB)) != []
    held = {first.peer_id: [0, 1, 2, 3], second.peer_id: [3, 4]}
    await third.until(lambda holders: holders == held, "holders", BLOB)
    assert await third.call("fetch", BLOB, first.peer_id, 0) == "ok"
    assert await third.call("fetch", BLOB, second.peer_id, 4) == "ok"
    # served while still partial: what the third got, others can have of it
    await third.call("hold", BLOB, 8, [0, 4])
    await second.call("want", BLOB)
    await second.until(lambda holders: holders.get(third.peer_id) == [0, 4], "holders", BLOB)
    assert await second.call("fetch", BLOB, third.peer_id, 0) == "ok"

    async with measured(2):
        first.process.send_signal(signal.SIGKILL)
        await third.until(lambda holders: first.peer_id not in holders, "holders", BLOB)
    # a machine that stops without closing anything is found out by its silence
    async with measured(10):
        second.process.send_signal(signal.SIGSTOP)
        await third.until(lambda peers: peers == [], "peers", timeout_s=12)
    second.process.send_signal(signal.SIGCONT)
    await third.until(lambda peers: peers == [second.peer_id], "peers", timeout_s=20)
    await third.until(lambda holders: holders.get(second.peer_id) == [3, 4], "holders", BLOB)

    memory = await third.call("memory")
    assert memory < MEMORY_MIB << 20, f"{memory >> 20} MiB"


async def test_a_node_comes_back_at_its_bootstrap_address(start: Any) -> None:
    first = await start()
    second = await start(first.address)
    await second.until(lambda peers: peers == [first.peer_id], "peers")
    first.process.kill()
    await second.until(lambda peers: peers == [], "peers")
    third = await start(second.address)
    await second.until(lambda peers: peers == [third.peer_id], "peers")


async def test_a_liar_is_asked_no_more(start: Any) -> None:
    first = await start()
    second = await start(first.address)
    await first.call("hold", BLOB, 4, [0, 1])
    assert await second.call("want", BLOB) == [first.peer_id]
    await first.call("lie")
    assert await second.call("fetch", BLOB, first.peer_id, 0) == "lied"
    assert await second.call("holders", BLOB) == {}


async def test_a_stranger_gets_nothing(start: Any) -> None:
    first = await start()
    await first.call("hold", BLOB, 4, [0])
    stranger = await start(first.address, secret="the secret of another fleet")
    assert await stranger.call("want", BLOB, 6) == []
    assert await stranger.call("peers") == []
    assert await first.call("peers") == []
