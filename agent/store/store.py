"""The store as the agent sees it: opens it, makes and removes layers, keeps it durable and below its quota.

Files below its path::

    format, lock, boot      see `boot.py`
    catalogue.sqlite        see `catalogue.py`
    layers/<hex>/           see `layout.py`
    reserve                 see `reserve.py`
    temporary/              layers being made or removed; emptied at start
    quarantine/<hex>/       layers that turned out broken at start, without their large files
"""

import math
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

import structlog
import trio

from agent.errors import StoreError
from agent.formats.model import Digest, LayerIndex
from agent.store import layout, scrubbing
from agent.store.boot import StoreLock, current_boot_id, read_boot, write_boot
from agent.store.catalogue import Catalogue
from agent.store.eviction import LayerFacts, bytes_to_free, plan_eviction
from agent.store.layer import FULL, StoredLayer
from agent.store.layout import BrokenLayer
from agent.store.reserve import Reserve
from agent.store.scrubbing import ScrubProgress, ScrubReport

log = structlog.get_logger()

CHECKPOINT_INTERVAL_S: Final = 30.0
"""What a power cut can cost is hashing and, where bytes never reached the disk, fetching this much again."""

NEW_LAYER_S: Final = 3.0
"""When a new layer's index is made durable: soon, but not while a container starts from it."""

QUOTA_LOOK_BYTES: Final = 32 << 20
"""Usage is looked at after so many bytes were written: the overshoot over the quota."""

STALE_ARRIVAL_S: Final = 600.0
"""A piece of which no byte came for so long is not being downloaded any more."""

RELIEF_BYTES: Final = 256 << 20
"""What eviction frees when the disk itself was full, if so much may go."""

PiecesChanged = Callable[[Digest, Sequence[int], bool], None]
Result = TypeVar("Result")


