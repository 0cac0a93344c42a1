"""What both versions of a Nydus bootstrap say, in one form, and the tables that they share (formats.md 3).

A bootstrap is a tree whose files refer to chunks of blobs. `Bootstrap` keeps the tree as inodes and the references as columns:
file number f has references [inode.first_chunk, inode.first_chunk + inode.chunk_count), each a chunk and its place in the file.

Nothing in a bootstrap is believed. Its parts must not overlap more than hard links and shared chunks explain: `Budget` counts the
bytes that inodes, directories and tables take, and their sum can never pass the size of the whole.
"""

import struct
from array import array
from typing import Final

import attrs

from agent.formats.model import Digester, FormatError, Inode, InodeKind
from agent.formats.tree import MAX_INODES, MAX_PATH_BYTES

COMPRESSORS: Final = ("none", "lz4", "gzip", "zstd")
"""By their numbers in the tables."""
DIGESTERS: Final[tuple[Digester, ...]] = ("blake3", "sha256")

FLAG_COMPRESSORS: Final = ((2, 1), (0x40, 2), (0x80, 3))
"""RafsSuperFlags that name a compressor, with its number."""
FLAG_BLAKE3: Final = 4
FLAG_SHA256: Final = 8
FLAG_TARFS: Final = 0x200
FLAG_ENCRYPTED: Final = 0x0200_0000

FEATURE_CHUNK_INFO_V2: Final = 4
FEATURE_ZRAN: Final = 8
FEATURE_SEPARATE_META: Final = 0x10
FEATURE_INLINED_DIGESTS: Final = 0x20
FEATURE_TARFS: Final = 0x40
FEATURE_BATCH: Final = 0x80
FEATURE_ENCRYPTED: Final = 0x100
FEATURE_EXTERNAL: Final = 0x800

CHUNK_COMPRESSED: Final = 1
CHUNK_HOLE: Final = 2
CHUNK_ENCRYPTED: Final = 4
CHUNK_BATCH: Final = 8
"""Not always set: a chunk of a batch has no compressed size of its own."""

CHUNK_ROW: Final = struct.Struct("<32sIIIIQQQII")
"""digest, blob, flags, size compressed, size, offset compressed, offset, offset in the file, number in the blob, CRC-32."""

WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
_AUFS: Final = b".wh..wh."

MIN_CHUNK: Final = 4 << 10
MAX_CHUNK: Final = 16 << 20
MAX_BLOBS: Final = 1 << 12
MAX_COMPRESSED: Final = 1 << 40
"""Bytes of one compressed blob (formats.md 3)."""


@attrs.frozen
class BlobEntry:
    """One row of the blob table. `id` is the blob's digest in hex, as a rule; the `ci_` fields place its chunk infos."""

    id: str
    compressor: int
    digester: int
    features: int
    chunk_count: int = 0
    compressed_size: int = 0
    toc_size: int = 0
    ci_compressor: int = 0
    ci_offset: int = 0
    ci_csize: int = 0
    ci_usize: int = 0
    toc_digest: bytes = bytes(32)
    meta_digest: bytes = bytes(32)
    meta_size: int = 0
    cipher: int = 0

    @property
    def is_zran(self) -> bool:
        """Whether the data are an original gzip layer."""
        return bool(self.features & FEATURE_ZRAN)

    def check(self) -> None:
        """Raises FormatError for what Shoal does not read."""
        if self.cipher or self.features & FEATURE_ENCRYPTED:
            raise FormatError(f"blob {self.id[:80]} is encrypted, which Shoal does not read")
        if self.features & FEATURE_TARFS:
            raise FormatError(f"blob {self.id[:80]} is a plain tar (tarfs mode), which Shoal does not read")
        if self.features & FEATURE_EXTERNAL:
            raise FormatError(f"blob {self.id[:80]} lies outside the registry, where Shoal does not read")
        if self.compressor >= len(COMPRESSORS) or self.ci_compressor >= len(COMPRESSORS):
            raise FormatError(f"blob {self.id[:80]} has the unknown compressor {self.compressor} or {self.ci_compressor}")


