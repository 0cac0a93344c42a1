"""Every file, attribute and xattr through the kernel, under every presentation, per layer and merged."""

from pathlib import Path

import pytest
import trio

from tests.agent_harness import drop_caches, in_thread, open_fleet, push_fixtures
from tests.tree_facts import differences, facts_of, fixture_truth

TAGS = ("oci", "esgz", "esgz-minchunk", "esgz-chunk64k", "esgz-exttoc")


@pytest.mark.slow
@pytest.mark.parametrize("presentation", ["erofs-file", "erofs-loop", "fuse-tree"])
async def test_fixtures_equal_the_ground_truth(shared_fixtures: Path, presentation: str) -> None:
    with trio.fail_after(110):
        async with open_fleet() as fleet:
            layers = await push_fixtures(fleet, shared_fixtures, [*TAGS, "esgz-exttoc-esgztoc"])
            node = await fleet.node("--presentation", presentation, "--no-background-fetch", in_fleet=False)
            wrong: dict[str, list[str]] = {}
            for tag in TAGS:
                layer_truths, merged_truth = fixture_truth(shared_fixtures, is_json=tag != "oci")
                root = await node.mount(f"fixtures:{tag}", tag, how=presentation)
                wrong[f"{tag} merged"] = differences(await in_thread(facts_of, root), merged_truth)
                for number, (digest, truth) in enumerate(zip(layers[tag], layer_truths, strict=True), 1):
                    found = await in_thread(facts_of, node.layer_dir(digest))
                    wrong[f"{tag} layer {number}"] = differences(found, truth)
            assert {where: what for where, what in wrong.items() if what} == {}
            # And once more from fsmount's files, not from what the kernel remembers.
            await in_thread(drop_caches)
            _, merged_truth = fixture_truth(shared_fixtures, is_json=True)
            assert differences(await in_thread(facts_of, node.folder / "esgz"), merged_truth) == []
            for tag in TAGS:
                await node.shoal("unmount", node.folder / tag)
                assert not any((node.folder / tag).iterdir())
            assert (await node.status())["failed_reads"] == 0
