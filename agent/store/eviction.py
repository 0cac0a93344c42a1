"""What goes first when the store is over its quota: a pure decision over facts.

Two passes over the layers that nobody has pinned, the least recently used first. The first takes the compressed bytes of
complete volumes: readers miss nothing, and should a peer want them they are cheap to get again. The second takes what is
left, volumes and the rest of the blobs. Each pass stops as soon as usage is down to the low watermark.
"""

from collections.abc import Iterable
from typing import Final, Literal

import attrs

from agent.formats.model import Digest

LOW_WATERMARK: Final = 0.9
"""Share of the quota at which eviction stops: freeing a tenth at a time keeps the next download from evicting again."""


@attrs.frozen
class LayerFacts:
    """What the decision needs to know of a layer."""

    digest: Digest
    last_used_s: float
    is_pinned: bool
    is_complete: bool
    blob_bytes: int
    data_bytes: int


@attrs.frozen
class Eviction:
    """One thing to take away."""

    digest: Digest
    part: Literal["blob", "data"]
    frees: int


def plan_eviction(layers: Iterable[LayerFacts], *, to_free: int) -> list[Eviction]:
    """What to evict, in order, until `to_free` bytes are free or nothing is left that may go."""
    order = sorted((layer for layer in layers if not layer.is_pinned), key=lambda layer: (layer.last_used_s, layer.digest))
    cheap = [Eviction(layer.digest, "blob", layer.blob_bytes) for layer in order if layer.is_complete]
    rest: list[Eviction] = []
    for layer in order:
        if not layer.is_complete:
            rest.append(Eviction(layer.digest, "blob", layer.blob_bytes))
        rest.append(Eviction(layer.digest, "data", layer.data_bytes))
    plan: list[Eviction] = []
    for eviction in [*cheap, *rest]:
        if to_free <= 0:
            break
        if eviction.frees > 0:
            plan.append(eviction)
            to_free -= eviction.frees
    return plan


def bytes_to_free(usage: int, quota: int | None) -> int:
    """How much must go: down to the low watermark if usage is over the quota, else nothing."""
    if quota is None or usage <= quota:
        return 0
    return usage - int(quota * LOW_WATERMARK)
