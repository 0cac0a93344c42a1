"""Byte ranges of a blob: what was asked, what an answer says it is, and what is still missing (RFC 9110 section 14)."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

import attrs

_CONTENT_RANGE = re.compile(r"bytes[ \t]+(\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z")

BLOCK_BYTES: Final = 64 << 10
"""Largest piece of data handed on at once, so that the event loop stays responsive (measured: conventions, 64 KiB writes)."""


class RangeMismatch(Exception):
    """An answer is not the range that was asked, or does not say which range it is."""


def merge(ranges: Sequence[tuple[int, int]], blob_size: int) -> list[tuple[int, int]]:
    """Half-open ranges, ascending, touching ones joined, empty ones dropped.

    Raises:
        ValueError: a range is not inside the blob.
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if not 0 <= start <= stop <= blob_size:
            raise ValueError(f"range [{start}, {stop}) is not inside a blob of {blob_size} bytes")
        if start == stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def bridge(ranges: Sequence[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Join ranges (ascending) that are at most `gap` bytes apart."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and start - joined[-1][1] <= gap:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def range_header(ranges: Sequence[tuple[int, int]]) -> str:
    """The value of a Range header."""
    return "bytes=" + ",".join(f"{start}-{stop - 1}" for start, stop in ranges)


@attrs.frozen
class ContentRange:
    """Half-open range that a body holds, and the blob's size if the server names it."""

    start: int
    stop: int
    total: int | None


def parse_content_range(text: str | None, blob_size: int) -> ContentRange:
    """Read a Content-Range header of a 206 answer or of a part.

    Raises:
        RangeMismatch: it is missing or malformed, or does not fit a blob of this size.
    """
    match = _CONTENT_RANGE.match(text.strip()) if text else None
    if match is None:
        raise RangeMismatch(f"Content-Range is {text!r:.100}")
    start, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if start > last or last >= blob_size or (total is not None and total != blob_size):
        raise RangeMismatch(f"Content-Range {text!r:.100} does not fit a blob of {blob_size} bytes")
    return ContentRange(start, last + 1, total)


class WantedRanges:
    """What is still missing of the asked ranges. Bytes are handed on once, whatever a server sends."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        """`ranges` as `merge` gives them."""
        self._starts = [start for start, _ in ranges]
        self._stops = [stop for _, stop in ranges]

    def __bool__(self) -> bool:
        return bool(self._starts)

    def missing(self) -> list[tuple[int, int]]:
        """The ranges without what was taken, ascending."""
        return list(zip(self._starts, self._stops, strict=True))

    @property
    def stop(self) -> int:
        """Behind the last missing byte; 0 if nothing is missing."""
        return self._stops[-1] if self._stops else 0

    def take(self, offset: int, data: bytes) -> Sequence[tuple[int, bytes]]:
        """What is wanted of `data`, which lies at `offset`, as (offset, bytes). No copy if all or nothing of it is wanted."""
        starts, stops = self._starts, self._stops
        end = offset + len(data)
        at = bisect_right(stops, offset)
        if at == len(stops) or starts[at] >= end or offset == end:
            return ()
        if starts[at] <= offset and end <= stops[at]:
            self._remove(at, offset, end)
            return ((offset, data),)
        taken, view = [], memoryview(data)
        while at < len(stops) and starts[at] < end:
            start, stop = max(starts[at], offset), min(stops[at], end)
            taken.append((start, bytes(view[start - offset : stop - offset])))
            if self._remove(at, start, stop):
                at += 1
        return taken

    def _remove(self, at: int, start: int, stop: int) -> bool:
        """Take [start, stop) out of range number `at`; is something of that range's beginning left at the same number?"""
        head, tail = start > self._starts[at], stop < self._stops[at]
        if head and tail:
            self._starts.insert(at + 1, stop)
            self._stops.insert(at, start)
        elif head:
            self._stops[at] = start
        elif tail:
            self._starts[at] = stop
        else:
            del self._starts[at], self._stops[at]
        return head
