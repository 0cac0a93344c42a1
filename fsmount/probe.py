"""What this machine can mount, found by doing it: a tiny layer under each presentation, its file read through the kernel."""

import errno
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from fsmount.bitmap import Bitmap
from fsmount.erofs import write_image
from fsmount.mounts import Mounts

_CONTENT: Final = bytes(range(256)) * 16
_REGULAR: Final = 1
_DIRECTORY: Final = 2


@dataclass(eq=False)
class _Node:
    """What the EROFS writer wants of an inode."""

    kind: int
    mode: int
    size: int = 0
    volume_offset: int = -1
    children: dict[bytes, "_Node"] = field(default_factory=dict)
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    target: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    is_opaque: bool = False


class Probe:
    """The tiny layer, in run_dir/probe, and the attempts to mount it."""

    def __init__(self, run_dir: Path, mounts: Mounts) -> None:
        self._folder = run_dir / "probe"
        self._mounts = mounts
        self._threads = trio.CapacityLimiter(1)

    async def attempt(self, presentation: str) -> None:
        """Mount, read, unmount. Raises MountError or OSError if anything of it fails or the content is wrong."""
        await trio.to_thread.run_sync(self._make, limiter=self._threads)
        mounts, folder = self._mounts, self._folder
        await mounts.add_volume("probe", str(folder / "data"), str(folder / "blocks"), len(_CONTENT))
        try:
            path, _ = await mounts.mount_layer("probe", str(folder / "image"), ["probe"], presentation)
            found = await trio.to_thread.run_sync((Path(path) / "file").read_bytes, limiter=self._threads)
            if found != _CONTENT:
                raise OSError(errno.EILSEQ, "a file of the probe reads wrong")
        finally:
            with trio.CancelScope(shield=True):
                await mounts.unmount_layer("probe")

    async def clean_up(self) -> None:
        """Take away what the attempts left."""
        await self._mounts.remove_volume("probe")
        await trio.to_thread.run_sync(lambda: shutil.rmtree(self._folder, ignore_errors=True), limiter=self._threads)

    def _make(self) -> None:
        self._folder.mkdir(exist_ok=True)
        (self._folder / "data").write_bytes(_CONTENT)
        blocks = Bitmap.create(self._folder / "blocks", 1, 4096)
        blocks.set(0, 1)
        blocks.close()
        file = _Node(_REGULAR, 0o644, len(_CONTENT), 0)
        (self._folder / "image").write_bytes(
            write_image(_Node(_DIRECTORY, 0o755, children={b"file": file}), volume_size=len(_CONTENT))
        )
