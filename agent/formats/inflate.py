"""Streaming decompression of a whole layer blob: gzip (any count of members), zstd (any count of frames), or none.

What is in the blob decides, not its media type: media types lie in the field (formats.md 0.1). Output comes in parts of
bounded size, whatever the input promises.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol, cast

from isal import isal_zlib

from agent.formats.model import FormatError

if TYPE_CHECKING:
    pass

InflateError: Final = cast("type[Exception]", isal_zlib.IsalError)
"""What isal raises; its type stub calls the class an instance."""

_STEP: Final = 1 << 20
_ZSTD_SLICE: Final = 1 << 10
"""zstandard gives all output of an input at once; 1 KiB of input is at most 256 blocks of 128 KiB, so 32 MiB are held at worst."""


class Inflater(Protocol):
    """Turns blob bytes into tar bytes."""

    def feed(self, data: memoryview) -> Iterator[bytes]:
        """The output of the next input, in parts."""

    def finish(self) -> None:
        """The input has ended; raises FormatError in the middle of a member or frame."""


class RawInflater:
    """Gives what it gets."""

    def feed(self, data: memoryview) -> Iterator[bytes]:
        """The output of the next input, in parts."""
        for at in range(0, len(data), _STEP):
            yield bytes(data[at : at + _STEP])

    def finish(self) -> None:
        """Nothing can be missing."""


class GzipInflater:
    """gzip members one after another; zeros behind the last one are padding (tape blocks), anything else is an error."""

    def __init__(self) -> None:
        self._member: isal_zlib.Decompress | None = None
        self._has_ended = False
        self._is_padding = False

    def feed(self, data: memoryview) -> Iterator[bytes]:
        """The output of the next input, in parts."""
        rest: bytes | memoryview = data
        while rest:
            member = self._member
            if member is None:
                if self._has_ended and (self._is_padding or rest[0] == 0):
                    if any(rest):
                        raise FormatError("bytes that are no gzip behind the last member")
                    self._is_padding = True
                    return
                member = self._member = isal_zlib.decompressobj(31)
            try:
                part = member.decompress(rest, _STEP)
                while True:
                    if part:
                        yield part
                    if member.eof or (len(part) < _STEP and not member.unconsumed_tail):
                        break
                    part = member.decompress(member.unconsumed_tail, _STEP)
            except InflateError as exc:
                raise FormatError(f"the layer is no valid gzip: {exc}") from exc
            if not member.eof:
                return
            rest = member.unused_data
            self._member, self._has_ended = None, True

    def finish(self) -> None:
        """Raises FormatError in the middle of a member."""
        if self._member is not None or not self._has_ended:
            raise FormatError("the gzip of the layer is cut short")


class ZstdInflater:
    """zstd frames one after another; skippable frames give nothing."""

    def __init__(self) -> None:
        import zstandard  # noqa: PLC0415 - 4 MB resident, and few layers are zstd

        self._module = zstandard
        self._context = zstandard.ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def feed(self, data: memoryview) -> Iterator[bytes]:
        """The output of the next input, in parts."""
        for at in range(0, len(data), _ZSTD_SLICE):
            rest = bytes(data[at : at + _ZSTD_SLICE])
            while rest:
                if self._frame is None:
                    self._frame = self._context.decompressobj()
                try:
                    part = self._frame.decompress(rest)
                except self._module.ZstdError as exc:
                    raise FormatError(f"the layer is no valid zstd: {exc}") from exc
                if part:
                    yield part
                if not self._frame.eof:
                    break
                rest = self._frame.unused_data
                self._frame = None

    def finish(self) -> None:
        """Raises FormatError in the middle of a frame."""
        if self._frame is not None:
            raise FormatError("the zstd of the layer is cut short")


def sniff(head: bytes) -> str:
    """ "gzip", "zstd" or "none" from a blob's first four bytes."""
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    if head[:4] == b"\x28\xb5\x2f\xfd" or (len(head) >= 4 and head[0] & 0xF0 == 0x50 and head[1:4] == b"\x2a\x4d\x18"):
        return "zstd"
    return "none"


def open_inflater(compression: str) -> Inflater:
    """The inflater for what `sniff` found."""
    if compression == "gzip":
        return GzipInflater()
    return ZstdInflater() if compression == "zstd" else RawInflater()
