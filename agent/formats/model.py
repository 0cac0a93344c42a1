"""The one shape into which every image format is parsed.

A parser turns the index of a layer (TOC, bootstrap, tar headers) into a `LayerIndex`: a tree of inodes, a table of chunks in
blob order, and the cut of the blob into pieces. Nothing here does I/O and nothing outside `agent.formats` asks which format
a layer had.

Volume layout. A layer's uncompressed file data lie in one flat volume. Each non-empty file has one extent there,
`[Inode.volume_offset, Inode.volume_offset + size)`, starting on a 4 KiB boundary; its chunks follow one another inside it at
their file offsets. Files with equal content share one extent. Primary chunks (those whose place no earlier chunk of the blob
has) have ascending `volume_offset` in blob order, so a place in the volume is found by bisection.

Tree rules that every parser guarantees: names are non-empty bytes of at most 255 without "/" or NUL and never "." or "..";
parents are always present; duplicates are already resolved (last wins, directory over directory merges); a hard link is the
same `Inode` object under several names; an OCI whiteout is a `CHAR` inode with rdev (0, 0) under the removed name; an opaque
directory has `is_opaque`; landmarks and the TOC's own file are not in the tree.
"""

import hashlib
import re
import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NewType, Self

import attrs

from fsmount.errors import ShoalError

BLOCK_SIZE: Final = 4096
"""Unit of the volume layout and of its presence bitmap: the page size, the largest EROFS block every kernel mounts."""

MAX_INDEX_BYTES: Final = 150 << 20
"""Cap on an uncompressed TOC; the cap of the containers/storage reader (formats.md section 2)."""

MAX_CHUNK_BYTES: Final = 64 << 20
"""Cap on one chunk's uncompressed size: a chunk is decoded in memory, and no writer of the field makes more than 16 MiB."""

Digest = NewType("Digest", str)
"""`sha256:<64 hex>`: the identity of a blob or of a chunk."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


class FormatError(ShoalError):
    """Bytes of an image that are not what their format promises. The layer may still be pulled whole."""


def parse_digest(text: str) -> Digest:
    """Check a digest as found in a manifest or a TOC.

    Raises:
        FormatError: it is not `sha256:` and 64 lowercase hex digits.
    """
    if not _DIGEST.match(text):
        raise FormatError(f"not a sha256 digest: {text[:100]!r}")
    return Digest(text)


def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """SHA-256 of `data`, as a digest string."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


class InodeKind(IntEnum):
    """What an inode is; the numbers are EROFS directory entry types."""

    FILE = 1
    DIRECTORY = 2
    CHAR = 3
    BLOCK = 4
    FIFO = 5
    SOCKET = 6
    SYMLINK = 7


@attrs.define(eq=False)
class Inode:
    """One inode of a layer. `mode` is permission bits only (07777); `mtime_ns` may be negative.

    `children` is used by directories, `target` by symlinks, `rdev` (major, minor) by devices. A file's chunks are
    `chunks[first_chunk:first_chunk + chunk_count]` of the layer's table, in file order and without gaps except for holes
    (bytes covered by no chunk read as zeros); `volume_offset` is -1 until the layout is made and for files without data.
    """

    kind: InodeKind
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    target: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = attrs.field(factory=dict)
    children: dict[bytes, "Inode"] = attrs.field(factory=dict)
    is_opaque: bool = False
    first_chunk: int = 0
    chunk_count: int = 0
    volume_offset: int = -1


@attrs.frozen
class Chunk:
    """One row of a `ChunkTable`; see there."""

    number: int
    blob_offset: int
    blob_length: int
    inner_offset: int
    size: int
    volume_offset: int
    digest: bytes


_CHUNKS_MAGIC: Final = b"SHOALCH1"
_LITTLE: Final = sys.byteorder == "little"


