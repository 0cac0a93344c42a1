"""The one shape into which every image format is parsed.

A parser turns the index of a layer (TOC, bootstrap, tar headers) into a `LayerIndex`: a tree of inodes, a table of chunks in
blob order, and the cut of the blob into pieces. Nothing here does I/O and nothing outside `agent.formats` asks which format
a layer had.

Volume layout. A layer's uncompressed file data lie in one flat volume. Each non-empty file has one extent there,
`[Inode.volume_offset, Inode.volume_offset + size)`, starting on a 4 KiB boundary; its chunks lie inside it at their file
offsets. Files with equal content share one extent. A chunk that several files use at different places has one row for each
place; rows are in blob order, and a *primary* chunk is the first row of its place in the volume.

The blob of a layer may be *spliced*: a format that spreads one tree over several blobs of a repository (nydus) sees them as
one, one behind the other, and `LayerIndex.parts` says which they are. Everything but the registry's end knows that blob alone.

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
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from enum import IntEnum
from itertools import pairwise
from operator import itemgetter
from typing import Final, Literal, NewType, Self

import attrs
import blake3

from fsmount.errors import ShoalError

BLOCK_SIZE: Final = 4096
"""Unit of the volume layout and of its presence bitmap: the page size, the largest EROFS block every kernel mounts."""

MAX_INDEX_BYTES: Final = 150 << 20
"""Cap on an uncompressed TOC; the cap of the containers/storage reader (formats.md section 2)."""

MAX_CHUNK_BYTES: Final = 64 << 20
"""Cap on one chunk's uncompressed size: a chunk is decoded in memory, and no writer of the field makes more than 16 MiB."""

Digester = Literal["sha256", "blake3"]
"""How the uncompressed bytes of chunks are hashed; both give 32 bytes."""

Digest = NewType("Digest", str)
"""`sha256:<64 hex>`: the identity of a blob or of a chunk."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


class FormatError(ShoalError):
    """Bytes of an image that are not what their format promises. The layer may still be pulled whole."""


class NoIndex(FormatError):
    """The image is in order and has no index for this layer: it is a plain one."""


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


def hash_chunk(digester: Digester, data: bytes | bytearray | memoryview) -> bytes:
    """Raw digest (32 bytes) of a chunk's uncompressed bytes."""
    return hashlib.sha256(data).digest() if digester == "sha256" else blake3.blake3(data).digest()


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

    `children` is used by directories, `target` by symlinks, `rdev` (major, minor) by devices. `volume_offset` is -1 until the
    layout is made and for files without data; bytes of a file that no chunk covers read as zeros. `first_chunk` and
    `chunk_count` are notes of a parser to `layout.lay_out` and mean nothing afterwards.
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


_CHUNKS_MAGIC: Final = b"SHOALCH2"
_DIGESTERS: Final[tuple[Digester, ...]] = ("sha256", "blake3")
_MEMBERS_MAGIC: Final = b"SHOALMB1"
PRIME_IN_MEMBER: Final = 8
"""Flag in `MemberTable.bits`; see there."""
_LITTLE: Final = sys.byteorder == "little"
_UNKNOWN: Final = bytes(32)


