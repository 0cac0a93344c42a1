"""Images of every kind of index, unchanged, through real containerds on Shoal alone: what containerd mounts is what was packed,
and no layer of it was downloaded by containerd."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from google.protobuf.empty_pb2 import Empty

from agent.runtimes.containerd.client import chain_ids, open_containerd
from agent.runtimes.containerd.proto import snapshots_pb2
from tests.agent_harness import AgentNode, Fleet, drop_caches, in_thread, open_fleet, push_fixtures
from tests.containerd_process import ContainerdBinaries, RunningContainerd, pull_through_cri, run_containerd
from tests.tree_facts import Facts, differences, facts_of, fixture_truth

TAGS = ("nydus-v6-zstd", "nydus-zran", "zstdchunked")


def top_snapshot(fixtures: Path, tag: str) -> str:
    """The chain ID of the whole image."""
    images = fixtures / "images"

    def document(digest: str) -> Any:
        return json.loads((images / "blobs" / digest.replace(":", "/")).read_bytes())

    named = {
        entry["annotations"]["org.opencontainers.image.ref.name"]: entry
        for entry in json.loads((images / "index.json").read_bytes())["manifests"]
    }
    manifest = document(named[tag]["digest"])
    return chain_ids(document(manifest["config"]["digest"])["rootfs"]["diff_ids"])[-1]


def layers_read_by_containerd(fleet: Fleet, layers: list[str]) -> set[str]:
    """By the registry's access log, where containerd and the agent say who they are."""
    lines = [line for line in (fleet.registry.folder / "registry.log").read_text().splitlines() if '"GET ' in line]
    assert any('"containerd/' in line for line in lines)  # manifests and configurations
    return {layer for layer in layers for line in lines if f"/blobs/{layer}" in line and '"containerd/' in line}


@attrs.frozen
class Machine:
    """A containerd whose snapshotter is a whole agent."""

    fleet: Fleet
    node: AgentNode
    containerd: RunningContainerd

    def image(self, tag: str) -> str:
        """Straight from the registry: containerd tries TLS first, which the node's proxy does not understand."""
        return f"{self.fleet.registry.address}/fixtures:{tag}"

    async def tree(self, snapshot: str, key: str, namespace: str) -> Facts:
        """All files of a snapshot, mounted as containerd says."""
        target = self.node.folder / key
        target.mkdir()
        service, kept = "containerd.services.snapshots.v1.Snapshots", {"containerd.io/gc.root": "test"}
        async with open_containerd(self.containerd.address) as client:
            view = snapshots_pb2.ViewSnapshotRequest(snapshotter="shoal", key=key, parent=snapshot, labels=kept)
            # Not ctr's: its views may be collected before they are mounted; and after our restart containerd redials for a while.
            found = await client._call(f"{service}/View", view, snapshots_pb2.ViewSnapshotResponse, namespace)
            (mount,) = found.mounts
            await trio.run_process(["mount", "-t", mount.type, mount.source, "-o", ",".join(mount.options), target])
            await in_thread(drop_caches)
            facts = await in_thread(facts_of, target)
            await trio.run_process(["umount", target])
            remove = snapshots_pb2.RemoveSnapshotRequest(snapshotter="shoal", key=key)
            await client._call(f"{service}/Remove", remove, Empty, namespace)
        return facts


@asynccontextmanager
async def machine(binaries: ContainerdBinaries, folder: Path) -> AsyncIterator[Machine]:
    async with open_fleet() as fleet:
        address = folder / "c" / "c.sock"
        node = await fleet.node("--no-background-fetch", "--snapshotter", f"--containerd-address={address}", in_fleet=False)
        socket = node.run_dir / "containerd.sock"
        async with run_containerd(binaries, folder / "c", socket, node.folder / "state") as containerd:
            yield Machine(fleet, node, containerd)


@pytest.mark.slow
async def test_unchanged_images_are_served(binaries: ContainerdBinaries, folder: Path, shared_fixtures: Path) -> None:
    with trio.fail_after(110):
        async with machine(binaries, folder) as m:
            pushed = await push_fixtures(m.fleet, shared_fixtures, [*TAGS, "oci-nydus"])
            layers = [layer for tag in TAGS for layer in pushed[tag]]
            for tag in TAGS:
                await pull_through_cri(m.containerd, m.image(tag))
                truth = fixture_truth(shared_fixtures, tag)[1]
                found = await m.tree(top_snapshot(shared_fixtures, tag), f"cri-{tag}", "k8s.io")
                assert differences(found, truth) == [], tag
            assert layers_read_by_containerd(m.fleet, layers) == set()

            for tag in TAGS:  # what is here by another way, from another namespace
                await m.node.shoal("pull", m.image(tag))
            assert sorted((await m.containerd.ctr("images", "ls", "-q")).split()) == sorted(m.image(tag) for tag in TAGS)
            if binaries.major >= 2:  # 1.x passes no labels
                for tag in TAGS:
                    pull = ("images", "pull", "--plain-http", "--snapshotter", "shoal", m.image(tag))
                    await m.containerd.ctr(*pull, namespace="third")
            assert layers_read_by_containerd(m.fleet, layers) == set()
            assert m.node.events("layer_left_to_containerd") == []

            await m.node.stop()
            await m.node.shoal("fsmount", "--stop")
            await m.fleet.registry.stop()
            await m.node.start()
            for tag in TAGS:
                found = await m.tree(top_snapshot(shared_fixtures, tag), f"again-{tag}", "default")
                assert differences(found, fixture_truth(shared_fixtures, tag)[1]) == [], tag
            status = await m.node.status()
            assert (status["degraded"], status["failed_reads"]) == ({}, 0)
            # What the images need outlasts garbage collection, and no more than that is kept.
            await m.containerd.ctr("leases", "rm", "--sync", (await m.containerd.ctr("leases", "create")).split()[-1])
            kept = await m.containerd.ctr("snapshots", "--snapshotter", "shoal", "ls")
            assert kept.count("Committed") == sum(len(pushed[tag]) for tag in TAGS), kept
