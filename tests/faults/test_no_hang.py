"""Registry and peers gone or silent: a read that nobody can serve fails in its deadline, and what is here is read on."""

import errno
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from tests.agent_harness import AgentNode, Fleet, drop_caches, in_thread, open_fleet, push_layers, read_errno
from tests.sample_layers import Layer
from tests.tree_facts import Facts, differences, facts_of
from tests.wire_proxy import Harm

DEADLINE_S = 3
SLACK_S = 15  # for a machine that is busy; a hang is longer
LAZY = ("--no-background-fetch", "--no-prefetch", f"--read-deadline={DEADLINE_S}s")


async def half_read(fleet: Fleet, image: Sequence[Layer], *settings: str) -> tuple[AgentNode, Path, dict[str, bytes]]:
    """A node with a peer, its root, and the first files of its first layer, which it has from that peer."""
    await push_layers(fleet, "small:1", image)
    peer = await fleet.node()
    await in_thread(facts_of, await peer.mount("small:1"))
    await peer.wait_complete()
    node = await fleet.node(*LAZY, *settings)
    root = await node.mount("small:1")
    here = {name: await in_thread((root / "part1" / name).read_bytes) for name in ("00000", "00001", "00002")}
    return node, root, here


async def facts_when_back(root: Path) -> Facts:
    """Everything below `root`, tried again while what was refused a moment ago is still refused. The test's deadline bounds it."""
    while True:
        try:
            return await in_thread(facts_of, root)
        except OSError:
            await trio.sleep(0.2)  # a reader that comes back; nothing tells it when


@pytest.mark.parametrize("presentation", ["erofs-file", "erofs-loop", "fuse-tree"])
async def test_everybody_gone(small_image: Sequence[Layer], presentation: str) -> None:
    with trio.fail_after(90):
        async with open_fleet() as fleet:
            node, root, here = await half_read(fleet, small_image, f"--presentation={presentation}")
            await fleet.nodes[0].kill()
            await node.proxy.refuse()
            await in_thread(drop_caches)
            failed: list[tuple[int, float]] = []
            async with trio.open_nursery() as nursery:

                async def fail(name: str) -> None:
                    failed.append(await in_thread(read_errno, root / "part2" / name))

                for name in ("00010", "00030", "00050"):
                    nursery.start_soon(fail, name)
                # Meanwhile, with those reads parked, cached ones go on and take no longer than ever.
                for name, content in here.items():
                    with trio.fail_after(1):
                        assert await in_thread((root / "part1" / name).read_bytes) == content
                assert failed == []
            assert [error for error, _took in failed] == [errno.EIO] * 3
            assert max(took for _error, took in failed) < DEADLINE_S + SLACK_S
            lines = node.events("read_deadline_passed")
            assert (await node.status())["failed_reads"] == len(lines)
            # The kernel's read-ahead behind the cached files may have been refused too; nobody waited for that.
            lines = [line for line in lines if line["layer"] == small_image[1].digest]
            assert 3 <= len(lines) <= 6
            for line in lines:
                assert line["image"].startswith(node.image("small:1"))
                assert line["chunks"]
                assert line["last_error"]

            # They come back, and so does everything else.
            await fleet.nodes[0].start()
            node.proxy.accept_again()
            assert len(await in_thread(facts_of, root)) == 2 + 1 + 120


async def test_registry_that_stalls(small_image: Sequence[Layer]) -> None:
    with trio.fail_after(90):
        async with open_fleet() as fleet:
            await push_layers(fleet, "small:1", small_image)
            node = await fleet.node(*LAZY, in_fleet=False)
            root = await node.mount("small:1")
            node.proxy.harm, node.proxy.skip = Harm.STALL, 32 << 10
            error, took = await in_thread(read_errno, root / "part1" / "00020")
            assert error == errno.EIO
            assert took < DEADLINE_S + SLACK_S
            # The silent connection is given up, and the next one works.
            node.proxy.harm = Harm.NONE
            assert len(await facts_when_back(root)) == 2 + 1 + 120


async def test_peer_that_freezes_is_left_for_the_registry(small_image: Sequence[Layer]) -> None:
    with trio.fail_after(90):
        async with open_fleet() as fleet:
            await push_layers(fleet, "small:1", small_image)
            peer = await fleet.node()
            truth = await in_thread(facts_of, await peer.mount("small:1"))
            await peer.wait_complete()
            node = await fleet.node("--no-background-fetch", "--no-prefetch")
            root = await node.mount("small:1")
            assert peer.child is not None
            peer.child.popen.send_signal(signal.SIGSTOP)
            assert differences(await in_thread(facts_of, root), truth) == []
            peer.child.popen.send_signal(signal.SIGCONT)
            status = await node.status()
            assert status["failed_reads"] == 0
            assert status["bytes"]["registry"] > 0


async def test_registry_that_breaks_off_is_asked_for_the_rest(small_image: Sequence[Layer]) -> None:
    """Every answer ends after 200,000 bytes: what came is kept, and the next request goes on behind it."""
    with trio.fail_after(90):
        async with open_fleet() as fleet:
            await push_layers(fleet, "small:1", small_image)
            good = await fleet.node(in_fleet=False)
            truth = await in_thread(facts_of, await good.mount("small:1"))
            node = await fleet.node("--no-background-fetch", "--no-prefetch", in_fleet=False)
            root = await node.mount("small:1")
            node.proxy.harm, node.proxy.skip = Harm.CUT, 200_000
            assert differences(await in_thread(facts_of, root), truth) == []
            status = await node.status()
            assert status["failed_reads"] == 0
            # A member of 64 KiB that had begun is asked for again, and what a cut loses on its way; no more.
            assert status["bytes"]["registry"] < 2 * sum(layer.size for layer in small_image)


async def test_without_a_registry_a_known_image_mounts_from_peers(small_image: Sequence[Layer]) -> None:
    with trio.fail_after(90):
        async with open_fleet() as fleet:
            node, _root, _here = await half_read(fleet, small_image)
            await node.shoal("unmount", node.folder / "root")
            await node.proxy.refuse()
            root = await node.mount("small:1", "again")
            assert len(await in_thread(facts_of, root)) == 2 + 1 + 120
            assert (await node.status())["failed_reads"] == 0


async def test_nobody_at_all_is_said_at_once(small_image: Sequence[Layer]) -> None:
    with trio.fail_after(60):
        async with open_fleet() as fleet:
            node = await fleet.node(in_fleet=False)
            await node.proxy.refuse()
            done = await node.shoal("mount", node.image("small:1"), node.folder / "root", check=False, timeout_s=30)
            assert done.status == 1
            assert node.proxy.address in done.stderr.decode()
