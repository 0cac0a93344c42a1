"""`shoal inspect`: what an image is made of, how lazily each layer can be mounted and why not, and what of it the fleet has.

Only indexes are read for that (and forgotten again). With `verify` every layer is fetched whole, and its blob and the tar inside
it are compared with what manifest and configuration say.
"""

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

import attrs
import trio

from agent.errors import ShoalError
from agent.formats.inflate import open_inflater, sniff
from agent.formats.model import Digest, FormatError, NoIndex, PieceTable
from agent.formats.opening import LayerFacts
from agent.formats.pieces import cut_fixed
from agent.images.layers import Layers
from agent.images.manifests import Manifests, facts_of
from agent.registry import Descriptor, ImageReference, ResolvedManifest
from agent.resolve import Resolver
from agent.store import Store, StoredLayer
from agent.swarm import Swarm

Emit = Callable[[dict[str, Any]], Awaitable[None]]

ANSWER_S: Final = 0.5
"""How long the fleet has to say what it holds of a layer: this is for people, and nothing waits for it."""
AT_ONCE: Final = 4
VERIFY_S: Final = 3600.0
STEP: Final = 1 << 20


@attrs.frozen
class Inspector:
    """See the module's text."""

    store: Store
    manifests: Manifests
    layers: Layers
    resolver: Resolver
    swarm: Swarm

    async def inspect(self, args: dict[str, Any], emit: Emit) -> dict[str, Any]:
        """What `shoal inspect --json` prints.

        Raises:
            ShoalError: nobody has the image.
        """
        image = ImageReference.parse(str(args["image"]))
        resolved = await self.manifests.get(image)
        pinned = attrs.evolve(image, digest=resolved.digest)
        found: dict[int, dict[str, Any]] = {}
        slots = trio.CapacityLimiter(AT_ONCE)

        async def one(number: int) -> None:
            async with slots:
                found[number] = await self._layer(pinned, resolved, resolved.layers[number])
            await emit({"what": str(image), "done": len(found), "total": len(resolved.layers), "state": "layers looked at"})

        async with trio.open_nursery() as nursery:
            for number in range(len(resolved.layers)):
                nursery.start_soon(one, number)
        layers = [found[number] for number in range(len(resolved.layers))]
        if args.get("verify"):
            diff_ids = (await self.manifests.config(image, resolved))[1]
            for number, (layer, diff_id) in enumerate(zip(resolved.layers, diff_ids, strict=True)):
                await emit({"what": "verifying", "done": number, "total": len(layers), "state": f"layer {number + 1}"})
                layers[number]["verified"] = await self._verify(pinned, resolved, layer, diff_id)
        return {
            "image": str(image),
            "digest": resolved.digest,
            "media_type": resolved.media_type,
            "size": sum(layer.size for layer in resolved.layers),
            "layers": layers,
        }

    async def _layer(self, image: ImageReference, resolved: ResolvedManifest, layer: Descriptor) -> dict[str, Any]:
        facts = facts_of(resolved, layer)
        found: dict[str, Any] = {
            "digest": layer.digest,
            "media_type": layer.media_type,
            "size": layer.size,
            "format": "tar",
            "is_lazy": False,
            "reason": "",
            "warnings": [],
        }
        stored = self.store.layer(layer.digest)
        layer_format = self.layers.format_of(facts)
        pieces: PieceTable | None = None
        if stored is not None:
            pieces = stored.pieces
            found |= _of_stored(stored)
        elif layer_format is not None:
            try:
                index = (await self.layers.indexes.fetch(image, facts, layer_format)).index
            except NoIndex as exc:
                found["reason"] = f"{exc}: the first node reads it through once"
            except FormatError as exc:
                found |= {"format": layer_format.name, "reason": str(exc)}
            else:
                pieces = index.pieces
                found |= {
                    "format": index.format,
                    "is_lazy": index.codec != "whole",
                    "entries": index.entry_count,
                    "chunks": len(index.chunks),
                    "uncompressed": index.volume_size,
                    "wanted_first": _prefetched(index.pieces, index.prefetch_stop, index.prefetch_pieces),
                    "warnings": list(index.warnings[:5]),
                }
        if not found["is_lazy"] and not found["reason"]:
            found["reason"] = "the image has no index for it: the first node reads it through once"
        pieces = pieces or cut_fixed(layer.size)
        return {**found, "pieces": len(pieces), **await self._whereabouts(layer.digest, pieces, stored)}

    async def _whereabouts(self, digest: Digest, pieces: PieceTable, stored: StoredLayer | None) -> dict[str, Any]:
        was_wanted = stored is not None
        await self.swarm.want(digest)
        try:
            holders = await self.swarm.wait_holders(digest, ANSWER_S)
        finally:
            if not was_wanted and self.store.layer(digest) is None:
                self.swarm.forget(digest)
        in_fleet = sum(any(holder.possession.has_piece(piece) for holder in holders) for piece in range(len(pieces)))
        held = 0 if stored is None else int.from_bytes(stored.possession(), "little").bit_count()
        return {"pieces_here": held, "pieces_in_fleet": in_fleet, "peers": len(holders)}

    async def _verify(self, image: ImageReference, resolved: ResolvedManifest, layer: Descriptor, diff_id: str) -> dict[str, Any]:
        """Fetch all of a layer and judge it: {"ok": bool, "what": one sentence}."""
        facts = attrs.evolve(facts_of(resolved, layer), diff_id=diff_id)
        try:
            await self.layers.prepare(image, layer)
            stored = self.store.layer(layer.digest)
            if stored is None:
                raise FormatError("it was evicted while it was looked at")
            await self._fetch_all(stored)
            what = await trio.to_thread.run_sync(_judge, stored, facts)
        except (ShoalError, OSError) as exc:
            return {"ok": False, "what": str(exc)}
        return {"ok": True, "what": what}

    async def _fetch_all(self, stored: StoredLayer) -> None:
        if stored.volume_size:
            await self.resolver.need(stored.digest, 0, stored.volume_size, VERIFY_S)
        for piece in range(len(stored.pieces)):
            if not stored.has_piece(piece):
                await self.resolver.refetch(stored.digest, piece, VERIFY_S)


