"""Streaming a blob once and learning where it can be entered again: checkpoints of gzip and of uncompressed blobs.

Deflate can be resumed at the border of two blocks, given 32 KiB of the output before it (formats.md 5.1). Where blocks begin only zlib's
own interface says (`Z_BLOCK`, `data_type`), which Python's module hides: it is called through ctypes, which releases the GIL.

The checkpoints are a function of the blob alone, whatever the cut of what is fed. zlib stops at borders only where one is due, so that
a stream of tiny blocks costs no call for each; whether one is due is asked at multiples of `_QUANTUM` in the blob, where zlib
has used all input and given all output, a state that does not depend on the way there.
"""

import ctypes
from collections.abc import Generator, Iterator
from enum import Enum, auto
from functools import lru_cache
from typing import Any, Final, Protocol

import attrs
from isal import isal_zlib

from agent.formats.inflate import Inflater, RawInflater, open_inflater
from agent.formats.model import FormatError

SPAN_BYTES: Final = 1 << 20
"""Blob bytes from one checkpoint to the next, or somewhat more: what a piece has."""
SPAN_OUTPUT: Final = 4 << 20
"""Output from one checkpoint to the next, or somewhat more: it is inflated in vain before a chunk at the end of a span."""
MAX_SPAN_BYTES: Final = 16 << 20
MAX_SPAN_OUTPUT: Final = 32 << 20
"""A blob in which blocks are so large that a span grows beyond this is not worth entering."""
MAX_CHECKPOINTS: Final = 2048
"""64 MiB of windows. Spans are doubled behind the 1024th and then after every 256: enough for 6 GiB."""

_QUANTUM: Final = 8 << 10
"""At most 8 MiB of output, by which a checkpoint is late."""
_OUTPUT: Final = 256 << 10
_WINDOW: Final = 32 << 10
_MAX_HEADER: Final = 256 << 10
"""Of a gzip header: the extra field has 64 KiB at most, names and comments are paths."""

_NO_FLUSH, _BLOCK = 0, 5
_OK, _STREAM_END, _BUF_ERROR = 0, 1, -5
_AT_BORDER, _IN_LAST = 128, 64


@attrs.frozen
class Checkpoint:
    """A place where a blob can be entered: `in_offset` is the first blob byte needed, `out_offset` the first byte of output.

    The `bits` (0 to 7) high bits of byte `prime` come before `in_offset`; `window` is the output before, 32 KiB at most.
    """

    in_offset: int
    out_offset: int
    bits: int = 0
    prime: int = 0
    window: bytes = b""


class SeekableInflater(Inflater, Protocol):
    """An inflater that learns checkpoints: those in `checkpoints` (who takes them clears the list) come before the part that is
    given next, and no part crosses one. `is_seekable` turns false, for good, when there is no use in them."""

    checkpoints: list[Checkpoint]
    is_seekable: bool


class SeekableRaw(RawInflater):
    """Gives what it gets, with a checkpoint at every multiple of `SPAN_BYTES`."""

    def __init__(self) -> None:
        self.checkpoints: list[Checkpoint] = []
        self.is_seekable = True
        self._at = 0

    def feed(self, data: memoryview) -> Iterator[bytes]:
        """The output of the next input, in parts."""
        while data:
            if self._at % SPAN_BYTES == 0:
                self.checkpoints.append(Checkpoint(self._at, self._at))
            part = data[: SPAN_BYTES - self._at % SPAN_BYTES]
            data = data[len(part) :]
            self._at += len(part)
            yield bytes(part)


class _ZStream(ctypes.Structure):
    """`z_stream` of zlib.h."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


@lru_cache(maxsize=1)
def load_zlib() -> Any:
    """The system's zlib; None where there is none, or one that is too old."""
    try:
        library = ctypes.CDLL("libz.so.1")
        stream = ctypes.POINTER(_ZStream)
        library.zlibVersion.restype = ctypes.c_char_p
        library.inflateInit2_.argtypes = [stream, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        library.inflate.argtypes = [stream, ctypes.c_int]
        library.inflateReset.argtypes = [stream]
        library.inflateEnd.argtypes = [stream]
        library.inflateGetDictionary.argtypes = [stream, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint)]
    except (OSError, AttributeError):
        return None
    return library


