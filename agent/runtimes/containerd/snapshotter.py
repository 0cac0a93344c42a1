"""The snapshotter itself: containerd's operations, done on records, directories and layers.

Theory of operation. A snapshot is either *own* (files in `<root>/<id>/fs`, as in containerd's overlayfs snapshotter) or
*served* (committed at Prepare, `<root>/<id>/fs` is a link to where a layer is mounted). Prepare with the label
`containerd.io/snapshot.ref` asks whether the layer can be skipped: the layer service mounts it, a served snapshot is recorded
under a name of ours, and the answer is "already exists", after which containerd looks for it with List. Whatever goes wrong
there ends in an ordinary writable snapshot, so that containerd downloads and unpacks the layer itself: a pull never fails
because a layer could not be lazy.

Layers are mounted by another process and may be gone: at start every layer that a snapshot stands on is restored, and whoever
needs a chain waits for the layers in it. One that cannot be restored is degraded: its users get "unavailable", tried again at
each use; nobody else notices. Before mounts are given out each layer's directory is compared with what was mounted there.

Order of locks: one layer's lock, then the records. A layer's lock spans its preparation and the record that uses it, and its
release, so that no layer is released between the two.
"""

import os
import secrets
import shutil
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Protocol, TypeVar

import attrs
import structlog
import trio

from agent.errors import ShoalError, StoreError
from agent.formats.model import parse_digest
from agent.registry import Descriptor, ImageReference
from agent.runtimes.containerd.filters import parse_filters
from agent.runtimes.containerd.labels import MANIFEST_DIGEST, REMOTE, REMOTE_VALUE, SNAPSHOT_REF, WantedLayer, wanted_layer
from agent.runtimes.containerd.mounts import Mount, check_root, mounts_of, overlay_options
from agent.runtimes.containerd.snapshots import (
    Kind,
    Snapshot,
    SnapshotExists,
    SnapshotNotFound,
    SnapshotRecords,
    SnapshotRefused,
    SnapshotUnavailable,
)

log = structlog.get_logger()

PREPARE_S: Final = 240.0
"""How long one layer may take before containerd is told to download it itself. A lazy layer takes well under a second; a plain one
is downloaded whole. kubelet gives up on a pull without progress after 5 minutes (image_pull_progress_timeout)."""

RESTORE_S: Final = 30.0
"""How long a request waits for one layer to be mounted again; stargz-snapshotter waits as long for a layer."""

RESTORES_AT_ONCE: Final = 8

_T = TypeVar("_T")


class PreparedLayer(Protocol):
    """A layer that can be read at `path`."""

    @property
    def name(self) -> str:
        """Its name for `restore`, `release` and `cached_bytes`."""

    @property
    def path(self) -> Path:
        """Where it is mounted."""

    @property
    def is_lazy(self) -> bool:
        """Whether its data come on demand."""


class LayerService(Protocol):
    """What makes layers readable."""

    async def prepare(
        self, image: ImageReference | None, layer: Descriptor, neighbours: Sequence[Descriptor] = ()
    ) -> PreparedLayer:
        """Mount a layer, lazily where its format allows; idempotent. Raises ShoalError where no source gives it."""

    async def restore(self, name: str) -> Path:
        """Mount a layer again that was prepared once; idempotent. Raises ShoalError if that is not possible now."""

    async def release(self, name: str) -> None:
        """Unmount a layer that nobody uses."""

    def cached_bytes(self, name: str) -> int:
        """Disk bytes that a layer takes now."""


@attrs.frozen
class Usage:
    """Disk use of one snapshot."""

    size: int
    inodes: int


@attrs.define
class _Layer:
    """What is known about one mounted layer; `identity` is (device, inode) of its root when it was mounted."""

    lock: trio.Lock = attrs.field(factory=trio.Lock)
    path: Path | None = None
    identity: tuple[int, int] = (-1, -1)
    problem: str = ""


