"""Incremental parser of multipart/byteranges bodies (RFC 9110 section 14.6, RFC 2046 section 5.1).

Each part says with its Content-Range how long it is, so part bodies are passed on without looking for the boundary in them,
and without a copy when a network read lies inside one part. Everything else (preamble, part headers, number of parts) is
bounded. Pure: bytes in, (blob offset, bytes) out.
"""

import re
from enum import Enum, auto
from typing import Final

from agent.registry.ranges import RangeMismatch, parse_content_range

_MAX_HEADER_BYTES: Final = 8 << 10
_MAX_PREAMBLE_BYTES: Final = 64 << 10
_MAX_PARTS: Final = 4096
"""Four times the ranges that any reader of the field asks at once (1,024 in containers/image)."""

_BOUNDARY = re.compile(r';[ \t]*boundary[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)+)"|([^\s;,"]+))', re.IGNORECASE)


def boundary_of(content_type: str) -> bytes:
    """The boundary that a Content-Type names.

    Raises:
        RangeMismatch: there is none, or it is longer than RFC 2046 allows.
    """
    match = _BOUNDARY.search(content_type)
    if match is None:
        raise RangeMismatch(f"multipart answer without a boundary: {content_type!r:.100}")
    boundary = re.sub(r"\\(.)", r"\1", match[1]) if match[1] is not None else match[2]
    if len(boundary) > 70 or not boundary.isascii():
        raise RangeMismatch("multipart boundary is not valid")
    return boundary.encode()


class _State(Enum):
    PREAMBLE = auto()
    DELIMITER = auto()  # directly behind a part's body
    LINE_END = auto()  # directly behind a boundary
    HEADERS = auto()
    BODY = auto()
    DONE = auto()


class MultipartParser:
    """Feed it a body in any cut; `done` tells whether the closing boundary came."""

    def __init__(self, boundary: bytes, blob_size: int) -> None:
        self._delimiter = b"--" + boundary
        self._blob_size = blob_size
        self._state = _State.PREAMBLE
        self._held = b""
        self._offset = 0
        self._left = 0
        self._parts = 0

    @property
    def done(self) -> bool:
        """Has the closing boundary been seen?"""
        return self._state is _State.DONE

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take the next bytes of the body; gives the blob bytes among them as (blob offset, bytes).

        Raises:
            RangeMismatch: not a multipart/byteranges body of a blob of this size.
        """
        out: list[tuple[int, bytes]] = []
        if self._state is _State.BODY and len(data) <= self._left:  # the usual case, no copy
            self._body(data, out)
            return out
        data = self._held + data
        self._held = b""
        while data:
            if self._state is _State.BODY:
                part, data = data[: self._left], data[self._left :]
                self._body(part, out)
                continue
            rest = self._step(data)
            if rest is None:
                self._held = data
                break
            data = rest
        return out

    def _body(self, data: bytes, out: list[tuple[int, bytes]]) -> None:
        if data:
            out.append((self._offset, data))
        self._offset += len(data)
        self._left -= len(data)
        if self._left == 0:
            self._state = _State.DELIMITER

    def _step(self, data: bytes) -> bytes | None:
        """One step outside a body: what remains of `data`, or None if more is needed."""
        match self._state:
            case _State.PREAMBLE:
                return self._preamble(data)
            case _State.DELIMITER:
                expected = b"\r\n" + self._delimiter
                if not data.startswith(expected):
                    if expected.startswith(data):
                        return None
                    raise RangeMismatch("a part of the multipart answer does not end where its Content-Range says")
                self._state = _State.LINE_END
                return data[len(expected) :]
            case _State.LINE_END:
                return self._line_end(data)
            case _State.HEADERS:
                return self._headers(data)
            case _:
                return b""  # an epilogue means nothing

    def _preamble(self, data: bytes) -> bytes | None:
        found = 0 if data.startswith(self._delimiter) else data.find(b"\r\n" + self._delimiter)
        if found < 0:
            if len(data) > _MAX_PREAMBLE_BYTES:
                raise RangeMismatch("multipart answer without its boundary")
            return None
        self._state = _State.LINE_END
        return data[data.index(self._delimiter, found) + len(self._delimiter) :]

    def _line_end(self, data: bytes) -> bytes | None:
        if data.startswith(b"--"):
            self._state = _State.DONE
            return b""
        line, newline, rest = data.partition(b"\r\n")
        if newline:
            if line.strip(b" \t"):
                raise RangeMismatch("multipart boundary with text behind it")
            self._state = _State.HEADERS
            # so that a part without any header ends its headers at once and is refused
            return b"\r\n" + rest
        if len(data) > _MAX_HEADER_BYTES:
            raise RangeMismatch("multipart boundary line is too long")
        return None

    def _headers(self, data: bytes) -> bytes | None:
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            if len(data) > _MAX_HEADER_BYTES:
                raise RangeMismatch("headers of a multipart part are too long")
            return None
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise RangeMismatch(f"multipart answer with more than {_MAX_PARTS} parts")
        where = None
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"content-range":
                where = value.decode("latin-1")
        content_range = parse_content_range(where, self._blob_size)
        self._offset, self._left = content_range.start, content_range.stop - content_range.start
        self._state = _State.BODY
        return rest