def open_seekable(compression: str) -> Inflater:
    """A `SeekableInflater` for what `inflate.sniff` found; an ordinary inflater where nothing can be entered in the middle."""
    if compression == "none":
        return SeekableRaw()
    if compression == "gzip" and load_zlib() is not None:
        return SeekableGzip()
    return open_inflater(compression)


class _Part(Enum):
    HEADER = auto()
    BODY = auto()
    TRAILER = auto()
    PADDING = auto()


class SeekableGzip:
    """gzip members one after another, zeros behind the last one are padding: as `inflate.GzipInflater`, with checkpoints.

    The first one is the first byte of deflate data; others follow when a span has passed, at a border of blocks (never before the
    last block of a member, from which it is not far to the next) or where a member's deflate data begin.
    """

    def __init__(self) -> None:
        self.checkpoints: list[Checkpoint] = []
        self.is_seekable = True
        self._zlib = load_zlib()
        self._stream = _ZStream()
        self._is_open = False
        if self._zlib is None or self._zlib.inflateInit2_(
            ctypes.byref(self._stream), -15, self._zlib.zlibVersion(), ctypes.sizeof(_ZStream)
        ):
            raise FormatError("zlib cannot be used")
        self._is_open = True
        self._buffer = ctypes.create_string_buffer(_OUTPUT)
        self._view = memoryview(self._buffer).cast("B")
        self._rewind()
        self._in = self._out = 0
        self._last_in = self._last_out = 0
        self._found = 0
        self._next_quantum = 0
        self._is_due = False
        self._last_byte = 0
        self._crc = self._size = 0
        self._held = bytearray()
        self._part = _Part.HEADER
        self._has_ended = False

    def __del__(self) -> None:
        if self._is_open:
            self._is_open = False
            self._zlib.inflateEnd(ctypes.byref(self._stream))

    def feed(self, data: memoryview) -> Iterator[bytes]:
        """The output of the next input, in parts."""
        block, at = bytes(data), 0
        while at < len(block):
            if self._part is _Part.BODY:
                at = yield from self._body(block, at)
            elif self._part is _Part.HEADER:
                at = self._header(block, at)
            elif self._part is _Part.TRAILER:
                at = self._trailer(block, at)
            elif block.count(0, at) != len(block) - at:
                raise FormatError("bytes that are no gzip behind the last member")
            else:
                at = len(block)
        self._in += len(block)

    def finish(self) -> None:
        """Raises FormatError in the middle of a member."""
        if self._held or not self._has_ended or self._part not in (_Part.HEADER, _Part.PADDING):
            raise FormatError("the gzip of the layer is cut short")

    # --- parts of a member: each takes input from `at` on and gives the place up to which it did ------------------------------

    def _header(self, block: bytes, at: int) -> int:
        if self._has_ended and not self._held and block[at] == 0:
            self._part = _Part.PADDING
            return at
        before = len(self._held)
        self._held += block[at : at + _MAX_HEADER]
        size = _header_size(self._held)
        if not size:
            if len(self._held) >= _MAX_HEADER:
                raise FormatError("a gzip header that does not end")
            return at + len(self._held) - before
        at += size - before
        self._held.clear()
        self._zlib.inflateReset(ctypes.byref(self._stream))
        self._crc = self._size = 0
        if not self._found or self._wants_one(self._in + at):
            self._note(Checkpoint(self._in + at, self._out))
        self._part = _Part.BODY
        return at

    def _body(self, block: bytes, at: int) -> Generator[bytes, None, int]:
        stream, reference, inflate = self._stream, ctypes.byref(self._stream), self._zlib.inflate
        address: int = ctypes.cast(ctypes.c_char_p(block), ctypes.c_void_p).value or 0
        base, is_full = self._in, False
        while at < len(block) or is_full:
            if not is_full and base + at >= self._next_quantum:
                self._enter_quantum(base + at)
            stop = min(len(block), self._next_quantum - base)
            room = stream.avail_out
            stream.next_in, stream.avail_in = address + at, stop - at
            result = inflate(reference, _BLOCK if self._is_due else _NO_FLUSH)
            at = stop - stream.avail_in
            self._out += room - stream.avail_out
            if result not in (_OK, _STREAM_END, _BUF_ERROR):
                raise FormatError(f"the layer is no valid gzip: {(stream.msg or b'bad data').decode('ascii', 'replace')}")
            kind = stream.data_type
            is_border = self._is_due and kind & (_AT_BORDER | _IN_LAST) == _AT_BORDER
            is_full = not stream.avail_out
            if is_full or is_border or result == _STREAM_END:
                yield from self._flush()
            if result == _STREAM_END:
                self._part = _Part.TRAILER
                break
            if is_border:
                prime = block[at - 1] if at else self._last_byte
                self._note(Checkpoint(base + at, self._out, kind & 7, prime if kind & 7 else 0, self._window()))
        self._last_byte = block[at - 1] if at else self._last_byte
        yield from self._flush()
        return at

    def _trailer(self, block: bytes, at: int) -> int:
        part = block[at : at + 8 - len(self._held)]
        self._held += part
        if len(self._held) == 8:
            if self._held != self._crc.to_bytes(4, "little") + (self._size & 0xFFFFFFFF).to_bytes(4, "little"):
                raise FormatError("the layer is no valid gzip: wrong checksum")
            self._held.clear()
            self._has_ended = True
            self._part = _Part.HEADER
        return at + len(part)

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    def _enter_quantum(self, at: int) -> None:
        self._next_quantum = (at // _QUANTUM + 1) * _QUANTUM
        self._is_due = self._wants_one(at)
        if self._is_due and (at - self._last_in > MAX_SPAN_BYTES or self._out - self._last_out > MAX_SPAN_OUTPUT):
            self._give_up()

    def _wants_one(self, at: int) -> bool:
        doublings = max(0, (self._found - MAX_CHECKPOINTS // 2) // (MAX_CHECKPOINTS // 8) + 1)
        return self.is_seekable and (
            at - self._last_in >= min(SPAN_BYTES << doublings, MAX_SPAN_BYTES // 2)
            or self._out - self._last_out >= min(SPAN_OUTPUT << doublings, MAX_SPAN_OUTPUT // 2)
        )

    def _note(self, checkpoint: Checkpoint) -> None:
        self._is_due = False
        if not self.is_seekable:
            return
        self._found += 1
        self._last_in, self._last_out = checkpoint.in_offset, checkpoint.out_offset
        self.checkpoints.append(checkpoint)
        if self._found > MAX_CHECKPOINTS:
            self._give_up()

    def _give_up(self) -> None:
        self.is_seekable = self._is_due = False
        self.checkpoints.clear()

    def _window(self) -> bytes:
        window, size = ctypes.create_string_buffer(_WINDOW), ctypes.c_uint(_WINDOW)
        if self._zlib.inflateGetDictionary(ctypes.byref(self._stream), window, ctypes.byref(size)):
            raise FormatError("zlib lost its window")
        return window.raw[: size.value]

    # --- output -----------------------------------------------------------------------------------------------------------------

    def _rewind(self) -> None:
        self._stream.next_out, self._stream.avail_out = ctypes.addressof(self._buffer), _OUTPUT

    def _flush(self) -> Iterator[bytes]:
        part = bytes(self._view[: _OUTPUT - self._stream.avail_out])
        if part:
            self._rewind()
            self._crc = isal_zlib.crc32(part, self._crc)
            self._size += len(part)
            yield part


def _header_size(data: bytearray) -> int:
    """Bytes of the gzip header at the start of `data` (RFC 1952 2.3), 0 if it does not end there."""
    if not b"\x1f\x8b\x08".startswith(data[:3]):
        raise FormatError("bytes that are no gzip in the layer")
    if len(data) < 10:
        return 0
    flags, at = data[3], 10
    if flags & 0xE0:
        raise FormatError(f"a gzip header with flags {flags:#x}")
    if flags & 4:
        if len(data) < at + 2:
            return 0
        at += 2 + int.from_bytes(data[at : at + 2], "little")
    for flag in (8, 16):
        if flags & flag:
            at = data.find(b"\0", at) + 1
            if not at:
                return 0
    if flags & 2:
        if len(data) >= at + 2 and isal_zlib.crc32(data[:at]) & 0xFFFF != int.from_bytes(data[at : at + 2], "little"):
            raise FormatError("a gzip header with a wrong checksum")
        at += 2
    return at if len(data) >= at else 0
