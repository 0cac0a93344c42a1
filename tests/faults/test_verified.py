"""A byte that is not what the image says never reaches a reader: flipped by the registry, by a peer, or on this node's disk."""

import errno
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from tests.agent_harness import AgentNode, Fleet, drop_caches, in_thread, open_fleet, push_layers, read_errno
from tests.sample_layers import Layer
from tests.tree_facts import Facts, differences, facts_of, sha256_of
from tests.wire_proxy import Harm

LAZY = ("--no-background-fetch", "--no-prefetch")
DEADLINE_S = 3
SLACK_S = 15  # for a machine that is busy; a hang is longer


async def good_node(fleet: Fleet, image: Sequence[Layer], *settings: str) -> tuple[AgentNode, Path, Facts]:
    """A node that holds the whole image, its root, and what is in it."""
    await push_layers(fleet, "small:1", image)
    node = await fleet.node(*settings)
    root = await node.mount("small:1")
    truth = await in_thread(facts_of, root)
    await node.wait_complete()
    return node, root, truth


def flip_bits(path: Path, stop: int, *, start: int = 100, step: int = 16 << 10) -> int:
    """Flip one bit in every `step` bytes of [start, stop); gives how many."""
    count = 0
    with path.open("r+b", buffering=0) as file:
        for at in range(start, stop, step):
            (byte,) = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte ^ 0x10]), at)
            count += 1
        os.fsync(file.fileno())
    return count


async def test_registry_that_flips_bits_gives_errors_not_bytes(small_image: Sequence[Layer]) -> None:
    with trio.fail_after(90):
        async with open_fleet() as fleet:
            _good, _root, truth = await good_node(fleet, small_image)
            node = await fleet.node(*LAZY, f"--read-deadline={DEADLINE_S}s", in_fleet=False)
            node.proxy.harm = Harm.FLIP
            refused = await node.shoal("mount", node.image("small:1"), node.folder / "root", check=False)
            assert refused.status == 1
            assert refused.stderr.startswith(b"shoal: ")
            assert not node.folder.joinpath("root").exists()
            node.proxy.harm = Harm.NONE
            root = await node.mount("small:1")
            node.proxy.harm = Harm.FLIP
            error, took = await in_thread(read_errno, root / "part1" / "00007")
            assert (error, node.proxy.harmed > 0) == (errno.EIO, True)
            assert took < DEADLINE_S + SLACK_S
            assert node.events("registry_sent_wrong_bytes")
            (passed,) = node.events("read_deadline_passed")
            assert passed["image"].startswith(node.image("small:1"))
            assert passed["layer"] == small_image[0].digest
            assert passed["chunks"]
            status = await node.status()
            assert status["bad_chunks"] > 0
            assert status["failed_reads"] > 0
            node.proxy.harm = Harm.NONE
            # The registry is itself again; what was refused is asked for anew a second later at the earliest.
            await node.shoal("unmount", root)
            await node.stop()
            await node.start()
            root = await node.mount("small:1")
            assert differences(await in_thread(facts_of, root), truth) == []


async def test_registry_that_flips_bits_is_passed_over_for_a_peer(small_image: Sequence[Layer]) -> None:
    """Both know the image; the peer is brought in only when the registry has spoilt everything it sent."""
    with trio.fail_after(90):
        async with open_fleet() as fleet:
            await push_layers(fleet, "small:1", small_image)
            node = await fleet.node(*LAZY)
            root = await node.mount("small:1")
            node.proxy.harm = Harm.FLIP
            async with trio.open_nursery() as nursery:

                async def read() -> None:
                    assert await in_thread(read_errno, root / "part2" / "00003") == (0, pytest.approx(0, abs=20))

                nursery.start_soon(read)
                await node.proxy.wait_harmed()
                peer = await fleet.node()
                truth = await in_thread(facts_of, await peer.mount("small:1"))
            assert differences(await in_thread(facts_of, root), truth) == []
            status = await node.status()
            assert status["failed_reads"] == 0
            assert status["bytes"]["peers"] > 10e6


