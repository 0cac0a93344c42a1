"""The miss path: from "these bytes of this volume are missing" to "they are there, verified".

`Resolver.need` parks its caller until the chunks of a volume range are present. Wants of all callers meet in a `PieceQueue`,
so that a node fetches each piece once; each run of pieces is fetched by one task that tries the sources in policy's order,
goes on with the next one at the member it had reached, and wakes readers chunk by chunk. Decoding, hashing and writing happen
in worker threads, in batches of what has arrived: a fast link makes large batches, a slow one wakes readers early.

Nothing unverified is ever marked: a chunk whose digest does not match is dropped, its source reported, and the next one asked.
A read ends with its bytes or, at its deadline, with EIO and one line in the log.
"""

import errno
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, Protocol

import attrs
import structlog
import trio

from agent.errors import ShoalError, SourceError, SourceLied, SourceUnavailable, StoreError
from agent.formats.model import BLOCK_SIZE, FormatError
from agent.resolve.absorb import Absorber, Adopted, Arrivals, adopt_from_disk
from agent.resolve.counters import Counters
from agent.resolve.queue import PieceQueue, Priority, Run
from agent.resolve.sources import Source, Sourcing
from agent.store import StoredLayer

log = structlog.get_logger()

LIMITS: Final = (6, 3, 1)
"""Runs in flight by priority: demand from six readers at once, prefetch of three layers side by side, one polite background."""
CALM_BATCH_BYTES: Final = 256 << 10
"""While nobody waits a worker-thread call takes at least this much: the hop costs 0.2 ms, as much as decoding 64 KiB."""
RETRY_FIRST_S: Final = 0.1
RETRY_MOST_S: Final = 2.0
POLITE_S: Final = 0.05
GIVE_UP_AFTER: Final = 5
"""Rounds over all sources before prefetch or background lets a piece go; a demand tries until its reader's deadline."""


@attrs.define
class Resume:
    """Where the next source goes on within a run: the member that starts at blob offset `layer_offset` holds `chunk`."""

    layer_offset: int = -1
    chunk: int = 0


class NodeChunks(Protocol):
    """Chunks with the same content at other places of this node."""

    def may_have(self, layer: StoredLayer, chunks: Sequence[int]) -> bool:
        """Whether asking for any of these is worth the time; no I/O."""

    async def take(self, layer: StoredLayer, chunks: Sequence[int]) -> list[int]:
        """Copy what is there, verified, into the layer; gives the chunks that came."""


@attrs.define(eq=False)
class _Waiter:
    remaining: set[int]
    done: trio.Event = attrs.field(factory=trio.Event)
    error: ShoalError | None = None


@attrs.define(eq=False)
class _LayerState:
    """What the resolver knows of one layer beyond what is stored."""

    layer: StoredLayer
    label: str
    waiters: dict[int, list[_Waiter]] = attrs.field(factory=dict)
    last_error: str = ""
    tried_self: set[int] = attrs.field(factory=set)


