"""The choice of sources: which pieces to ask of whom. Pure: the facts, the clock and the randomness come in.

A holder's cost is a sum of milliseconds, roughly the wait it promises:

- its distance: the round trip, or `NEAR_MS` unknown in this zone; `FAR_MS` on top for another zone;
- its load: a full set of upload slots means waiting for one;
- its recent failures, which decay (`agent.swarm.members`), each worth `FAILURE_MS`.

A run of neighbouring pieces goes to one holder, as far as it holds them, because a request costs a round trip; long wants
are cut into runs and spread, because two holders are twice as fast. What nobody holds goes to the registry.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Final

import attrs

from agent.swarm.members import Holder

NEAR_MS: Final = 1.0
FAR_MS: Final = 40.0
"""A zone border costs this much extra: a typical distance between regions, so that a near copy wins unless it is busy."""
BUSY_MS: Final = 100.0
"""What a full set of upload slots costs: a slot is held for about one run of pieces."""
FAILURE_MS: Final = 250.0
"""What one fresh failure costs: more than any distance or load, so others are tried first while they have the piece."""
GIVE_UP_FAILURES: Final = 3.0
"""A holder with more fresh failures than this is not asked: the registry is better."""
JITTER_MS: Final = 5.0
"""Equal holders are chosen at random, so that a fleet does not ask the same one."""
MAX_RUN: Final = 8
"""Pieces in one assignment, about 8 MiB: enough to keep a connection busy for a tenth of a second at 1 Gbit/s."""


@attrs.frozen
class Assignment:
    """Ask `source` (a peer id, empty: the registry) for `pieces`, which are neighbours in ascending order."""

    source: str
    pieces: tuple[int, ...]


def cost_ms(holder: Holder, zone: str) -> float:
    """What asking the holder is expected to cost."""
    distance = NEAR_MS if holder.rtt_ms is None else holder.rtt_ms
    if zone and holder.zone and holder.zone != zone:
        distance += FAR_MS
    return distance + holder.load * BUSY_MS + holder.failures * FAILURE_MS


def rank(
    holders: Sequence[Holder],
    *,
    zone: str = "",
    excluded: Collection[str] = (),
    jitter: Callable[[], float] = lambda: 0.0,
) -> list[Holder]:
    """The holders that may be asked, best first. `jitter` gives numbers in [0, 1)."""
    usable = [h for h in holders if h.peer_id not in excluded and h.failures <= GIVE_UP_FAILURES]
    return sorted(usable, key=lambda holder: cost_ms(holder, zone) + jitter() * JITTER_MS)


def choose(
    pieces: Sequence[int],
    holders: Sequence[Holder],
    *,
    zone: str = "",
    excluded: Collection[str] = (),
    jitter: Callable[[], float] = lambda: 0.0,
    max_run: int = MAX_RUN,
) -> list[Assignment]:
    """Cut `pieces` (ascending) into runs, each for one source; the order of the runs is that of the pieces.

    Every piece is in exactly one assignment; a peer is only asked for pieces it holds; the registry only for what no usable
    peer holds.
    """
    ranked = rank(holders, zone=zone, excluded=excluded, jitter=jitter)
    given = {holder.peer_id: 0 for holder in ranked}
    base = {holder.peer_id: cost_ms(holder, zone) for holder in ranked}
    result: list[Assignment] = []
    at = 0
    while at < len(pieces):
        able = [holder for holder in ranked if holder.possession.has_piece(pieces[at])]
        if able:
            # What was given already makes a holder busier: this spreads a long want over all holders.
            best = min(able, key=lambda h: base[h.peer_id] + given[h.peer_id] * BUSY_MS / MAX_RUN)
            stop = _run(pieces, at, max_run, best.possession.has_piece)
            given[best.peer_id] += stop - at
            source = best.peer_id
        else:
            stop = _run(pieces, at, max_run, lambda piece: not any(h.possession.has_piece(piece) for h in ranked))
            source = ""
        result.append(Assignment(source, tuple(pieces[at:stop])))
        at = stop
    return result


def _run(pieces: Sequence[int], at: int, most: int, fits: Callable[[int], bool]) -> int:
    stop = at + 1
    while stop < len(pieces) and stop - at < most and pieces[stop] == pieces[stop - 1] + 1 and fits(pieces[stop]):
        stop += 1
    return stop
