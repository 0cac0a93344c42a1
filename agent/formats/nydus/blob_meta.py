"""What a data blob says of its own chunks: chunk infos with their header, batch and zran contexts (formats.md 3.3).

A bootstrap describes chunks well enough unless they are compressed in batches or lie in an original gzip layer. None of this needs
to be trusted: what comes out is verified by the chunks' digests. It is bounded all the same.
"""

import io
import struct
from typing import Final

import attrs
import lz4.block
import zstandard
from isal import isal_zlib

from agent.formats.inflate import InflateError
from agent.formats.model import MAX_CHUNK_BYTES, FormatError
from agent.formats.nydus.bootstrap import FEATURE_BATCH, FEATURE_CHUNK_INFO_V2, FEATURE_ZRAN, MAX_COMPRESSED, BlobEntry

HEADER_SIZE: Final = 4096
MAX_TABLES: Final = 96 << 20
"""Bytes of one blob's tables, uncompressed: 24 for each of 2^20 chunks, and 2,000 windows."""

_MAGIC: Final = 0xB10BB10B
_HEADER: Final = struct.Struct("<IIIIQQQQQI")
"""magic, features, compressor, entries; offset, size compressed and size of the infos; offset, size and count of contexts."""
_INFO_V1: Final = struct.Struct("<QQ")
_INFO_V2: Final = struct.Struct("<QQQ")
_ZRAN: Final = struct.Struct("<QQQIIIBB2x")
_BATCH: Final = struct.Struct("<II32x")
_CONTEXT_SIZE: Final = 40
_WINDOW: Final = 1 << 15
_MAX_RATIO: Final = 1032
_RATIO_SLACK: Final = 64 << 10
_ZSTD_WINDOW: Final = 8 << 20

INFO_COMPRESSED: Final = 1
INFO_ZRAN: Final = 2
INFO_BATCH: Final = 4
INFO_ENCRYPTED: Final = 8


@attrs.frozen
class ChunkInfo:
    """One chunk of a blob. `context` and `inner` are the batch or zran context and the chunk's place in it."""

    offset: int
    size: int
    flags: int
    compressed_offset: int
    compressed_size: int
    context: int
    inner: int


@attrs.frozen
class ZranContext:
    """Bytes [start, start + length) of the gzip layer, which inflate to `size` bytes from `out` on; the `bits` high bits of `prime`
    come first, and `window` is the output before (at `window_offset`, `window_size` in the table)."""

    start: int
    length: int
    out: int
    size: int
    bits: int
    prime: int
    window_offset: int
    window_size: int


class BlobMeta:
    """The tables of one blob."""

    def __init__(self, entry: BlobEntry, tables: bytes, header: bytes) -> None:
        """`tables` are uncompressed.

        Raises:
            FormatError: they contradict each other or the bootstrap.
        """
        if len(header) != HEADER_SIZE or header[-4:] != _MAGIC.to_bytes(4, "little"):
            raise FormatError("the chunk infos of a blob have no header")
        fields = _HEADER.unpack_from(header)
        magic, features, compressor, self._count, ci_offset, ci_csize, ci_usize, contexts, contexts_size, context_count = fields
        if magic != _MAGIC or (compressor, ci_offset, ci_csize, ci_usize) != (
            entry.ci_compressor,
            entry.ci_offset,
            entry.ci_csize,
            entry.ci_usize,
        ):
            raise FormatError(f"the header of the chunk infos of blob {entry.id[:80]} contradicts the bootstrap")
        self._is_v2 = bool(features & FEATURE_CHUNK_INFO_V2)
        self._tables = tables
        self._info_size = (_INFO_V2 if self._is_v2 else _INFO_V1).size
        if self._count != entry.chunk_count or self._count * self._info_size > len(tables):
            raise FormatError(f"{self._count} chunk infos in {len(tables)} bytes, the bootstrap says {entry.chunk_count}")
        if contexts + contexts_size > len(tables) or context_count * _CONTEXT_SIZE > contexts_size:
            raise FormatError(f"{context_count} contexts of {contexts_size} bytes at {contexts}, the tables have {len(tables)}")
        self._contexts, self._contexts_stop = contexts, contexts + contexts_size
        is_used = features & (FEATURE_BATCH | FEATURE_ZRAN)
        self.context_count: int = context_count if is_used else 0

    def info(self, number: int) -> ChunkInfo:
        """Info of a chunk, by its number in the blob.

        Raises:
            FormatError: there is no such chunk, or an encrypted one.
        """
        if not 0 <= number < self._count:
            raise FormatError(f"chunk {number} of a blob with {self._count}")
        at = number * self._info_size
        if not self._is_v2:
            u, c = _INFO_V1.unpack_from(self._tables, at)
            size, csize = (u >> 44) + ((u >> 8 & 0xF) << 20) + 1, (c >> 44) + ((c >> 40 & 0xF) << 20) + 1
            return ChunkInfo(
                u & 0xFFFFFFFF000, size, INFO_COMPRESSED if size != csize else 0, c & (MAX_COMPRESSED - 1), csize, 0, 0
            )
        u, c, data = _INFO_V2.unpack_from(self._tables, at)
        flags = u >> 56
        if flags & INFO_ENCRYPTED:
            raise FormatError("the image is encrypted, which Shoal does not read")
        return ChunkInfo(
            (u & 0xFFFFFFFF) << 12,
            (u >> 32 & 0xFFFFFF) + 1,
            flags,
            c & (MAX_COMPRESSED - 1),
            c >> 40,
            data >> 32,
            data & 0xFFFFFFFF,
        )

    def batch(self, number: int) -> tuple[int, int]:
        """(size compressed, size) of a batch.

        Raises:
            FormatError: there is none, or one that is too large.
        """
        if not 0 <= number < self.context_count:
            raise FormatError(f"batch {number} of a blob with {self.context_count}")
        csize, size = _BATCH.unpack_from(self._tables, self._contexts + number * _CONTEXT_SIZE)
        if not 0 < csize <= MAX_CHUNK_BYTES or not csize <= size <= MAX_CHUNK_BYTES:
            raise FormatError(f"a batch of {csize} bytes that holds {size}")
        return csize, size

    def zran(self, number: int) -> ZranContext:
        """A zran context.

        Raises:
            FormatError: there is none, or it cannot be true.
        """
        if not 0 <= number < self.context_count:
            raise FormatError(f"context {number} of a blob with {self.context_count}")
        at = self._contexts + number * _CONTEXT_SIZE
        start, out, window, length, size, window_size, prime, bits = _ZRAN.unpack_from(self._tables, at)
        base = self._contexts + self.context_count * _CONTEXT_SIZE + window
        if (
            not start < MAX_COMPRESSED
            or not length
            or not 0 < size <= length * _MAX_RATIO + _RATIO_SLACK
            or not out < 1 << 50
            or bits > 7
            or window_size > _WINDOW
            or base + window_size > self._contexts_stop
        ):
            raise FormatError(f"context {number} has bytes [{start}, {start + length}) and {size} of output")
        return ZranContext(start, length, out, size, bits, prime, base, window_size)

    def window(self, context: ZranContext) -> bytes:
        """The output before a context."""
        return self._tables[context.window_offset : context.window_offset + context.window_size]


