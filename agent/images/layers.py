"""From a layer's descriptor to a mounted directory: fetch its index, store it, mount it, start what it needs first.

`Layers.prepare` is what every consumer (containerd, `shoal mount`, `shoal pull`) calls. It returns when the directory can be
read, not when its data are here. A layer that cannot be lazy (plain gzip, or an index that nothing vouches for) is fetched
whole, verified by its own digest, and presented in the same way.

Trust. A lazy layer's index must match a digest that the manifest names (`…/stargz/toc.digest`); the manifest was verified by
whoever resolved it. Everything else follows from the index.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Protocol

import attrs
import structlog
import trio

from agent.errors import ShoalError, SourceError, SourceRefused, SourceUnavailable, StoreError
from agent.formats import estargz
from agent.formats.model import Digest, FormatError, LayerIndex, parse_digest
from agent.images.adopt import adopt_chunks, has_donors
from agent.images.whole import WholeFetcher, WholeSources
from agent.registry import Descriptor, ImageReference, RegistryClient
from agent.resolve import Counters, Priority, Resolver, Source
from agent.store import Store, StoredLayer
from fsmount.erofs import write_image
from fsmount.link import Link

log = structlog.get_logger()

TOC_DIGEST: Final = "containerd.io/snapshot/stargz/toc.digest"
LAYER_DIGEST: Final = "containerd.io/snapshot/stargz/layer.digest"
EXTERNAL_TOC_SUFFIX: Final = "-esgztoc"
PEER_INDEX_S: Final = 3.0
"""A peer that has not sent an index (about 1 MB) after this long is passed over for the registry."""


class IndexSources(WholeSources, Protocol):
    """Who may hold a layer's index, before the layer is known."""

    async def index_holders(self, blob: Digest) -> list[tuple[Source, int, int]]:
        """Peers that hold the index piece: (source, its first byte, the blob's size). May wait for one round trip."""

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
        registry: RegistryClient,
        sources: IndexSources,
        resolver: Resolver,
        link: Callable[[], Awaitable[Link]],
        counters: Counters,
        *,
        presentation: str,
        prefetch: bool,
        background: bool,
        work_dir: Path,
    ) -> None:
        self._nursery = nursery
        self._store = store
        self._registry = registry
        self._sources = sources
        self._resolver = resolver
        self._link = link
        self._presentation = presentation
        self._prefetch = prefetch
        self._background = background
        self._flights: dict[str, _Flight] = {}
        self._rebuilds: dict[str, _Flight] = {}
        self._presented: dict[str, tuple[Link, StoredLayer, PreparedLayer]] = {}
        """What was mounted over which connection, so that asking again costs nothing; another connection asks fsmount anew."""
        self._cpu = trio.CapacityLimiter(2)
        self._whole = WholeFetcher(store, sources, counters, work_dir, self._cpu)

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
        try:
            flight.prepared = await self._prepare(image, layer)
        except ShoalError as exc:
            flight.error = exc
        except Exception as exc:  # the component's edge: a defect must not take the agent's other layers with it
            log.exception("layer_preparation_failed", layer=layer.digest)
            flight.error = ShoalError(f"preparing {layer.digest} failed: {exc!r}")
        finally:
            del self._flights[layer.digest]
            flight.done.set()

    async def _prepare(self, image: ImageReference | None, layer: Descriptor) -> PreparedLayer:
        digest = parse_digest(layer.digest)
        if image is not None:
            self._sources.add_origin(digest, image)
        stored = self._store.layer(digest)
        if stored is None:
            if image is None:
                raise SourceRefused(f"layer {digest} is not on this node and no image says where it is")
            stored = await self._fetch(image, layer, digest)
            log.info(
                "layer_ready", layer=digest, image=str(image), format=stored.extra.get("format"), size_bytes=stored.blob_size
            )
        return await self._present(stored)

    async def _fetch(self, image: ImageReference, layer: Descriptor, digest: Digest) -> StoredLayer:
        if layer.size <= 0:
            layer = await self._describe(image, layer)
        toc_digest = layer.annotations.get(TOC_DIGEST)
        if toc_digest is not None:
            try:
                return await self._fetch_lazy(image, layer, digest, parse_digest(toc_digest))
            except FormatError as exc:
                log.warning("layer_not_lazy", layer=digest, image=str(image), reason=str(exc))
        return await self._whole.fetch(image, layer, digest)

    async def _describe(self, image: ImageReference, layer: Descriptor) -> Descriptor:
        """The manifest's own words on a layer of which a caller knows the digest alone."""
        resolved = await self._registry.resolve(image)
        for known in resolved.layers:
            if known.digest == layer.digest:
                return attrs.evolve(known, annotations={**known.annotations, **layer.annotations})
        raise SourceRefused(f"image {image} has no layer {layer.digest}")

    async def _fetch_lazy(self, image: ImageReference, layer: Descriptor, digest: Digest, toc_digest: Digest) -> StoredLayer:
        toc, index_start, index_bytes = await self._fetch_toc(image, layer, digest, toc_digest)
        with self._resolver.holding_prefetch():
            index, meta = await trio.to_thread.run_sync(_build, toc, layer.size, index_start, toc_digest, limiter=self._cpu)
        for warning in index.warnings[:5]:
            log.warning("layer_entry_changed", layer=digest, image=str(image), reason=warning)
        extra: dict[str, str | int] = {"image": str(image), "format": index.format, "toc_digest": toc_digest}
        stored = await self._store.create_layer(digest, index, meta, extra)
        if index.pieces.index_piece >= 0 and index_bytes:
            await trio.to_thread.run_sync(_keep_index, stored, index_start, index_bytes, limiter=self._cpu)
        return stored

    async def _fetch_toc(
        self, image: ImageReference, layer: Descriptor, digest: Digest, toc_digest: Digest
    ) -> tuple[bytes, int, bytes]:
        """(TOC JSON, blob offset where the index begins, the bytes from there to the blob's end), from a peer or the registry."""
        for source, start, size in await self._sources.index_holders(digest):
            if size != layer.size or not 0 <= start < size:
                continue
            try:
                with trio.fail_after(PEER_INDEX_S):
                    tail = await self._read(source, digest, size, start, size)
                return await self._unpack(tail, size, toc_digest, source, start)
            except (SourceError, FormatError, trio.TooSlowError) as exc:
                log.info("peer_index_refused", layer=digest, peer=source.name, reason=str(exc))
        source = self._sources.registry_source(image)
        start = max(0, layer.size - estargz.TAIL_GUESS(layer.size))
        tail = await self._read(source, digest, layer.size, start, layer.size)
        footer = estargz.parse_footer(tail, layer.size)
        if footer is None:
            raise FormatError("the manifest names a TOC digest, but the blob does not end in an eStargz footer")
        if footer.toc_offset < 0:
            return await self._external_toc(image, digest, toc_digest), layer.size, b""
        if footer.toc_offset < start:
            tail = await self._read(source, digest, layer.size, footer.toc_offset, start) + tail
            start = footer.toc_offset
        return await self._unpack(tail, layer.size, toc_digest, source, start)

    async def _unpack(self, tail: bytes, size: int, toc_digest: Digest, source: Source, start: int) -> tuple[bytes, int, bytes]:
        footer = estargz.parse_footer(tail, size)
        if footer is None or footer.toc_offset < start:
            raise FormatError(f"{source.name} sent an index without its footer")
        compressed = tail[footer.toc_offset - start : size - start - footer.footer_size]
        toc = await trio.to_thread.run_sync(estargz.unpack_toc, compressed, toc_digest, limiter=self._cpu)
        return toc, footer.toc_offset, tail[footer.toc_offset - start :]

    async def _external_toc(self, image: ImageReference, digest: Digest, toc_digest: Digest) -> bytes:
        if not image.tag:
            raise FormatError(f"{image} has no tag, so its TOC image (tag{EXTERNAL_TOC_SUFFIX}) cannot be named")
        toc_image = attrs.evolve(image, tag=image.tag + EXTERNAL_TOC_SUFFIX, digest=None)
        resolved = await self._registry.resolve(toc_image)
        for layer in resolved.layers:
            if layer.annotations.get(LAYER_DIGEST) == digest:
                raw = await self._registry.fetch_small(toc_image, layer, max_bytes=64 << 20)
                self._resolver.count("registry", len(raw))
                return await trio.to_thread.run_sync(estargz.unpack_toc, raw, toc_digest, limiter=self._cpu)
        raise FormatError(f"{toc_image} has no TOC for layer {digest}")

    async def _read(self, source: Source, digest: Digest, size: int, start: int, stop: int) -> bytes:
        """One range, whole, in memory."""
        data = bytearray(stop - start)
        got = 0
        async with source.fetch(digest, size, [(start, stop)]) as stream:
            async for offset, block in stream:
                data[offset - start : offset - start + len(block)] = block
                got += len(block)
        self._resolver.count(source.kind, got)
        if got != stop - start or len(data) != stop - start:
            raise SourceUnavailable(f"{source.name} sent {got} of {stop - start} bytes", source=source.name)
        return bytes(data)

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
        if self._prefetch and stored.prefetch_stop > 0:
            # One piece more: the kernel reads ahead of the last file that is wanted, into what lies behind the landmark, and its
            # reader waits for both. Fetched on demand that piece came 50 to 80 ms later, in the middle of a container's start.
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
        await flight.done.wait()
        if flight.error is not None:
            raise flight.error

    async def _fly_again(self, flight: "_Flight", stored: StoredLayer) -> None:
        try:
            image = stored.extra.get("image")
            if not image:
                raise SourceRefused(f"layer {stored.digest} is incomplete and no image says where it is")
            layer = Descriptor(str(stored.extra.get("media_type", "")), stored.digest, stored.blob_size)
            await self._whole.fetch(ImageReference.parse(str(image)), layer, stored.digest)
        except ShoalError as exc:
            flight.error = exc
        finally:
            del self._rebuilds[stored.digest]
            flight.done.set()

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

    async def result(self) -> PreparedLayer:
        await self.done.wait()
        if self.prepared is None:
            raise self.error or ShoalError("preparation ended without a result")
        return self.prepared


def _build(toc: bytes, blob_size: int, index_start: int, toc_digest: Digest) -> tuple[LayerIndex, bytearray]:
    index = estargz.parse_toc(toc, blob_size=blob_size, toc_offset=index_start, toc_digest=toc_digest)
    return index, write_image(index.root, volume_size=index.volume_size, user_markers=False)


def _keep_index(stored: StoredLayer, start: int, data: bytes) -> None:
    stored.write_blob(start, data)
    stored.mark_piece(stored.pieces.index_piece)


@asynccontextmanager
async def open_layers(
    store: Store,
    registry: RegistryClient,
    sources: IndexSources,
    resolver: Resolver,
    link: Callable[[], Awaitable[Link]],
    *,
    presentation: str,
    prefetch: bool,
    background: bool,
) -> AsyncIterator[Layers]:
    """The layers of a node. `link` gives the connection to fsmount, and waits while there is none."""
    async with trio.open_nursery() as nursery:
        yield Layers(
            nursery,
            store,
            registry,
            sources,
            resolver,
            link,
            resolver.counters,
            presentation=presentation,
            prefetch=prefetch,
            background=background,
            work_dir=store.path / "temporary",
        )
        nursery.cancel_scope.cancel()
