"""Which pieces to fetch next: the pure part of the resolver.

A node fetches each piece once. Wants of three priorities stand in queues; what is taken from a queue is a *run* of
neighbouring pieces of one layer, so that one request fills the link. A demand read takes its piece and, while a reader goes
through a layer in order, a growing window of the pieces behind it. A demand for a piece that waits further back inside another
run cuts that run before it, unless the run will be there soon anyway.

Nothing here does I/O or looks at a clock: `now` is passed in.
"""

from collections.abc import Callable, Hashable, Iterator
from enum import IntEnum
from typing import Final, Generic, TypeVar

import attrs

MAX_WINDOW: Final = 8
"""Most pieces (about 8 MiB) a demand read takes along: a fifth of a second of a 400 Mbit/s link, within which a reader in
order catches up."""
PREFETCH_RUN: Final = 4
"""Pieces of one prefetch request: short enough that the layers of an image share the link, long enough to hide 20 ms."""
BACKGROUND_RUN: Final = 8
NEAR: Final = 1
"""A demand so few pieces behind what a run is receiving waits for it: a new request costs a round trip, and what was under way
to the old one is fetched twice. A read across the border of two pieces asks for both at once."""
SOON_S: Final = 0.1
"""So does one whose piece the run will bring within this time, at its pace so far: a cut run leaves up to a round trip's worth of
bytes on the link (1 MB at 20 ms and 400 Mbit/s) that are fetched again, and the new request shares the link with all others."""
QUIET_S: Final = 1.5
"""Background waits until nobody has asked for anything for this long: the pauses of a starting container are shorter ..."""
BULK_S: Final = 2.0
"""... unless demand has gone on for this long: then somebody reads everything, and help is what is polite. A start from layers
without hints goes on for more than a second, too, and what it does not need would be in its way."""

Key = TypeVar("Key", bound=Hashable)


class Priority(IntEnum):
    """Who waits for a piece; smaller is more urgent."""

    DEMAND = 0
    PREFETCH = 1
    BACKGROUND = 2


@attrs.define(eq=False)
class Run(Generic[Key]):
    """Pieces [first, stop) of layer `key` in flight; `first` moves up as pieces complete, `stop` may move down. `paced_from` is when
    the piece at `first` began to be waited for."""

    key: Key
    first: int
    stop: int
    priority: Priority
    started_as: Priority
    paced_from: float


@attrs.define
class _Reader:
    """How a layer is being read, to grow or reset the window."""

    next_piece: int = -1
    window: int = 1