def read_stored(entry: BlobEntry, data: bytes) -> BlobMeta:
    """From the blob's own bytes [ci_offset, ci_offset + ci_csize + HEADER_SIZE).

    Raises:
        FormatError: they are not what the bootstrap says.
    """
    check_bounds(entry)
    if len(data) != entry.ci_csize + HEADER_SIZE:
        raise FormatError(f"{len(data)} bytes of chunk infos, {entry.ci_csize + HEADER_SIZE} were due")
    tables = decompress(data[: entry.ci_csize], entry.ci_compressor, entry.ci_usize)
    return BlobMeta(entry, tables, data[entry.ci_csize :])


def read_copy(entry: BlobEntry, data: bytes) -> BlobMeta | None:
    """From the copy beside the bootstrap: uncompressed tables, padding, header. None if it is not one, as from some writers.

    Raises:
        FormatError: it contradicts the bootstrap.
    """
    if entry.ci_usize > MAX_TABLES or len(data) < entry.ci_usize + HEADER_SIZE:
        return None
    return BlobMeta(entry, data[: entry.ci_usize], data[-HEADER_SIZE:])


def check_bounds(entry: BlobEntry) -> None:
    """Raises FormatError unless the chunk infos have a size that can be read."""
    if entry.ci_usize > MAX_TABLES or entry.ci_csize > MAX_TABLES or entry.ci_offset >= MAX_COMPRESSED:
        raise FormatError(f"chunk infos of {entry.ci_csize} bytes, {entry.ci_usize} uncompressed, at {entry.ci_offset}")


def decompress(data: bytes, compressor: int, size: int) -> bytes:
    """Metadata that was compressed whole; never more than `size` bytes are made of it.

    Raises:
        FormatError: it does not give exactly `size` bytes.
    """
    try:
        if compressor == 0 or (compressor == 1 and len(data) == size):
            out = data
        elif compressor == 1:
            out = lz4.block.decompress(data, uncompressed_size=size)
        elif compressor == 2:
            out = isal_zlib.decompressobj(31).decompress(data, size + 1)
        else:
            context = zstandard.ZstdDecompressor(max_window_size=max(_ZSTD_WINDOW, size))
            out = context.stream_reader(io.BytesIO(data)).read(size + 1)
    except (lz4.block.LZ4BlockError, InflateError, zstandard.ZstdError, ValueError, OverflowError) as exc:
        raise FormatError(f"the metadata of a blob cannot be decompressed: {exc}") from exc
    if len(out) != size:
        raise FormatError(f"the metadata of a blob have {len(out)} bytes, {size} were due")
    return out
