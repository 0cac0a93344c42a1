"""Chunks that this node has already at another place: copied instead of fetched, whatever format either layer has.

`adopt_chunks` copies what is here when a layer is mounted. `NodeChunks` is asked by the resolver before it fetches a piece, and
so finds what came later. Both look only for chunks of which the store knows that they may be somewhere else.
"""

from collections.abc import Sequence
from typing import Final

import structlog
import trio

from agent.errors import StoreError
from agent.resolve import Resolver
from agent.store import Store, StoredLayer

log = structlog.get_logger()

SLICE: Final = 64
"""Chunks copied by one worker-thread call, so that readers of the first ones are not kept waiting."""


class NodeChunks:
    """Takes chunks of a layer from other places of the node."""

    def __init__(self, store: Store, limiter: trio.CapacityLimiter) -> None:
        self._store = store
        self._limiter = limiter

    def may_have(self, layer: StoredLayer, chunks: Sequence[int]) -> bool:
        """Whether looking for these chunks is worth the time; no I/O."""
        return any(self._store.is_shared(layer, number) for number in chunks)

    async def take(self, layer: StoredLayer, chunks: Sequence[int]) -> list[int]:
        """Copy those of the missing chunks that are here, each hashed on the way; gives the ones that came."""
        wanted = [number for number in chunks if self._store.is_shared(layer, number) and not layer.has_chunk(number)]
        if not wanted:
            await trio.lowlevel.checkpoint()
            return []
        try:
            found = await self._store.find_chunks([layer.chunks.digest(number) for number in wanted])
        except StoreError as exc:
            log.warning("chunks_not_looked_up", layer=layer.digest, reason=str(exc), consequence="they are fetched")
            return []
        pairs = [(number, *place) for number, place in zip(wanted, found, strict=True) if place is not None]
        if not pairs:
            return []
        return await trio.to_thread.run_sync(_copy, layer, pairs, limiter=self._limiter)


def _copy(layer: StoredLayer, pairs: Sequence[tuple[int, StoredLayer, int]]) -> list[int]:
    done = []
    for number, donor, donor_number in pairs:
        try:
            if not layer.has_chunk(number) and layer.copy_chunk(donor, donor_number, number):
                done.append(number)
        except StoreError as exc:  # evicted meanwhile, or a bad sector: it is fetched instead
            log.debug("chunk_not_copied", layer=layer.digest, chunk=number, reason=str(exc))
    return done


def has_donors(store: Store, layer: StoredLayer) -> bool:
    """Whether it is worth it to wait for `adopt_chunks` before anything is fetched: a layer of another image has data.

    Layers of one image arrive together; what they share is found piece by piece, as soon as the layers are filed.
    """
    image = layer.extra.get("image")
    return any(other.extra.get("image") != image and other.part_bytes()[1] for other in store.layers())


async def adopt_chunks(store: Store, layer: StoredLayer, resolver: Resolver, limiter: trio.CapacityLimiter) -> int:
    """Copy what this node has of the layer's chunks. Gives the compressed bytes saved."""
    await store.filed(layer.digest)
    node, table = NodeChunks(store, limiter), layer.chunks
    wanted = [number for number in range(len(table)) if store.is_shared(layer, number) and not layer.has_chunk(number)]
    members: dict[int, int] = {}
    copied = 0
    for at in range(0, len(wanted), SLICE):
        done = await node.take(layer, wanted[at : at + SLICE])
        resolver.chunks_arrived(layer.digest, done)
        copied += len(done)
        members |= {table.blob_offset[number]: table.blob_length[number] for number in done}
    saved = sum(members.values())  # several chunks may share a member; its bytes are saved once
    resolver.counters.cache_bytes += saved
    if saved:
        log.info("chunks_copied", layer=layer.digest, chunks=copied, saved_bytes=saved)
    return saved
