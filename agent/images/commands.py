"""What the client commands do inside the agent: pull, mount, unmount, scrub."""

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import attrs
import structlog
import trio

from agent.errors import ShoalError
from agent.formats.model import Digest, FormatError
from agent.images.fsmount_link import FsmountLink
from agent.images.layers import Layers, PreparedLayer
from agent.images.manifests import Manifests
from agent.images.records import FleetRecords
from agent.registry import ImageReference, ResolvedManifest
from agent.resolve import Resolver
from agent.runtimes.containerd.client import Containerd, together
from agent.store import BadSpot, ScrubProgress, Store
from agent.swarm import Swarm
from agent.transfer import PeerClient

log = structlog.get_logger()

Emit = Callable[[dict[str, Any]], Awaitable[None]]

REPAIR_S: Final = 120.0
"""How long `shoal scrub` waits for damaged chunks to come from elsewhere."""
ROOTS: Final = "mounted-root"


@attrs.define
class ImageCommands:
    """See the module's text. `containerd` may be down: only `pull` needs it."""

    store: Store
    manifests: Manifests
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
        self.layers.expect()
        resolved = await self.manifests.get(image)
        pinned = attrs.evolve(image, digest=resolved.digest)
        prepared: list[PreparedLayer] = []

        async def prepare() -> None:
            prepared.extend(await self._prepare_all(pinned, resolved, emit))

        async def tell_containerd() -> None:
            config, diff_ids = await self.manifests.config(image, resolved)
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
        self.layers.expect()
        resolved = await self.manifests.get(image)
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
                return await self.layers.rebuild_image(layer)
            if layer.codec == "whole":
                await self.layers.rebuild(layer)
            elif spot.kind == "chunk":
                start = layer.chunks.volume_offset[spot.number]
                await self.resolver.need(spot.layer, start, start + max(1, layer.chunks.size[spot.number]), REPAIR_S)
            else:
                await self.resolver.refetch(spot.layer, spot.number, REPAIR_S)
        except (ShoalError, OSError) as exc:
            log.error("damage_not_replaced", layer=spot.layer, kind=spot.kind, number=spot.number, reason=str(exc))
            return False
        return layer.has_chunk(spot.number) if spot.kind == "chunk" else layer.has_piece(spot.number)


async def _forward(receive: "trio.MemoryReceiveChannel[dict[str, Any]]", emit: Emit) -> None:
    async for event in receive:
        await emit(event)
