"""Looks for bytes that are not what they were: all of them (scrub), or those an unclean boot has put in doubt (settle).

Works in slices of a few megabytes in one thread, rests in between, and forgets what is bad.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal

import attrs
import structlog
import trio

from agent.errors import StoreError
from agent.formats.model import Digest
from agent.store.layer import StoredLayer

log = structlog.get_logger()

SLICE_BYTES: Final = 4 << 20
"""Work of one thread call: some 10 ms, so that cancelling is prompt and the hop to the thread costs nothing."""

PiecesChanged = Callable[[Digest, Sequence[int], bool], None]
Kind = Literal["chunk", "piece", "image"]


@attrs.frozen
class BadSpot:
    """Something that was not what it should be. `offset` is in the volume for a chunk, in the blob for a piece."""

    layer: Digest
    kind: Kind
    number: int
    offset: int
    size: int


@attrs.frozen
class ScrubProgress:
    """How far it is, in bytes of all layers."""

    layer: Digest
    done_bytes: int
    total_bytes: int
    bad: int


@attrs.frozen
class ScrubReport:
    """What was looked at, and what was bad."""

    layers: int = 0
    chunks: int = 0
    pieces: int = 0
    size_bytes: int = 0
    bad: tuple[BadSpot, ...] = ()


@attrs.frozen
class _Job:
    layer: StoredLayer
    kind: Kind
    number: int
    offset: int
    size: int


async def scrub(
    layers: Sequence[StoredLayer],
    progress: Callable[[ScrubProgress], None] | None,
    limiter: trio.CapacityLimiter,
    *,
    share: float,
    on_pieces: PiecesChanged | None,
) -> ScrubReport:
    """Look at everything of these layers."""
    return await _work(layers, _everything, progress, limiter, share=share, on_pieces=on_pieces)


async def settle(
    layers: Sequence[StoredLayer], limiter: trio.CapacityLimiter, *, share: float, on_pieces: PiecesChanged | None
) -> ScrubReport:
    """Look at what is in doubt. Pieces that turn out good are told of, for they can be served again."""
    return await _work(layers, _doubtful, None, limiter, share=share, on_pieces=on_pieces)


async def _work(
    layers: Sequence[StoredLayer],
    choose: Callable[[StoredLayer], list[_Job]],
    progress: Callable[[ScrubProgress], None] | None,
    limiter: trio.CapacityLimiter,
    *,
    share: float,
    on_pieces: PiecesChanged | None,
) -> ScrubReport:
    chosen = await trio.to_thread.run_sync(lambda: [(layer, choose(layer)) for layer in layers], limiter=limiter)
    total = sum(job.size for _layer, jobs in chosen for job in jobs)
    bad: list[BadSpot] = []
    chunks = pieces = done = 0
    for layer, jobs in chosen:
        for batch in _slices(jobs):
            started = time.monotonic()
            before = {job.number for job in batch if job.kind == "piece" and layer.has_piece(job.number)}
            try:
                found = await trio.to_thread.run_sync(_look_at, batch, limiter=limiter)
            except StoreError as exc:
                log.info("scrub_skipped_layer", layer=layer.digest, reason=str(exc))
                break
            for spot in found:
                log.warning(
                    "bad_bytes_found",
                    layer=spot.layer,
                    kind=spot.kind,
                    number=spot.number,
                    offset=spot.offset,
                    size_bytes=spot.size,
                )
            bad.extend(found)
            done += sum(job.size for job in batch)
            chunks += sum(1 for job in batch if job.kind == "chunk")
            pieces += sum(1 for job in batch if job.kind == "piece")
            _tell(layer, before, {job.number for job in batch if job.kind == "piece"}, on_pieces)
            if progress is not None:
                progress(ScrubProgress(layer.digest, done, total, len(bad)))
            await trio.sleep((time.monotonic() - started) * (1 / share - 1))
    return ScrubReport(len(chosen), chunks, pieces, done, tuple(bad))


def _tell(layer: StoredLayer, before: set[int], looked_at: set[int], on_pieces: PiecesChanged | None) -> None:
    if on_pieces is None:
        return
    now = {number for number in looked_at if layer.has_piece(number)}
    if now - before:
        on_pieces(layer.digest, sorted(now - before), True)
    if before - now:
        on_pieces(layer.digest, sorted(before - now), False)


def _slices(jobs: list[_Job]) -> Iterator[list[_Job]]:
    batch: list[_Job] = []
    size = 0
    for job in jobs:
        batch.append(job)
        size += job.size
        if size >= SLICE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _everything(layer: StoredLayer) -> list[_Job]:
    chunks = sorted({*layer.present_chunks(), *layer.doubtful_chunks()})
    pieces = sorted({*(number for number in range(len(layer.pieces)) if layer.has_piece(number)), *layer.doubtful_pieces()})
    image = _Job(layer, "image", 0, 0, layer.image_path.stat().st_size if layer.image_path.exists() else 0)
    return [image, *_jobs(layer, chunks, pieces)]


def _doubtful(layer: StoredLayer) -> list[_Job]:
    return _jobs(layer, layer.doubtful_chunks(), layer.doubtful_pieces())


def _jobs(layer: StoredLayer, chunks: Sequence[int], pieces: Sequence[int]) -> list[_Job]:
    jobs = [_Job(layer, "chunk", number, layer.chunks.volume_offset[number], layer.chunks.size[number]) for number in chunks]
    for number in pieces:
        start, stop = layer.pieces.extent(number)
        jobs.append(_Job(layer, "piece", number, start, stop - start))
    return jobs


def _look_at(batch: Sequence[_Job]) -> list[BadSpot]:
    bad = []
    is_blob_judged = False
    for job in batch:
        layer = job.layer
        if job.kind == "chunk":
            was_here = layer.has_chunk(job.number) or layer.is_doubtful(job.number)
            is_good = layer.verify_chunk(job.number) or not was_here  # gone meanwhile: evicted, not bad
        elif job.kind == "piece":
            if layer.codec == "whole" and is_blob_judged and layer.has_piece(job.number):
                continue  # a blob without random access was judged as a whole with its first piece
            was_here = layer.has_piece(job.number) or job.number in layer.doubtful_pieces()
            is_good = layer.verify_piece(job.number) or not was_here
            is_blob_judged = True
        else:
            is_good = layer.verify_image()
        if not is_good:
            bad.append(BadSpot(layer.digest, job.kind, job.number, job.offset, job.size))
    return bad
