"""kill -9 of the agent at random moments while readers read: they wait and notice nothing, and nothing is fetched twice."""

import hashlib
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import trio

from tests.agent_harness import AgentNode, drop_caches, in_thread, open_fleet, push_layers
from tests.sample_layers import make_estargz, noise_tar
from tests.tree_facts import Facts, differences, facts_of, sha256_of

KILLS = 50
SEED = 20_417
RATE = 400_000
"""Bytes a second of the link to the registry: the load must last as long as the kills."""
MEMBER = 32 << 10
PER_CONNECTION = MEMBER + (48 << 10)
"""What a kill may cost on a connection: the part of a member that had come (it cannot be verified), two blocks in the proxy, and
what lay in the sockets between the proxy and the agent."""
UNREAD = 1 << 20
"""What the registry counts as sent on a connection that broke, but lay in the buffers before the slow link; 0.6 MB were measured."""


def read_files(root: Path, names: Sequence[str], truth: Facts) -> list[str]:
    """Read the files once; gives what was wrong."""
    wrong = []
    for name in names:
        try:
            if sha256_of(bytes(root) + name.encode()) != truth[name]["sha256"]:
                wrong.append(f"{name}: wrong bytes")
        except OSError as exc:
            wrong.append(f"{name}: {exc}")
    return wrong


@pytest.mark.slow
@pytest.mark.timeout(280)
async def test_fifty_deaths_under_load(tmp_path: Path) -> None:
    random = Random(SEED)
    tar = tmp_path / "noise.tar"
    noise_tar(tar, files=320, size=100_000, seed=SEED)
    with tar.open("rb") as stream:
        layer = make_estargz(stream, tmp_path / "layer", chunk_size=MEMBER)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    await in_thread(lambda: subprocess.run(["tar", "-xpf", tar, "-C", unpacked], check=True, timeout=60))
    truth = await in_thread(facts_of, unpacked)
    names = [key for key, entry in truth.items() if entry["type"] == "file"]
    random.shuffle(names)
    pack = ["tar", "--create", "--sort=name", "--numeric-owner", "--file=-", "."]
    expected = await in_thread(lambda: hashlib.sha256(subprocess.run(pack, cwd=unpacked, capture_output=True, check=True).stdout))

    with trio.fail_after(260):
        async with open_fleet() as fleet:
            await push_layers(fleet, "load:1", [layer])
            node = await fleet.node("--no-background-fetch", "--read-deadline=200s", in_fleet=False, rate=RATE)
            root = await node.mount("load:1")
            results: list[list[str]] = []

            async def read_all() -> None:
                results.append(await in_thread(read_files, root, names, truth))

            async def pack_all() -> None:
                # Its own program, as a reader that knows nothing of us.
                done = await in_thread(lambda: subprocess.run(pack, cwd=root, capture_output=True, check=False))
                right = hashlib.sha256(done.stdout).digest() == expected.digest()
                results.append([] if right and done.returncode == 0 else [f"tar: {done.returncode} {done.stderr[-500:]!r}"])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_all)
                nursery.start_soon(pack_all)
                served = await kill_often(node, random)
                assert results == [], "the load was over before the kills were"
                node.proxy.rate = 0.0
            assert results == [[], []], "\n".join(
                line for line in (node.run_dir / "fsmount.log").read_text().splitlines() if "ERROR" in line
            )

            # Enough of the kills hit an agent that was serving.
            assert served >= KILLS // 5
            passed, said = node.proxy.passed, fleet.registry_bytes(node)
            lost = node.proxy.broken * PER_CONNECTION
            # Of the 33 MB 36 MB crossed the link, with 33 of the kills during service.
            print(f"size {layer.size}, passed {passed}, registry says {said}, serving kills {served}, broken {node.proxy.broken}")
            assert passed <= 1.02 * layer.size + lost
            assert said <= passed + node.proxy.broken * UNREAD
            await in_thread(drop_caches)
            assert differences(await in_thread(facts_of, root), truth) == []
            assert node.proxy.passed == passed, "what was verified is fetched again"
            assert node.events("read_deadline_passed") == []


async def kill_often(node: AgentNode, random: Random) -> int:
    """Kill the agent `KILLS` times, starting it again each time; gives how often it had become ready before it died."""
    await node.kill()
    began = time.monotonic()
    await node.start()
    span = min(4.0, 2 * (time.monotonic() - began))
    served = 1
    for _ in range(KILLS - 1):
        await node.kill()
        node.launch()
        seen = node.log.stat().st_size
        await trio.sleep(random.uniform(0, span))  # the random moment
        assert node.child is not None
        assert node.child.is_running(), node.child.tail()
        with node.log.open("rb") as stream:
            stream.seek(seen)
            served += b"shoal agent is ready" in stream.read()
    return served