class BlobChunks:
    """The chunks that a bootstrap's files use, each once, as columns. `index` is the number of the chunk in its blob.

    An `is_open` chunk has no row in the bootstrap: its place and digest are in the blob's own tables.
    """

    __slots__ = ("blob", "compressed_offset", "compressed_size", "digests", "flags", "index", "offset", "open_rows", "size")

    def __init__(self) -> None:
        self.blob = array("H")
        self.index = array("I")
        self.flags = array("I")
        self.compressed_offset = array("Q")
        self.compressed_size = array("I")
        self.offset = array("Q")
        self.size = array("I")
        self.digests = bytearray()
        self.open_rows: list[int] = []

    def __len__(self) -> int:
        return len(self.size)

    def append(
        self,
        digest: bytes,
        blob: int,
        flags: int,
        compressed_size: int,
        size: int,
        compressed_offset: int,
        offset: int,
        index: int,
    ) -> int:
        """Add a chunk; gives its row."""
        self.blob.append(blob)
        self.index.append(index)
        self.flags.append(flags)
        self.compressed_offset.append(compressed_offset)
        self.compressed_size.append(compressed_size)
        self.offset.append(offset)
        self.size.append(size)
        self.digests += digest
        return len(self.size) - 1

    def append_open(self, blob: int, index: int, offset: int, size: int) -> int:
        """Add a chunk of which only the place in the uncompressed blob is known."""
        row = self.append(bytes(32), blob, 0, 0, size, 0, offset, index)
        self.open_rows.append(row)
        return row


@attrs.define(eq=False)
class Bootstrap:
    """See the module's text. `files` are the files with data, each once; `prefetch` the inodes wanted first, in that order;
    `whiteouts` are directories with names that are OCI whiteouts, still in the tree."""

    version: int
    digester: Digester
    blobs: list[BlobEntry]
    root: Inode
    chunks: BlobChunks
    files: list[Inode]
    ref_chunk: "array[int]"
    ref_offset: "array[int]"
    prefetch: list[Inode]
    whiteouts: list[tuple[Inode, bytes]]
    entry_count: int
    warnings: tuple[str, ...]

    def apply_whiteouts(self, *, is_merged: bool) -> None:
        """Turn names that stand for absences into the marks of the model, or drop them where no layer is below (`is_merged`)."""
        for directory, name in self.whiteouts:
            del directory.children[name]
        if is_merged:
            return
        for directory, name in self.whiteouts:
            hidden = name[len(WHITEOUT) :]
            old = directory.children.get(hidden)
            if name == _OPAQUE:
                directory.is_opaque = True
            elif name.startswith(_AUFS) or hidden in (b"", b".", b".."):
                continue
            elif old is None:
                directory.children[hidden] = Inode(InodeKind.CHAR, mode=0)
            elif old.kind is InodeKind.DIRECTORY:
                old.is_opaque = True


def find_digester(flags: int) -> Digester:
    """The digester that superblock flags name.

    Raises:
        FormatError: none or two.
    """
    is_blake3, is_sha256 = bool(flags & FLAG_BLAKE3), bool(flags & FLAG_SHA256)
    if is_blake3 == is_sha256:
        raise FormatError(f"superblock flags {flags:#x} do not name one digest algorithm")
    return "blake3" if is_blake3 else "sha256"


def check_flags(flags: int) -> None:
    """Raises FormatError for images that Shoal does not read."""
    if flags & FLAG_ENCRYPTED:
        raise FormatError("the image is encrypted, which Shoal does not read")
    if flags & FLAG_TARFS:
        raise FormatError("the image is in tarfs mode, which Shoal does not read")


def check_chunk_size(size: int) -> None:
    """Raises FormatError unless it is a power of two within the format's limits."""
    if not MIN_CHUNK <= size <= MAX_CHUNK or size & (size - 1):
        raise FormatError(f"chunks of {size} bytes")


class Budget:
    """Bounds the work that a bootstrap of `size` bytes can cause."""

    __slots__ = ("_entries", "_left", "_size")

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._entries = 0

    def take(self, start: int, length: int) -> None:
        """Count bytes [start, start + length) as used by one thing.

        Raises:
            FormatError: they lie outside the bootstrap, or more was used than it has.
        """
        if start < 0 or length < 0 or start + length > self._size:
            raise FormatError(f"bytes [{start}, {start + length}) lie outside the bootstrap of {self._size}")
        self._left -= length
        if self._left < 0:
            raise FormatError("parts of the bootstrap overlap")

    def entry(self, path_length: int) -> None:
        """Count one name."""
        self._entries += 1
        if self._entries > MAX_INODES:
            raise FormatError(f"more than {MAX_INODES} files and directories in one bootstrap")
        if path_length > MAX_PATH_BYTES:
            raise FormatError(f"a path of {path_length} bytes")

    @property
    def entries(self) -> int:
        """Names counted."""
        return self._entries