class ChunkTable:
    """All chunks of one layer in blob order, as columns (60 bytes a chunk).

    Columns, indexed by chunk number: `blob_offset` of the compressed member that holds the chunk, `blob_length` of that whole
    member, `inner_offset` bytes to skip after decompressing it, `size` uncompressed, `volume_offset` where the chunk lies in
    the volume. Digest number i is `digests[32 * i:32 * i + 32]` (raw, of the table's `digester`), zeros for a chunk of which the
    index does not say it (`is_known`). Several chunks may share a member, and several rows may have the same bytes of it (for
    several places in the volume). Rows ascend by (blob_offset, inner_offset).

    On disk (`to_bytes`): magic `SHOALCH2`, u64 count, u64 digester (0 sha256, 1 blake3), then the columns in the order above
    (u64, u32, u32, u32, u64), then the digests; little-endian, each column starting right behind the one before.
    """

    __slots__ = (
        "_primary_chunks",
        "_primary_offsets",
        "blob_length",
        "blob_offset",
        "digester",
        "digests",
        "inner_offset",
        "size",
        "volume_offset",
    )

    def __init__(self, digester: Digester = "sha256") -> None:
        self.digester: Digester = digester
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
        """Raw digest of the chunk's uncompressed bytes."""
        return bytes(self.digests[32 * number : 32 * number + 32])

    def is_known(self, number: int) -> bool:
        """Whether the index says the chunk's digest. One that it does not may be taken only out of a piece that was verified."""
        return self.digests[32 * number : 32 * number + 32] != _UNKNOWN

    @property
    def is_complete(self) -> bool:
        """Whether the index says every chunk's digest."""
        # Zeros nowhere, in nearly every table; else it matters whether they are one row's.
        return _UNKNOWN not in self.digests or all(self.is_known(number) for number in range(len(self)))

    def is_right(self, number: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether `data` are the chunk's bytes, by its digest."""
        return hash_chunk(self.digester, data) == self.digests[32 * number : 32 * number + 32]

    def append(self, blob_offset: int, blob_length: int, inner_offset: int, size: int, digest: bytes) -> int:
        """Add a chunk behind the last one; gives its number. Its volume offset is set by the layout."""
        self.blob_offset.append(blob_offset)
        self.blob_length.append(blob_length)
        self.inner_offset.append(inner_offset)
        self.size.append(size)
        self.volume_offset.append(0)
        self.digests += digest
        return len(self.size) - 1

    def by_place(self) -> "list[tuple[int, int]]":
        """(number, volume offset) of all rows, by place in the volume; of one place the lowest number first."""
        rows = list(enumerate(self.volume_offset))
        if any(a > b for a, b in pairwise(self.volume_offset)):
            rows.sort(key=itemgetter(1))  # stable
        return rows

    def _primaries(self) -> tuple["array[int]", "array[int]"]:
        if self._primary_offsets is None or self._primary_chunks is None:
            offsets, chunks, top = array("Q"), array("I"), -1
            for number, offset in self.by_place():
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
        head = struct.pack("<QQ", len(self), _DIGESTERS.index(self.digester))
        return b"".join([_CHUNKS_MAGIC, head, *(c.tobytes() for c in columns), bytes(self.digests)])

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """Read the on-disk form.

        Raises:
            FormatError: wrong magic or length.
        """
        view = memoryview(data)
        if len(view) < 24 or bytes(view[:8]) != _CHUNKS_MAGIC:
            raise FormatError("not a Shoal chunk table")
        count, digester = struct.unpack_from("<QQ", view, 8)
        if len(view) != 24 + 60 * count or digester >= len(_DIGESTERS):
            raise FormatError(f"chunk table of {count} chunks and digester {digester} has {len(view)} bytes")
        table, at = cls(_DIGESTERS[digester]), 24
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
    footer), -1 if the index is elsewhere; it holds no chunks.

    `digests` is empty, or has the SHA-256 of every piece's compressed bytes (32 each; all zeros: not known). A piece with a
    digest is verified by it as a whole before anything of it is decoded: for formats that leave bytes between the chunks
    unvouched for, or have no chunk digests.
    """

    starts: "array[int]"
    first_chunk: "array[int]"
    index_piece: int = -1
    digests: bytes = b""

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

    def digest(self, piece: int) -> bytes:
        """Raw SHA-256 of the piece's compressed bytes; empty if nobody has said."""
        digest = self.digests[32 * piece : 32 * piece + 32]
        return digest if digest != _UNKNOWN else b""

    def piece_of_chunk(self, chunk: int) -> int:
        """Number of the piece that holds the chunk."""
        return bisect_right(self.first_chunk, chunk) - 1

    def covering(self, start: int, stop: int) -> range:
        """Numbers of the pieces that overlap blob range [start, stop)."""
        if start >= stop or start >= self.blob_size:
            return range(0)
        return range(max(0, bisect_right(self.starts, start) - 1), min(len(self), bisect_right(self.starts, stop - 1)))

    def to_bytes(self) -> bytes:
        """On-disk form: magic `SHOALPC2`, u64 count of pieces, i64 index piece, u64 starts, u32 first chunks, digests;
        little-endian."""
        starts, first = array("Q", self.starts), array("I", self.first_chunk)
        if not _LITTLE:
            starts.byteswap()
            first.byteswap()
        head = struct.pack("<Qq", len(self), self.index_piece)
        return b"".join([b"SHOALPC2", head, starts.tobytes(), first.tobytes(), self.digests])

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """Read the on-disk form.

        Raises:
            FormatError: wrong magic or length.
        """
        view = memoryview(data)
        if len(view) < 24 or bytes(view[:8]) != b"SHOALPC2":
            raise FormatError("not a Shoal piece table")
        count, index_piece = struct.unpack_from("<Qq", view, 8)
        columns = 24 + 12 * (count + 1)
        if len(view) not in (columns, columns + 32 * count):
            raise FormatError(f"piece table of {count} pieces has {len(view)} bytes")
        starts, first = array("Q"), array("I")
        starts.frombytes(view[24 : 24 + 8 * (count + 1)])
        first.frombytes(view[24 + 8 * (count + 1) : columns])
        if not _LITTLE:
            starts.byteswap()
            first.byteswap()
        return cls(starts, first, index_piece, bytes(view[columns:]))


