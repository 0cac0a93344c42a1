"""From bytes that arrive to chunks in the volume: the buffer between a connection and a worker thread, and what runs in it."""

import hashlib
from collections import deque
from collections.abc import Sequence
from typing import Final

import attrs
import structlog
import trio

from agent.errors import StoreError
from agent.formats.members import PieceDecoder
from agent.formats.model import FormatError
from agent.store import StoredLayer

log = structlog.get_logger()

BATCH_BYTES: Final = 1 << 20
"""Most bytes one worker-thread call takes: about 10 ms of inflate and hash, so that chunks are not held back longer."""
BUFFER_BYTES: Final = 4 << 20
"""Bytes that may wait for the worker; beyond it the connection is not read, which slows the sender."""


class Arrivals:
    """Bytes on their way from the connection to the worker thread, bounded by `BUFFER_BYTES`. One task puts, one takes.

    TLS hands out 16 KiB at a time, so this is called thousands of times a second: a `put` with room does not yield.
    """

    def __init__(self) -> None:
        self._blocks: deque[tuple[int, bytes]] = deque()
        self._size = 0
        self._ended = False
        self._arrived = trio.Event()
        self._taken = trio.Event()

    def put(self, offset: int, block: bytes) -> bool:
        """Add a block; False when it is time for `wait_room`."""
        self._blocks.append((offset, block))
        self._size += len(block)
        self._arrived.set()
        return self._size < BUFFER_BYTES

    async def wait_room(self) -> None:
        while self._size >= BUFFER_BYTES:
            self._taken = trio.Event()
            await self._taken.wait()

    def end(self) -> None:
        self._ended = True
        self._arrived.set()

    async def take(self, least: int) -> list[tuple[int, bytes]]:
        """What has arrived, at most `BATCH_BYTES`, once it is `least` bytes or the end; empty at the end."""
        while self._size < least and not self._ended:
            self._arrived = trio.Event()
            await self._arrived.wait()
        batch, size = [], 0
        while self._blocks and size < BATCH_BYTES:
            batch.append(self._blocks.popleft())
            size += len(batch[-1][1])
        self._size -= size
        self._taken.set()
        return batch


