"""An image with a SOCI index, through the kernel: lazily where a layer has a zTOC, whole where it has none."""

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from agent.formats.model import Digest
from agent.lab.publish import MANIFEST_TYPE
from agent.registry import ImageReference, open_registry_client
from tests.agent_harness import Fleet, drop_caches, in_thread, open_fleet
from tests.soci_writer import build_index, build_ztoc, digest_text
from tests.tree_facts import differences, facts_of, fixture_truth

SPAN = 256 << 10


@attrs.frozen
class Pushed:
    layers: list[str]
    size: int
    ztoc_size: int


async def push_soci(fleet: Fleet, fixtures: Path, name: str) -> Pushed:
    """The fixture image `oci`, with a zTOC for its first layer: the second is too small for one."""
    images = fixtures / "images"

    def blob(digest: str) -> bytes:
        return (images / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()

    index = json.loads((images / "index.json").read_bytes())
    (entry,) = (m for m in index["manifests"] if m["annotations"]["org.opencontainers.image.ref.name"] == "oci")
    manifest: dict[str, Any] = json.loads(blob(entry["digest"]))
    if "manifests" in manifest:
        manifest = json.loads(blob(manifest["manifests"][0]["digest"]))
    first = manifest["layers"][0]
    ztoc = build_ztoc(blob(first["digest"]), SPAN).data
    soci_index = build_index({first["digest"]: ztoc})
    manifest["annotations"] = {"com.amazon.soci.index-digest": digest_text(soci_index)}
    target = ImageReference.parse(f"{fleet.registry.address}/{name}")
    folder = fleet.folder / "blobs"
    folder.mkdir()
    async with open_registry_client(None, None) as registry:
        for number, content in enumerate(
            [ztoc, b"{}", *(blob(part["digest"]) for part in (manifest["config"], *manifest["layers"]))]
        ):
            path = folder / str(number)
            path.write_bytes(content)
            await registry.push_blob(target, path, Digest(digest_text(content)))
        inner = attrs.evolve(target, tag=None, digest=Digest(digest_text(soci_index)))
        await registry.push_manifest(inner, soci_index, MANIFEST_TYPE)
        await registry.push_manifest(target, json.dumps(manifest).encode(), MANIFEST_TYPE)
    return Pushed([layer["digest"] for layer in manifest["layers"]], first["size"], len(ztoc))


@pytest.mark.slow
async def test_a_soci_image_equals_the_ground_truth(shared_fixtures: Path) -> None:
    with trio.fail_after(110):
        async with open_fleet() as fleet:
            pushed = await push_soci(fleet, shared_fixtures, "soci:1")
            node = await fleet.node("--no-background-fetch")
            root = await node.mount("soci:1")
            by_digest = {layer["digest"]: layer for layer in (await node.status())["layers"]}
            assert by_digest[pushed.layers[0]]["format"] == "soci"
            assert by_digest[pushed.layers[0]]["pieces_held"] < by_digest[pushed.layers[0]]["pieces"] / 2
            assert fleet.registry_bytes(node) < pushed.ztoc_size + pushed.size / 2
            layer_truths, merged_truth = fixture_truth(shared_fixtures, "oci")
            assert differences(await in_thread(facts_of, root), merged_truth) == []
            for digest, truth in zip(pushed.layers, layer_truths, strict=True):
                assert differences(await in_thread(facts_of, node.layer_dir(digest)), truth) == []
            await in_thread(drop_caches)
            assert differences(await in_thread(facts_of, root), merged_truth) == []

            # The fleet has the spans; what a second node asks the registry for is little more than the zTOC.
            other = await fleet.node("--no-background-fetch")
            assert differences(await in_thread(facts_of, await other.mount("soci:1")), merged_truth) == []
            assert fleet.registry_bytes(other) < pushed.ztoc_size + pushed.size / 4
            for each in (node, other):
                assert (await each.status())["failed_reads"] == 0
                scrubbed = await each.shoal("scrub", check=False)
                assert scrubbed.status == 0, scrubbed.stdout
