"""What the client commands do inside the agent: pull, mount, unmount, scrub."""

import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import attrs
import structlog
import trio

from agent.errors import ShoalError, SourceUnavailable, StoreError
from agent.formats import estargz
from agent.formats.model import Digest, FormatError
from agent.images.fsmount_link import FsmountLink
from agent.images.layers import Layers, PreparedLayer
from agent.images.records import FleetRecords
from agent.registry import ImageReference, RegistryClient, ResolvedManifest
from agent.resolve import Resolver
from agent.runtimes.containerd.client import Containerd, together
from agent.store import BadSpot, ScrubProgress, Store
from agent.swarm import Swarm
from agent.transfer import PeerClient
from fsmount.erofs import write_image

log = structlog.get_logger()

Emit = Callable[[dict[str, Any]], Awaitable[None]]

MAX_CONFIG_BYTES: Final = 8 << 20
"""The cap containerd puts on an image configuration."""
REPAIR_S: Final = 120.0
"""How long `shoal scrub` waits for damaged chunks to come from elsewhere."""
ROOTS: Final = "mounted-root"


@attrs.define
class ImageCommands:
    """See the module's text. `containerd` may be down: only `pull` needs it."""

    store: Store
    registry: RegistryClient
    layers: Layers
    resolver: Resolver
    link: FsmountLink
    containerd: Containerd
    records: FleetRecords
    swarm: Swarm
    peers: PeerClient | None

    async def pull(self, args: dict[str, Any], emit: Emit) -> dict[str, Any]:
        """Bring an image into containerd; its layers are served by this agent's snapshotter."""
        began = time.monotonic()
        image = ImageReference.parse(str(args["image"]))
        namespace = str(args.get("namespace") or "default")
        resolved = await self._manifest(image)
        pinned = attrs.evolve(image, digest=resolved.digest)
        prepared: list[PreparedLayer] = []

        async def prepare() -> None:
            prepared.extend(await self._prepare_all(pinned, resolved, emit))

        async def tell_containerd() -> None:
            config, diff_ids = await self._config(image, resolved)
            chain = list(zip(resolved.layers, diff_ids, strict=True))
            await self.containerd.pull_image(namespace, image, resolved, config, chain)

        # containerd asks for the layers one after another; by then each is on its way, so that both go on at once.
        await together(prepare, tell_containerd)
        return {
            "image": str(image),
            "digest": resolved.digest,
            "layers": len(prepared),
            "lazy": sum(layer.is_lazy for layer in prepared),
            "seconds": time.monotonic() - began,
        }

    async def mount(self, args: dict[str, Any], emit: Emit) -> dict[str, Any]:
        """Mount the merged root of an image, read-only."""
        began = time.monotonic()
        image = ImageReference.parse(str(args["image"]))
        directory = Path(str(args["directory"]))
        if not directory.is_absolute():
            raise ShoalError(f"{directory} is not an absolute path")
        resolved = await self._manifest(image)
        prepared = await self._prepare_all(attrs.evolve(image, digest=resolved.digest), resolved, emit)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ShoalError(f"cannot make {directory}: {exc.strerror}") from exc
        names = [layer.name for layer in prepared]
        link = await self.link.current()
        await link.mount_root(directory, names)
        for layer in resolved.layers:
            await self.store.pin(Digest(layer.digest), f"{ROOTS}:{directory}")
        return {
            "image": str(image),
            "digest": resolved.digest,
            "layers": len(names),
            "presentation": prepared[0].presentation if prepared else "empty",
            "seconds": time.monotonic() - began,
        }

    async def unmount(self, args: dict[str, Any], _emit: Emit) -> None:
        """Take a merged root away; its layers stay cached."""
        directory = Path(str(args["directory"]))
        link = await self.link.current()
        roots = (await link.list())["roots"]
        if not any(root.get("target") == str(directory) for root in roots):
            mounted = ", ".join(str(root.get("target")) for root in roots) or "nothing"
            raise ShoalError(f"{directory} was not mounted by this agent; mounted are: {mounted}")
        await link.unmount_root(directory)
        for layer in self.store.layers():
            if f"{ROOTS}:{directory}" in self.store.pins(layer.digest):
                await self.store.unpin(layer.digest, f"{ROOTS}:{directory}")

    async def _manifest(self, image: ImageReference) -> ResolvedManifest:
        """The image's manifest: from the registry, or what the fleet knows of it while the registry is away."""
        try:
            resolved = await self.registry.resolve(image)
        except SourceUnavailable as exc:
            known = await self.records.find_image(image, self.swarm, self.peers)
            if known is None:
                raise
            log.warning("image_from_fleet", image=str(image), digest=known.digest, reason=str(exc))
            return known
        await self.records.keep_image(image, resolved)
        return resolved

    async def _config(self, image: ImageReference, resolved: ResolvedManifest) -> tuple[bytes, list[str]]:
        """The image's configuration, from a peer or the registry, and the diff IDs that it names."""
        config = self.records.get(resolved.config.digest)
        if config is None:
            config = await self.records.fetch(resolved.config.digest, self.swarm, self.peers)
            source = "peer"
            if config is None:
                config = await self.registry.fetch_small(image, resolved.config, max_bytes=MAX_CONFIG_BYTES)
                source = "registry"
            self.resolver.count(source, len(config))
            await self.records.keep(resolved.config.digest, config)
        try:
            diff_ids = list(json.loads(config)["rootfs"]["diff_ids"])
        except (ValueError, KeyError, TypeError) as exc:
            raise FormatError(f"the configuration of {image} names no layers") from exc
        if len(diff_ids) != len(resolved.layers):
            raise FormatError(f"{image} has {len(resolved.layers)} layers, but its configuration names {len(diff_ids)}")
        return config, diff_ids

    async def _prepare_all(self, image: ImageReference, resolved: ResolvedManifest, emit: Emit) -> list[PreparedLayer]:
        if not resolved.layers:
            raise FormatError(f"{image} has no layers")
        prepared: dict[int, PreparedLayer] = {}
        failure: list[ShoalError] = []

        async def one(number: int, scope: trio.CancelScope) -> None:
            try:
                prepared[number] = await self.layers.prepare(image, resolved.layers[number])
            except ShoalError as exc:
                failure.append(exc)
                scope.cancel()
            else:
                await emit(
                    {
                        "what": str(image.tag or "layers"),
                        "done": len(prepared),
                        "total": len(resolved.layers),
                        "state": "layers ready",
                    }
                )

        async with trio.open_nursery() as nursery:
            for number in range(len(resolved.layers)):
                nursery.start_soon(one, number, nursery.cancel_scope)
        if failure:
            raise failure[0]
        return [prepared[number] for number in range(len(resolved.layers))]

    async def scrub(self, _args: dict[str, Any], emit: Emit) -> dict[str, Any]:
        """Hash everything that is cached, and replace what is damaged from peers or the registry."""
        send, receive = trio.open_memory_channel[dict[str, Any]](1)

        def progress(state: ScrubProgress) -> None:
            try:
                send.send_nowait(
                    {"what": "scrubbing", "done": state.done_bytes, "total": state.total_bytes, "state": f"{state.bad} damaged"}
                )
            except trio.WouldBlock:
                return  # the client is slower than the disk; the next one tells the same

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_forward, receive, emit)
            report = await self.store.scrub(progress)
            send.close()
        replaced = 0
        for spot in report.bad:
            if await self._replace(spot):
                replaced += 1
        return {
            "layers": report.layers,
            "chunks": report.chunks,
            "pieces": report.pieces,
            "bytes": report.size_bytes,
            "bad": [
                f"{spot.kind} {spot.number} of layer {spot.layer} ({spot.size} bytes at offset {spot.offset})"
                for spot in report.bad
            ],
            "replaced": replaced,
        }

    async def _replace(self, spot: BadSpot) -> bool:
        layer = self.store.layer(spot.layer)
        if layer is None:
            return False
        try:
            if spot.kind == "image":
                return await self._rebuild_image(spot.layer)
            if layer.codec == "whole":
                await self.layers.rebuild(layer)
            elif spot.kind == "chunk":
                start = layer.chunks.volume_offset[spot.number]
                await self.resolver.need(spot.layer, start, start + max(1, layer.chunks.size[spot.number]), REPAIR_S)
            elif spot.number == layer.pieces.index_piece:
                return False  # the layer stands without it; peers ask another node
            else:
                await self.resolver.refetch(spot.layer, spot.number, REPAIR_S)
        except (ShoalError, OSError) as exc:
            log.error("damage_not_replaced", layer=spot.layer, kind=spot.kind, number=spot.number, reason=str(exc))
            return False
        return layer.has_chunk(spot.number) if spot.kind == "chunk" else layer.has_piece(spot.number)

    async def _rebuild_image(self, digest: Digest) -> bool:
        layer = self.store.layer(digest)
        if layer is None or layer.pieces.index_piece < 0:
            return False
        start, stop = layer.pieces.extent(layer.pieces.index_piece)
        data = layer.read_blob(start, stop)
        toc_digest = Digest(str(layer.extra["toc_digest"]))
        if data is None:
            return False

        def build() -> bytearray:
            footer = estargz.parse_footer(data, layer.blob_size)
            if footer is None:
                raise StoreError(f"the index of {digest} has no footer")
            toc = estargz.unpack_toc(data[: stop - start - footer.footer_size], toc_digest)
            index = estargz.parse_toc(toc, blob_size=layer.blob_size, toc_offset=start, toc_digest=toc_digest)
            return write_image(index.root, volume_size=index.volume_size, user_markers=False)

        image = await trio.to_thread.run_sync(build)
        return await trio.to_thread.run_sync(layer.repair_image, image)


async def _forward(receive: "trio.MemoryReceiveChannel[dict[str, Any]]", emit: Emit) -> None:
    async for event in receive:
        await emit(event)
