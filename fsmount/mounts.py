"""The mount table: what is registered and mounted, kept on disk, and the calls that change it.

Every change goes: record what is about to be there, do it, record that it is done. A process that dies in between leaves a
record that says "not mounted", and the next call of the same kind cleans up and starts over; all calls are idempotent, so an
agent that reconnects simply says everything again.

The kernel reads images and volumes through our own FUSE root while it mounts. So every mount(2) and every look at a mount
point runs in a worker thread while the event loop answers.
"""

import errno
import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from fsmount import loop, syscalls
from fsmount.errors import MountError, ShoalError
from fsmount.root import Root
from fsmount.table import LayerRecord, RootRecord, Table, VolumeRecord, store_table

log = logging.getLogger("fsmount")

PRESENTATIONS: Final = ("erofs-file", "erofs-loop", "fuse-tree")
"""Best first."""

READAHEAD_COMPLETE_KIB: Final = 1024
READAHEAD_PARTIAL_KIB: Final = 256

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_MAX_LAYERS: Final = 500  # overlayfs' own limit on lower layers
_MAX_VOLUMES: Final = 500

R = TypeVar("R")


class Mounts:
    """The table of one FUSE mount, with the root that serves it."""

    def __init__(self, run_dir: Path, root: Root, table: Table, default_presentation: str) -> None:
        self._run_dir = run_dir
        self._fs = run_dir / "fs"
        self._root = root
        self._table = table
        self._default = default_presentation
        self._lock = trio.Lock()
        self._threads = trio.CapacityLimiter(4)
        self._readahead: Path | None = None

    # Start

    async def restore(self) -> None:
        """Open again what the table names, and forget mounts that are gone."""
        table, root = self._table, self._root
        for volume in list(table.volumes):
            try:
                root.add_volume(volume)
            except ShoalError as error:
                log.error("volume_lost volume=%s error=%s", volume.name, error)
        for layer in list(table.layers):
            try:
                root.add_layer(layer)
            except KeyError as error:
                log.error("layer_lost layer=%s missing_volume_id=%s", layer.name, error)

    async def probe(self, attempt: Callable[[str], Any]) -> list[str]:
        """The presentations that work here; tried once per FUSE mount. `attempt` is an async callable that raises if one fails."""
        if self._table.presentations is None:
            found = []
            for presentation in PRESENTATIONS:
                try:
                    await attempt(presentation)
                    found.append(presentation)
                except (OSError, MountError) as error:
                    log.warning("presentation_unavailable presentation=%s reason=%s", presentation, error)
            self._table.presentations = found
            async with self._lock:
                await self._save()
        return self._table.presentations

    @property
    def presentations(self) -> list[str]:
        """What the probe found; nothing before it ran."""
        return self._table.presentations or []

    async def forget(self, record_id: int) -> None:
        """The kernel let go of a retired record."""
        async with self._lock:
            self._table.volumes = [v for v in self._table.volumes if v.id != record_id]
            self._table.layers = [record for record in self._table.layers if record.id != record_id]
            await self._save()

    # Volumes

    async def add_volume(self, name: str, data_path: str, blocks_path: str, size: int) -> None:
        """Register a volume; again with the same facts is no change.

        Raises:
            MountError: the name is taken by a volume with other facts, or its files do not fit.
        """
        _check_name(name)
        async with self._lock:
            known = self._table.volume(name)
            if known is not None:
                if (known.data_path, known.blocks_path, known.size) != (data_path, blocks_path, size):
                    raise MountError(f"volume {name} is registered with other files; remove it first", errno.EEXIST)
                if self._root.volume(name) is not None:
                    return
                self._table.volumes.remove(known)  # its files could not be opened at the last start
            record = VolumeRecord(name, self._table.new_id(), data_path, blocks_path, size)
            self._root.add_volume(record)
            self._table.volumes.append(record)
            await self._save()

    async def remove_volume(self, name: str) -> None:
        """Take a volume's name away; who has it open reads on. No such volume: no change.

        Raises:
            MountError: a layer still uses it.
        """
        async with self._lock:
            record = self._table.volume(name)
            if record is None:
                return
            user = next((layer.name for layer in self._table.layers if name in layer.volumes and not layer.is_retired), None)
            if user is not None:
                raise MountError(f"volume {name} is used by layer {user}; unmount that first", errno.EBUSY)
            await self._retire(record)

    # Layers

    async def mount_layer(
        self, name: str, image_path: str, volumes: Sequence[str], presentation: str = "auto"
    ) -> tuple[str, str]:
        """Present a layer at run_dir/layers/<name>; gives the path and the presentation used.

        Raises:
            MountError: no presentation (or not the one asked for) works.
        """
        _check_name(name)
        if len(volumes) > _MAX_VOLUMES:
            raise MountError(f"layer {name} has {len(volumes)} volumes, more than {_MAX_VOLUMES}", errno.E2BIG)
        wanted = self._default if presentation == "auto" else presentation
        if wanted != "auto" and wanted not in PRESENTATIONS:
            raise MountError(f"no presentation is called {wanted!r}; there are {', '.join(PRESENTATIONS)}", errno.EINVAL)
        path = str(self._run_dir / "layers" / name)
        async with self._lock:
            known = self._table.layer(name)
            if known is not None:
                same = (
                    known.image_path == image_path
                    and known.volumes == list(volumes)
                    and presentation in ("auto", known.presentation)
                )
                if same and known.is_mounted and await self._in_thread(_is_mounted, path):
                    return path, known.presentation
                if known.is_mounted and not same and await self._in_thread(_is_mounted, path):
                    raise MountError(f"layer {name} is mounted from other files; unmount it first", errno.EEXIST)
                await self._take_down(known, path)
            volume_ids = []
            for volume in volumes:
                registered = self._table.volume(volume)
                if registered is None or self._root.volume(volume) is None:
                    raise MountError(f"volume {volume} of layer {name} is not registered", errno.ENOENT)
                volume_ids.append(registered.id)
            candidates = [wanted] if wanted != "auto" else (self.presentations or list(PRESENTATIONS))
            refused: list[str] = []
            code = errno.EINVAL
            for candidate in candidates:
                record = LayerRecord(name, self._table.new_id(), image_path, list(volumes), volume_ids, candidate)
                self._table.layers.append(record)
                self._root.add_layer(record)
                await self._save()
                try:
                    await self._present(record, path)
                except OSError as error:
                    refused.append(f"{candidate}: {error.strerror}")
                    code = error.errno or errno.EIO
                    await self._take_down(record, path)
                    continue
                record.is_mounted = True
                await self._save()
                if refused:
                    log.warning("presentation_refused layer=%s used=%s refused=%s", name, candidate, "; ".join(refused))
                return path, candidate
            raise MountError(f"layer {name} cannot be mounted: {'; '.join(refused)}", code)

    async def unmount_layer(self, name: str) -> None:
        """Take a layer's mount away; who has files of it open goes on reading. Not mounted: no change."""
        _check_name(name)
        async with self._lock:
            record = self._table.layer(name)
            if record is not None:
                await self._take_down(record, str(self._run_dir / "layers" / name))

    async def _present(self, record: LayerRecord, path: str) -> None:
        await self._in_thread(os.makedirs, path, 0o755, True)
        complete = all(volume is not None and volume.is_complete for volume in map(self._root.volume, record.volumes))
        readahead = READAHEAD_COMPLETE_KIB if complete else READAHEAD_PARTIAL_KIB
        # The kernel takes the FUSE mount's read-ahead over into a file when it opens it; under our lock, one layer at a time.
        await self._in_thread(self.set_readahead, readahead)
        devices = [str(self._fs / "volumes" / name) for name in record.volumes]
        image_in_fuse = str(self._fs / "images" / record.name)
        if record.presentation == "fuse-tree":
            record.uses_fuse = True
            await self._in_thread(syscalls.bind, str(self._fs / "trees" / record.name), path)
        elif record.presentation == "erofs-loop":
            await self._in_thread(_mount_loop, record.image_path, devices, path, readahead)
        else:
            try:
                await self._in_thread(_mount_erofs, record.image_path, devices, path)
            except OSError as error:
                if error.errno != errno.ENOTBLK:
                    raise
                # The image's file system (tmpfs, overlayfs) cannot back a mount; ours can.
                record.uses_fuse = True
                await self._in_thread(_mount_erofs, image_in_fuse, devices, path)

    async def _take_down(self, record: LayerRecord, path: str) -> None:
        record.is_mounted = False
        await self._in_thread(_unmount_all, path)
        with suppress(OSError):
            await self._in_thread(os.rmdir, path)
        await self._retire(record)

    async def _retire(self, record: VolumeRecord | LayerRecord) -> None:
        record.is_retired = True
        unknown = await self._root.retire(record.id)
        if unknown or (isinstance(record, LayerRecord) and not record.uses_fuse):
            self._root.drop(record.id)
            if isinstance(record, VolumeRecord):
                self._table.volumes.remove(record)
            else:
                self._table.layers.remove(record)
        await self._save()

    # Merged roots

    async def mount_root(self, target: str, layers: Sequence[str]) -> None:
        """Show several layers (bottom first) merged at `target`, an existing directory.

        One layer too goes through overlayfs, over an empty directory: a bind would show its whiteouts.

        Raises:
            MountError: a layer is not mounted, the target is taken, or the kernel refuses.
        """
        if not target.startswith("/") or not layers or len(layers) >= _MAX_LAYERS:
            raise MountError(
                f"cannot mount {len(layers)} layers at {target!r}: an absolute path and 1 to {_MAX_LAYERS - 1} layers",
                errno.EINVAL,
            )
        async with self._lock:
            known = self._table.root(target)
            if known is not None:
                if await self._in_thread(_is_mounted, target):
                    if known.layers == list(layers):
                        return
                    raise MountError(f"other layers are mounted at {target}; unmount them first", errno.EBUSY)
                self._table.roots.remove(known)
            for name in layers:
                layer = self._table.layer(name)
                if layer is None or not layer.is_mounted:
                    raise MountError(f"layer {name} is not mounted", errno.ENOENT)
            record = RootRecord(target, list(layers))
            self._table.roots.append(record)
            await self._save()
            empty = str(self._run_dir / "empty")
            paths = [str(self._run_dir / "layers" / name) for name in reversed(layers)]
            try:
                await self._in_thread(os.makedirs, empty, 0o755, True)
                await self._in_thread(_mount_overlay, [*paths, empty], target)
            except OSError as error:
                self._table.roots.remove(record)
                await self._save()
                raise MountError(f"cannot mount at {target}: {error.strerror}", error.errno or errno.EIO) from error

    async def unmount_root(self, target: str) -> None:
        """Take a merged root away. Not there: no change."""
        async with self._lock:
            record = self._table.root(target)
            if record is not None:
                await self._in_thread(syscalls.unmount, target)
                self._table.roots.remove(record)
                await self._save()

    # All of it

    def list(self) -> dict[str, list[dict[str, Any]]]:
        """What is registered and mounted, without the retired."""
        table = self._table
        return {
            "volumes": [{"name": v.name, "size": v.size} for v in table.volumes if not v.is_retired],
            "layers": [
                {
                    "name": r.name,
                    "path": str(self._run_dir / "layers" / r.name),
                    "presentation": r.presentation,
                    "volumes": r.volumes,
                }
                for r in table.layers
                if r.is_mounted
            ],
            "roots": [{"target": r.target, "layers": r.layers} for r in table.roots],
        }

    async def unmount_everything(self) -> None:
        """Before the end: no mount of ours stays."""
        for root in list(self._table.roots):
            await self.unmount_root(root.target)
        for layer in list(self._table.layers):
            if not layer.is_retired:
                await self.unmount_layer(layer.name)

    async def quiesce(self) -> None:
        """Wait until no change is under way; none can begin afterwards."""
        await self._lock.acquire()

    def set_readahead(self, kib: int) -> None:
        """In a thread: how far the kernel reads ahead on volumes that it opens from now on."""
        if self._readahead is None:
            device = next((m.device for m in syscalls.mounted() if m.path == str(self._fs)), None)
            if device is None:
                return
            self._readahead = Path(f"/sys/class/bdi/{device}/read_ahead_kb")
        try:
            self._readahead.write_text(str(kib))
        except OSError as error:
            log.warning("readahead_not_set kib=%d error=%s", kib, error)

    async def _save(self) -> None:
        """Under the lock: one writer of the file at a time."""
        await self._in_thread(store_table, self._run_dir / "fsmount.state", self._table.to_bytes())

    async def _in_thread(self, function: Callable[..., R], *args: Any) -> R:
        return await trio.to_thread.run_sync(function, *args, limiter=self._threads)


