"""An image with a SOCI index, through the kernel: lazily where a layer has a zTOC, whole where it has none."""

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from agent.formats.model import Digest
from agent.formats.soci import INDEX_V1
from agent.lab.publish import MANIFEST_TYPE
from agent.registry import OCI_INDEX, ImageReference, open_registry_client
from tests.agent_harness import AgentNode, Fleet, drop_caches, in_thread, open_fleet, push_fixtures
from tests.soci_writer import build_index, build_ztoc, digest_text
from tests.tree_facts import differences, facts_of, fixture_truth

SPAN = 256 << 10


@attrs.frozen
class Pushed:
    layers: list[str]
    size: int
    ztoc_size: int


def list_referrers(soci_index: bytes) -> bytes:
    """What clients put under the tag: other artifacts are there as well."""

    def entry(artifact_type: str) -> dict[str, Any]:
        digest = digest_text(soci_index)
        return {"mediaType": MANIFEST_TYPE, "digest": digest, "size": len(soci_index), "artifactType": artifact_type}

    entries = [entry("application/vnd.example.signature"), entry(INDEX_V1)]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


async def push_soci(fleet: Fleet, fixtures: Path, name: str, *, is_v1: bool = False) -> Pushed:
    """The fixture image `oci`, with a zTOC for its first layer: the second is too small for one.

    A version 1 index only refers to the image, and is listed under the tag that stands for the referrers API.
    """
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
    target = ImageReference.parse(f"{fleet.registry.address}/{name}")
    if is_v1:
        raw = json.dumps(manifest).encode()
        subject = {"mediaType": MANIFEST_TYPE, "digest": digest_text(raw), "size": len(raw)}
        soci_index = build_index({first["digest"]: ztoc}, is_v1=True, subject=subject)
    else:
        soci_index = build_index({first["digest"]: ztoc})
        manifest["annotations"] = {"com.amazon.soci.index-digest": digest_text(soci_index)}
        raw = json.dumps(manifest).encode()
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
        await registry.push_manifest(target, raw, MANIFEST_TYPE)
        if is_v1:
            tag = attrs.evolve(target, tag=digest_text(raw).replace(":", "-"))
            await registry.push_manifest(tag, list_referrers(soci_index), OCI_INDEX)
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


def asked_for_referrers(fleet: Fleet, node: AgentNode) -> list[str]:
    """What the node asked the registry for: the referrers API, which this registry lacks, and the tag in its place."""
    return [
        access.path.partition("?")[0].split("/")[-2]
        for access in fleet.registry.accesses(node.proxy.source)
        if "/referrers/" in access.path or "/manifests/sha256-" in access.path
    ]


@pytest.mark.slow
async def test_an_index_that_only_refers_to_the_image_is_used_where_it_is_wanted(shared_fixtures: Path) -> None:
    with trio.fail_after(110):
        async with open_fleet() as fleet:
            pushed = await push_soci(fleet, shared_fixtures, "soci:1", is_v1=True)
            await push_fixtures(fleet, shared_fixtures, ["oci"])
            layer_truths, merged_truth = fixture_truth(shared_fixtures, "oci")
            node = await fleet.node("--no-background-fetch", "--soci-v1", "--log-level=debug", in_fleet=False)
            seen = json.loads((await node.shoal("inspect", node.image("soci:1"), "--json")).stdout)["layers"]
            assert [(layer["format"], layer["is_lazy"]) for layer in seen] == [("soci", True), ("tar", False)]
            assert "no zTOC" in seen[1]["reason"]
            before = fleet.registry_bytes(node)
            root = await node.mount("soci:1")
            by_digest = {layer["digest"]: layer for layer in (await node.status())["layers"]}
            lazy, small = (by_digest[digest] for digest in pushed.layers)
            assert (lazy["format"], small["format"]) == ("soci", "tar")
            assert lazy["pieces_held"] < lazy["pieces"] / 2
            assert fleet.registry_bytes(node) - before < pushed.ztoc_size + pushed.size / 2
            # Once for both layers, and for the inspection before.
            assert asked_for_referrers(fleet, node) == ["referrers", "manifests"]
            assert differences(await in_thread(facts_of, root), merged_truth) == []
            assert differences(await in_thread(facts_of, node.layer_dir(pushed.layers[0])), layer_truths[0]) == []
            assert [event["layer"] for event in node.events("layer_without_index")] == [pushed.layers[1]]

            # The same image where nothing refers to it is a plain one, and nobody need know.
            alone = await fleet.node("--no-background-fetch", "--soci-v1", in_fleet=False)
            await alone.mount("fixtures:oci")
            assert {layer["format"] for layer in (await alone.status())["layers"]} == {"tar"}
            assert asked_for_referrers(fleet, alone) == ["referrers", "manifests"]
            for each in (node, alone):
                assert each.events("layer_not_lazy") == each.events("referrers_not_listed") == []

            other = await fleet.node("--no-background-fetch", in_fleet=False)
            root = await other.mount("soci:1")
            assert {layer["format"] for layer in (await other.status())["layers"]} == {"tar"}
            assert fleet.registry_bytes(other) >= pushed.size
            assert asked_for_referrers(fleet, other) == []
            seen = json.loads((await other.shoal("inspect", other.image("soci:1"), "--json")).stdout)["layers"]
            assert {layer["format"] for layer in seen} == {"tar"}
            assert differences(await in_thread(facts_of, root), merged_truth) == []