class Resolver:
    """See the module's text; made by `open_resolver`."""

    def __init__(
        self, nursery: trio.Nursery, sourcing: Sourcing, counters: Counters, rebuild: Callable[[StoredLayer], Awaitable[None]]
    ) -> None:
        self._nursery = nursery
        self._sourcing = sourcing
        self._rebuild = rebuild
        self.counters = counters
        self._states: dict[str, _LayerState] = {}
        self._queue: PieceQueue[str] = PieceQueue(self._is_wanted, lambda name: len(self._states[name].layer.pieces), LIMITS)
        self._threads = trio.CapacityLimiter(2)
        self.node: NodeChunks | None = None
        """Asked before anything is fetched; set by whoever wires the agent."""
        self._refetching: set[tuple[str, int]] = set()
        self._piece_ended = trio.Event()

    # --- what callers use -------------------------------------------------------------------------------------------------

    def add_layer(self, layer: StoredLayer, label: str) -> None:
        """Make a layer known. `label` (the image) is for log lines."""
        self._states.setdefault(layer.digest, _LayerState(layer, label))

    def forget_layer(self, digest: str) -> None:
        """A layer is going away; whoever waits for it gets an error."""
        state = self._states.pop(digest, None)
        if state:
            self._queue.forget(digest)
            for waiter in {waiter for waiters in state.waiters.values() for waiter in waiters}:
                waiter.error = StoreError(f"layer {digest} was removed", errno=errno.ESTALE)
                waiter.done.set()

    async def need(self, digest: str, start: int, stop: int, deadline_s: float) -> None:
        """Return when volume bytes [start, stop) of the layer are present and verified.

        Raises:
            StoreError: the layer is unknown or the disk refused the bytes.
            OSError: EIO, the deadline passed; a line in the log says what was waited for.
        """
        state = self._states.get(digest)
        if state is None:
            raise StoreError(f"layer {digest} is not known to this agent", errno=errno.ESTALE)
        if deadline_s <= 0:  # the kernel asks again for what was refused a moment ago; the log has it
            if await self._settled_missing(state.layer, start, stop):
                raise OSError(errno.EIO, f"{state.label}: nobody could give the bytes in time")
            return
        with trio.move_on_after(deadline_s) as scope:
            await self._need(state, start, stop)
        if scope.cancelled_caught:
            self.counters.failed_reads += 1
            self._log_deadline(state, start, stop, deadline_s)
            raise OSError(errno.EIO, f"{state.label}: nobody could give the bytes in {deadline_s:g} s")

    async def _need(self, state: _LayerState, start: int, stop: int) -> None:
        layer = state.layer
        missing = await self._settled_missing(layer, start, stop)
        if not missing:
            await trio.lowlevel.checkpoint()
            return
        self.counters.demand_waits += 1
        if layer.codec == "whole":
            await self._rebuild(layer)
            return
        waiter = _Waiter(set(missing))
        for chunk in missing:
            state.waiters.setdefault(chunk, []).append(waiter)
        try:
            now = time.monotonic()
            for piece in sorted({layer.pieces.piece_of_chunk(chunk) for chunk in missing}):
                self._queue.want(layer.digest, piece, Priority.DEMAND, now)
            self._kick()
            await waiter.done.wait()
        finally:
            for chunk in waiter.remaining:
                waiters = state.waiters.get(chunk)
                if waiters and waiter in waiters:
                    waiters.remove(waiter)
                    if not waiters:
                        del state.waiters[chunk]
        if waiter.error is not None:
            raise waiter.error

    async def _settled_missing(self, layer: StoredLayer, start: int, stop: int) -> list[int]:
        """Missing chunks of the range, after chunks in doubt (unclean boot) have been hashed."""
        doubtful = [chunk for chunk in layer.chunks.overlapping(start, stop) if layer.is_doubtful(chunk)]
        if doubtful:
            await trio.to_thread.run_sync(lambda: [layer.verify_chunk(chunk) for chunk in doubtful], limiter=self._threads)
        return list(layer.missing_chunks(start, stop))

    async def refetch(self, digest: str, piece: int, deadline_s: float) -> None:
        """Return when a piece of which the blob's bytes were lost is held again.

        Raises:
            OSError: EIO, the deadline passed.
        """
        state = self._states.get(digest)
        if state is None:
            raise StoreError(f"layer {digest} is not known to this agent", errno=errno.ESTALE)
        self._refetching.add((digest, piece))
        try:
            self._queue.want(digest, piece, Priority.PREFETCH, time.monotonic())
            self._kick()
            with trio.move_on_after(deadline_s) as scope:
                while not state.layer.has_piece(piece):
                    await self._piece_ended.wait()
            if scope.cancelled_caught:
                raise OSError(errno.EIO, f"piece {piece} of {digest} did not come in {deadline_s:g} s")
        finally:
            self._refetching.discard((digest, piece))

    def prefetch(self, digest: str, pieces: Sequence[int], priority: Priority = Priority.PREFETCH) -> None:
        """Want pieces without waiting for them, in the order given."""
        state = self._states.get(digest)
        if state is None or state.layer.codec == "whole":
            return
        now = time.monotonic()
        for piece in pieces:
            if self._is_wanted(digest, piece):
                self._queue.want(digest, piece, priority, now)
        self._kick()

    def is_busy(self) -> bool:
        """Whether anything is queued or in flight."""
        return bool(len(self._queue) or self._queue.runs())

    # --- runs -------------------------------------------------------------------------------------------------------------

    def _is_wanted(self, digest: str, piece: int) -> bool:
        state = self._states.get(digest)
        if state is None:
            return False
        if (digest, piece) in self._refetching:
            return not state.layer.has_piece(piece)
        return _lacks(state.layer, piece)

    def _kick(self) -> None:
        for run in self._queue.take(time.monotonic()):
            self._nursery.start_soon(self._fetch_run, run)

    async def keep_kicking(self) -> None:
        """Start background runs when quiet has come; nothing else would notice."""
        while True:
            await trio.sleep(0.25)
            if self._queue.queued(Priority.BACKGROUND):
                self._kick()

    async def _fetch_run(self, run: Run[str]) -> None:
        state = self._states.get(run.key)
        try:
            if state is not None:
                await self._fetch_pieces(run, state)
        except StoreError as exc:
            if state is not None:
                log.error("store_refused_bytes", layer=run.key, image=state.label, reason=str(exc))
                self._fail(run, state, exc)
        finally:
            self._queue.finished(run, time.monotonic())
            self._piece_ended.set()
            self._piece_ended = trio.Event()
            self._kick()

    async def _fetch_pieces(self, run: Run[str], state: _LayerState) -> None:
        layer = state.layer
        excluded: set[str] = set()
        rounds = looked_until = 0
        resume = Resume()
        while run.first < run.stop:
            if not self._is_wanted(run.key, run.first):
                self._wake(state, layer.pieces.chunks_of(run.first))
                self._queue.advance(run, run.first + 1)
                continue
            if layer.has_piece(run.first) or run.first not in state.tried_self:
                state.tried_self.add(run.first)
                found = await trio.to_thread.run_sync(adopt_from_disk, layer, run.first, limiter=self._threads)
                if layer.has_piece(run.first):
                    self._piece_done(state, run.first)
                    continue
                if found.chunks:
                    self._part_done(state, run.first, found)
                    resume.layer_offset, resume.chunk = found.resume
                    continue
            if self.node is not None and looked_until < run.stop:
                first_chunk, looked_until = layer.pieces.first_chunk, run.stop
                chunks = range(first_chunk[run.first], first_chunk[run.stop])
                if self.node.may_have(layer, chunks) and (taken := await self.node.take(layer, chunks)):
                    members = {layer.chunks.blob_offset[chunk]: layer.chunks.blob_length[chunk] for chunk in taken}
                    self.counters.cache_bytes += sum(members.values())
                    self._wake(state, taken)
                    continue
            candidates = self._sourcing.candidates(layer, run.first, run.stop, excluded)
            if not candidates:
                rounds += 1
                if rounds >= GIVE_UP_AFTER and not self._has_waiters(state, run):
                    log.warning(
                        "pieces_given_up",
                        layer=run.key,
                        image=state.label,
                        first=run.first,
                        stop=run.stop,
                        reason=state.last_error or "no source",
                    )
                    return
                excluded.clear()
                await trio.sleep(min(RETRY_MOST_S, RETRY_FIRST_S * 2 ** min(rounds, 8)))
                continue
            source, pieces = candidates[0]
            try:
                await self._stream(run, state, source, self._stop_of(run, state, pieces), resume)
            except SourceError as exc:
                state.last_error = f"{source.kind} {source.name}: {exc}"
                log.info(
                    "source_failed",
                    layer=run.key,
                    image=state.label,
                    piece=run.first,
                    kind=source.kind,
                    source=source.name,
                    reason=str(exc),
                )
                excluded.add(source.name)
                self._sourcing.report(source, layer, exc)
                if isinstance(exc, SourceLied):
                    self.counters.bad_chunks += 1

    def _stop_of(self, run: Run[str], state: _LayerState, pieces: int) -> int:
        """Where a request for the run ends: before a piece of which an earlier agent has left a part in the blob file, or that
        is not wanted any more."""
        stop, starts = run.first + 1, state.layer.pieces.starts
        most = min(run.stop, run.first + max(1, pieces))
        while stop < most:
            block = -(-starts[stop] // BLOCK_SIZE) * BLOCK_SIZE  # the block before may have data of the piece before
            is_begun = block < starts[stop + 1] and state.layer.blob_has_data(block, block + 1)
            if is_begun and stop not in state.tried_self:
                break
            if not self._is_wanted(run.key, stop):
                break
            stop += 1
        return stop

    def _has_waiters(self, state: _LayerState, run: Run[str]) -> bool:
        pieces = state.layer.pieces
        return any(chunk in state.waiters for chunk in range(pieces.first_chunk[run.first], pieces.first_chunk[run.stop]))

    async def _stream(self, run: Run[str], state: _LayerState, source: Source, stop_piece: int, resume: Resume) -> None:
        """Fetch pieces [run.first, stop_piece) from one source, from the member reached by the last one."""
        layer, pieces = state.layer, state.layer.pieces
        start, stop = pieces.starts[run.first], pieces.starts[stop_piece]
        first_chunk = pieces.first_chunk[run.first]
        if resume.layer_offset > start:
            start, first_chunk = resume.layer_offset, resume.chunk
        absorber = Absorber(layer, first_chunk, pieces.first_chunk[stop_piece], start, run.first)
        arrivals = Arrivals()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._absorb_all, run, state, absorber, arrivals)
                try:
                    async with source.fetch(layer.digest, layer.blob_size, [(start, stop)]) as stream:
                        async for offset, block in stream:
                            self.counters.count(source.kind, len(block))
                            if not arrivals.put(offset, block):
                                await arrivals.wait_room()
                            if run.priority is Priority.BACKGROUND:
                                await self._be_polite(run)
                            if run.stop < stop_piece and offset + len(block) >= pieces.starts[run.stop]:
                                self.counters.abandoned_bytes += stop - offset - len(block)
                                break
                finally:
                    arrivals.end()
        except BaseExceptionGroup as group:
            error = _narrow(group, source)
            if error is None:
                raise
            raise error from group
        finally:
            resume.layer_offset, resume.chunk = absorber.resume_point()
        if run.first < min(stop_piece, run.stop):
            raise SourceUnavailable(f"{source.name} ended its answer too early", source=source.name)

    async def _be_polite(self, run: Run[str]) -> None:
        # What ends the wait is the passing of quiet time, of which there is no event.
        while run.priority is Priority.BACKGROUND and not self._queue.may_background(time.monotonic()):  # noqa: ASYNC110
            await trio.sleep(POLITE_S)

    async def _absorb_all(self, run: Run[str], state: _LayerState, absorber: Absorber, arrivals: Arrivals) -> None:
        while batch := await arrivals.take(1 if run.priority is Priority.DEMAND else CALM_BATCH_BYTES):
            try:
                await trio.to_thread.run_sync(absorber.absorb, batch, limiter=self._threads)
            finally:
                # Also what came before a bad chunk: the next source goes on behind it, and nobody else would wake its readers.
                chunks, held = absorber.take_done()
                self.counters.chunks_verified += len(chunks)
                self._wake(state, chunks)
                for piece in held:
                    self._queue.arrived(run, piece + 1, time.monotonic())
                    self._sourcing.piece_held(state.layer, piece)

    def _piece_done(self, state: _LayerState, piece: int) -> None:
        chunks = state.layer.pieces.chunks_of(piece)
        start, stop = state.layer.pieces.extent(piece)
        self.counters.cache_bytes += stop - start
        self.counters.chunks_verified += len(chunks)
        self._wake(state, chunks)
        self._sourcing.piece_held(state.layer, piece)

    def _part_done(self, state: _LayerState, piece: int, found: Adopted) -> None:
        start, stop = state.layer.pieces.extent(piece)
        self.counters.cache_bytes += (stop if found.resume[0] < 0 else found.resume[0]) - start
        self.counters.chunks_verified += len(found.chunks)
        self._wake(state, found.chunks)

    def chunks_arrived(self, digest: str, chunks: Sequence[int]) -> None:
        """Chunks were written by somebody else (copied from another layer); wake who waits for them."""
        state = self._states.get(digest)
        if state:
            self._wake(state, chunks)

    def _wake(self, state: _LayerState, chunks: Sequence[int]) -> None:
        for chunk in chunks:
            for waiter in state.waiters.pop(chunk, ()):
                waiter.remaining.discard(chunk)
                if not waiter.remaining:
                    waiter.done.set()

    def _fail(self, run: Run[str], state: _LayerState, error: ShoalError) -> None:
        pieces = state.layer.pieces
        for chunk in range(pieces.first_chunk[run.first], pieces.first_chunk[run.stop]):
            for waiter in state.waiters.pop(chunk, ()):
                waiter.error = error
                waiter.done.set()

    def _log_deadline(self, state: _LayerState, start: int, stop: int, deadline_s: float) -> None:
        missing = list(state.layer.missing_chunks(start, stop))
        pieces = sorted({state.layer.pieces.piece_of_chunk(chunk) for chunk in missing})
        log.error(
            "read_deadline_passed",
            image=state.label,
            layer=state.layer.digest,
            volume_range=f"{start}-{stop}",
            chunks=missing[:8],
            pieces=pieces[:8],
            deadline_s=deadline_s,
            last_error=state.last_error or "no source answered",
        )


