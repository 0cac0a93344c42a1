"""From a layer's descriptor to a mounted directory: fetch its index, store it, mount it, start what it needs first.

`Layers.prepare` is what every consumer (containerd, `shoal mount`, `shoal pull`) calls. It returns when the directory can be
read, not when its data are here. A layer that cannot be lazy (plain gzip, or an index that nothing vouches for) is fetched
whole, verified by its own digest, and presented in the same way.

Trust. A lazy layer's index must match a digest that the manifest names (how, is the format's affair); the manifest was verified
by whoever resolved it. Everything else follows from the index. With `soci_v1` an index is also believed that only refers to the
image: nobody vouches for that one.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import attrs
import structlog
import trio

from agent.errors import ShoalError, SourceError, SourceRefused, StoreError
from agent.formats.catalogue import find_format
from agent.formats.model import Digest, FormatError, NoIndex, parse_digest
from agent.formats.opening import Format, LayerFacts
from agent.images.adopt import adopt_chunks, has_donors
from agent.images.fleet_index import FleetIndexes
from agent.images.index_reading import IndexFetcher, IndexSources
from agent.images.manifests import Manifests, facts_of
from agent.images.whole import WholeFetcher, WholeSources
from agent.indexing.processes import IndexProcesses, open_index_processes
from agent.registry import Descriptor, ImageReference
from agent.resolve import Counters, Priority, Resolver
from agent.store import Store, StoredLayer
from fsmount.link import Link

log = structlog.get_logger()


class LayerSources(IndexSources, WholeSources, Protocol):
    """The fleet and the registries, as this module needs them."""

    async def announce(self, layer: StoredLayer) -> None:
        """Tell the fleet that this node reads the layer and may hold pieces of it."""

    def add_origin(self, blob: Digest, image: ImageReference) -> None:
        """Remember from which image a blob may be fetched."""


@attrs.frozen
class PreparedLayer:
    """A layer that can be read at `path`."""

    name: str
    path: Path
    presentation: str
    is_lazy: bool


def layer_name(digest: str) -> str:
    """The name of a layer's volume, mount and directory: the hex part of its digest."""
    return digest.partition(":")[2]


