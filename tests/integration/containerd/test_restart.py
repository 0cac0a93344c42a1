"""What lasts when the agent goes and comes: every served snapshot, or a degraded one that spoils nothing else."""

from pathlib import Path

import grpc
import pytest
import trio

from agent.errors import SettingsError, ShoalError
from agent.runtimes.containerd.client import ContainerdError, open_containerd
from agent.runtimes.containerd.mounts import Mount
from agent.runtimes.containerd.proto.snapshots_pb2 import PrepareSnapshotRequest
from agent.runtimes.containerd.service import serve_snapshots
from agent.runtimes.containerd.snapshots import Kind, SnapshotExists, SnapshotUnavailable
from agent.runtimes.containerd.snapshotter import Snapshotter, open_snapshotter
from tests.containerd_image import OUTPUT, SampleImage
from tests.containerd_process import ContainerdBinaries, run_containerd
from tests.containerd_service import DirectoryLayers, served
from tests.integration.containerd.test_pull import REF

DIGESTS = ["sha256:" + f"{number:064x}" for number in range(200)]


def labels(at: int) -> dict[str, str]:
    return {
        "containerd.io/snapshot.ref": f"chain-{at}",
        "containerd.io/snapshot/cri.image-ref": "registry.test/a:b",
        "containerd.io/snapshot/cri.layer-digest": DIGESTS[at],
    }


async def serve_chain(snapshotter: Snapshotter, count: int) -> list[str]:
    """Have `count` layers served on one another; gives the snapshots' names."""
    parent, names = "", []
    for at in range(count):
        with pytest.raises(SnapshotExists):
            await snapshotter.prepare(f"default/{at}/extract", parent, labels(at))
        found = await snapshotter.select([f'labels."containerd.io/snapshot.ref"==chain-{at},parent=="{parent}"'])
        assert [s.kind for s in found] == [Kind.COMMITTED]
        parent = found[0].name
        names.append(parent)
    return names


def make_layers(folder: Path, layers: DirectoryLayers, count: int) -> None:
    for at in range(count):
        tree = folder / "trees" / str(at)
        tree.mkdir(parents=True)
        (tree / f"file-{at}").write_text(str(at))
        (tree / "top").write_text(str(at))
        layers.add(DIGESTS[at], tree)


async def mounted(target: Path, mounts: list[Mount]) -> None:
    target.mkdir(exist_ok=True)
    (mount,) = mounts
    root = Path(next(o for o in mount.options if o.startswith("lowerdir=")).split("=")[1].split(":")[0]).parent.parent
    options = ",".join(mount.options).replace(f"{root}/", "")
    # As containerd does with long options: from inside the common folder.
    await trio.run_process(["mount", "-t", mount.type, mount.source, "-o", options, target], cwd=root)


async def test_128_served_layers_mount(folder: Path, layers: DirectoryLayers) -> None:
    make_layers(folder, layers, 128)
    async with open_snapshotter(folder / "state", layers) as snapshotter:
        names = await serve_chain(snapshotter, 128)
        mounts = await snapshotter.prepare("default/1/container", names[-1], {})
        await mounted(folder / "merged", mounts)
        try:
            merged = folder / "merged"
            assert (merged / "top").read_text() == "127"
            assert sorted(path.name for path in merged.iterdir()) == sorted(["top", *(f"file-{at}" for at in range(128))])
            (merged / "top").write_text("mine")
        finally:
            await trio.run_process(["umount", folder / "merged"])
        assert (await snapshotter.usage("default/1/container")).inodes >= 2


async def test_every_served_snapshot_is_served_after_a_restart(folder: Path, layers: DirectoryLayers) -> None:
    make_layers(folder, layers, 3)
    async with open_snapshotter(folder / "state", layers) as snapshotter:
        names = await serve_chain(snapshotter, 3)
        before = await snapshotter.prepare("default/9/container", names[-1], {})
    layers.unmount_all()
    async with open_snapshotter(folder / "state", layers) as snapshotter:
        assert await snapshotter.mounts("default/9/container") == before
        assert len(layers.mounted) == 3
        assert snapshotter.degraded() == {}
        assert [s.name for s in await snapshotter.select(["kind==committed"])] == names


