"""Images brought into real containerds: by `shoal pull`'s client and by containerd's own clients."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from agent.errors import ShoalError
from agent.registry import ImageReference
from agent.runtimes.containerd.client import Containerd, ContainerdError, open_containerd
from tests.containerd_image import OUTPUT, Registry, SampleImage, open_registry
from tests.containerd_process import ContainerdBinaries, RunningContainerd, pull_through_cri, run_containerd
from tests.containerd_service import DirectoryLayers, Served, served

TIMEOUT_S = 60
REF = ImageReference.parse("registry.test/sample:latest")


@attrs.frozen
class Node:
    service: Served
    layers: DirectoryLayers
    containerd: RunningContainerd
    client: Containerd

    async def run(self, ref: str, name: str, namespace: str = "default") -> str:
        # The test bed has no second network to give.
        return await self.containerd.ctr("run", "--rm", "--snapshotter", "shoal", "--net-host", ref, name, namespace=namespace)

    async def pull(self, image: SampleImage, namespace: str = "default") -> None:
        chain = list(zip(image.layers, image.diff_ids, strict=True))
        await self.client.pull_image(namespace, REF, image.resolved(), image.config, chain)


@asynccontextmanager
async def node(binaries: ContainerdBinaries, folder: Path, layers: DirectoryLayers) -> AsyncIterator[Node]:
    with trio.fail_after(TIMEOUT_S):
        async with (
            served(folder, layers) as service,
            run_containerd(binaries, folder / "c", service.socket, folder / "state") as containerd,
            open_containerd(containerd.address) as client,
        ):
            yield Node(service, layers, containerd, client)


async def test_our_pull_runs_from_served_layers(
    binaries: ContainerdBinaries, folder: Path, layers: DirectoryLayers, sample_image: SampleImage
) -> None:
    sample_image.add_to(layers)
    async with node(binaries, folder, layers) as n:
        steps: list[tuple[int, int]] = []
        chain = list(zip(sample_image.layers, sample_image.diff_ids, strict=True))
        await n.client.pull_image(
            "default", REF, sample_image.resolved(), sample_image.config, chain, lambda done, total: steps.append((done, total))
        )
        assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
        assert await n.run(str(REF), "one") == OUTPUT
        assert [layer.digest for _, layer, _ in layers.asked] == [layer.digest for layer in sample_image.layers]
        image, layer, neighbours = layers.asked[0]
        assert image is not None
        assert (image.name, image.digest) == (REF.name, sample_image.manifest_digest)
        assert layer.annotations["containerd.io/snapshot/stargz/toc.digest"].startswith("sha256:")
        assert neighbours == [layer.digest for layer in sample_image.layers[1:]]
        assert not (sample_image.trees[0] / "written").exists()

        await n.pull(sample_image)  # again: finds everything
        assert len(layers.asked) == 3
        await n.pull(sample_image, namespace="k8s.io")
        assert await n.run(str(REF), "two", namespace="k8s.io") == OUTPUT
        assert str(REF) in await n.containerd.ctr("images", "ls", "-q", namespace="k8s.io")
        assert (await n.containerd.ctr("leases", "ls", "-q")).split() == []


async def test_layers_go_when_the_image_goes(
    binaries: ContainerdBinaries, folder: Path, layers: DirectoryLayers, sample_image: SampleImage
) -> None:
    sample_image.add_to(layers)
    async with node(binaries, folder, layers) as n:
        await n.pull(sample_image)
        assert len(layers.mounted) == 3
        # An unrelated collection first: the image record, not luck, keeps the snapshots.
        await n.containerd.ctr("content", "prune", "references", check=False)
        assert await n.run(str(REF), "one") == OUTPUT
        await n.containerd.ctr("images", "rm", "--sync", str(REF))
        assert layers.mounted == set()
        assert [path.name for path in (folder / "state" / "snapshots").iterdir() if path.name.isdigit()] == []


async def test_a_layer_that_is_not_served_is_a_clear_error_and_leaves_nothing(
    binaries: ContainerdBinaries, folder: Path, layers: DirectoryLayers, sample_image: SampleImage
) -> None:
    sample_image.add_to(layers)
    layers.failures[sample_image.layers[1].digest.removeprefix("sha256:")] = ShoalError("registry says no")
    async with node(binaries, folder, layers) as n:
        with pytest.raises(ContainerdError, match="could not be served"):
            await n.pull(sample_image)
        assert await n.containerd.ctr("images", "ls", "-q") == ""
        assert (await n.containerd.ctr("leases", "ls", "-q")).split() == []


async def test_containerd_without_our_section_is_told_so(
    binaries: ContainerdBinaries, folder: Path, layers: DirectoryLayers, sample_image: SampleImage
) -> None:
    async with node(binaries, folder, layers) as n:
        with pytest.raises(ContainerdError, match=r"has no snapshotter 'other'.*config\.toml"):
            await n.client.check_snapshotter("other")
    async with open_containerd(str(folder / "nobody.sock")) as client:
        with pytest.raises(ContainerdError, match="is it running"):
            await client.version()


@asynccontextmanager
async def pushed(folder: Path, image: SampleImage) -> AsyncIterator[tuple[Registry, str]]:
    async with open_registry(folder / "registry") as registry:
        yield registry, str(await registry.push(image, "sample"))


async def test_cri_pulls_lazily(
    binaries: ContainerdBinaries, folder: Path, layers: DirectoryLayers, sample_image: SampleImage
) -> None:
    sample_image.add_to(layers)
    async with pushed(folder, sample_image) as (registry, ref), node(binaries, folder, layers) as n:
        await pull_through_cri(n.containerd, ref)
        assert await n.run(ref, "one", namespace="k8s.io") == OUTPUT
        assert registry.layers_read(sample_image) == set()
        image, _, neighbours = layers.asked[0]
        assert (str(image), len(neighbours)) == (f"{ref}@{sample_image.manifest_digest}", 2)


async def test_ctr_pull_is_lazy_where_it_passes_labels(
    binaries: ContainerdBinaries, folder: Path, layers: DirectoryLayers, sample_image: SampleImage
) -> None:
    """2.x pulls through the transfer service, which passes them on; 1.x fetches all and unpacks into our snapshots."""
    sample_image.add_to(layers)
    async with pushed(folder, sample_image) as (registry, ref), node(binaries, folder, layers) as n:
        await n.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "shoal", ref)
        assert await n.run(ref, "one") == OUTPUT
        read = registry.layers_read(sample_image)
        assert read == (set() if binaries.major >= 2 else {layer.digest for layer in sample_image.layers})


async def test_what_cannot_be_served_is_downloaded_by_containerd(
    binaries: ContainerdBinaries, folder: Path, layers: DirectoryLayers, sample_image: SampleImage
) -> None:
    sample_image.add_to(layers)
    layers.failures[sample_image.layers[1].digest.removeprefix("sha256:")] = ShoalError("registry says no")
    async with pushed(folder, sample_image) as (registry, ref), node(binaries, folder, layers) as n:
        await pull_through_cri(n.containerd, ref)
        assert await n.run(ref, "one", namespace="k8s.io") == OUTPUT
        assert sample_image.layers[0].digest not in registry.layers_read(sample_image)
        assert sample_image.layers[1].digest in registry.layers_read(sample_image)