class Absorber:
    """Takes the bytes of a run as they arrive; runs in worker threads, one call at a time.

    Three copies of a byte are made: the block as it came goes to the blob file (write), the decoder's output is hashed in
    place and goes to the volume (write). Of a piece with a digest of its own nothing is decoded before all of it is here and
    right; its blocks wait in memory until then.
    """

    def __init__(
        self, layer: StoredLayer, first_chunk: int, stop_chunk: int, start: int, first_piece: int, *, write_blob: bool = True
    ) -> None:
        self._layer = layer
        self._decoder = PieceDecoder(layer.chunks, layer.codec, first_chunk, stop_chunk, start, layer.members)
        self._waiting: list[bytes] = []
        self._whole_from = -1
        """Blob offset from which blocks have been kept for the piece that is arriving; -1 if none are."""
        self._next_chunk = first_chunk
        self._stop_chunk = stop_chunk
        self._position = start
        self._piece = first_piece
        self._write_blob = write_blob
        self._done: list[int] = []
        self._held: list[int] = []

    def take_done(self) -> tuple[list[int], list[int]]:
        """Chunks that are present and pieces that are held since the last call; also of an `absorb` that raised."""
        done, held = self._done, self._held
        self._done, self._held = [], []
        return done, held

    def absorb(self, batch: Sequence[tuple[int, bytes]]) -> None:
        """Decode, verify, write; `take_done` tells what came of it.

        Raises:
            FormatError: the bytes are not what the index promises; nothing of the bad chunk was written to the volume.
            StoreError: the disk refused.
        """
        layer, starts = self._layer, self._layer.pieces.starts
        for offset, block in batch:
            if offset != self._position:
                raise FormatError(f"bytes from offset {offset} where {self._position} was due")
            if self._write_blob:
                layer.write_blob(offset, block)
            view = memoryview(block)
            while view:
                # A block may end one piece and begin the next, and each is judged by itself.
                part = view[: starts[self._piece + 1] - self._position] if self._piece < len(layer.pieces) else view
                view = view[len(part) :]
                self._take(part)

    def _take(self, part: memoryview) -> None:
        """Bytes of the piece that is arriving."""
        layer, piece, position = self._layer, self._piece, self._position
        self._position += len(part)
        if piece >= len(layer.pieces):
            self._decode(part)
            return
        start, stop = layer.pieces.extent(piece)
        is_last = self._position >= stop
        digest = layer.pieces.digest(piece)
        if digest:
            if not self._waiting:
                self._whole_from = position
            self._waiting.append(bytes(part))
            if not is_last:
                return
            whole = b"".join(self._waiting)
            self._waiting = []
            # What came before the part that this absorber was given lies in the blob file.
            before = layer.peek_blob(start, self._whole_from) if self._whole_from > start else b""
            hasher = hashlib.sha256(before)
            hasher.update(whole)
            if hasher.digest() != digest:
                raise FormatError(f"piece {piece} does not match its digest")
            self._decoder.is_vouched = True
            self._decode(memoryview(whole))
            self._decoder.is_vouched = False
        else:
            self._decode(part)
        if is_last:
            if self._next_chunk < layer.pieces.first_chunk[piece + 1]:
                raise FormatError(f"piece {piece} ended before its last chunk did")
            layer.mark_piece(piece)
            self._held.append(piece)
            self._piece += 1

    def _decode(self, data: memoryview) -> None:
        for number, chunk in self._decoder.feed(data):
            self._layer.write_chunk(number, chunk)
            self._done.append(number)
            self._next_chunk = number + 1

    def resume_point(self) -> tuple[int, int]:
        """Blob offset at which to go on, and the first chunk that has not arrived; (-1, 0) if there is none.

        The blob file has everything before that offset, also what lies between two members.
        """
        if self._next_chunk >= self._stop_chunk:
            return -1, 0
        reached = self._whole_from if self._waiting else self._position
        return min(reached, self._layer.chunks.blob_offset[self._next_chunk]), self._next_chunk


@attrs.frozen
class Adopted:
    """What the blob file gave of a piece: chunks, and where to go on (as `Absorber.resume_point`)."""

    chunks: list[int]
    resume: tuple[int, int]


def adopt_from_disk(layer: StoredLayer, piece: int) -> Adopted:
    """Decode what the blob file has of a piece: all of it if it is held but was dropped from the volume, or as much from its
    beginning as an agent had received when it was killed. In a worker thread; marks the piece if it is whole."""
    start, stop = layer.pieces.extent(piece)
    was_held = layer.has_piece(piece)
    chunks = layer.pieces.chunks_of(piece)
    if was_held or layer.blob_has_data(start, stop):
        absorber = Absorber(layer, chunks.start, chunks.stop, start, piece, write_blob=False)
        try:
            absorber.absorb([(start, layer.peek_blob(start, stop))])
            return Adopted(absorber.take_done()[0], absorber.resume_point())
        except (FormatError, StoreError) as exc:
            if was_held:
                log.warning("held_piece_was_bad", layer=layer.digest, piece=piece, reason=str(exc))
                layer.forget_piece(piece)
    absorber = Absorber(layer, chunks.start, chunks.stop, start, piece, write_blob=False)
    at = start
    try:
        for number in chunks:
            end = layer.chunks.blob_offset[number] + layer.chunks.blob_length[number]
            if end > at:
                if not layer.blob_has_data(at, end):
                    break
                absorber.absorb([(at, layer.peek_blob(at, end))])
                at = end
    except (FormatError, StoreError) as exc:  # the member that was arriving
        log.debug("leftover_ends", layer=layer.digest, piece=piece, reason=str(exc))
    return Adopted(absorber.take_done()[0], absorber.resume_point())