class Store:
    """The open store. Sync methods do no I/O worth a thread; those that do are async."""

    def __init__(
        self,
        path: Path,
        catalogue: Catalogue,
        reserve: Reserve,
        *,
        quota_bytes: int | None,
        on_pieces: PiecesChanged | None,
    ) -> None:
        self.path = path
        self.quota_bytes = quota_bytes
        self._catalogue = catalogue
        self._reserve = reserve
        self._on_pieces = on_pieces
        self._layers: dict[Digest, StoredLayer] = {}
        self._pins: dict[Digest, set[str]] = {}
        self._making: dict[Digest, trio.Lock] = {}
        self._unindexed: set[Digest] = set()
        self._filed: dict[Digest, trio.Event] = {}
        self._shared: dict[Digest, bytearray] = {}
        """A byte for every chunk of a layer: whether its content may lie at another place of this node too."""
        self._disk = trio.CapacityLimiter(4)
        self._db = trio.CapacityLimiter(1)
        self._scrubber = trio.CapacityLimiter(1)
        self._token = trio.lowlevel.current_trio_token()
        self._look = trio.Event()
        self._made = trio.Event()
        self._written_since_look = 0
        self._is_disk_full = False
        self._to_index_send, self._to_index = trio.open_memory_channel[Digest](math.inf)  # at most one entry a layer

    # --- layers -----------------------------------------------------------------------------------------------------------

    def layer(self, digest: Digest) -> StoredLayer | None:
        """A stored layer, None if there is none."""
        return self._layers.get(digest)

    def layers(self) -> list[StoredLayer]:
        """All stored layers."""
        return list(self._layers.values())

    async def create_layer(
        self, digest: Digest, index: LayerIndex, meta_image: bytes | bytearray, extra: dict[str, str | int]
    ) -> StoredLayer:
        """Store a new layer without any of its data; the one that is there if it is there already.

        A process killed at any moment leaves it complete or absent. It survives a power cut from the next checkpoint on.

        Raises:
            FormatError: the index contradicts itself.
            StoreError: the disk refused.
        """
        async with self._making.setdefault(digest, trio.Lock()):
            known = self._layers.get(digest)
            if known is not None:
                return known
            try:
                made = await self._in_disk_thread(self._make_layer, digest, index, meta_image, dict(extra))
            except StoreError as exc:
                if exc.errno not in FULL or not await self._relieve():
                    raise
                made = await self._in_disk_thread(self._make_layer, digest, index, meta_image, dict(extra))
            self._layers[digest] = made
            self._unindexed.add(digest)
            self._filed[digest] = trio.Event()
        self._made.set()
        self._making.pop(digest, None)  # whoever comes now finds the layer
        self._to_index_send.send_nowait(digest)
        return made

    def _make_layer(
        self, digest: Digest, index: LayerIndex, meta_image: bytes | bytearray, extra: dict[str, str | int]
    ) -> StoredLayer:
        target = self._root_of(digest)
        work = Path(tempfile.mkdtemp(prefix=target.name[:12] + ".", dir=self.path / "temporary"))
        try:
            # Durable with the first checkpoint: a start does not wait for the disk, and a layer that a power cut tears is noticed
            # by its checksums and read anew.
            layout.write_layer(work, digest, index, meta_image, extra)
            if not target.exists():
                try:
                    work.rename(target)
                except OSError:
                    if not target.exists():
                        raise
            return self._open_layer(target, is_unclean=False, is_dirty=False, is_new=True)
        except BrokenLayer as exc:
            raise StoreError(f"layer {digest} was broken as soon as it was made: {exc}") from exc
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _open_layer(self, root: Path, *, is_unclean: bool, is_dirty: bool, is_new: bool = False) -> StoredLayer:
        opened = layout.open_layer(root, is_unclean=is_unclean)
        return StoredLayer(
            root,
            opened,
            on_written=self._note_written,
            on_full=self._note_full,
            writing=self._reserve.gate,
            is_dirty=is_dirty,
            is_new=is_new,
        )

    def _root_of(self, digest: Digest) -> Path:
        return self.path / "layers" / digest.removeprefix("sha256:")

    async def remove_layer(self, digest: Digest) -> None:
        """Remove a layer with all its files and pins. What fsmount has open of it stays readable until it lets go.

        Raises:
            StoreError: the disk refused.
        """
        layer = self._layers.pop(digest, None)
        if layer is None:
            await trio.lowlevel.checkpoint()
            return
        lost = [number for number in range(len(layer.pieces)) if layer.has_piece(number)]
        self._pins.pop(digest, None)
        self._shared.pop(digest, None)
        with trio.CancelScope(shield=True):
            await self._in_disk_thread(self._remove_files, layer)
            await self._in_db_thread(self._catalogue.remove_layer, digest)
        self._tell(digest, lost, held=False)

    def _remove_files(self, layer: StoredLayer) -> None:
        layer.close()
        doomed = Path(tempfile.mkdtemp(prefix="removed.", dir=self.path / "temporary"))
        layer.root.rename(doomed / "layer")
        shutil.rmtree(doomed, ignore_errors=True)

    async def find_chunk(self, digest: bytes) -> tuple[StoredLayer, int] | None:
        """A layer of this node that has the content (raw digest) of a chunk in its volume, and the chunk's number there."""
        return (await self.find_chunks([digest]))[0]

    async def find_chunks(self, digests: Sequence[bytes]) -> list[tuple[StoredLayer, int] | None]:
        """`find_chunk` for many at once, in their order."""
        return await self._in_db_thread(self._find_present, digests)

    def _find_present(self, digests: Sequence[bytes]) -> list[tuple[StoredLayer, int] | None]:
        found: list[tuple[StoredLayer, int] | None] = [None] * len(digests)
        for at, digest, chunk in self._catalogue.find_chunks(digests):
            layer = self._layers.get(digest)
            if layer is None or found[at] is not None or chunk >= len(layer.chunks):
                continue
            if layer.has_chunk(chunk) and layer.chunks.digest(chunk) == digests[at]:
                found[at] = (layer, chunk)
        return found

    async def filed(self, digest: Digest) -> None:
        """Return when it is known which chunks of the layer other places of this node may have."""
        event = self._filed.get(digest)
        if event is None:
            await trio.lowlevel.checkpoint()
        else:
            await event.wait()

    def is_shared(self, layer: StoredLayer, number: int) -> bool:
        """Whether a chunk's content may lie at another place of this node too: `find_chunk` is worth its time. No I/O.

        False as long as the layer is not `filed`.
        """
        shared = self._shared.get(layer.digest)
        return shared is not None and bool(shared[number])

    def _note_shared(self, layer: StoredLayer) -> None:
        """In the catalogue's thread. Other layers learn of this one as well."""
        count = len(layer.chunks)
        digests = [layer.chunks.digest(number) for number in range(count)]
        shared = bytearray(count)
        seen: set[bytes] = set()
        for number, digest in enumerate(digests):
            if digest in seen and layer.chunks.is_known(number):
                shared[number] = 1
            seen.add(digest)
        if len(self._layers) > 1:
            for number, other, other_number in self._catalogue.find_chunks(digests, apart_from=layer.digest):
                shared[number] = 1
                others = self._shared.get(other)
                if others is not None and other_number < len(others):
                    others[other_number] = 1
        if layer.digest in self._layers:
            self._shared[layer.digest] = shared

    # --- pins and documents -----------------------------------------------------------------------------------------------

    async def pin(self, digest: Digest, owner: str) -> None:
        """Keep a layer from eviction until `owner` unpins it; survives restarts."""
        self._pins.setdefault(digest, set()).add(owner)
        await self._in_db_thread(self._catalogue.pin, digest, owner)

    async def unpin(self, digest: Digest, owner: str) -> None:
        """Take one owner's pin away."""
        owners = self._pins.get(digest, set())
        owners.discard(owner)
        if not owners:
            self._pins.pop(digest, None)
        self._look.set()
        await self._in_db_thread(self._catalogue.unpin, digest, owner)

    def pins(self, digest: Digest) -> frozenset[str]:
        """Who has pinned a layer."""
        return frozenset(self._pins.get(digest, ()))

    async def put_document(self, kind: str, key: str, raw: bytes) -> None:
        """Keep something small (a manifest, a configuration, an image record) under a name."""
        await self._in_db_thread(self._catalogue.put_document, kind, key, raw)

    async def get_document(self, kind: str, key: str) -> bytes | None:
        """What was put under that name, None if nothing was."""
        return await self._in_db_thread(self._catalogue.get_document, kind, key)

    async def list_documents(self, kind: str) -> list[str]:
        """The keys of a kind, sorted."""
        return await self._in_db_thread(self._catalogue.list_documents, kind)

    async def delete_document(self, kind: str, key: str) -> None:
        """Delete a document if it is there."""
        await self._in_db_thread(self._catalogue.delete_document, kind, key)

    # --- quota ------------------------------------------------------------------------------------------------------------

    def usage(self) -> int:
        """Bytes of disk that blobs and volumes take now; two fstat calls a layer, about 3 µs."""
        return sum(layer.disk_bytes() for layer in self.layers())  # a list: in another thread than the one that adds layers

    async def evict(self, to_free: int) -> int:
        """Evict what is not pinned until `to_free` bytes are free or nothing is left that may go; gives the bytes freed."""
        freed = 0
        for eviction in plan_eviction(await self._in_disk_thread(self._facts), to_free=to_free):
            layer = self._layers.get(eviction.digest)
            if layer is None or self._pins.get(eviction.digest):
                continue
            before = layer.disk_bytes()
            if eviction.part == "blob":
                lost = await self._in_disk_thread(self._evict_blob, layer)
                self._tell(layer.digest, lost, held=False)
            else:
                await self._in_disk_thread(layer.evict_data)
            freed += before - layer.disk_bytes()
            log.info("evicted", layer=layer.digest, part=eviction.part, size_bytes=before - layer.disk_bytes())
        return freed

    async def _relieve(self) -> bool:
        """Make room on a full disk; whether any was made."""
        usage = await self._in_disk_thread(self.usage)
        freed = await self.evict(min(RELIEF_BYTES, usage // 4))
        await self._in_disk_thread(self._reserve.take)
        return freed > 0

    def _evict_blob(self, layer: StoredLayer) -> list[int]:
        return layer.evict_blob(stale_after_s=STALE_ARRIVAL_S)

    def _facts(self) -> list[LayerFacts]:
        facts = []
        for layer in list(self._layers.values()):
            blob, data = layer.part_bytes()
            pinned = bool(self._pins.get(layer.digest))
            facts.append(LayerFacts(layer.digest, layer.last_used_s, pinned, layer.complete, blob, data))
        return facts

    def _note_written(self, size: int) -> None:
        """Called by whoever wrote, in its thread."""
        self._written_since_look += size  # an increment lost between two threads only delays the look
        if self._written_since_look >= QUOTA_LOOK_BYTES:
            self._wake()

    def _note_full(self) -> None:
        self._is_disk_full = True
        self._wake()

    def _wake(self) -> None:
        self._written_since_look = 0
        try:
            self._token.run_sync_soon(self._set_look, idempotent=True)
        except trio.RunFinishedError:
            log.debug("store_written_after_its_end", path=str(self.path))

    def _set_look(self) -> None:
        self._look.set()

    async def _keep_quota(self) -> None:
        while True:
            usage = await self._in_disk_thread(self.usage)
            to_free = bytes_to_free(usage, self.quota_bytes)
            if self._is_disk_full:
                self._is_disk_full = False
                to_free = max(to_free, min(RELIEF_BYTES, usage // 4))
            if to_free > 0:
                try:
                    freed = await self.evict(to_free)
                    if freed < to_free:
                        log.warning("store_over_quota", usage_bytes=usage, quota_bytes=self.quota_bytes, freed_bytes=freed)
                except StoreError as exc:
                    log.error("eviction_failed", reason=str(exc))
            await self._in_disk_thread(self._reserve.take)
            await self._look.wait()
            self._look = trio.Event()

    # --- durability -------------------------------------------------------------------------------------------------------

    async def checkpoint(self) -> None:
        """Make durable what is here now; a power cut later puts it in doubt but does not lose it.

        Raises:
            StoreError: the disk failed for at least one layer; the others are durable.
        """
        failure: StoreError | None = None
        for layer in self.layers():
            try:
                await self._in_disk_thread(layer.checkpoint)
            except StoreError as exc:
                if layer.digest in self._layers:  # otherwise it was removed meanwhile
                    log.error("checkpoint_failed", layer=layer.digest, reason=str(exc))
                    failure = failure or exc
        await self._in_db_thread(self._catalogue.note_used, [(layer.digest, layer.last_used_s) for layer in self.layers()])
        if failure is not None:
            raise failure

    async def _keep_checkpointing(self, interval_s: float) -> None:
        while True:
            with trio.move_on_after(interval_s):
                await self._made.wait()
                await trio.sleep(NEW_LAYER_S)
            self._made = trio.Event()
            await self._in_disk_thread(self._reserve.take)  # somebody else on this disk may have made room
            try:
                await self.checkpoint()
            except StoreError as exc:
                log.debug("checkpoint_incomplete", reason=str(exc))

    async def _keep_indexing(self) -> None:
        async for digest in self._to_index:
            layer = self._layers.get(digest)
            if layer is not None:
                try:
                    if digest in self._unindexed:
                        await self._in_db_thread(self._catalogue.index_layer, digest, layer.chunks)
                        self._unindexed.discard(digest)
                    await self._in_db_thread(self._note_shared, layer)
                except StoreError as exc:
                    log.warning(
                        "layer_not_indexed",
                        layer=digest,
                        reason=str(exc),
                        consequence="its chunks are not found from other layers",
                    )
            filed = self._filed.pop(digest, None)
            if filed is not None:
                filed.set()

    # --- verification -----------------------------------------------------------------------------------------------------

    async def scrub(self, progress: Callable[[ScrubProgress], None] | None = None, *, share: float = 0.8) -> ScrubReport:
        """Hash and decode everything that is here; what is bad is forgotten, so that it is fetched again, and reported.

        `share` is the part of the time in which it works; the rest is left to others. May be cancelled at any point.
        """
        return await scrubbing.scrub(self.layers(), progress, self._scrubber, share=share, on_pieces=self._on_pieces)

    async def settle(self, *, share: float = 0.5) -> ScrubReport:
        """Hash what an unclean boot has put in doubt; what is bad is forgotten."""
        return await scrubbing.settle(self.layers(), self._scrubber, share=share, on_pieces=self._on_pieces)

    async def _settle_quietly(self) -> None:
        try:
            report = await self.settle()
        except StoreError as exc:
            log.error("settling_failed", reason=str(exc))
            return
        if report.chunks or report.pieces:
            log.info("store_settled", chunks=report.chunks, pieces=report.pieces, bad=len(report.bad))

    # --- inner ------------------------------------------------------------------------------------------------------------

    def _tell(self, digest: Digest, pieces: Sequence[int], *, held: bool) -> None:
        if self._on_pieces is not None and pieces:
            self._on_pieces(digest, pieces, held)

    async def _in_disk_thread(self, call: Callable[..., Result], *args: object) -> Result:
        return await _in_thread(self._disk, call, *args)

    async def _in_db_thread(self, call: Callable[..., Result], *args: object) -> Result:
        try:
            return await _in_thread(self._db, call, *args)
        except StoreError as exc:
            if exc.errno not in FULL:
                raise
        try:
            result: Result = await _in_thread(self._db, self._call_with_reserve, call, *args)
        except StoreError as exc:
            if exc.errno not in FULL or not await self._relieve():
                raise
        else:
            self._note_full()
            return result
        return await _in_thread(self._db, call, *args)

    def _call_with_reserve(self, call: Callable[..., Result], *args: object) -> Result:
        with self._reserve.lent():
            self._catalogue.shrink_log()
            try:
                return call(*args)
            except StoreError:
                self._catalogue.shrink_log()  # otherwise what failed keeps the reserve
                raise

    def _load(self, *, is_unclean: bool, is_dirty: bool) -> None:
        """Open all layers; in a thread, before anybody else has the store."""
        for name in ("layers", "temporary", "quarantine"):
            (self.path / name).mkdir(exist_ok=True)
        for leftover in (self.path / "temporary").iterdir():
            shutil.rmtree(leftover, ignore_errors=True)
        for root in sorted((self.path / "layers").iterdir()):
            try:
                layer = self._open_layer(root, is_unclean=is_unclean, is_dirty=is_dirty)
            except BrokenLayer as exc:
                log.warning(
                    "layer_quarantined", layer=root.name, reason=str(exc), consequence="it is fetched again when it is needed"
                )
                layout.set_aside(root, self.path / "quarantine")
                continue
            self._layers[layer.digest] = layer
        used, self._unindexed = self._catalogue.reconcile(self._layers)
        self._pins = self._catalogue.pins()
        for digest, at in used.items():
            self._layers[digest].last_used_s = at

    def _close_layers(self) -> bool:
        """Make everything durable and close it; whether that succeeded for all."""
        self._reserve.give_up()
        is_clean = True
        try:
            self._catalogue.note_used([(layer.digest, layer.last_used_s) for layer in self._layers.values()])
        except StoreError as exc:
            log.warning("times_of_use_not_kept", reason=str(exc))
        for layer in self._layers.values():
            try:
                layer.checkpoint()
                layer.sync_maps()
            except StoreError as exc:
                is_clean = False
                log.error("layer_not_closed_cleanly", layer=layer.digest, reason=str(exc))
            layer.close(unmap=True)
        self._catalogue.close()
        return is_clean


@asynccontextmanager
async def open_store(
    path: Path,
    *,
    quota_bytes: int | None,
    boot_id: str | None = None,
    on_pieces: PiecesChanged | None = None,
    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S,
    settle_in_background: bool = True,
) -> AsyncIterator[Store]:
    """Open the store at `path`, made if it is not there, and keep it until the block ends.

    Args:
        path: its directory; one agent at a time.
        quota_bytes: bound of the disk space of blobs and volumes; None for no bound.
        boot_id: the kernel's id of this boot, for tests.
        on_pieces: called on the event loop with (layer, pieces, whether they are held now) when pieces are lost to eviction
            or found bad, and when doubtful ones turned out good.
        checkpoint_interval_s: time between checkpoints.
        settle_in_background: whether what is in doubt is hashed without being asked for.

    Raises:
        StoreError: another agent has it (EBUSY), it is of another version, or the disk refused.
    """
    boot_id = boot_id or current_boot_id()
    opening = trio.CapacityLimiter(1)
    lock = await _in_thread(opening, StoreLock, path)
    try:
        reserve = Reserve(path)
        await _in_thread(opening, reserve.give_up)
        last_boot, was_clean = await _in_thread(opening, read_boot, path)
        is_unclean = not was_clean and last_boot != boot_id and (path / "layers").exists()
        catalogue = await _in_thread(opening, lambda: Catalogue(path / "catalogue.sqlite", is_unclean=is_unclean))
        store = Store(path, catalogue, reserve, quota_bytes=quota_bytes, on_pieces=on_pieces)
        if not is_unclean:  # otherwise only when everything is in doubt: a second power cut must find the first
            await _in_thread(opening, lambda: write_boot(path, boot_id, is_clean=False))
        started = time.monotonic()
        await _in_thread(opening, lambda: store._load(is_unclean=is_unclean, is_dirty=not was_clean))
        if is_unclean:
            await _in_thread(opening, lambda: _confirm_doubt(store, path, boot_id))
        await _in_thread(opening, reserve.take)
        log.info(
            "store_opened", layers=len(store.layers()), is_unclean=is_unclean, elapsed_s=round(time.monotonic() - started, 3)
        )
        error: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store._keep_quota)
                nursery.start_soon(store._keep_checkpointing, checkpoint_interval_s)
                nursery.start_soon(store._keep_indexing)
                if settle_in_background:
                    nursery.start_soon(store._settle_quietly)
                for layer in store.layers():
                    if layer.digest in store._unindexed or not layer.complete:
                        store._filed[layer.digest] = trio.Event()
                        store._to_index_send.send_nowait(layer.digest)
                try:
                    yield store
                except Exception as exc:  # noqa: BLE001  # handed on below, not wrapped in a group by the nursery
                    error = exc
                nursery.cancel_scope.cancel()
            if error is not None:
                raise error
        finally:
            with trio.CancelScope(shield=True):
                if await _in_thread(opening, store._close_layers):
                    await _in_thread(opening, lambda: write_boot(path, boot_id, is_clean=True))
                await _in_thread(opening, reserve.take)  # the next start needs it as much
    finally:
        lock.release()


def _confirm_doubt(store: Store, path: Path, boot_id: str) -> None:
    for layer in store.layers():
        layer.sync_maps()
    write_boot(path, boot_id, is_clean=False)


async def _in_thread(limiter: trio.CapacityLimiter, call: Callable[..., Result], *args: object) -> Result:
    try:
        return await trio.to_thread.run_sync(call, *args, limiter=limiter)
    except OSError as exc:
        raise StoreError(f"the store's disk failed: {exc}", errno=exc.errno or 0) from exc