async def test_peer_that_sends_wrong_bytes_is_reported_and_passed_over(small_image: Sequence[Layer]) -> None:
    with trio.fail_after(90):
        async with open_fleet() as fleet:
            liar, _root, truth = await good_node(fleet, small_image)
            for layer in small_image:
                # Not the index, or the layer would not even be mounted from this peer.
                assert flip_bits(liar.stored(layer.digest) / "blob", 5_000_000) > 100
            node = await fleet.node()
            root = await node.mount("small:1")
            assert differences(await in_thread(facts_of, root), truth) == []
            reports = node.events("peer_sent_wrong_bytes")
            assert {report["peer"] for report in reports} == {(await liar.status())["peer_id"]}
            # Reported once for each layer: after that nobody asks it for that blob again.
            assert len(reports) <= 2 * len(small_image)
            status = await node.status()
            assert status["bad_chunks"] >= 1
            assert status["failed_reads"] == 0
            assert fleet.registry_bytes(node) > 0


@pytest.mark.parametrize("source", ["registry", "peer"])
async def test_scrub_finds_a_flipped_bit_and_replaces_it(small_image: Sequence[Layer], source: str) -> None:
    with trio.fail_after(90):
        async with open_fleet() as fleet:
            node, root, truth = await good_node(fleet, small_image)
            if source == "peer":
                other = await fleet.node()
                await other.mount("small:1")
                await other.wait_complete()
                await node.wait_status(lambda status: status["peers"] == 1, "joined by the other")
                await node.proxy.refuse()
            layer = small_image[0].digest
            flip_bits(node.stored(layer) / "data", 300_000)  # some fall between two files, where nothing is
            assert flip_bits(node.stored(layer) / "blob", 3_000_000, start=2_500_000, step=1 << 20) == 1
            before = (await node.status())["bytes"]
            done = await node.shoal("scrub", check=False)
            text = done.stdout.decode()
            assert done.status == 0, text
            counts = re.search(r"(\d+) damaged, (\d+) replaced", text)
            assert counts is not None
            assert counts[1] == counts[2]
            assert f"chunk 1 of layer {layer}" in text
            assert "piece" in text
            after = (await node.status())["bytes"]
            used = {"registry": "registry", "peer": "peers"}[source]
            assert after[used] > before[used]
            await in_thread(drop_caches)
            assert differences(await in_thread(facts_of, root), truth) == []
            again = await node.shoal("scrub")
            assert "0 damaged" in again.stdout.decode()


@pytest.mark.parametrize("source", ["registry", "peer", "nobody"])
async def test_after_an_unclean_boot_flipped_bits_are_found_before_they_are_served(
    small_image: Sequence[Layer], source: str
) -> None:
    with trio.fail_after(90):
        async with open_fleet() as fleet:
            node, root, truth = await good_node(fleet, small_image, f"--read-deadline={DEADLINE_S}s")
            peers: list[str] = []
            if source == "peer":
                other = await fleet.node()
                await other.mount("small:1")
                await other.wait_complete()
                peers = [other.address]
            # The power goes: agent, fsmount and mounts are gone at once, and the next boot has another id.
            pids = (await node.status())["pids"]
            await node.kill()
            for name in ("holder", "fsmount"):
                os.kill(pids[name], signal.SIGKILL)
            await node.shoal("fsmount", "--stop", check=False)
            (node.store / "boot").write_text("4b1d4b1d-0000-0000-0000-000000000000 running\n")
            for layer in small_image:
                assert flip_bits(node.stored(layer.digest) / "data", 5_000_000, step=500_000) == 10
                assert flip_bits(node.stored(layer.digest) / "blob", 5_000_000, step=500_000) == 10
            if source != "registry":
                await node.proxy.refuse()
            await in_thread(drop_caches)
            await node.start(peers)
            if source == "peer":
                await node.wait_status(lambda status: status["peers"] == 1, "joined by the other")
            await node.mount("small:1")
            if source != "nobody":
                assert differences(await in_thread(facts_of, root), truth) == []
                status = await node.status()
                used = {"registry": "registry", "peer": "peers"}[source]
                assert status["bytes"][used] > 0
                assert status["failed_reads"] == 0
                return
            served = 0
            for number in range(60):
                path = root / "part1" / f"{number:05}"
                error, took = await in_thread(read_errno, path)
                assert error in (0, errno.EIO)
                assert took < DEADLINE_S + SLACK_S
                if error == 0:
                    served += 1
                    assert await in_thread(sha256_of, os.fsencode(path)) == truth[f"/part1/{number:05}"]["sha256"]
                if error and served > 5:
                    break
            assert served > 5
