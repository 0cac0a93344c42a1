"""A layer on disk for fsmount's tests, an agent that fills it from a source, and a look at a mounted tree."""

import os
import random
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from agent.formats.model import Inode, InodeKind
from fsmount.bitmap import Bitmap
from fsmount.erofs import write_image
from fsmount.errors import LinkError
from fsmount.link import Link, Need, open_link

BLOCK = 4096


def file_node(volume: bytearray, content: bytes, **facts: object) -> Inode:
    """A file whose content is appended to the volume on a block boundary."""
    offset = -1
    if content:
        volume += bytes(-len(volume) % BLOCK)
        offset = len(volume)
        volume += content
    return Inode(InodeKind.FILE, size=len(content), volume_offset=offset, **facts)  # type: ignore[arg-type]


@dataclass
class LayerOnDisk:
    """Data file (empty at first), block map, metadata image, and the bytes that belong into the data file."""

    name: str
    folder: Path
    source: bytes
    blocks: Bitmap
    chunk: int = 256 << 10
    served: list[tuple[int, int]] = field(default_factory=list)

    @property
    def data_path(self) -> Path:
        return self.folder / "data"

    @property
    def blocks_path(self) -> Path:
        return self.folder / "blocks"

    @property
    def image_path(self) -> Path:
        return self.folder / "image"

    def fill(self, start: int, stop: int) -> None:
        """Write the chunks that cover a range, then set their bits."""
        start, stop = start // self.chunk * self.chunk, min(-(-stop // self.chunk) * self.chunk, len(self.source))
        fd = os.open(self.data_path, os.O_WRONLY)
        try:
            os.pwrite(fd, self.source[start:stop], start)
        finally:
            os.close(fd)
        self.blocks.set(start // BLOCK, -(-stop // BLOCK))
        self.served.append((start, stop))

    def take_away(self) -> None:
        """All data go: bits first, then the bytes are overwritten with what no reader may ever see."""
        self.blocks.clear(0, self.blocks.bits)
        with self.data_path.open("r+b") as file:
            file.write(b"\xee" * len(self.source))


def make_layer(folder: Path, name: str, root: Inode, volume: bytes) -> LayerOnDisk:
    """Write a layer's files; no block is present."""
    folder.mkdir(parents=True)
    with (folder / "data").open("wb") as file:
        file.truncate(len(volume))
    (folder / "image").write_bytes(write_image(root, volume_size=len(volume)))
    blocks = Bitmap.create(folder / "blocks", -(-len(volume) // BLOCK), BLOCK)
    return LayerOnDisk(name, folder, bytes(volume), blocks)


@contextmanager
def big_file_layer(folder: Path, name: str, size: int, seed: int = 0) -> Iterator[LayerOnDisk]:
    """A layer of one file `big` of random bytes."""
    volume = bytearray()
    node = file_node(volume, random.Random(seed).randbytes(size), mode=0o644)
    layer = make_layer(folder, name, Inode(InodeKind.DIRECTORY, children={b"big": node}), bytes(volume))
    try:
        yield layer
    finally:
        layer.blocks.close()


async def register(link: Link, layer: LayerOnDisk, presentation: str = "auto") -> Path:
    """Volume and mount of a layer; the mount's path."""
    await link.add_volume(layer.name, layer.data_path, layer.blocks_path, len(layer.source))
    mounted = await link.mount_layer(layer.name, layer.image_path, [layer.name], presentation)
    return mounted.path


@asynccontextmanager
async def open_agent(run_dir: Path, *layers: LayerOnDisk) -> AsyncIterator[Link]:
    """A link whose needs are met from the layers' sources, and that stays up for as long as the process at the other end."""

    async def meet(need: Need) -> None:
        layer = next(layer for layer in layers if layer.name == need.volume)
        layer.fill(need.offset, need.offset + need.length)

    async with open_link(run_dir, meet) as link:
        yield link


async def keep_agent(run_dir: Path, *layers: LayerOnDisk) -> None:
    """What the real agent does: connect, register everything, and do it again whenever fsmount went away."""
    while True:
        try:
            async with open_agent(run_dir, *layers) as link:
                for layer in layers:
                    await register(link, layer)
                await link.wait_closed()
        except LinkError:  # it died again while we were talking
            await trio.sleep(0.01)


def look(root: Path) -> dict[str, dict[str, object]]:
    """Everything that a program can see of a tree, by path; inode numbers only as the set of names that share one."""
    found: dict[str, dict[str, object]] = {}
    by_inode: dict[int, list[str]] = {}
    top = os.fsencode(root)
    paths = [top]
    for folder, directories, files in os.walk(top):
        paths += [os.path.join(folder, name) for name in directories + files]
    for path in paths:
        status = os.lstat(path)
        kind = stat.S_IFMT(status.st_mode)
        name = os.fsdecode(path[len(top) :])
        facts: dict[str, object] = {
            "mode": oct(status.st_mode),
            "owner": (status.st_uid, status.st_gid),
            "mtime_ns": status.st_mtime_ns,
            "nlink": status.st_nlink,
            "blocks": status.st_blocks,
            "rdev": status.st_rdev,
            "xattrs": {key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)},
        }
        if kind != stat.S_IFDIR:
            facts["size"] = status.st_size
            by_inode.setdefault(status.st_ino, []).append(name)
        if kind == stat.S_IFLNK:
            facts["target"] = os.readlink(path)
        elif kind == stat.S_IFREG:
            with open(path, "rb") as file:
                facts["content"] = file.read()
        elif kind == stat.S_IFDIR:
            facts["entries"] = sorted(os.listdir(path))
        found[name] = facts
    for names in by_inode.values():
        for name in names:
            found[name]["same_file"] = sorted(names)
    return found


async def in_thread(function, *args):  # type: ignore[no-untyped-def]
    """Touch a mount without blocking the agent that must feed it; abandoned when the test is cancelled.

    Without a limit on threads: trio's own of 40 is less than what some tests park.
    """
    return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