async def test_layers_that_come_back_elsewhere_are_found(folder: Path, layers: DirectoryLayers) -> None:
    make_layers(folder, layers, 2)
    async with open_snapshotter(folder / "state", layers) as snapshotter:
        names = await serve_chain(snapshotter, 2)
    layers.unmount_all()
    layers.run_dir = folder / "elsewhere"
    layers.run_dir.mkdir()
    async with open_snapshotter(folder / "state", layers) as snapshotter:
        await mounted(folder / "merged", await snapshotter.view("default/1/view", names[-1], {}))
        assert (folder / "merged" / "file-0").read_text() == "0"
        await trio.run_process(["umount", folder / "merged"])


async def test_a_layer_that_cannot_be_restored_degrades_its_users_alone(folder: Path, layers: DirectoryLayers) -> None:
    make_layers(folder, layers, 2)
    async with open_snapshotter(folder / "state", layers) as snapshotter:
        good = (await serve_chain(snapshotter, 1))[0]
        with pytest.raises(SnapshotExists):
            await snapshotter.prepare("default/5/extract", "", labels(1))
        (bad,) = [s.name for s in await snapshotter.select(['labels."containerd.io/snapshot.ref"==chain-1'])]
        await snapshotter.prepare("default/6/container", bad, {})
    layers.unmount_all()
    layers.failures[DIGESTS[1].removeprefix("sha256:")] = ShoalError("registry is down")
    async with open_snapshotter(folder / "state", layers) as snapshotter:
        assert len(await snapshotter.prepare("default/7/container", good, {})) == 1
        for attempt in (
            lambda: snapshotter.mounts("default/6/container"),
            lambda: snapshotter.prepare("default/8/container", bad, {}),
            lambda: snapshotter.view("default/8/view", bad, {}),
        ):
            with pytest.raises(SnapshotUnavailable, match="registry is down"):
                await attempt()
        assert list(snapshotter.degraded()) == [DIGESTS[1].removeprefix("sha256:")]
        assert (await snapshotter.stat(bad)).kind is Kind.COMMITTED
        # The registry is back: the next use mounts it, with nobody restarting anything.
        layers.failures.clear()
        assert len(await snapshotter.mounts("default/6/container")) == 1
        assert snapshotter.degraded() == {}


async def test_a_layer_that_the_node_lost_is_prepared_anew(folder: Path, layers: DirectoryLayers) -> None:
    make_layers(folder, layers, 1)
    async with open_snapshotter(folder / "state", layers) as snapshotter:
        (name,) = await serve_chain(snapshotter, 1)
    layers.unmount_all()
    layers.lost.add(DIGESTS[0].removeprefix("sha256:"))
    async with open_snapshotter(folder / "state", layers) as snapshotter:
        assert len(await snapshotter.view("default/1/view", name, {})) == 1
    assert [str(image) for image, _, _ in layers.asked] == ["registry.test/a:b"] * 2


async def test_a_layer_unmounted_behind_our_back_is_mounted_again(folder: Path, layers: DirectoryLayers) -> None:
    make_layers(folder, layers, 1)
    async with open_snapshotter(folder / "state", layers) as snapshotter:
        (name,) = await serve_chain(snapshotter, 1)
        await snapshotter.prepare("default/1/container", name, {})
        layers.unmount_all()
        await snapshotter.mounts("default/1/container")
        assert len(layers.mounted) == 1


async def test_a_slow_layer_is_left_to_containerd(folder: Path, layers: DirectoryLayers) -> None:
    make_layers(folder, layers, 1)
    layers.delay_s = 30
    async with open_snapshotter(folder / "state", layers, prepare_s=0.2) as snapshotter:
        (mount,) = await snapshotter.prepare("default/1/extract", "", labels(0))
        assert (mount.type, mount.options) == ("bind", ("rw", "rbind"))


async def test_removed_snapshots_free_their_key_at_once_and_their_disk_at_cleanup(folder: Path, layers: DirectoryLayers) -> None:
    make_layers(folder, layers, 1)
    async with open_snapshotter(folder / "state", layers) as snapshotter:
        (name,) = await serve_chain(snapshotter, 1)
        await snapshotter.prepare("default/1/container", name, {})
        assert (await snapshotter.usage(name)).size == layers.cached_bytes("")
        await snapshotter.remove("default/1/container")
        await snapshotter.prepare("default/1/container", name, {})
        await snapshotter.remove("default/1/container")
        await snapshotter.remove(name)
        assert len(layers.mounted) == 1
        await snapshotter.cleanup()
        assert layers.mounted == set()
        assert [path.name for path in (folder / "state" / "snapshots").iterdir() if path.name.isdigit()] == []
        await serve_chain(snapshotter, 1)
        await snapshotter.cleanup()
        assert len(layers.mounted) == 1


