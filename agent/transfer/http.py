"""The data plane's HTTP dialect, pure: paths, ranges, the headers between peers.

    GET /v1/blobs/<digest>      Range: bytes=<first>-<last>
        206  Content-Range: bytes <first>-<last>/<size>     the bytes, exactly as the registry has them
        404  nothing of this blob is here          416  the range is not (wholly) held here
        503  Retry-After: <seconds>, Shoal-Peers: <peer ids>     all upload slots are taken; these have been served lately
    GET /v1/ping                204

A range ends where the blob ends at the latest. Suffix ranges and several ranges in one request are not spoken.
"""

import re
from typing import Final

import attrs

from agent.formats.model import Digest

BLOBS: Final = "/v1/blobs/"
MAX_HEAD_BYTES: Final = 8 << 10
"""Longest request or response head: both ends write a few hundred bytes."""
PING: Final = "/v1/ping"
PEERS_HEADER: Final = "shoal-peers"

_PATH: Final = re.compile(r"/v1/blobs/(sha256:[0-9a-f]{64})\Z")
_RANGE: Final = re.compile(rb"bytes=([0-9]{1,19})-([0-9]{0,19})\Z")
_STATUS: Final = re.compile(rb"HTTP/1\.1 ([1-9][0-9][0-9])(?: [^\r\n]*)?\Z")
_LENGTH: Final = re.compile(r"[0-9]{1,19}\Z")
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})\Z")


@attrs.frozen
class Request:
    """A well-formed request for blob bytes [start, stop); `stop` is None for "to the end"."""

    blob: Digest
    start: int
    stop: int | None


def parse_request(path: str, headers: list[tuple[bytes, bytes]]) -> Request | int:
    """Read a request for a blob; an HTTP status if it is none."""
    match = _PATH.match(path)
    if match is None:
        return 404
    ranges = [value for name, value in headers if name.lower() == b"range"]
    if not ranges:
        return Request(Digest(match[1]), 0, None)
    parsed = _RANGE.match(ranges[0]) if len(ranges) == 1 else None
    if parsed is None:
        return 400
    start, last = int(parsed[1]), parsed[2]
    if last and int(last) < start:
        return 400
    return Request(Digest(match[1]), start, int(last) + 1 if last else None)


def range_header(start: int, stop: int) -> str:
    """The Range header for [start, stop)."""
    return f"bytes={start}-{stop - 1}"


@attrs.frozen
class Answer:
    """The head of a response; header names are in lower case. `length` is that of the body."""

    status: int
    headers: dict[str, str]
    length: int


def request_head(path: str, host: str, extent: tuple[int, int] | None = None) -> bytes:
    """A GET request."""
    wanted = f"Range: {range_header(*extent)}\r\n" if extent else ""
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{wanted}\r\n".encode("ascii")


def parse_answer(head: bytes) -> Answer | None:
    """Read a response head without its empty line; None if it is none that a data server of ours sends: another version,
    a body without a length, a header twice or folded."""
    lines = head.split(b"\r\n")
    status = _STATUS.match(lines[0])
    if status is None:
        return None
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        key = name.decode("latin-1").lower()
        if not colon or not key or key != key.strip() or key in headers:
            return None
        headers[key] = value.strip().decode("latin-1")
    number = int(status[1])
    length = "0" if number == 204 else headers.get("content-length", "")
    if "transfer-encoding" in headers or not _LENGTH.match(length) or number < 200:
        return None
    return Answer(number, headers, int(length))


def content_range(start: int, stop: int, size: int) -> bytes:
    """The Content-Range header for [start, stop) of a blob."""
    return f"bytes {start}-{stop - 1}/{size}".encode()


def parse_content_range(text: str) -> tuple[int, int, int] | None:
    """(start, stop, size) of a Content-Range header; None if it is not one."""
    match = _CONTENT_RANGE.match(text)
    if match is None:
        return None
    start, stop, size = int(match[1]), int(match[2]) + 1, int(match[3])
    return (start, stop, size) if start < stop <= size else None


def join_ranges(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes in ascending order, with touching and overlapping ranges joined; empty ones are dropped."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
