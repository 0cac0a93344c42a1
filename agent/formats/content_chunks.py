"""Cutting a file into chunks where its content says so, as the writer of containers/storage does (formats.md section 2).

A rolling sum over 64 bytes, that of bup and Perkeep, ends a chunk where its low 16 bits are ones: every 64 KiB on average. Runs of
1 KiB of zeros and more are chunks of their own, holes. As the sums are the same, files that podman has pushed in parts that
are equal to ours have equal chunks. Unlike there a chunk has a least and a most size: contents that repeat themselves can end a
chunk at every other byte, or at none.

With b the last 64 bytes, youngest first, the sum is 64 * 63 * 31 + 1 b[0] + 2 b[1] + … + 64 b[63]. Python takes 100 ns for a byte
of that; so it is made for all places of a block at once, as one large integer with a lane for each byte. From the plain sum A
and the weighted sum B of a window of w bytes come those of 2 w: A' = A + A>>w and B' = B + (B + w A)>>w, where >>w is w lanes on.
Lanes of 16 bits hold the sums up to w = 16; then even and odd ones go on apart, in lanes of 32 bits. Measured: 45 MB/s.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

import attrs

HOLE_LEAST: Final = 1 << 10
CHUNK_LEAST: Final = 1 << 10
CHUNK_MOST: Final = 16 << 20

_WINDOW: Final = 64
_BLOCK: Final = 32 << 10
"""Bytes summed at once: the integers of 256 KiB no longer fit into a core's cache, which halves the speed."""
_HOLE: Final = bytes(HOLE_LEAST)
_NO_ZERO: Final = re.compile(rb"[^\0]")
_LOW_HALVES: Final = int.from_bytes(b"\xff\xff\0\0" * (_BLOCK // 2 + 2 * _WINDOW), "little")
_TARGET: Final = ((0xFFFF - _WINDOW * (_WINDOW - 1) * 31) & 0xFFFF).to_bytes(2, "little")


@attrs.frozen
class ContentChunk:
    """A chunk of a file; a hole has no `data`."""

    size: int
    data: bytes = attrs.field(repr=False)
    is_hole: bool = False


class RollingSum:
    """Finds the places where the sum ends a chunk."""

    def __init__(self) -> None:
        self._before = bytes(_WINDOW - 1)
        self._position = 0

    def feed(self, block: bytes) -> list[int]:
        """The ends of chunks that the next bytes of the file bring, as offsets in the file."""
        ends: list[int] = []
        for at in range(0, len(block), _BLOCK):
            part = block[at : at + _BLOCK]
            data = self._before + part
            if data.count(0) < len(data):  # sparse files are read fast
                first = self._position - len(self._before) + 1
                ends += (first + lane for lane in _find_lanes(data) if lane >= len(self._before))
            self._before = data[-(_WINDOW - 1) :]
            self._position += len(part)
        return ends


def _find_lanes(data: bytes) -> list[int]:
    """Offsets in `data` at which the sum of what has come is the one that ends a chunk."""
    count = len(data)
    raw = bytearray(2 * count)
    raw[::2] = data
    plain = weighted = int.from_bytes(raw, "little")
    for step in range(4):
        on = 16 << step
        weighted += (weighted + (plain << step)) << on
        plain += plain << on
    even = _widen_twice(plain & _LOW_HALVES, weighted & _LOW_HALVES)
    odd = _widen_twice(plain >> 16 & _LOW_HALVES, weighted >> 16 & _LOW_HALVES)
    sums = (even & _LOW_HALVES | (odd & _LOW_HALVES) << 16).to_bytes(2 * (count + 2 * _WINDOW), "little")
    found: list[int] = []
    at = sums.find(_TARGET, 0, 2 * count)
    while at >= 0:
        if not at % 2:
            found.append(at // 2)
        at = sums.find(_TARGET, at + 1, 2 * count)
    return found


def _widen_twice(plain: int, weighted: int) -> int:
    """The weighted sums of 64 bytes from both sums of 16, of which every second is here, in lanes of 32 bits."""
    on = 32 * 16 // 2
    weighted += (weighted + (plain << 4)) << on
    plain += plain << on
    return weighted + ((weighted + (plain << 5)) << 2 * on)


def cut_chunks(blocks: Iterable[bytes]) -> Iterator[ContentChunk]:
    """The chunks of a file that is given in blocks, in order and without gaps. Holds one chunk and a few blocks."""
    ends: deque[int] = deque()
    held = bytearray()
    start = at = hole = 0  # of the chunk that is open; hole: its size if it is one
    for is_zeros, data, size in _split_zeros(_sum_up(blocks, ends)):
        if is_zeros:
            if held:
                yield ContentChunk(len(held), bytes(held))
                held.clear()
            hole += size
            while hole > CHUNK_MOST:
                yield ContentChunk(CHUNK_MOST, b"", is_hole=True)
                hole -= CHUNK_MOST
            at += size
            start = at
            continue
        if hole:
            yield ContentChunk(hole, b"", is_hole=True)
            hole = 0
        stop = at + size
        taken = 0
        while ends and ends[0] <= stop:
            end = ends.popleft()
            if end > at and end - start >= CHUNK_LEAST:
                held += data[taken : end - at]
                taken = end - at
                yield from _cut_most(held, is_end=True)
                start = end
        held += data[taken:]
        yield from _cut_most(held, is_end=False)
        at = stop
        start = at - len(held)
    yield from _cut_most(held, is_end=True)
    if hole:
        yield ContentChunk(hole, b"", is_hole=True)


def _cut_most(held: bytearray, *, is_end: bool) -> Iterator[ContentChunk]:
    """Chunks of the most that there may be, and at the end what is left."""
    while len(held) > CHUNK_MOST or (is_end and held):
        yield ContentChunk(min(len(held), CHUNK_MOST), bytes(held[:CHUNK_MOST]))
        del held[:CHUNK_MOST]


def _sum_up(blocks: Iterable[bytes], ends: "deque[int]") -> Iterator[bytes]:
    rolling = RollingSum()
    for block in blocks:
        ends += rolling.feed(block)
        yield block


def _split_zeros(blocks: Iterable[bytes]) -> Iterator[tuple[bool, bytes, int]]:
    """(is zeros, data, size): runs of zeros that are long enough to be holes, in parts, and what is between them."""
    zeros, is_hole = 0, False
    for block in blocks:
        at = 0
        if zeros or is_hole:
            found = _NO_ZERO.search(block)
            at = found.start() if found else len(block)
            zeros += at
            if is_hole or zeros >= HOLE_LEAST:
                if zeros:
                    yield True, b"", zeros
                zeros, is_hole = 0, found is None
            elif found:
                yield False, bytes(zeros), zeros
                zeros = 0
        while at < len(block):
            hole = block.find(_HOLE, at)
            if hole < 0:
                end = block[max(at, len(block) - HOLE_LEAST) :]
                zeros = len(end) - len(end.rstrip(b"\0"))
                if stop := len(block) - zeros - at:
                    yield False, block[at : at + stop], stop
                break
            if hole > at:
                yield False, block[at:hole], hole - at
            found = _NO_ZERO.search(block, hole)
            at = found.start() if found else len(block)
            yield True, b"", at - hole
            is_hole = found is None
    if zeros:
        yield False, bytes(zeros), zeros
