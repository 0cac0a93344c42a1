"""RAFS v5 (formats.md 3.1), into a `Bootstrap`.

Every name has an inode of its own here; those of one hard link have the same number in them. Chunk infos follow their inode, so a
chunk that several files use is described several times: they are one row where all that matters is equal.
"""

import struct
from array import array
from typing import Final

from agent.formats.model import FormatError, Inode, InodeKind
from agent.formats.nydus.bootstrap import (
    CHUNK_ENCRYPTED,
    CHUNK_HOLE,
    CHUNK_ROW,
    FLAG_COMPRESSORS,
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
from agent.formats.tree import MAX_INODES, MAX_NAME_BYTES, TreeBuilder, check_xattrs
from fsmount.erofs.layout import MAX_TARGET, decode_rdev

_MAGIC: Final = 0x52414653
_VERSION: Final = 0x500
_SUPER: Final = struct.Struct("<IIIIQQQQQIIIIQ")
"""magic, version, own size, chunk size, flags, inodes; inode, prefetch and blob table offsets; entries of the first two, size of
the third; entries and offset of the extended blob table."""
_SUPER_SIZE: Final = 8192
_EXTENDED_BLOB: Final = struct.Struct("<IIQQ40x")
_BLOB_ID_AT: Final = 8
_INODE: Final = struct.Struct("<32sQQIIIIQQQIIIHHIIq8x")
"""digest, parent, number, uid, gid, project, mode, size, blocks, flags, links, first child, children or chunks, size of the name
and of the target, rdev, nanoseconds, seconds."""
_HAS_LINKS: Final = 2
_HAS_XATTRS: Final = 4
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


def is_v5(data: bytes) -> bool:
    """Whether there is a superblock of RAFS v5."""
    return len(data) >= _SUPER_SIZE and data[:4] == _MAGIC.to_bytes(4, "little")


def parse_v5(data: bytes) -> Bootstrap:
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
        self._row_of: dict[tuple[bytes, int, int, int, int], int] = {}
        self._ref_chunk, self._ref_offset = array("I"), array("Q")
        self._files: list[Inode] = []
        self._whiteouts: list[tuple[Inode, bytes]] = []
        self._chunk_size = 0
        self._blob_count = 0
        self._offsets = array("I")
        self._linked: dict[int, Inode] = {}
        self._by_entry: dict[int, Inode] = {}
        # Directories to be read: (inode, first child, children, length of its path).
        self._pending: list[tuple[Inode, int, int, int]] = []

    def parse(self) -> Bootstrap:
        data = self._data
        if not is_v5(data):
            raise FormatError("the bootstrap is not RAFS v5")
        fields = _SUPER.unpack_from(data)
        _, version, own_size, self._chunk_size, flags, _, inode_table, prefetch, blob_table = fields[:9]
        inode_count, prefetch_count, blob_table_size, extended_count, extended = fields[9:]
        if version != _VERSION or own_size != _SUPER_SIZE:
            raise FormatError(f"RAFS of version {version:#x} with a superblock of {own_size} bytes")
        check_flags(flags)
        check_chunk_size(self._chunk_size)
        digester = find_digester(flags)
        compressors = [number for flag, number in FLAG_COMPRESSORS if flags & flag]
        if len(compressors) > 1:
            raise FormatError(f"superblock flags {flags:#x} name several compressors")
        if inode_count > MAX_INODES:
            raise FormatError(f"more than {MAX_INODES} files and directories in one bootstrap")
        self._budget.take(inode_table, 4 * inode_count)
        self._offsets = array("I", struct.unpack_from(f"<{inode_count}I", data, inode_table))
        blobs = self._read_blobs(blob_table, blob_table_size, extended, extended_count, compressors[0] if compressors else 0)
        self._blob_count = len(blobs)
        root = self._read_tree()
        wanted = []
        if prefetch_count:
            self._budget.take(prefetch, 4 * prefetch_count)
            numbers = struct.unpack_from(f"<{prefetch_count}I", data, prefetch)
            wanted = [self._by_entry[number - 1] for number in numbers if number - 1 in self._by_entry]
        return Bootstrap(
            5,
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

    def _read_blobs(self, start: int, size: int, extended: int, extended_count: int, compressor: int) -> list[BlobEntry]:
        self._budget.take(start, size)
        table = self._data[start : start + size]
        ids: list[str] = []
        at = 0
        while at + _BLOB_ID_AT < len(table):
            stop = table.find(b"\0", at + _BLOB_ID_AT)
            stop = len(table) if stop < 0 else stop
            name = table[at + _BLOB_ID_AT : stop]
            if not name:
                break
            ids.append(name.decode("ascii", "replace"))
            at = stop + 1
            if len(ids) > MAX_BLOBS:
                raise FormatError(f"more than {MAX_BLOBS} blobs")
        if extended_count > MAX_BLOBS:
            raise FormatError(f"{extended_count} rows in the extended blob table")
        if extended_count:
            self._budget.take(extended, _EXTENDED_BLOB.size * extended_count)
        entries = []
        for number, blob_id in enumerate(ids):
            chunk_count = features = csize = 0
            if number < extended_count:
                chunk_count, features, _, csize = _EXTENDED_BLOB.unpack_from(self._data, extended + _EXTENDED_BLOB.size * number)
            entry = BlobEntry(blob_id, compressor, 0, features, chunk_count, csize)
            entry.check()
            if entry.is_zran:
                raise FormatError("RAFS v5 with zran blobs")
            entries.append(entry)
        return entries

    # --- the tree ---------------------------------------------------------------------------------------------------------

    def _read_tree(self) -> Inode:
        _, root = self._inode(0, 0)
        if root.kind is not InodeKind.DIRECTORY:
            raise FormatError("the root of the bootstrap is not a directory")
        pending = self._pending
        while pending:
            directory, first, count, path_length = pending.pop()
            children, entry = directory.children, self._budget.entry
            # `first` is a number of an inode: one more than its place in the table.
            if count and not 2 <= first <= first + count - 1 <= len(self._offsets):
                raise FormatError(f"children {first} to {first + count - 1} of {len(self._offsets)} inodes")
            for place in range(first - 1, first - 1 + count):
                name, child = self._inode(place, path_length)
                entry(path_length + 1 + len(name))
                if name in (b"", b".", b"..") or b"/" in name or b"\0" in name or len(name) > MAX_NAME_BYTES:
                    raise FormatError(f"an entry with the name {name[:80]!r}")
                if name in children:
                    raise FormatError(f"two entries of the name {name[:80]!r} in one directory")
                children[name] = child
                if name.startswith(WHITEOUT):
                    self._whiteouts.append((directory, name))
        return root

    def _inode(self, place: int, path_length: int) -> tuple[bytes, Inode]:
        """(name, inode) at a place of the inode table."""
        data = self._data
        if place in self._by_entry or place >= len(self._offsets):
            raise FormatError(f"inode {place + 1} is missing or has two places in the tree")
        at = self._offsets[place] << 3
        self._budget.take(at, _INODE.size)
        fields = _INODE.unpack_from(data, at)
        (_, _, number, uid, gid, _, mode, size, _, flags, _, first, count) = fields[:13]
        name_size, target_size, rdev, nanoseconds, seconds = fields[13:]
        at += _INODE.size
        self._budget.take(at, name_size)
        name = data[at : at + name_size]
        at += -(-name_size // 8) * 8
        kind = _KINDS.get(mode & 0o170000)
        if kind is None or nanoseconds >= 1_000_000_000 or not -(1 << 62) < seconds < 1 << 62:
            raise FormatError(f"{name[:80]!r} has the mode {mode:#o} and the time {seconds}.{nanoseconds}")
        if flags & _HAS_LINKS:
            linked = self._linked.get(number)
            if linked is not None:
                if linked.kind is not kind or kind is InodeKind.DIRECTORY:
                    raise FormatError(f"{name[:80]!r} is a hard link to something else")
                self._by_entry[place] = linked
                return name, linked
        inode = Inode(kind, mode & 0o7777, uid, gid, seconds * 1_000_000_000 + nanoseconds)
        self._by_entry[place] = inode
        if flags & _HAS_LINKS:
            self._linked[number] = inode
        if kind is InodeKind.SYMLINK:
            self._budget.take(at, target_size)
            inode.target, inode.size = data[at : at + target_size].rstrip(b"\0"), target_size
            if not 0 < target_size <= MAX_TARGET or len(inode.target) != target_size or b"\0" in inode.target:
                raise FormatError(f"symlink {name[:80]!r} has a target of {target_size} bytes")
            at += -(-target_size // 8) * 8
        elif kind in (InodeKind.CHAR, InodeKind.BLOCK):
            inode.rdev = decode_rdev(rdev)
        elif kind is InodeKind.DIRECTORY:
            self._pending.append((inode, first, count, path_length + (1 + name_size if place else 0)))
        if flags & _HAS_XATTRS:
            pairs, at = self._xattrs(at, name)
            inode.xattrs = check_xattrs(pairs, name, self._notes)
        if kind is InodeKind.FILE and size:
            self._add_file(inode, size, at, count, name)
        return name, inode

    def _xattrs(self, at: int, name: bytes) -> tuple[list[tuple[bytes, bytes]], int]:
        """The pairs at `at`, and where they end."""
        self._budget.take(at, 8)
        (total,) = struct.unpack_from("<Q", self._data, at)
        at += 8
        self._budget.take(at, total)
        found, stop = [], at + total
        while at + 4 <= stop:
            (size,) = struct.unpack_from("<I", self._data, at)
            key, zero, value = self._data[at + 4 : at + 4 + size].partition(b"\0")
            if not zero or at + 4 + size > stop:
                raise FormatError(f"an xattr of {name[:80]!r} does not end inside its area")
            found.append((key, value))
            at += 4 + size
        return found, -(-stop // 8) * 8

    def _add_file(self, inode: Inode, size: int, at: int, count: int, name: bytes) -> None:
        if size > _MAX_FILE or count > -(-size // self._chunk_size):
            raise FormatError(f"file {name[:80]!r} of {size} bytes has {count} chunks")
        self._budget.take(at, CHUNK_ROW.size * count)
        inode.size = size
        inode.first_chunk = len(self._ref_chunk)
        filled = 0
        table = self._data[at : at + CHUNK_ROW.size * count]
        for digest, blob, flags, csize, usize, coffset, offset, place, index, _ in CHUNK_ROW.iter_unpack(table):
            if place != filled or not 0 < usize <= min(self._chunk_size, size - filled):
                raise FormatError(f"file {name[:80]!r} has a chunk of {usize} bytes at {place} where {filled} was due")
            if flags & CHUNK_ENCRYPTED:
                raise FormatError("the image is encrypted, which Shoal does not read")
            filled += usize
            if flags & CHUNK_HOLE:
                continue
            if blob >= self._blob_count:
                raise FormatError(f"file {name[:80]!r} has a chunk of blob {blob}, with {self._blob_count} blobs")
            key = (digest, blob, coffset, csize, usize)
            row = self._row_of.get(key)
            if row is None:
                row = self._row_of[key] = self._chunks.append(digest, blob, flags, csize, usize, coffset, offset, index)
            self._ref_chunk.append(row)
            self._ref_offset.append(place)
        if filled != size:
            raise FormatError(f"the chunks of file {name[:80]!r} end at {filled} of {size}")
        inode.chunk_count = len(self._ref_chunk) - inode.first_chunk
        self._files.append(inode)