class ChunkTable:
    """All chunks of one layer in blob order, as columns (60 bytes a chunk).

    Columns, indexed by chunk number: `blob_offset` of the compressed member that holds the chunk, `blob_length` of that whole
    member, `inner_offset` bytes to skip after decompressing it, `size` uncompressed, `volume_offset` where the chunk lies in
    the volume. Digest number i is `digests[32 * i:32 * i + 32]` (SHA-256, raw). Several chunks may share a member.

    On disk (`to_bytes`): magic `SHOALCH1`, u64 count, then the columns in the order above (u64, u32, u32, u32, u64), then
    the digests; little-endian, each column starting right behind the one before.
    """

    __slots__ = (
        "_primary_chunks",
        "_primary_offsets",
        "blob_length",
        "blob_offset",
        "digests",
        "inner_offset",
        "size",
        "volume_offset",
    )

    def __init__(self) -> None:
        self.blob_offset = array("Q")
        self.blob_length = array("I")
        self.inner_offset = array("I")
        self.size = array("I")
        self.volume_offset = array("Q")
        self.digests = bytearray()
        self._primary_offsets: array[int] | None = None
        self._primary_chunks: array[int] | None = None

    def __len__(self) -> int:
        return len(self.size)

    def __getitem__(self, number: int) -> Chunk:
        return Chunk(
            number,
            self.blob_offset[number],
            self.blob_length[number],
            self.inner_offset[number],
            self.size[number],
            self.volume_offset[number],
            self.digest(number),
        )

    def digest(self, number: int) -> bytes:
        """Raw SHA-256 of the chunk's uncompressed bytes."""
        return bytes(self.digests[32 * number : 32 * number + 32])

    def append(self, blob_offset: int, blob_length: int, inner_offset: int, size: int, digest: bytes) -> int:
        """Add a chunk behind the last one; gives its number. Its volume offset is set by the layout."""
        self.blob_offset.append(blob_offset)
        self.blob_length.append(blob_length)
        self.inner_offset.append(inner_offset)
        self.size.append(size)
        self.volume_offset.append(0)
        self.digests += digest
        return len(self.size) - 1

    def _primaries(self) -> tuple["array[int]", "array[int]"]:
        if self._primary_offsets is None or self._primary_chunks is None:
            offsets, chunks, top = array("Q"), array("I"), -1
            for number, offset in enumerate(self.volume_offset):
                if offset > top:
                    offsets.append(offset)
                    chunks.append(number)
                    top = offset
            self._primary_offsets, self._primary_chunks = offsets, chunks
        return self._primary_offsets, self._primary_chunks

    def overlapping(self, start: int, stop: int) -> Iterator[int]:
        """Numbers of the primary chunks with bytes in volume range [start, stop), ascending."""
        offsets, chunks = self._primaries()
        at = max(0, bisect_right(offsets, start) - 1)
        while at < len(offsets) and offsets[at] < stop:
            number = chunks[at]
            if offsets[at] + self.size[number] > start:
                yield number
            at += 1

    def neighbours(self, number: int) -> tuple[int, int]:
        """Primary chunks directly before and behind the place of chunk `number` in the volume, -1 where there is none."""
        offsets, chunks = self._primaries()
        at = bisect_right(offsets, self.volume_offset[number]) - 1
        return (chunks[at - 1] if at > 0 else -1, chunks[at + 1] if at + 1 < len(chunks) else -1)

    def to_bytes(self) -> bytes:
        """The on-disk form described above."""
        columns: tuple[array[int], ...] = (self.blob_offset, self.blob_length, self.inner_offset, self.size, self.volume_offset)
        if not _LITTLE:
            columns = tuple(array(c.typecode, c) for c in columns)
            for column in columns:
                column.byteswap()
        return b"".join([_CHUNKS_MAGIC, struct.pack("<Q", len(self)), *(c.tobytes() for c in columns), bytes(self.digests)])

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """Read the on-disk form.

        Raises:
            FormatError: wrong magic or length.
        """
        view = memoryview(data)
        if len(view) < 16 or bytes(view[:8]) != _CHUNKS_MAGIC:
            raise FormatError("not a Shoal chunk table")
        (count,) = struct.unpack_from("<Q", view, 8)
        if len(view) != 16 + 60 * count:
            raise FormatError(f"chunk table of {count} chunks has {len(view)} bytes, not {16 + 60 * count}")
        table, at = cls(), 16
        for column in (table.blob_offset, table.blob_length, table.inner_offset, table.size, table.volume_offset):
            column.frombytes(view[at : at + count * column.itemsize])
            if not _LITTLE:
                column.byteswap()
            at += count * column.itemsize
        table.digests += view[at:]
        return table