class Layers:
    """See the module's text; made by `open_layers`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        store: Store,
        manifests: Manifests,
        sources: LayerSources,
        resolver: Resolver,
        link: Callable[[], Awaitable[Link]],
        fleet_indexes: FleetIndexes,
        processes: IndexProcesses,
        counters: Counters,
        *,
        presentation: str,
        prefetch: bool,
        background: bool,
        soci_v1: bool,
        work_dir: Path,
    ) -> None:
        self._nursery = nursery
        self._store = store
        self._manifests = manifests
        self._sources = sources
        self._resolver = resolver
        self._link = link
        self._fleet_indexes = fleet_indexes
        self._presentation = presentation
        self._prefetch = prefetch
        self._background = background
        self._soci_v1 = soci_v1
        self._flights: dict[str, _Flight] = {}
        self._rebuilds: dict[str, _Flight] = {}
        self._presented: dict[str, tuple[Link, StoredLayer, PreparedLayer]] = {}
        """What was mounted over which connection, so that asking again costs nothing; another connection asks fsmount anew."""
        self._cpu = trio.CapacityLimiter(2)
        self.indexes = IndexFetcher(manifests.registry, sources, resolver, processes, self._cpu)
        self._whole = WholeFetcher(store, sources, counters, work_dir, self._cpu)

    def expect(self) -> None:
        """Layers will be prepared as soon as somebody knows which."""
        self.indexes.processes.expect()

    async def prepare(
        self, image: ImageReference | None, layer: Descriptor, neighbours: Sequence[Descriptor] = ()
    ) -> PreparedLayer:
        """Make a layer readable. Callers of the same layer share the work; one that goes away does not stop it.

        `neighbours` are prepared as well, without being waited for.

        Raises:
            ShoalError: no source gave the layer, or it is not what its digest says.
        """
        for neighbour in neighbours:
            if neighbour.digest != layer.digest:
                self._start(image, neighbour)
        return await self._start(image, layer).result()

    def _start(self, image: ImageReference | None, layer: Descriptor) -> "_Flight":
        flight = self._flights.get(layer.digest)
        if flight is None:
            flight = self._flights[layer.digest] = _Flight()
            self._nursery.start_soon(self._fly, flight, image, layer)
        return flight

    async def _fly(self, flight: "_Flight", image: ImageReference | None, layer: Descriptor) -> None:
        async with flight.taking_off(layer.digest, self._flights):
            flight.prepared = await self._prepare(image, layer)

    async def _prepare(self, image: ImageReference | None, layer: Descriptor) -> PreparedLayer:
        digest = parse_digest(layer.digest)
        if image is not None:
            self._sources.add_origin(digest, image)
        stored = self._store.layer(digest)
        if stored is None:
            if image is None:
                raise SourceRefused(f"layer {digest} is not on this node and no image says where it is")
            self.expect()
            stored = await self._fetch(image, layer, digest)
            log.info(
                "layer_ready", layer=digest, image=str(image), format=stored.extra.get("format"), size_bytes=stored.blob_size
            )
        return await self._present(stored)

    def format_of(self, facts: LayerFacts) -> Format | None:
        """The format that the layer is tried as first; None for a plain one."""
        return find_format(facts, soci_v1=self._soci_v1)

    async def _fetch(self, image: ImageReference, layer: Descriptor, digest: Digest) -> StoredLayer:
        facts = await self._facts(image, layer)
        layer_format = self.format_of(facts)
        if layer_format is not None:
            try:
                return await self._fetch_lazy(image, facts, layer_format)
            except NoIndex as exc:
                log.debug("layer_without_index", layer=digest, image=str(image), reason=str(exc))
            except FormatError as exc:
                if layer_format.is_only_form:
                    raise
                log.warning("layer_not_lazy", layer=digest, image=str(image), reason=str(exc))
        return await self._fetch_plain(image, Descriptor(facts.media_type, digest, facts.size), digest)

    async def _fetch_plain(self, image: ImageReference, layer: Descriptor, digest: Digest) -> StoredLayer:
        """A layer without an index in the image: with one that a fleet member made, if those are trusted, or through once."""
        diff_id = await self._diff_id(image, digest)
        found = await self._fleet_indexes.find(digest, layer.size, diff_id)
        if found is None:
            stored = await self._whole.fetch(image, layer, digest, diff_id)
            self._nursery.start_soon(self._fleet_indexes.publish, stored)
            return stored
        extra: dict[str, str | int] = {
            "image": str(image),
            "format": found.index.format,
            "diff_id": found.diff_id,
            "media_type": layer.media_type,
        }
        stored = await self._store.create_layer(digest, found.index, found.meta, extra)
        self._nursery.start_soon(self._fleet_indexes.adopt, stored, found)
        return stored

    async def _facts(self, image: ImageReference, layer: Descriptor) -> LayerFacts:
        """The manifest's own words on a layer. Who knows all of them (our own pull) need not be without a manifest."""
        try:
            resolved = await self._manifests.get(image)
        except SourceError:
            if layer.size <= 0:
                raise
            return LayerFacts(parse_digest(layer.digest), layer.size, layer.media_type, layer.annotations)
        return facts_of(resolved, layer)

    async def _diff_id(self, image: ImageReference, digest: Digest) -> str:
        """What the image's configuration says that the layer unpacks to; empty if it cannot be had."""
        try:
            resolved = await self._manifests.get(image)
            _, diff_ids = await self._manifests.config(image, resolved)
        except (SourceError, FormatError) as exc:
            log.warning("diff_id_unknown", layer=digest, image=str(image), reason=str(exc))
            return ""
        return dict(zip((layer.digest for layer in resolved.layers), diff_ids, strict=True)).get(digest, "")

    async def _fetch_lazy(self, image: ImageReference, facts: LayerFacts, layer_format: Format) -> StoredLayer:
        read = await self.indexes.fetch(image, facts, layer_format)
        for warning in read.index.warnings[:5]:
            log.warning("layer_entry_changed", layer=facts.digest, image=str(image), reason=warning)
        extra: dict[str, str | int] = {"image": str(image), "format": read.index.format}
        stored = await self._store.create_layer(facts.digest, read.index, read.meta, extra)
        await trio.to_thread.run_sync(read.keep_index_piece, stored, limiter=self._cpu)
        return stored

    async def rebuild_image(self, stored: StoredLayer) -> bool:
        """Make a layer's metadata image again from its index, after the stored one was damaged; False if it cannot be made.

        Raises:
            ShoalError: nobody gave the index, or the disk refused.
        """
        image = ImageReference.parse(str(stored.extra.get("image", "")))
        facts = await self._facts(image, Descriptor("", stored.digest, 0))
        layer_format = self.format_of(facts)
        if layer_format is None:
            return False
        try:
            read = await self.indexes.fetch(image, facts, layer_format)
        except NoIndex:
            return False
        return await trio.to_thread.run_sync(stored.repair_image, read.meta, limiter=self._cpu)

    async def _present(self, stored: StoredLayer) -> PreparedLayer:
        name = layer_name(stored.digest)
        link = await self._link()
        known = self._presented.get(stored.digest)
        if known is not None and known[0] is link and self._store.layer(stored.digest) is known[1]:
            return known[2]
        self._resolver.add_layer(stored, str(stored.extra.get("image", stored.digest)))
        await link.add_volume(name, stored.data_path, stored.blocks_path, stored.volume_size)
        mounted = await link.mount_layer(name, stored.image_path, [name], self._presentation)
        await self._sources.announce(stored)
        self._nursery.start_soon(self._start_fetching, stored)
        prepared = PreparedLayer(name, Path(mounted.path), mounted.presentation, is_lazy=stored.codec != "whole")
        self._presented[stored.digest] = link, stored, prepared
        return prepared

    async def _start_fetching(self, stored: StoredLayer) -> None:
        if stored.codec == "whole" or stored.complete:
            return
        if has_donors(self._store, stored):
            try:
                await adopt_chunks(self._store, stored, self._resolver, self._cpu)
            except StoreError as exc:
                log.warning("chunks_not_copied", layer=stored.digest, reason=str(exc))
        if self._prefetch and stored.prefetch_pieces:
            self._resolver.prefetch(stored.digest, stored.prefetch_pieces)
        if self._prefetch and stored.prefetch_stop > 0:
            # One piece more, a small one: the kernel reads ahead of the last file that is wanted, into what lies behind the landmark,
            # and its reader waits for both. Fetched on demand it came 50 to 80 ms later, in the middle of a container's start.
            self._resolver.prefetch(stored.digest, stored.pieces.covering(0, stored.prefetch_stop + 1))
        if self._background:
            self._resolver.prefetch(stored.digest, range(len(stored.pieces)), Priority.BACKGROUND)

    async def restore(self, name: str) -> Path:
        """Make a stored layer readable again after a restart.

        Raises:
            ShoalError: it is not in the store any more, or cannot be mounted.
        """
        stored = self._store.layer(Digest("sha256:" + name))
        if stored is None:
            raise ShoalError(f"layer {name} is not in the store any more; pull its image again")
        return (await self._present(stored)).path

    async def release(self, name: str) -> None:
        """Unmount a layer that nobody uses; its data stay cached until they are evicted."""
        link = await self._link()
        self._presented.pop(f"sha256:{name}", None)
        await link.unmount_layer(name)

    async def rebuild(self, stored: StoredLayer) -> None:
        """Fetch a layer without random access again, after some of it was lost; readers that wait share the work.

        Raises:
            ShoalError: no source gave it.
        """
        flight = self._rebuilds.get(stored.digest)
        if flight is None:
            flight = self._rebuilds[stored.digest] = _Flight()
            self._nursery.start_soon(self._fly_again, flight, stored)
        await flight.ended()

    async def _fly_again(self, flight: "_Flight", stored: StoredLayer) -> None:
        async with flight.taking_off(stored.digest, self._rebuilds):
            image = stored.extra.get("image")
            if not image:
                raise SourceRefused(f"layer {stored.digest} is incomplete and no image says where it is")
            layer = Descriptor(str(stored.extra.get("media_type", "")), stored.digest, stored.blob_size)
            await self._whole.fetch(ImageReference.parse(str(image)), layer, stored.digest)

    def cached_bytes(self, name: str) -> int:
        """Disk bytes that a layer takes now, 0 if it is unknown."""
        stored = self._store.layer(Digest("sha256:" + name))
        return stored.disk_bytes() if stored else 0


