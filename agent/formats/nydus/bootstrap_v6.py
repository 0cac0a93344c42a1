"""RAFS v6: an EROFS image with a blob table and a chunk table (formats.md 3.2), into a `Bootstrap`.

The kernel's own EROFS rules are enough for the tree; `fsmount.erofs.layout` has the records. Two things go beyond them: the high
bits of a chunk index hold the chunk's number in its blob, and a file has one index for each chunk of the superblock's size,
whatever the chunk bits of its inode say.
"""

import struct
from array import array
from typing import Final

from agent.formats.model import FormatError, Inode, InodeKind
from agent.formats.nydus.bootstrap import (
    CHUNK_ENCRYPTED,
    CHUNK_ROW,
    MAX_BLOBS,
    WHITEOUT,
    BlobChunks,
    BlobEntry,
    Bootstrap,
    Budget,
    check_chunk_size,
    check_flags,
    find_digester,
)
from agent.formats.tree import MAX_NAME_BYTES, TreeBuilder, check_xattrs
from fsmount.erofs.layout import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_INDEXES,
    CHUNKED,
    COMPACT,
    DIRENT,
    DIRENT_SIZE,
    EXTENDED,
    FLAT_INLINE,
    FLAT_PLAIN,
    FORMAT_EXTENDED,
    INCOMPAT_CHUNKED,
    INCOMPAT_DEVICES,
    MAX_TARGET,
    NULL_BLOCK,
    SLOT,
    SUPER_MAGIC,
    SUPER_OFFSET,
    SUPERBLOCK,
    XATTR_ENTRY,
    XATTR_HEADER_SIZE,
    XATTR_PREFIXES,
    decode_rdev,
)

_COMPAT_RAFS: Final = 0x4000_0000
_TARFS_BLOCK_BITS: Final = 9
_EXTENSION_OFFSET: Final = 1152
_EXTENSION: Final = struct.Struct("<QQIIQQQI")
"""flags, blob table offset and size, chunk size, chunk table offset and size, prefetch table offset and size."""
_BLOB: Final = struct.Struct("<64s4xIIIIIQQIIQQQ32s32sQQI")
"""id, chunk size, chunks, compressor, digester, features, size compressed, size, TOC size; compressor, offset, size compressed
and size of the chunk infos; digest of the TOC and of the separate meta blob; its size; IV; cipher."""
_BLOB_SIZE: Final = 256
_KINDS: Final = {
    0o100000: InodeKind.FILE,
    0o040000: InodeKind.DIRECTORY,
    0o020000: InodeKind.CHAR,
    0o060000: InodeKind.BLOCK,
    0o010000: InodeKind.FIFO,
    0o140000: InodeKind.SOCKET,
    0o120000: InodeKind.SYMLINK,
}
_MAX_FILE: Final = 1 << 50
_UINT16: Final = struct.Struct("<H")
_INDEX: Final = struct.Struct("<HHI")


def is_v6(data: bytes) -> bool:
    """Whether there is an EROFS superblock."""
    return len(data) >= BLOCK and data[SUPER_OFFSET : SUPER_OFFSET + 4] == SUPER_MAGIC.to_bytes(4, "little")


def parse_v6(data: bytes) -> Bootstrap:
    """Read a bootstrap.

    Raises:
        FormatError: it is not one, or not one that Shoal reads.
    """
    return _Parser(data).parse()


