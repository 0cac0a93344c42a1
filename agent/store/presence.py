"""Which chunks of a volume are here, and which of its 4 KiB blocks fsmount may therefore serve.

Three maps in shared file memory. `chunks`: the bytes of the chunk were verified and written. `doubt`: they were once, but a
power cut may have taken them; nobody is served until they are hashed again. `blocks`: what fsmount looks at. A block is
present when no missing chunk has a byte in it: blocks of a file's holes and the tail behind a file's last byte need nothing,
and a block shared by neighbouring chunks needs all of them.

A process may be killed between any two steps, so their order matters:

- adding: (bytes written) -> doubt bit cleared -> chunk bit set -> block bits set. Cut short, blocks are missing;
  `rebuild_blocks` at the next start adds them.
- dropping: chunk bit cleared -> block bits cleared, generation raised -> (bytes punched). Cut short, blocks of bytes that are
  still right stay set until `rebuild_blocks`.
- doubting: doubt bit set -> chunk bit cleared -> block bits cleared. Cut short, both are set: doubt wins.

Chunks that share a place in the volume (files with equal content) share one bit, that of the first of them.
"""

import threading
from array import array
from collections.abc import Iterator

from agent.formats.model import BLOCK_SIZE, ChunkTable, FormatError
from fsmount.bitmap import Bitmap


