"""Chunks that other layers of this node have already: copied instead of fetched."""

from typing import Final

import structlog
import trio

from agent.errors import StoreError
from agent.resolve import Resolver
from agent.store import Store, StoredLayer

log = structlog.get_logger()

SLICE: Final = 64
"""Chunks copied by one worker-thread call, so that readers of the first ones are not kept waiting."""


def has_donors(store: Store, layer: StoredLayer) -> bool:
    """Whether a layer of another image has data: most first pulls find none, and need not look up every digest, which takes
    0.1 s for 13,000. Layers of one image that arrive together seldom share much."""
    image = layer.extra.get("image")
    return any(other.extra.get("image") != image and other.part_bytes()[1] for other in store.layers())


async def adopt_chunks(store: Store, layer: StoredLayer, resolver: Resolver, limiter: trio.CapacityLimiter) -> int:
    """Copy what this node has of the layer's chunks; each is hashed on the way. Gives the compressed bytes saved."""
    table = layer.chunks
    missing = [number for number in range(len(table)) if not layer.has_chunk(number)]
    found = await store.find_chunks([table.digest(number) for number in missing])
    pairs = [
        (number, *place) for number, place in zip(missing, found, strict=True) if place is not None and place[0] is not layer
    ]

    def copy(part: list[tuple[int, StoredLayer, int]]) -> list[int]:
        done = []
        for number, donor, donor_number in part:
            try:
                if not layer.has_chunk(number) and layer.copy_chunk(donor, donor_number, number):
                    done.append(number)
            except StoreError as exc:  # evicted meanwhile, or a bad sector: it is fetched instead
                log.debug("chunk_not_copied", layer=layer.digest, chunk=number, reason=str(exc))
        return done

    members: set[int] = set()
    for at in range(0, len(pairs), SLICE):
        done = await trio.to_thread.run_sync(copy, pairs[at : at + SLICE], limiter=limiter)
        resolver.chunks_arrived(layer.digest, done)
        members.update(done)
    # Several chunks may share a member; its bytes are saved once, and only if all of it is here.
    saved = sum({table.blob_offset[number]: table.blob_length[number] for number in members}.values())
    resolver.counters.cache_bytes += saved
    if saved:
        log.info("chunks_copied", layer=layer.digest, chunks=len(pairs), saved_bytes=saved)
    return saved