class _Parser:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._budget = Budget(len(data))
        self._notes = TreeBuilder()  # for its warnings
        self._chunks = BlobChunks()
        self._row_of: dict[tuple[int, int], int] = {}
        self._ref_chunk, self._ref_offset = array("I"), array("Q")
        self._files: list[Inode] = []
        self._whiteouts: list[tuple[Inode, bytes]] = []
        self._inodes: dict[int, Inode] = {}
        # A directory's data, to be read after its inode: (inode, layout, u, size, end of inode and xattrs, path length).
        self._pending: list[tuple[Inode, int, int, int, int, int]] = []
        self._root_nid = self._epoch = self._epoch_ns = self._meta = self._chunk_size = self._blob_count = 0

    def parse(self) -> Bootstrap:
        data = self._data
        if not is_v6(data):
            raise FormatError("the bootstrap is not RAFS v6: no EROFS superblock")
        fields = SUPERBLOCK.unpack_from(data, SUPER_OFFSET)
        compat, block_bits, self._root_nid, self._epoch, self._epoch_ns = fields[2], fields[3], fields[5], fields[7], fields[8]
        meta_block, incompat = fields[10], fields[14]
        if not compat & _COMPAT_RAFS:
            raise FormatError("the bootstrap is EROFS but not RAFS v6")
        if block_bits == _TARFS_BLOCK_BITS:
            raise FormatError("the image is in tarfs mode, which Shoal does not read")
        if block_bits != BLOCK_BITS or incompat & ~(INCOMPAT_CHUNKED | INCOMPAT_DEVICES):
            raise FormatError(f"RAFS v6 with blocks of 2^{block_bits} bytes and features {incompat:#x}")
        if self._epoch_ns >= 1_000_000_000 or not self._epoch < 1 << 62:
            raise FormatError("the superblock's time is not one")
        self._meta = meta_block << BLOCK_BITS
        (flags, blob_table, blob_size, self._chunk_size, chunk_table, chunk_size, prefetch, prefetch_size) = (
            _EXTENSION.unpack_from(data, _EXTENSION_OFFSET)
        )
        check_flags(flags)
        check_chunk_size(self._chunk_size)
        digester = find_digester(flags)
        blobs = self._read_blobs(blob_table, blob_size)
        self._blob_count = len(blobs)
        self._read_chunks(chunk_table, chunk_size)
        root = self._read_tree()
        wanted = self._read_prefetch(prefetch, prefetch_size)
        return Bootstrap(
            6,
            digester,
            blobs,
            root,
            self._chunks,
            self._files,
            self._ref_chunk,
            self._ref_offset,
            wanted,
            self._whiteouts,
            self._budget.entries,
            tuple(self._notes.warnings),
        )

    # --- tables -----------------------------------------------------------------------------------------------------------

    def _read_blobs(self, start: int, size: int) -> list[BlobEntry]:
        self._budget.take(start, size)
        if size % _BLOB_SIZE or size // _BLOB_SIZE > MAX_BLOBS:
            raise FormatError(f"a blob table of {size} bytes")
        blobs = []
        for at in range(start, start + size, _BLOB_SIZE):
            fields = _BLOB.unpack_from(self._data, at)
            blob_id, _, chunk_count, compressor, digester, features, csize, _, toc_size = fields[:9]
            name = blob_id.rstrip(b"\0").decode("ascii", "replace")
            tables = (*fields[9:16], fields[17])  # without the IV
            entry = BlobEntry(name, compressor, digester, features, chunk_count, csize, toc_size, *tables)
            entry.check()
            blobs.append(entry)
        return blobs

    def _read_chunks(self, start: int, size: int) -> None:
        if size % CHUNK_ROW.size:
            raise FormatError(f"a chunk table of {size} bytes")
        self._budget.take(start, size)
        rows, append, count = self._row_of, self._chunks.append, self._blob_count
        table = memoryview(self._data)[start : start + size]
        for digest, blob, flags, csize, usize, coffset, offset, _, index, _ in CHUNK_ROW.iter_unpack(table):
            if blob >= count or flags & CHUNK_ENCRYPTED:
                raise FormatError(f"chunk {index} of blob {blob} (flags {flags:#x}), with {count} blobs")
            rows[(blob, index)] = append(digest, blob, flags, csize, usize, coffset, offset, index)

    def _read_prefetch(self, start: int, size: int) -> list[Inode]:
        if not size:
            return []
        self._budget.take(start, size)
        found = []
        for nid in struct.unpack_from(f"<{size // 4}I", self._data, start):
            if nid and nid in self._inodes:
                found.append(self._inodes[nid])
        return found

    # --- the tree ---------------------------------------------------------------------------------------------------------

    def _read_tree(self) -> Inode:
        root = self._inode(self._root_nid, b"/", 0)
        if root.kind is not InodeKind.DIRECTORY:
            raise FormatError("the root of the bootstrap is not a directory")
        pending = self._pending
        while pending:
            directory, layout, extra, size, end, path_length = pending.pop()
            children, entry = directory.children, self._budget.entry
            for nid, name in self._entries(layout, extra, size, end):
                length = path_length + 1 + len(name)
                entry(length)
                if name in children:
                    raise FormatError(f"two entries of the name {name[:80]!r} in one directory")
                child = self._inodes.get(nid)
                if child is None:
                    child = self._inode(nid, name, length)
                elif child.kind is InodeKind.DIRECTORY:
                    raise FormatError(f"directory {name[:80]!r} has two names")
                children[name] = child
                if name.startswith(WHITEOUT):
                    self._whiteouts.append((directory, name))
        return root

    def _entries(self, layout: int, extra: int, size: int, end: int) -> list[tuple[int, bytes]]:
        """(nid, name) of a directory's entries, without "." and ".."."""
        found: list[tuple[int, bytes]] = []
        take, data = self._budget.take, self._data
        whole = size & -BLOCK if layout == FLAT_INLINE else size
        for at in range(0, size, BLOCK):
            start = (extra << BLOCK_BITS) + at if at < whole else end
            length = min(BLOCK, size - at)
            take(start, length)
            block = data[start : start + length]
            names = int.from_bytes(block[8:10], "little")
            if names % DIRENT_SIZE or not DIRENT_SIZE <= names <= length:
                raise FormatError("a directory block that is none")
            entries = list(DIRENT.iter_unpack(block[:names]))
            last = len(entries) - 1
            for number, (nid, name_at, _) in enumerate(entries):
                stop = entries[number + 1][1] if number < last else length
                name = block[name_at:stop]
                if number == last:
                    name = name.partition(b"\0")[0]
                if name_at < names or not 0 < len(name) <= MAX_NAME_BYTES or b"/" in name or b"\0" in name:
                    raise FormatError(f"a directory entry with the name {name[:80]!r}")
                if name not in (b".", b".."):
                    found.append((nid, name))
        return found

    def _inode(self, nid: int, name: bytes, path_length: int) -> Inode:
        data, at = self._data, self._meta + nid * SLOT
        self._budget.take(at, COMPACT.size)
        (i_format,) = _UINT16.unpack_from(data, at)
        layout = i_format >> 1
        if i_format & FORMAT_EXTENDED:
            self._budget.take(at + COMPACT.size, EXTENDED.size - COMPACT.size)
            _, count, mode, size, extra, _, uid, gid, seconds, nanoseconds, _ = EXTENDED.unpack_from(data, at)
            at += EXTENDED.size
            if nanoseconds >= 1_000_000_000 or not -(1 << 62) < seconds < 1 << 62:
                raise FormatError(f"{name[:80]!r} has the time {seconds}.{nanoseconds}")
        else:
            _, count, mode, _, size, later, extra, _, uid, gid = COMPACT.unpack_from(data, at)
            at += COMPACT.size
            seconds, nanoseconds = self._epoch + later, self._epoch_ns
        kind = _KINDS.get(mode & 0o170000)
        if kind is None or layout not in (FLAT_PLAIN, FLAT_INLINE, CHUNKED):
            raise FormatError(f"{name[:80]!r} has the mode {mode:#o} and the layout {layout}")
        inode = Inode(kind, mode & 0o7777, uid, gid, seconds * 1_000_000_000 + nanoseconds)
        self._inodes[nid] = inode
        if count:
            area = XATTR_HEADER_SIZE + 4 * (count - 1)
            self._budget.take(at, area)
            inode.xattrs = check_xattrs(self._xattrs(at, area, name), name, self._notes)
            at += area
        if kind is InodeKind.FILE:
            if size:
                self._add_file(inode, size, layout, extra, at, name)
        elif kind is InodeKind.DIRECTORY:
            if layout == CHUNKED or size > len(data):
                raise FormatError(f"directory {name[:80]!r} of layout {layout} has {size} bytes")
            self._pending.append((inode, layout, extra, size, at, path_length))
        elif kind is InodeKind.SYMLINK:
            if layout == CHUNKED or not 0 < size <= MAX_TARGET:
                raise FormatError(f"symlink {name[:80]!r} of layout {layout} has {size} bytes")
            start = at if layout == FLAT_INLINE else extra << BLOCK_BITS
            self._budget.take(start, size)
            inode.target, inode.size = data[start : start + size], size
            if b"\0" in inode.target:
                raise FormatError(f"symlink {name[:80]!r} has a NUL byte in its target")
        elif kind in (InodeKind.CHAR, InodeKind.BLOCK):
            inode.rdev = decode_rdev(extra)
        return inode

    def _add_file(self, inode: Inode, size: int, layout: int, extra: int, at: int, name: bytes) -> None:
        if layout != CHUNKED or not extra & CHUNK_INDEXES or size > _MAX_FILE:
            raise FormatError(f"file {name[:80]!r} of {size} bytes has the layout {layout} ({extra:#x})")
        inode.size = size
        chunk_size = self._chunk_size
        count = -(-size // chunk_size)
        at = -(-at // 8) * 8
        self._budget.take(at, 8 * count)
        inode.first_chunk = len(self._ref_chunk)
        offset = 0
        for high, device, block in _INDEX.iter_unpack(self._data[at : at + 8 * count]):
            if block != NULL_BLOCK:
                expected = min(chunk_size, size - offset)
                self._ref_chunk.append(self._find_chunk((device & 0xFF) - 1, high | (device >> 8) << 16, block, expected, name))
                self._ref_offset.append(offset)
            offset += chunk_size
        inode.chunk_count = len(self._ref_chunk) - inode.first_chunk
        self._files.append(inode)

    def _find_chunk(self, blob: int, index: int, block: int, size: int, name: bytes) -> int:
        row = self._row_of.get((blob, index))
        if row is None:
            if not 0 <= blob < self._blob_count:
                raise FormatError(f"file {name[:80]!r} has a chunk of blob {blob}, with {self._blob_count} blobs")
            row = self._row_of[(blob, index)] = self._chunks.append_open(blob, index, block << BLOCK_BITS, size)
        if self._chunks.size[row] != size or self._chunks.offset[row] != block << BLOCK_BITS:
            raise FormatError(f"file {name[:80]!r} does not fit chunk {index} of blob {blob}")
        return row

    # --- xattrs -----------------------------------------------------------------------------------------------------------

    def _xattrs(self, at: int, area: int, name: bytes) -> list[tuple[bytes, bytes]]:
        stop = at + area
        if self._data[at + 4]:
            raise FormatError(f"{name[:80]!r} has shared xattrs, which RAFS does not know")
        at += XATTR_HEADER_SIZE
        found: list[tuple[bytes, bytes]] = []
        while at + XATTR_ENTRY.size <= stop:
            at += self._xattr(at, stop, name, found)
        return found

    def _xattr(self, at: int, stop: int, name: bytes, found: list[tuple[bytes, bytes]]) -> int:
        name_length, prefix, value_length = XATTR_ENTRY.unpack_from(self._data, at)
        start = at + XATTR_ENTRY.size
        if start + name_length + value_length > stop:
            raise FormatError(f"an xattr of {name[:80]!r} does not end inside its area")
        text = XATTR_PREFIXES.get(prefix)
        if text is not None:
            value_at = start + name_length
            found.append((text + self._data[start:value_at], self._data[value_at : value_at + value_length]))
        elif name_length or prefix or value_length:
            self._notes.warn(f"an xattr of {name[:80]!r} was dropped: its namespace {prefix} cannot be kept")
        padded: int = -(-(name_length + value_length) // 4) * 4
        return XATTR_ENTRY.size + padded
