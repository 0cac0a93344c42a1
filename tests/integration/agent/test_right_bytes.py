"""Every file, attribute and xattr of every fixture image through the kernel, under every presentation, per layer and merged."""

import json
from pathlib import Path

import pytest
import trio

from tests.agent_harness import drop_caches, in_thread, open_fleet, push_fixtures
from tests.tree_facts import differences, facts_of, fixture_truth

GROUPS = {
    "plain": ("oci", "oci-nydus"),
    "estargz": ("esgz", "esgz-minchunk", "esgz-chunk64k", "esgz-exttoc"),
    "zstd-chunked": ("zstdchunked",),
    "nydus-v6": ("nydus-v6-zstd", "nydus-v6-lz4", "nydus-v6-none", "nydus-v6-batch", "nydus-v6-prefetch"),
    "nydus-v5": ("nydus-v5-zstd", "nydus-v5-lz4"),
    "nydus-zran": ("nydus-zran",),
}
BESIDE = {"estargz": ("esgz-exttoc-esgztoc",), "nydus-zran": ("oci-nydus",)}
"""Images that others need: the TOCs, and the original layers, which zran reads."""


def test_no_fixture_is_left_out(shared_fixtures: Path) -> None:
    known = {tag for tags in (*GROUPS.values(), *BESIDE.values()) for tag in tags}
    index = json.loads((shared_fixtures / "images" / "index.json").read_bytes())
    assert {entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index["manifests"]} == known


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("presentation", ["erofs-file", "erofs-loop", "fuse-tree"])
async def test_fixtures_equal_the_ground_truth(shared_fixtures: Path, presentation: str, group: str) -> None:
    tags = GROUPS[group]
    with trio.fail_after(110):
        async with open_fleet() as fleet:
            layers = await push_fixtures(fleet, shared_fixtures, [*tags, *BESIDE.get(group, ())])
            node = await fleet.node("--presentation", presentation, "--no-background-fetch", in_fleet=False)
            wrong: dict[str, list[str]] = {}
            for tag in tags:
                layer_truths, merged_truth = fixture_truth(shared_fixtures, tag)
                root = await node.mount(f"fixtures:{tag}", tag, how=presentation)
                wrong[f"{tag} merged"] = differences(await in_thread(facts_of, root), merged_truth)
                for number, (digest, truth) in enumerate(zip(layers[tag], layer_truths, strict=False), 1):
                    found = await in_thread(facts_of, node.layer_dir(digest))
                    wrong[f"{tag} layer {number}"] = differences(found, truth)
            assert {where: what for where, what in wrong.items() if what} == {}
            # And once more from fsmount's files, not from what the kernel remembers.
            await in_thread(drop_caches)
            assert differences(await in_thread(facts_of, node.folder / tags[0]), fixture_truth(shared_fixtures, tags[0])[1]) == []
            for tag in tags:
                await node.shoal("unmount", node.folder / tag)
                assert not any((node.folder / tag).iterdir())
            assert (await node.status())["failed_reads"] == 0
            # Each was read as the format that it is, and not whole for want of a reader.
            lazy = {layer["format"] for layer in (await node.status())["layers"]}
            assert group == "plain" or not any(name.startswith("tar") for name in lazy), lazy