class Snapshotter:
    """See the module's text; made by `open_snapshotter`. Names and keys are those of containerd's metadata layer."""

    def __init__(self, root: Path, records: SnapshotRecords, layers: LayerService, *, prepare_s: float) -> None:
        self._root = root
        self._records = records
        self._service = layers
        self._prepare_s = prepare_s
        self._layers: dict[str, _Layer] = {}
        self._options = overlay_options()
        self._warned: set[tuple[str, str]] = set()
        # sqlite has one writer and this file one connection.
        self._db = trio.CapacityLimiter(1)
        self._disk = trio.CapacityLimiter(4)
        self._cleaning = trio.Lock()

    # What containerd asks.

    async def stat(self, key: str) -> Snapshot:
        """The record of a snapshot. Raises SnapshotError."""
        return await self._record(lambda: self._records.get(key))

    async def select(self, filters: Sequence[str]) -> list[Snapshot]:
        """Every record that passes containerd's filters. Raises FilterError."""
        wanted = parse_filters(filters)
        return await self._record(lambda: self._records.select(wanted))

    async def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Change labels. Raises SnapshotError."""
        return await self._record(lambda: self._records.update(name, labels, paths))

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A writable snapshot on `parent`, or with the ref label and a layer that can be served: SnapshotExists.

        Raises:
            SnapshotError: see the classes; SnapshotUnavailable where a layer beneath is not served.
        """
        wanted = wanted_layer(labels)
        if wanted is not None and await self._serve(key, parent, wanted):
            raise SnapshotExists(f"layer {wanted.digest} is served as a snapshot")
        return await self._create(key, parent, Kind.ACTIVE, labels)

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A read-only snapshot on `parent`. Raises SnapshotError."""
        return await self._create(key, parent, Kind.VIEW, labels)

    async def mounts(self, key: str) -> list[Mount]:
        """The mounts of an active snapshot or a view, once all layers beneath answer. Raises SnapshotError."""
        chain = await self._record(lambda: self._records.chain(key))
        if chain[0].kind is Kind.COMMITTED:
            raise SnapshotRefused(f"snapshot {key} is committed; mounts are of active snapshots and views")
        await self._check_layers(chain)
        return self._mounts(chain)

    async def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str = "") -> None:
        """Make an active snapshot a parent for others. Raises SnapshotError."""
        active = await self.stat(key)
        usage = await self._on_disk(_disk_usage, self._directory(active.id))
        await self._record(lambda: self._records.commit(name, key, labels, size=usage.size, inodes=usage.inodes, parent=parent))

    async def remove(self, key: str) -> None:
        """Forget a snapshot; its files and layer go at the next `cleanup`. Raises SnapshotError."""
        await self._record(lambda: self._records.remove(key))

    async def usage(self, key: str) -> Usage:
        """Disk use: of own files, or of a layer's cache. Raises SnapshotError."""
        found = await self.stat(key)
        if found.layer is not None:
            return Usage(await self._on_disk(self._service.cached_bytes, found.layer), 0)
        if found.kind is Kind.COMMITTED:
            return Usage(found.size, found.inodes)
        return await self._on_disk(_disk_usage, self._directory(found.id))

    async def cleanup(self) -> None:
        """Delete directories of removed snapshots and release layers that none stands on. A failure is logged; the next call
        tries again."""
        # Ids in use are read after the folder: a directory made meanwhile then is in use or not seen.
        async with self._cleaning:
            present = await self._on_disk(_numbered, self._root)
            used = await self._record(self._records.ids)
            for identity in sorted(present - used):
                await self._on_disk(self._delete, identity)
            for name in await self._record(self._records.unused_layers):
                await self._release(name)

    async def layers(self) -> set[str]:
        """Names of all layers that this snapshotter holds: those snapshots stand on, and those not released yet."""
        return await self._record(lambda: {*self._records.layers(), *self._records.unused_layers()})

    def degraded(self) -> dict[str, str]:
        """Layers that snapshots stand on and that are not served now, each with the reason."""
        return {name: layer.problem for name, layer in self._layers.items() if layer.problem}

    async def restore(self) -> None:
        """Mount every layer again that a snapshot stands on; those that fail are degraded and logged."""
        names = await self._record(self._records.layers)
        at_once = trio.CapacityLimiter(RESTORES_AT_ONCE)

        async def one(name: str) -> None:
            async with at_once:
                try:
                    await self._answering(name)
                except SnapshotUnavailable as exc:
                    log.warning("snapshot_degraded", layer=name, reason=str(exc), consequence="containers on it cannot start")

        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(one, name)
        if names:
            log.info("snapshots_restored", layers=len(names), degraded=len(self.degraded()))

    # Served snapshots.

    async def _serve(self, key: str, parent: str, wanted: WantedLayer) -> bool:
        """Record a served snapshot for the layer; False, with one warning, where that cannot be."""
        namespace = key.partition("/")[0]
        known = await self._record(lambda: self._records.find_remote(namespace, wanted.labels[SNAPSHOT_REF], parent))
        if known is not None and known.layer is not None:
            try:
                await self._answering(known.layer)
            except SnapshotUnavailable as exc:
                self._warn(wanted, str(exc))
                return False
            return True
        try:
            with trio.fail_after(self._prepare_s):
                async with self._layer(_layer_name(wanted.digest)).lock:
                    prepared = await self._service.prepare(*_asked(wanted))
                    await self._register(prepared)
                    await self._add_served(f"{namespace}/shoal/{secrets.token_hex(16)}", parent, wanted, prepared)
        except trio.TooSlowError:
            self._warn(wanted, f"not ready within {self._prepare_s:.0f} s")
            return False
        except SnapshotNotFound:
            raise
        except (ShoalError, OSError) as exc:
            self._warn(wanted, str(exc))
            return False
        except Exception as exc:  # the layer service's edge: containerd can still pull
            log.exception("layer_preparation_failed", layer=wanted.digest)
            self._warn(wanted, repr(exc))
            return False
        log.debug("layer_served", layer=wanted.digest, image=wanted.image_ref, is_lazy=prepared.is_lazy)
        return True

    async def _add_served(self, name: str, parent: str, wanted: WantedLayer, prepared: PreparedLayer) -> None:
        labels = {**wanted.labels, REMOTE: REMOTE_VALUE}

        def add() -> None:
            if self._records.find_remote(name.partition("/")[0], labels[SNAPSHOT_REF], parent) is not None:
                return  # another pull of the same image was faster
            found = self._records.create(name, parent, Kind.COMMITTED, labels, layer=prepared.name)
            try:
                directory = self._directory(found.id)
                directory.mkdir(mode=0o700)
                (directory / "fs").symlink_to(prepared.path)
            except OSError:
                self._records.remove(name)
                raise

        await self._record(add)

    async def _register(self, prepared: PreparedLayer) -> None:
        layer = self._layer(prepared.name)
        layer.path, layer.problem = prepared.path, ""
        layer.identity = await self._on_disk(_identity, prepared.path)

    async def _check_layers(self, chain: Sequence[Snapshot]) -> None:
        for name in dict.fromkeys(snapshot.layer for snapshot in chain):
            if name is not None:
                await self._answering(name)

    async def _answering(self, name: str) -> None:
        """Make sure that a layer is mounted, mounting it again where it is not. Raises SnapshotUnavailable."""
        layer = self._layer(name)
        if layer.path is not None and await self._on_disk(_identity, layer.path) == layer.identity:
            return
        async with layer.lock:
            if layer.path is not None and await self._on_disk(_identity, layer.path) == layer.identity:
                return
            try:
                with trio.fail_after(RESTORE_S):
                    path = await self._restored(name)
                layer.identity = await self._on_disk(_identity, path)
            except Exception as exc:  # the layer service's edge: its defect must not take other snapshots along
                if not isinstance(exc, ShoalError | OSError | trio.TooSlowError):
                    log.exception("layer_restore_failed", layer=name)
                layer.path = None
                layer.problem = str(exc) or f"not mounted within {RESTORE_S:.0f} s"
                raise SnapshotUnavailable(f"layer {name} is not served: {layer.problem}") from exc
            snapshots = (await self._record(self._records.layers)).get(name, [])
            await self._on_disk(self._link, snapshots, path)
            layer.path, layer.problem = path, ""

    async def _restored(self, name: str) -> Path:
        """Mount a layer from what the node has, else prepare it anew from where its snapshot once came."""
        try:
            return await self._service.restore(name)
        except ShoalError as exc:
            gone = exc
        wanted = wanted_layer(await self._record(lambda: self._records.labels_of_layer(name)))
        if wanted is None or wanted.image_ref is None:
            raise gone
        log.info("layer_prepared_again", layer=name, image=wanted.image_ref, reason=str(gone))
        return (await self._service.prepare(*_asked(wanted))).path

    async def _release(self, name: str) -> None:
        layer = self._layer(name)
        try:
            layer.lock.acquire_nowait()
        except trio.WouldBlock:  # being prepared, so about to be used again; if not, the next clean-up finds it
            return
        try:
            if not await self._record(lambda: self._records.is_unused(name)):
                return
            layer.path, layer.problem = None, ""
            await self._service.release(name)
            await self._record(lambda: self._records.released(name))
        except (ShoalError, OSError) as exc:
            log.warning("layer_not_released", layer=name, reason=str(exc))
        finally:
            layer.lock.release()

    def _warn(self, wanted: WantedLayer, reason: str) -> None:
        """Say once for each layer and reason that containerd will download a layer."""
        if (wanted.digest, reason) in self._warned:
            return
        if len(self._warned) >= 1000:
            self._warned.clear()
        self._warned.add((wanted.digest, reason))
        log.warning(
            "layer_left_to_containerd",
            layer=wanted.digest,
            image=wanted.image_ref,
            reason=reason,
            consequence="containerd downloads this layer and those above it whole",
        )

    def _layer(self, name: str) -> _Layer:
        return self._layers.setdefault(name, _Layer())

    # Own snapshots.

    async def _create(self, key: str, parent: str, kind: Kind, labels: Mapping[str, str]) -> list[Mount]:
        beneath = await self._record(lambda: self._records.chain(parent)) if parent else []
        await self._check_layers(beneath)

        def create() -> list[Mount]:
            found = self._records.create(key, parent, kind, labels)
            try:
                self._make_directory(found.id, kind, beneath[0].id if beneath else None)
            except OSError:
                self._records.remove(key)
                raise
            return self._mounts([found, *beneath])

        return await self._record(create)

    def _make_directory(self, identity: int, kind: Kind, parent: int | None) -> None:
        directory = self._directory(identity)
        if directory.exists():  # left by a crash before its id was recorded for good
            self._delete(identity)
        directory.mkdir(mode=0o700)
        upper = directory / "fs"
        upper.mkdir()
        upper.chmod(0o755)  # whatever the umask; containerd's own snapshotter does the same
        if parent is not None:
            owner = (self._directory(parent) / "fs").stat()
            os.chown(upper, owner.st_uid, owner.st_gid)
        if kind is Kind.ACTIVE:
            (directory / "work").mkdir(mode=0o711)

    def _mounts(self, chain: Sequence[Snapshot]) -> list[Mount]:
        top, *beneath = chain
        return mounts_of(self._root, top.id, [s.id for s in beneath], is_view=top.kind is Kind.VIEW, extra=self._options)

    def _directory(self, identity: int) -> Path:
        return self._root / str(identity)

    def _link(self, snapshots: Sequence[int], path: Path) -> None:
        """Let the snapshots' directories lead to where their layer is now."""
        for identity in snapshots:
            link = self._directory(identity) / "fs"
            if not (link.is_symlink() and link.readlink() == path):
                link.parent.mkdir(mode=0o700, exist_ok=True)
                fresh = link.with_name("fs.new")
                fresh.unlink(missing_ok=True)
                fresh.symlink_to(path)
                fresh.replace(link)

    def _delete(self, identity: int) -> None:
        try:
            shutil.rmtree(self._directory(identity))
        except OSError as exc:
            log.warning("snapshot_directory_not_deleted", path=str(self._directory(identity)), reason=str(exc))

    # Threads.

    async def _record(self, work: Callable[[], _T]) -> _T:
        """Run one change or question on the records. Raises StoreError where the disk refuses."""
        try:
            return await trio.to_thread.run_sync(work, limiter=self._db)
        except sqlite3.Error as exc:
            raise StoreError(f"the snapshot records cannot be read or written: {exc}") from exc

    async def _on_disk(self, work: Callable[..., _T], *arguments: object) -> _T:
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._disk)