def _lacks(layer: StoredLayer, piece: int) -> bool:
    """Whether a piece is worth fetching: a chunk of it is not in the volume."""
    return not all(layer.has_chunk(chunk) for chunk in layer.pieces.chunks_of(piece))


def _narrow(group: BaseExceptionGroup[BaseException], source: Source) -> ShoalError | None:
    """The one error of a failed stream that decides what to do next; None if it was cancelled or is a defect of ours."""
    leaves: list[BaseException] = []
    groups: list[BaseExceptionGroup[BaseException]] = [group]
    while groups:
        for exc in groups.pop().exceptions:
            if isinstance(exc, BaseExceptionGroup):
                groups.append(exc)
            else:
                leaves.append(exc)
    if not all(isinstance(exc, ShoalError) for exc in leaves):
        return None
    for exc in leaves:
        if isinstance(exc, FormatError):
            return SourceLied(f"{source.name} sent wrong bytes: {exc}", source=source.name)
    for kind in (StoreError, SourceError):
        for exc in leaves:
            if isinstance(exc, kind):
                return exc
    return None


@asynccontextmanager
async def open_resolver(
    sourcing: Sourcing, counters: Counters, rebuild: Callable[[StoredLayer], Awaitable[None]]
) -> AsyncIterator[Resolver]:
    """A resolver whose tasks end with the block. `rebuild` makes a layer without random access whole again."""
    async with trio.open_nursery() as nursery:
        resolver = Resolver(nursery, sourcing, counters, rebuild)
        nursery.start_soon(resolver.keep_kicking)
        yield resolver
        nursery.cancel_scope.cancel()