@attrs.frozen
class PieceTable:
    """The cut of a blob into pieces: piece i is blob bytes [starts[i], starts[i + 1]) and holds the chunks
    [first_chunk[i], first_chunk[i + 1]); both arrays have one element more than there are pieces.

    The pieces cover the whole blob. `index_piece` is the number of the piece that holds the layer's index (TOC and
    footer), -1 if the index is elsewhere; it holds no chunks and is verified by the TOC digest.
    """

    starts: "array[int]"
    first_chunk: "array[int]"
    index_piece: int = -1

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def blob_size(self) -> int:
        """Bytes of the blob."""
        return self.starts[-1]

    def extent(self, piece: int) -> tuple[int, int]:
        """Half-open byte range of the piece in the blob."""
        return self.starts[piece], self.starts[piece + 1]

    def chunks_of(self, piece: int) -> range:
        """Numbers of the chunks in the piece."""
        return range(self.first_chunk[piece], self.first_chunk[piece + 1])

    def piece_of_chunk(self, chunk: int) -> int:
        """Number of the piece that holds the chunk."""
        return bisect_right(self.first_chunk, chunk) - 1

    def covering(self, start: int, stop: int) -> range:
        """Numbers of the pieces that overlap blob range [start, stop)."""
        if start >= stop or start >= self.blob_size:
            return range(0)
        return range(max(0, bisect_right(self.starts, start) - 1), min(len(self), bisect_right(self.starts, stop - 1)))

    def to_bytes(self) -> bytes:
        """On-disk form: magic `SHOALPC1`, u64 count of pieces, i64 index piece, u64 starts, u32 first chunks; little-endian."""
        starts, first = array("Q", self.starts), array("I", self.first_chunk)
        if not _LITTLE:
            starts.byteswap()
            first.byteswap()
        return b"".join([b"SHOALPC1", struct.pack("<Qq", len(self), self.index_piece), starts.tobytes(), first.tobytes()])

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """Read the on-disk form.

        Raises:
            FormatError: wrong magic or length.
        """
        view = memoryview(data)
        if len(view) < 24 or bytes(view[:8]) != b"SHOALPC1":
            raise FormatError("not a Shoal piece table")
        count, index_piece = struct.unpack_from("<Qq", view, 8)
        if len(view) != 24 + 12 * (count + 1):
            raise FormatError(f"piece table of {count} pieces has {len(view)} bytes")
        starts, first = array("Q"), array("I")
        starts.frombytes(view[24 : 24 + 8 * (count + 1)])
        first.frombytes(view[24 + 8 * (count + 1) :])
        if not _LITTLE:
            starts.byteswap()
            first.byteswap()
        return cls(starts, first, index_piece)


@attrs.frozen
class LayerIndex:
    """What a format's TOC or bootstrap says, in one shape for all formats.

    `codec` tells how a member is decoded ("gzip": one gzip member; "zstd": one frame; "raw": stored as is; "whole": no
    random access, the blob is read from its start). `prefetch_stop` is the blob offset before which everything is wanted
    at start (landmark), 0 for nothing, -1 for no hint. `warnings` are one sentence each (dropped xattrs, clamped names).
    """

    format: str
    codec: str
    root: Inode
    chunks: ChunkTable
    pieces: PieceTable
    volume_size: int
    entry_count: int
    prefetch_stop: int = -1
    warnings: tuple[str, ...] = ()