def _check_name(name: str) -> None:
    if not _NAME.match(name):
        raise MountError(f"{name[:200]!r} cannot name a volume or layer", errno.EINVAL)


def _is_mounted(path: str) -> bool:
    return any(entry.path == path for entry in syscalls.mounted())


def _unmount_all(path: str) -> None:
    """Unmount whatever is stacked at a path; a dead process may have left a mount it had not recorded."""
    while syscalls.unmount(path):
        continue


def _mount_erofs(image: str, devices: Sequence[str], path: str) -> None:
    syscalls.mount_configured("erofs", path, [("source", image), *(("device", device) for device in devices)])


def _mount_loop(image: str, devices: Sequence[str], path: str, readahead_kib: int) -> None:
    held: list[int] = []
    try:
        attached = []
        for file in (image, *devices):
            fd, device = loop.attach(file, readahead_kib)
            held.append(fd)
            attached.append(device)
        _mount_erofs(attached[0], attached[1:], path)
    finally:
        for fd in held:
            os.close(fd)


def _mount_overlay(lower: Sequence[str], target: str) -> None:
    """Top first. No redirects: an image must not name paths outside its own place."""
    options = [("source", "shoal"), ("redirect_dir", "nofollow")]
    try:
        syscalls.mount_configured("overlay", target, [*options, *(("lowerdir+", path) for path in lower)])
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Before Linux 6.5 there is no lowerdir+; one string then, which fsconfig would cut at 255 bytes.
        joined = ":".join(path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,") for path in lower)
        syscalls.mount("shoal", target, "overlay", syscalls.MS_RDONLY, f"redirect_dir=nofollow,lowerdir={joined}")