class MemberTable:
    """What must be known of members beyond their bytes, for formats where the bytes alone do not tell how to decode them.

    Columns, ascending by `blob_offset`: `blob_offset` of a member, `size` of it uncompressed (0: not known), `bits` (0 to 7) and
    `prime`: that many high bits of byte `prime` come before the member's first byte (a deflate stream resumed at a checkpoint,
    formats.md 5.1), and window i, the up to 32 KiB of output before it, is `windows[window_end[i - 1]:window_end[i]]`.
    With `PRIME_IN_MEMBER` added to `bits` (1 to 7 then), the index does not know that byte: it is the member's first one.

    On disk (`to_bytes`): magic `SHOALMB1`, u64 count, then the columns (u64, u64, u8, u8, u64), then the windows.
    """

    __slots__ = ("bits", "blob_offset", "prime", "size", "window_end", "windows")

    def __init__(self) -> None:
        self.blob_offset = array("Q")
        self.size = array("Q")
        self.bits = array("B")
        self.prime = array("B")
        self.window_end = array("Q")
        self.windows: bytearray | memoryview = bytearray()

    def __len__(self) -> int:
        return len(self.blob_offset)

    def append(self, blob_offset: int, size: int = 0, bits: int = 0, prime: int = 0, window: bytes | memoryview = b"") -> None:
        """Add a member behind the last one."""
        assert isinstance(self.windows, bytearray)
        self.blob_offset.append(blob_offset)
        self.size.append(size)
        self.bits.append(bits)
        self.prime.append(prime)
        self.windows += window
        self.window_end.append(len(self.windows))

    def find(self, blob_offset: int) -> int:
        """Row of the member that begins at `blob_offset`, -1 if there is none."""
        at = bisect_left(self.blob_offset, blob_offset)
        return at if at < len(self) and self.blob_offset[at] == blob_offset else -1

    def window(self, row: int) -> bytes:
        """The output before a member."""
        return bytes(self.windows[self.window_end[row - 1] if row else 0 : self.window_end[row]])

    def to_bytes(self) -> bytes:
        """The on-disk form described above."""
        columns: tuple[array[int], ...] = (self.blob_offset, self.size, self.bits, self.prime, self.window_end)
        if not _LITTLE:
            columns = tuple(array(c.typecode, c) for c in columns)
            for column in columns:
                column.byteswap()
        return b"".join([_MEMBERS_MAGIC, struct.pack("<Q", len(self)), *(c.tobytes() for c in columns), self.windows])

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """Read the on-disk form. The windows stay a view of `data`, which may be a mapped file.

        Raises:
            FormatError: wrong magic, length or order.
        """
        view = memoryview(data)
        if len(view) < 16 or bytes(view[:8]) != _MEMBERS_MAGIC:
            raise FormatError("not a Shoal member table")
        (count,) = struct.unpack_from("<Q", view, 8)
        if len(view) < 16 + 26 * count:
            raise FormatError(f"member table of {count} members has {len(view)} bytes")
        table, at = cls(), 16
        for column in (table.blob_offset, table.size, table.bits, table.prime, table.window_end):
            column.frombytes(view[at : at + count * column.itemsize])
            if not _LITTLE:
                column.byteswap()
            at += count * column.itemsize
        table.windows = view[at:]
        ends = table.window_end
        if (
            any(a >= b for a, b in pairwise(table.blob_offset))
            or any(not 0 <= b - a <= 1 << 15 for a, b in pairwise([0, *ends]))
            or any(bits > 15 or bits == PRIME_IN_MEMBER for bits in table.bits)
            or (ends[-1] if count else 0) != len(table.windows)
        ):
            raise FormatError("the member table contradicts itself")
        return table


@attrs.frozen
class BlobPart:
    """Bytes [start, start + size) of one of the registry's blobs, which has `blob_size`: one part of a spliced blob.

    A blob may come several times: where members overlap, the bytes that two of them need are spliced in twice.
    """

    digest: Digest
    size: int
    start: int = 0
    blob_size: int = attrs.field(default=attrs.Factory(lambda self: self.start + self.size, takes_self=True))


@attrs.frozen
class LayerIndex:
    """What a format's TOC or bootstrap says, in one shape for all formats.

    `codec` tells how a member is decoded:

    - "gzip": gzip members; "zstd": one frame. The extent of a member may reach beyond its end.
    - "zstd/raw", "lz4/raw" (block), "gzip/raw": the member fills its extent exactly; one of which the extent is as long as the
      member uncompressed is stored as is. Uncompressed it has the size that `members` says, else that of its one chunk.
    - "raw": stored as is.
    - "deflate": resumed in the middle of a stream with what `members` says; the extent may reach beyond the last chunk.
    - "whole": no random access, the blob is read from its start.

    `prefetch_stop` is the blob offset before which everything is wanted at start (landmark), 0 for nothing, -1 for no hint;
    `prefetch_pieces` are wanted before that, in this order. `warnings` are one sentence each (dropped xattrs, clamped names).
    `parts`: see the module's text; empty for a blob that is one in the registry too.
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
    members: MemberTable | None = None
    prefetch_pieces: tuple[int, ...] = ()
    parts: tuple[BlobPart, ...] = ()
