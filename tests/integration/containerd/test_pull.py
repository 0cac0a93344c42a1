"""Images brought into real containerds: by `shoal pull`'s client and by containerd's own clients."""

from pathlib import Path

import pytest
import trio

from agent.runtimes.containerd.client import ContainerdError, chain_ids, open_containerd
from tests.containerd_image import OUTPUT, SampleImage, open_registry
from tests.containerd_process import ContainerdBinaries, RunningContainerd, run_containerd
from tests.containerd_service import DirectoryLayers, served

TIMEOUT_S = 60


async def run_container(containerd: RunningContainerd, ref: str, name: str) -> str:
    # No network namespace and no cgroup of its own: the test bed has neither to give.
    return await containerd.ctr("run", "--rm", "--snapshotter", "shoal", "--net-host", ref, name)


async def test_pulled_image_runs_from_our_layers_alone(
    binaries: ContainerdBinaries, folder: Path, layers: DirectoryLayers, sample_image: SampleImage
) -> None:
    sample_image.add_to(layers)
    ref_text = "registry.test/sample:latest"
    from agent.registry.references import ImageReference

    with trio.fail_after(TIMEOUT_S):
        async with (
            served(folder, layers) as service,
            run_containerd(binaries, folder / "c", service.socket, folder / "state") as containerd,
            open_containerd(containerd.address) as client,
        ):
            steps: list[tuple[int, int]] = []
            chain = list(zip(sample_image.layers, sample_image.diff_ids, strict=True))
            begun = trio.current_time()
            await client.pull_image(
                "default",
                ImageReference.parse(ref_text),
                sample_image.resolved(),
                sample_image.config,
                chain,
                lambda done, total: steps.append((done, total)),
            )
            print("pull", binaries.major, trio.current_time() - begun)
            assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
            assert await run_container(containerd, ref_text, "one") == OUTPUT
            assert [asked[1].digest for asked in layers.asked] == [layer.digest for layer in sample_image.layers]
            assert layers.asked[0][2] == [layer.digest for layer in sample_image.layers[1:]]
            begun = trio.current_time()
            await client.pull_image(
                "default", ImageReference.parse(ref_text), sample_image.resolved(), sample_image.config, chain
            )
            print("pull again", binaries.major, trio.current_time() - begun)
