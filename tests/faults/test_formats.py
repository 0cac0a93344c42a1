"""What holds for eStargz holds for spliced nydus images and zstd:chunked as well: no wrong byte, and no reader that notices a death."""

import errno
import re
from pathlib import Path

import pytest
import trio

from tests.agent_harness import drop_caches, in_thread, open_fleet, push_fixtures, read_errno
from tests.faults.test_verified import flip_bits
from tests.tree_facts import differences, facts_of, fixture_truth
from tests.wire_proxy import Harm

TAGS = ("zstdchunked", "nydus-v6-zstd")
DEADLINE_S = 3
KILLS = 5
RATE = 300_000
LARGE = "/sizes/4MiB+1"
"""A file that nothing reads before its time."""


@pytest.mark.slow
@pytest.mark.parametrize("tag", TAGS)
async def test_flipped_bits_never_reach_a_reader(shared_fixtures: Path, tag: str) -> None:
    _, truth = fixture_truth(shared_fixtures, tag)
    with trio.fail_after(110):
        async with open_fleet() as fleet:
            layers = (await push_fixtures(fleet, shared_fixtures, [tag]))[tag]
            # From the registry: at first not even an index, then an error for what has not come.
            alone = await fleet.node("--no-background-fetch", "--no-prefetch", f"--read-deadline={DEADLINE_S}s", in_fleet=False)
            alone.proxy.harm = Harm.FLIP
            refused = await alone.shoal("mount", alone.image(f"fixtures:{tag}"), alone.folder / "root", check=False)
            assert (refused.status, refused.stderr.decode().count("\n")) == (1, 1), refused.stderr
            alone.proxy.harm = Harm.NONE
            root = await alone.mount(f"fixtures:{tag}")
            alone.proxy.harm = Harm.FLIP
            error, _ = await in_thread(read_errno, Path(f"{root}{LARGE}"))
            assert (error, alone.proxy.harmed > 0) == (errno.EIO, True)
            assert alone.events("registry_sent_wrong_bytes")
            await alone.stop()

            # From a peer whose disk is bad: it is passed over.
            liar = await fleet.node()
            await liar.mount(f"fixtures:{tag}")
            await liar.wait_complete()
            flipped = 0
            for layer in layers:
                blob = liar.stored(layer) / "blob"
                if blob.stat().st_blocks:
                    flipped += flip_bits(blob, blob.stat().st_size // 2)
            assert flipped > 5
            node = await fleet.node()
            root = await node.mount(f"fixtures:{tag}")
            assert differences(await in_thread(facts_of, root), truth) == []
            assert {report["peer"] for report in node.events("peer_sent_wrong_bytes")} == {(await liar.status())["peer_id"]}
            await node.wait_complete()
            await liar.stop()

            # From its own disk, found by scrubbing.
            for layer in layers:
                data, blob = node.stored(layer) / "data", node.stored(layer) / "blob"
                if data.exists() and data.stat().st_blocks:
                    flip_bits(data, data.stat().st_size, step=1 << 20)
                if blob.stat().st_blocks:
                    flip_bits(blob, blob.stat().st_size, start=blob.stat().st_size // 3, step=1 << 20)
            done = await node.shoal("scrub", check=False)
            counts = re.search(r"(\d+) damaged, (\d+) replaced", done.stdout.decode())
            assert counts is not None
            assert (done.status, counts[1]) == (0, counts[2]), done.stdout
            assert int(counts[1]) > 2
            await in_thread(drop_caches)
            assert differences(await in_thread(facts_of, root), truth) == []
            assert "0 damaged" in (await node.shoal("scrub")).stdout.decode()
            assert (await node.status())["failed_reads"] == 0


@pytest.mark.slow
async def test_readers_do_not_notice_that_the_agent_dies(shared_fixtures: Path) -> None:
    with trio.fail_after(110):
        async with open_fleet() as fleet:
            await push_fixtures(fleet, shared_fixtures, TAGS)
            node = await fleet.node("--no-background-fetch", "--read-deadline=90s", in_fleet=False, rate=RATE)
            wrong: dict[str, list[str]] = {}

            async def read(tag: str, root: Path) -> None:
                wrong[tag] = differences(await in_thread(facts_of, root), fixture_truth(shared_fixtures, tag)[1])

            async with trio.open_nursery() as nursery:
                for tag in TAGS:
                    nursery.start_soon(read, tag, await node.mount(f"fixtures:{tag}", tag))
                for _ in range(KILLS):
                    before = node.proxy.passed
                    while node.proxy.passed < before + RATE // 10 and len(wrong) < len(TAGS):  # noqa: ASYNC110 - bytes pass
                        await trio.sleep(0.02)
                    await node.kill()
                    await node.start()
                assert len(wrong) < len(TAGS), "the load was over before the kills were"
                node.proxy.rate = 0.0
            assert wrong == {tag: [] for tag in TAGS}
            assert node.events("read_deadline_passed") == []
            assert (await node.status())["failed_reads"] == 0
            scrubbed = await node.shoal("scrub", check=False)
            assert (scrubbed.status, "0 damaged" in scrubbed.stdout.decode()) == (0, True), scrubbed.stdout


@pytest.mark.slow
async def test_equal_chunks_of_another_format_are_not_fetched(shared_fixtures: Path) -> None:
    with trio.fail_after(60):
        async with open_fleet() as fleet:
            layers = await push_fixtures(fleet, shared_fixtures, ["zstdchunked", "esgz"])
            node = await fleet.node(in_fleet=False)
            await node.mount("fixtures:zstdchunked", "zstd")
            await node.wait_complete()
            before = fleet.registry_bytes(node)
            assert (await node.status())["bytes"]["cache"] == 0
            root = await node.mount("fixtures:esgz", "esgz")
            assert differences(await in_thread(facts_of, root), fixture_truth(shared_fixtures, "esgz")[1]) == []
            status = await node.status()
            size = sum(layer["blob_size"] for layer in status["layers"] if layer["digest"] in layers["esgz"])
            fetched = fleet.registry_bytes(node) - before
            assert status["bytes"]["registry"] == before + fetched
            assert status["bytes"]["cache"] > 0
            assert fetched < size / 10  # 0.13 of 4.2 MB: what the TOCs take, and two landmarks