async def test_a_container_starts_after_the_agent_came_back(
    binaries: ContainerdBinaries, folder: Path, layers: DirectoryLayers, sample_image: SampleImage
) -> None:
    sample_image.add_to(layers)
    chain = list(zip(sample_image.layers, sample_image.diff_ids, strict=True))
    with trio.fail_after(60):
        async with (
            run_containerd(binaries, folder / "c", folder / "shoal.sock", folder / "state") as containerd,
            open_containerd(containerd.address) as client,
        ):
            for namespace in ("before", "after"):
                async with served(folder, layers):
                    # containerd dials again with growing pauses of at most three seconds.
                    while True:
                        try:
                            await client.pull_image(namespace, REF, sample_image.resolved(), sample_image.config, chain)
                            break
                        except ContainerdError:
                            await trio.sleep(0.2)
                    run = ("run", "--rm", "--snapshotter", "shoal", "--net-host", str(REF), namespace)
                    assert await containerd.ctr(*run, namespace="before") == OUTPUT
                layers.unmount_all()
                with pytest.raises(ContainerdError):  # nobody answers containerd now
                    await client.pull_image("between", REF, sample_image.resolved(), sample_image.config, chain)


async def test_the_socket_is_private_and_a_dead_one_is_replaced(folder: Path, layers: DirectoryLayers) -> None:
    path = folder / "run" / "shoal.sock"
    async with open_snapshotter(folder / "state", layers) as snapshotter:
        path.parent.mkdir()
        import socket

        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
            dead.bind(str(path))
        async with serve_snapshots(snapshotter, path):
            assert path.stat().st_mode & 0o777 == 0o600
            with pytest.raises(SettingsError, match="another agent"):
                async with serve_snapshots(snapshotter, path):
                    pass
        assert not path.exists()
        path.write_text("no socket")
        with pytest.raises(SettingsError, match="no socket"):
            async with serve_snapshots(snapshotter, path):
                pass
        with pytest.raises(SettingsError, match="too long"):
            async with serve_snapshots(snapshotter, folder / ("x" * 110)):
                pass


async def test_a_state_folder_that_overlay_cannot_take_is_refused(folder: Path, layers: DirectoryLayers) -> None:
    with pytest.raises(SettingsError, match="--state-dir"):
        async with open_snapshotter(folder / "a:b", layers):
            pass


async def test_a_request_that_is_given_up_stops_its_work(folder: Path, layers: DirectoryLayers) -> None:
    make_layers(folder, layers, 1)
    layers.delay_s = 3600
    async with served(folder, layers) as service:
        with grpc.insecure_channel(f"unix:{service.socket}", options=[("grpc.default_authority", "localhost")]) as channel:
            prepare = channel.unary_unary(
                "/containerd.services.snapshots.v1.Snapshots/Prepare", PrepareSnapshotRequest.SerializeToString, bytes
            )
            call = prepare.future(PrepareSnapshotRequest(snapshotter="shoal", key="default/1/x", labels=labels(0)))
            with trio.fail_after(20):
                await layers.waiting.wait()
                call.cancel()
                await layers.cancelled.wait()
        assert await service.snapshotter.select([]) == []


async def test_two_pulls_of_one_layer_make_one_snapshot(folder: Path, layers: DirectoryLayers) -> None:
    make_layers(folder, layers, 1)
    async with open_snapshotter(folder / "state", layers) as snapshotter:

        async def pull(at: int) -> None:
            with pytest.raises(SnapshotExists):
                await snapshotter.prepare(f"default/{at}/extract", "", labels(0))

        async with trio.open_nursery() as nursery:
            for at in range(5):
                nursery.start_soon(pull, at)
        assert len(await snapshotter.select([])) == 1
        assert await snapshotter.layers() == {DIGESTS[0].removeprefix("sha256:")}