def blocks_of(volume_size: int) -> int:
    """Number of blocks that hold a volume."""
    return -(-volume_size // BLOCK_SIZE)


def find_firsts(chunks: ChunkTable, volume_size: int) -> "array[int] | None":
    """For every chunk the number of the first chunk at its place; None if no two share one.

    Raises:
        FormatError: chunks overlap, are empty, differ at one place, or lie outside the volume.
    """
    sizes = chunks.size
    firsts = array("I", range(len(chunks)))
    has_duplicates = False
    first = top = 0
    for number, offset in chunks.by_place():
        if offset >= top:
            size = sizes[number]
            if size == 0 or offset + size > volume_size:
                raise FormatError(f"chunk {number} lies at {offset}+{size} of a volume of {volume_size} bytes")
            first, top = number, offset + size
            continue
        if top - sizes[first] != offset or sizes[first] != sizes[number] or chunks.digest(first) != chunks.digest(number):
            raise FormatError(f"chunk {number} overlaps another in the volume without being equal to it")
        firsts[number] = first
        has_duplicates = True
    return firsts if has_duplicates else None


class Presence:
    """The three maps of one volume. Tests need no lock and no thread; changes are safe from any thread."""

    def __init__(self, chunks: ChunkTable, volume_size: int, *, chunk_map: Bitmap, doubt_map: Bitmap, block_map: Bitmap) -> None:
        self._table = chunks
        self._firsts = find_firsts(chunks, volume_size)
        self._places = len(chunks) if self._firsts is None else sum(1 for at, first in enumerate(self._firsts) if at == first)
        self._chunks, self._doubt, self.blocks = chunk_map, doubt_map, block_map
        self._lock = threading.Lock()
        self._doubts = doubt_map.count()
        if len(chunks):
            chunks.neighbours(0)  # builds the table's search columns now, not on the event loop

    def first(self, number: int) -> int:
        """The chunk whose bit stands for this one."""
        return number if self._firsts is None else self._firsts[number]

    def has(self, number: int) -> bool:
        """Whether the chunk's verified bytes are in the volume."""
        return self._chunks.test(self.first(number))

    def is_doubtful(self, number: int) -> bool:
        """Whether the chunk was here before an unclean boot and has not been hashed since."""
        return self._doubts > 0 and self._doubt.test(self.first(number))

    def doubtful(self) -> list[int]:
        """All chunks in doubt."""
        return list(_set_bits(self._doubt)) if self._doubts > 0 else []

    def present(self) -> list[int]:
        """All chunks that are here, each place once."""
        return list(_set_bits(self._chunks))

    def missing(self, start: int, stop: int) -> list[int]:
        """Chunks with bytes in volume range [start, stop) that are not here, each place once, ascending."""
        test = self._chunks.test
        return [number for number in self._table.overlapping(start, stop) if not test(number)]

    @property
    def is_complete(self) -> bool:
        """Whether all chunks are here."""
        return self._chunks.count() >= self._places

    def add(self, number: int) -> None:
        """Note that the chunk's verified bytes are in the volume."""
        number = self.first(number)
        with self._lock:
            self._clear_doubt(number)
            self._chunks.set(number, number + 1)
            self._show(number)

    def drop(self, number: int) -> None:
        """Note that the chunk is not to be used any more; before its bytes go."""
        number = self.first(number)
        with self._lock:
            self._clear_doubt(number)
            self._chunks.clear(number, number + 1)
            start, stop = self._extent(number)
            self.blocks.clear(start, stop)

    def drop_all(self) -> None:
        """Note that the whole volume is not to be used any more; before its bytes go."""
        with self._lock:
            self._doubt.clear(0, self._doubt.bits)
            self._doubts = 0
            self._chunks.clear(0, self._chunks.bits)
            self._rebuild()

    def doubt_all(self, also: bytes = b"") -> int:
        """Put in doubt whatever is here, and the chunks of `also` (a bitmap); gives how many are in doubt now."""
        with self._lock:
            self._doubt.load(self._chunks.to_bytes())
            if also:
                self._doubt.load(also)
            self._doubts = self._doubt.count()
            self._chunks.clear(0, self._chunks.bits)
            self._rebuild()
            return self._doubts

    def rebuild_blocks(self) -> None:
        """Bring the block map in line with the chunk map, after a process may have died between the two."""
        with self._lock:
            for number in list(_set_bits(self._doubt)) if self._doubts else ():
                if self._chunks.test(number):
                    self._chunks.clear(number, number + 1)
            self._rebuild()

    def snapshot(self) -> bytes:
        """The chunks that are here or in doubt, as a bitmap; for a checkpoint."""
        with self._lock:
            present = int.from_bytes(self._chunks.to_bytes(), "little")
            if self._doubts:
                present |= int.from_bytes(self._doubt.to_bytes(), "little")
            return present.to_bytes((self._chunks.bits + 7) // 8, "little")

    def close(self) -> None:
        """Unmap; for the end of the store."""
        for bitmap in (self._chunks, self._doubt, self.blocks):
            bitmap.close()

    def sync(self) -> None:
        """Write the maps to the disk."""
        for bitmap in (self._chunks, self._doubt, self.blocks):
            bitmap.sync()

    def _extent(self, number: int) -> tuple[int, int]:
        offset = self._table.volume_offset[number]
        return offset // BLOCK_SIZE, blocks_of(offset + self._table.size[number])

    def _clear_doubt(self, number: int) -> None:
        if self._doubts and self._doubt.test(number):
            self._doubt.clear(number, number + 1)
            self._doubts -= 1

    def _show(self, number: int) -> None:
        """Set the bits of the blocks that this chunk completes."""
        start, stop = self._extent(number)
        before, behind = self._table.neighbours(number)
        if before >= 0 and self._extent(before)[1] > start and not self._is_block_whole(start, before):
            start += 1
        if start < stop and behind >= 0 and self._extent(behind)[0] < stop and not self._is_block_whole(stop - 1, behind):
            stop -= 1
        if start < stop:
            self.blocks.set(start, stop)

    def _is_block_whole(self, block: int, likely_missing: int) -> bool:
        # The neighbour first: of thousands of tiny chunks in one block (a hostile image) the next to come is missing.
        if not self._chunks.test(likely_missing):
            return False
        overlapping = self._table.overlapping(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        return all(self._chunks.test(number) for number in overlapping)

    def _rebuild(self) -> None:
        blocks, at = self.blocks, 0
        for start, stop in self._missing_blocks():
            if not blocks.all_set(at, start):
                blocks.set(at, start)
            if blocks.first_set(start, stop) < stop:
                blocks.clear(start, stop)
            at = stop
        if not blocks.all_set(at, blocks.bits):
            blocks.set(at, blocks.bits)

    def _missing_blocks(self) -> Iterator[tuple[int, int]]:
        """Runs of blocks with a byte of a missing chunk, ascending and apart from one another."""
        run_start = run_stop = 0
        for number in self._table.overlapping(0, self.blocks.bits * BLOCK_SIZE):
            if self._chunks.test(number):
                continue
            start, stop = self._extent(number)
            if start > run_stop:
                if run_start < run_stop:
                    yield run_start, run_stop
                run_start = start
            run_stop = stop
        if run_start < run_stop:
            yield run_start, run_stop


def _set_bits(bitmap: Bitmap) -> Iterator[int]:
    for at, byte in enumerate(bitmap.to_bytes()):
        if byte:
            for bit in range(8):
                if byte >> bit & 1 and at * 8 + bit < bitmap.bits:
                    yield at * 8 + bit
