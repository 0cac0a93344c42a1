"""Whatever the format: what one node of the fleet has, no other asks the registry for, not even when there is no registry."""

import json
from pathlib import Path

import pytest
import trio

from tests.agent_harness import drop_caches, in_thread, open_fleet, push_fixtures
from tests.tree_facts import differences, facts_of, fixture_truth

PAIRS = (("esgz", "nydus-v6-zstd"), ("zstdchunked", "nydus-v6-batch"), ("nydus-zran", "nydus-v5-lz4"))
"""Chunks have SHA-256 in the first of each and BLAKE3 in the second: a node with both has nothing of one by the other."""
TAGS = tuple(tag for pair in PAIRS for tag in pair)


@pytest.mark.slow
async def test_other_nodes_take_nothing_from_the_registry(shared_fixtures: Path) -> None:
    with trio.fail_after(110):
        async with open_fleet() as fleet:
            await push_fixtures(fleet, shared_fixtures, [*TAGS, "oci-nydus"])
            first = await fleet.node("--no-background-fetch")
            for tag in TAGS:
                await first.mount(f"fixtures:{tag}", tag)
                # All pieces: of chunks that it has from another of the images it would not fetch them.
                seen = json.loads((await first.shoal("inspect", first.image(f"fixtures:{tag}"), "--verify", "--json")).stdout)
                assert all(layer["verified"]["ok"] for layer in seen["layers"]), seen
                await first.wait_complete()
            assert await fleet.check_registry_bytes(first) > 0

            served = abandoned = 0
            for pair in PAIRS:  # each on a node that has nothing else
                node = await fleet.node(bootstrap=[first])
                for tag in pair:
                    root = await node.mount(f"fixtures:{tag}", tag)
                    assert differences(await in_thread(facts_of, root), fixture_truth(shared_fixtures, tag)[1]) == []
                await node.wait_complete()
                assert fleet.registry_bytes(node) == 0, pair
                status = await node.status()
                assert (status["bytes"]["registry"], status["bytes"]["cache"]) == (0, 0)
                served += status["bytes"]["peers"]
                abandoned += status["abandoned_bytes"]
                assert served <= (await first.status())["served_bytes"] <= served + abandoned
                await node.stop()

            # The registry goes. Under the first node's name for it the images are known to that node alone.
            await first.proxy.refuse()
            last = await fleet.node(bootstrap=[first])
            for tag in TAGS:
                await last.shoal("mount", first.image(f"fixtures:{tag}"), last.folder / tag)
            await in_thread(drop_caches)
            for tag in TAGS:
                found = await in_thread(facts_of, last.folder / tag)
                assert differences(found, fixture_truth(shared_fixtures, tag)[1]) == [], tag
            assert fleet.registry_bytes(last) == 0
            assert (await last.status())["failed_reads"] == 0