@asynccontextmanager
async def open_snapshotter(state_dir: Path, layers: LayerService, *, prepare_s: float = PREPARE_S) -> AsyncIterator[Snapshotter]:
    """The snapshotter over `state_dir/snapshots`; restores what it served before, in the background.

    Raises:
        SettingsError: the directory cannot be used for overlays.
        StoreError: the records cannot be opened.
    """
    root = state_dir.absolute() / "snapshots"
    check_root(root)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with SnapshotRecords(root / "metadata.db") as records:
        snapshotter = Snapshotter(root, records, layers, prepare_s=prepare_s)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(snapshotter.restore)
            yield snapshotter
            nursery.cancel_scope.cancel()


def _asked(wanted: WantedLayer) -> tuple[ImageReference | None, Descriptor, list[Descriptor]]:
    """The arguments of `LayerService.prepare`. The size is unknown (0); the manifest has it."""
    image = None
    if wanted.image_ref is not None:
        image = ImageReference.parse(wanted.image_ref)
        if manifest := wanted.labels.get(MANIFEST_DIGEST):
            # The tag may have moved since containerd resolved it.
            image = attrs.evolve(image, digest=parse_digest(manifest))
    return (
        image,
        Descriptor("", wanted.digest, 0, annotations=dict(wanted.labels)),
        [Descriptor("", d, 0) for d in wanted.neighbours],
    )


def _layer_name(digest: str) -> str:
    return digest.partition(":")[2]


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (-1, -1)
    return (found.st_dev, found.st_ino)


def _numbered(root: Path) -> set[int]:
    return {int(entry.name) for entry in os.scandir(root) if entry.name.isdigit()}


def _disk_usage(directory: Path) -> Usage:
    """Blocks and inodes under a snapshot's `fs`, hard links once, other file systems not (continuity fs.DiskUsage)."""
    seen: set[tuple[int, int]] = set()
    size = 0
    pending = [os.fspath(directory / "fs")]
    while pending:
        path = pending.pop()
        try:
            found = os.lstat(path)
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            size += found.st_blocks * 512
            if stat.S_ISDIR(found.st_mode):
                pending += [entry.path for entry in os.scandir(path)]
        except FileNotFoundError:  # a container may delete while this walks
            continue
    return Usage(size, len(seen))