def _of_stored(stored: StoredLayer) -> dict[str, Any]:
    return {
        "format": stored.format,
        "is_lazy": stored.codec != "whole",
        "entries": stored.entry_count,
        "chunks": len(stored.chunks),
        "uncompressed": stored.volume_size,
        "wanted_first": _prefetched(stored.pieces, stored.prefetch_stop, stored.prefetch_pieces),
    }


def _prefetched(pieces: PieceTable, stop: int, first: tuple[int, ...]) -> int:
    """Blob bytes that are fetched without being asked for."""
    wanted = {*first, *(pieces.covering(0, stop) if stop > 0 else ())}
    return sum(pieces.starts[piece + 1] - pieces.starts[piece] for piece in wanted)


def _judge(stored: StoredLayer, facts: LayerFacts) -> str:
    """Hash a layer that is here completely; in a worker thread. Gives what was found right.

    Raises:
        FormatError: something differs.
    """
    for number in stored.present_chunks():
        if not stored.verify_chunk(number):
            raise FormatError(f"chunk {number} does not match its digest")
    chunks = f"{len(stored.chunks)} chunks right"
    if stored.parts:
        _judge_parts(stored)
        return f"{chunks}; every blob that was read as a whole matches its digest"
    blob, tar = hashlib.sha256(), hashlib.sha256()
    inflater = None
    for start in range(0, stored.blob_size, STEP):
        data = stored.peek_blob(start, min(start + STEP, stored.blob_size))
        blob.update(data)
        # What is not compressed may still begin like something that is: a data blob of a nydus image does.
        inflater = inflater or open_inflater("none" if stored.codec == "raw" else sniff(data[:4]))
        for part in inflater.feed(memoryview(data)):
            tar.update(part)
    if "sha256:" + blob.hexdigest() != stored.digest:
        raise FormatError(f"the blob has digest sha256:{blob.hexdigest()}")
    if inflater is not None:
        inflater.finish()
    if "sha256:" + tar.hexdigest() != facts.diff_id:
        raise FormatError(f"the tar in the blob is sha256:{tar.hexdigest()}, but the image says {facts.diff_id}")
    return f"{chunks}; blob digest and diff_id right"


def _judge_parts(stored: StoredLayer) -> None:
    base = 0
    for part in stored.parts:
        if part.size == part.blob_size:
            hasher = hashlib.sha256()
            for start in range(base, base + part.size, STEP):
                hasher.update(stored.peek_blob(start, min(start + STEP, base + part.size)))
            if "sha256:" + hasher.hexdigest() != part.digest:
                raise FormatError(f"blob {part.digest} has digest sha256:{hasher.hexdigest()}")
        base += part.size