@attrs.define(eq=False)
class _Flight:
    """One preparation in progress and who waits for it."""

    done: trio.Event = attrs.field(factory=trio.Event)
    prepared: PreparedLayer | None = None
    error: ShoalError | None = None

    @asynccontextmanager
    async def taking_off(self, digest: str, flights: dict[str, "_Flight"]) -> AsyncIterator[None]:
        """The work itself goes inside: its failure is kept for those who wait, and does not go further."""
        try:
            yield
        except ShoalError as exc:
            self.error = exc
        except Exception as exc:  # the component's edge: a defect must not take the agent's other layers with it
            log.exception("layer_preparation_failed", layer=digest)
            self.error = ShoalError(f"preparing {digest} failed: {exc!r}")
        finally:
            del flights[digest]
            self.done.set()

    async def ended(self) -> None:
        await self.done.wait()
        if self.error is not None:
            raise self.error

    async def result(self) -> PreparedLayer:
        await self.ended()
        if self.prepared is None:
            raise ShoalError("preparation ended without a result")
        return self.prepared


@asynccontextmanager
async def open_layers(
    store: Store,
    manifests: Manifests,
    sources: LayerSources,
    resolver: Resolver,
    link: Callable[[], Awaitable[Link]],
    fleet_indexes: FleetIndexes,
    *,
    presentation: str,
    prefetch: bool,
    background: bool,
    soci_v1: bool,
) -> AsyncIterator[Layers]:
    """The layers of a node. `link` gives the connection to fsmount, and waits while there is none."""
    async with open_index_processes() as processes, trio.open_nursery() as nursery:
        yield Layers(
            nursery,
            store,
            manifests,
            sources,
            resolver,
            link,
            fleet_indexes,
            processes,
            resolver.counters,
            presentation=presentation,
            prefetch=prefetch,
            background=background,
            soci_v1=soci_v1,
            work_dir=store.path / "temporary",
        )
        nursery.cancel_scope.cancel()
