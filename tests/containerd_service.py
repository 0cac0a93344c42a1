"""What the containerd tests share: a layer service over plain directories, the served snapshotter, a small image."""

import os
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from agent.errors import ShoalError
from agent.registry import Descriptor, ImageReference
from agent.runtimes.containerd.service import serve_snapshots
from agent.runtimes.containerd.snapshotter import Snapshotter, open_snapshotter

REPOSITORY = Path(__file__).resolve().parent.parent


@attrs.frozen
class MountedDirectory:
    name: str
    path: Path
    presentation: str = "bind"
    is_lazy: bool = True


class DirectoryLayers:
    """A layer service whose layers are directories on this machine, mounted by a read-only bind as the real ones are mounted."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.directories: dict[str, Path] = {}
        self.asked: list[tuple[ImageReference | None, Descriptor, list[str]]] = []
        self.failures: dict[str, ShoalError] = {}
        self.mounted: set[str] = set()
        self.lost: set[str] = set()
        self.delay_s = 0.0
        self.waiting = trio.Event()
        self.cancelled = trio.Event()

    def add(self, digest: str, directory: Path) -> None:
        self.directories[digest.removeprefix("sha256:")] = directory

    async def prepare(
        self, image: ImageReference | None, layer: Descriptor, neighbours: Sequence[Descriptor] = ()
    ) -> MountedDirectory:
        self.asked.append((image, layer, [n.digest for n in neighbours]))
        name = layer.digest.removeprefix("sha256:")
        self.waiting.set()
        try:
            await trio.sleep(self.delay_s)
        except trio.Cancelled:
            self.cancelled.set()
            raise
        self.lost.discard(name)
        return MountedDirectory(name, await self.restore(name))

    async def restore(self, name: str) -> Path:
        if name in self.failures:
            raise self.failures[name]
        if name not in self.directories or name in self.lost:
            raise ShoalError(f"no layer {name}")
        path = self.run_dir / name
        if name not in self.mounted:
            path.mkdir(exist_ok=True)
            await trio.run_process(["mount", "--bind", self.directories[name], path], check=True)
            await trio.run_process(["mount", "-o", "remount,bind,ro", path], check=True)
            self.mounted.add(name)
        return path

    async def release(self, name: str) -> None:
        if name in self.mounted:
            await trio.run_process(["umount", self.run_dir / name], check=True)
            self.mounted.remove(name)

    def cached_bytes(self, name: str) -> int:
        return 12345

    def unmount_all(self) -> None:
        for name in sorted(self.mounted):
            subprocess.run(["umount", "-l", self.run_dir / name], check=False)
        self.mounted.clear()


@attrs.frozen
class Served:
    snapshotter: Snapshotter
    layers: DirectoryLayers
    socket: Path


@asynccontextmanager
async def served(folder: Path, layers: DirectoryLayers, **options: float) -> AsyncIterator[Served]:
    socket = folder / "shoal.sock"
    async with open_snapshotter(folder / "state", layers, **options) as snapshotter, serve_snapshots(snapshotter, socket):
        yield Served(snapshotter, layers, socket)


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("CONTAINERD")}