class PieceQueue(Generic[Key]):
    """Queues of wanted pieces and the runs in flight. `limits[p]` bounds how many runs of priority p are in flight."""

    def __init__(
        self, is_wanted: Callable[[Key, int], bool], piece_count: Callable[[Key], int], limits: tuple[int, int, int]
    ) -> None:
        self._is_wanted = is_wanted
        self._piece_count = piece_count
        self._limits = limits
        self._queues: tuple[dict[tuple[Key, int], None], ...] = ({}, {}, {})
        self._in_flight: dict[tuple[Key, int], Run[Key]] = {}
        self._active = [0, 0, 0]
        self._readers: dict[Key, _Reader] = {}
        self._last_demand = self._last_foreground = float("-inf")
        self._demand_since = float("inf")
        self._piece_s = float("inf")
        """How long a run took for a piece lately; runs share the links, so one figure does for all."""

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues)

    def queued(self, priority: Priority) -> int:
        """How many pieces wait at this priority."""
        return len(self._queues[priority])

    def runs(self) -> set[Run[Key]]:
        """The runs in flight."""
        return set(self._in_flight.values())

    def want(self, key: Key, piece: int, priority: Priority, now: float) -> None:
        """Put a piece in its queue, unless a run already brings it soon."""
        if priority is not Priority.BACKGROUND:
            self._last_foreground = now
        if priority is Priority.DEMAND:
            if now - self._last_demand > QUIET_S:
                self._demand_since = now
            self._last_demand = now
        run = self._in_flight.get((key, piece))
        if run is not None:
            if priority is not Priority.DEMAND or piece <= run.first + NEAR or self._comes_soon(run, piece, now):
                run.priority = min(run.priority, priority)
                return
            self._cut(run, piece)
        for other in Priority:
            if (key, piece) in self._queues[other]:
                if other <= priority:
                    return
                del self._queues[other][(key, piece)]
        self._queues[priority][(key, piece)] = None

    def _comes_soon(self, run: Run[Key], piece: int, now: float) -> bool:
        stalled_s = max(0.0, now - run.paced_from - self._piece_s)
        return (piece - run.first) * self._piece_s + stalled_s <= SOON_S

    def _cut(self, run: Run[Key], piece: int) -> None:
        """End `run` before `piece`; what it would have fetched behind it goes back to the queue."""
        for back in range(piece, run.stop):
            self._in_flight.pop((run.key, back), None)
            if back != piece:
                self._queues[max(run.priority, Priority.PREFETCH)].setdefault((run.key, back), None)
        run.stop = piece

    def is_bulk(self, now: float) -> bool:
        """Whether demand reads have gone on without a pause for so long that everything seems to be read."""
        return now - self._last_demand <= QUIET_S and now - self._demand_since >= BULK_S

    def may_background(self, now: float) -> bool:
        """Whether background fetching would disturb nobody, or help."""
        if self.is_bulk(now):
            return True
        is_idle = (
            not self._queues[Priority.PREFETCH] and not self._active[Priority.DEMAND] and not self._active[Priority.PREFETCH]
        )
        return is_idle and now - self._last_foreground > QUIET_S

    def take(self, now: float) -> Iterator[Run[Key]]:
        """Take every run that may start now; the caller fetches each and calls `finished`."""
        for priority in Priority:
            queue = self._queues[priority]
            if priority is Priority.BACKGROUND and not self.may_background(now):
                return
            while queue and self._active[priority] < self._limits[priority]:
                key, piece = next(iter(queue))
                del queue[(key, piece)]
                if (key, piece) in self._in_flight or not self._is_wanted(key, piece):
                    continue
                run = Run(key, piece, self._extend(key, piece, priority), priority, priority, now)
                for number in range(run.first, run.stop):
                    self._in_flight[(key, number)] = run
                    for other in self._queues:
                        other.pop((key, number), None)
                self._active[priority] += 1
                yield run

    def _extend(self, key: Key, piece: int, priority: Priority) -> int:
        """Where the run that starts with `piece` ends."""
        count = self._piece_count(key)
        if priority is Priority.DEMAND:
            reader = self._readers.setdefault(key, _Reader())
            near = reader.next_piece >= 0 and reader.next_piece - 1 <= piece <= reader.next_piece + 1
            reader.window = min(MAX_WINDOW, reader.window * 2) if near else 1
            most = reader.window
        else:
            most = PREFETCH_RUN if priority is Priority.PREFETCH else BACKGROUND_RUN
        stop = piece + 1
        while stop < count and stop - piece < most and (key, stop) not in self._in_flight and self._is_wanted(key, stop):
            if priority is not Priority.DEMAND and (key, stop) not in self._queues[priority]:
                break
            stop += 1
        if priority is Priority.DEMAND:
            self._readers[key].next_piece = stop
        return stop

    def arrived(self, run: Run[Key], piece: int, now: float) -> None:
        """A source has brought everything before `piece`."""
        count = min(piece, run.stop) - run.first
        if count > 0:
            took_s = (now - run.paced_from) / count
            self._piece_s = took_s if self._piece_s == float("inf") else (self._piece_s + took_s) / 2
            run.paced_from = now
        self.advance(run, piece)

    def advance(self, run: Run[Key], piece: int) -> None:
        """Everything before `piece` is here, wherever it came from."""
        for number in range(run.first, min(piece, run.stop)):
            self._in_flight.pop((run.key, number), None)
        run.first = piece

    def finished(self, run: Run[Key], now: float) -> None:
        """A run has ended, well or not."""
        if run.started_as is not Priority.BACKGROUND:
            self._last_foreground = now
        self._active[run.started_as] -= 1
        self.advance(run, run.stop)

    def forget(self, key: Key) -> None:
        """Drop every want of a layer; runs in flight go on until they end."""
        for queue in self._queues:
            for place in [place for place in queue if place[0] == key]:
                del queue[place]
        self._readers.pop(key, None)
