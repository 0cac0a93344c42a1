"""A RAFS v6 bootstrap: an EROFS image of the merged tree with nydus' own tables in it (formats.md 3.2).

Order: superblocks and device table; from the next block the blob table and the prefetch table; from the next block the
inodes, the root first, each followed by its xattrs and its chunk indexes or inline tail; whole blocks of directories and long
symlinks; and the chunk table. Inodes count from one block before the root's, so that no inode has number 0.

Inodes are extended ones, xattrs inline, files always in chunks of the image's one size: the part of EROFS that nydus' own
reader knows. Inodes with inline tails, which may not cross a block, are placed first, the others fill the gaps.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Final

import attrs

from agent.formats.model import FormatError, Inode, InodeKind
from agent.formats.nydus_writer.blob import WrittenBlob, clean
from agent.formats.nydus_writer.merge import MergedTree, merge_layers
from agent.formats.nydus_writer.records import (
    BLOCK,
    CHUNK_BYTES,
    COMPAT_RAFS_V6,
    COMPRESSOR_FLAGS,
    DEVICES_OFFSET,
    EXTENDED_SUPER,
    EXTENDED_SUPER_OFFSET,
    FLAG_DIGESTS_INLINED,
    FLAG_OWNERS,
    FLAG_PLAIN_TEXT,
    FLAG_SHA256,
    FLAG_XATTRS,
)
from agent.formats.nydus_writer.tables import BlobTables
from fsmount.erofs.layout import (
    BLOCK_BITS,
    CHUNK_INDEXES,
    CHUNKED,
    DEVICE_SLOT_SIZE,
    DIRENT,
    DIRENT_SIZE,
    EXTENDED,
    FLAT_INLINE,
    FLAT_PLAIN,
    FORMAT_EXTENDED,
    INCOMPAT_CHUNKED,
    INCOMPAT_DEVICES,
    MAX_XATTR_AREA,
    SLOT,
    SUPER_MAGIC,
    SUPER_OFFSET,
    SUPERBLOCK,
    TYPE_BITS,
    XATTR_ACLS,
    XATTR_ENTRY,
    XATTR_HEADER_SIZE,
    XATTR_PREFIXES,
    encode_rdev,
)

MAX_PREFETCH: Final = 1 << 16
MAX_WARNINGS: Final = 100

_WORST_RDEV: Final = (0xFFF, 0xFFFFF)


@attrs.frozen(eq=False)
class Bootstrap:
    """`missing` are the prefetch paths that the image does not have."""

    image: bytearray
    missing: tuple[bytes, ...]
    warnings: tuple[str, ...]


class _Record:
    """An inode on its way into the image."""

    __slots__ = (
        "area",
        "cuts",
        "data_block",
        "head",
        "indexes",
        "inode",
        "layout",
        "links",
        "names",
        "number",
        "position",
        "size",
        "targets",
    )

    def __init__(self, inode: Inode, number: int) -> None:
        self.inode = inode
        self.number = number
        self.links = 1
        self.layout = FLAT_PLAIN
        self.size = 0
        self.area = b""
        self.head = EXTENDED.size
        """Bytes of inode and xattr area."""
        self.position = 0
        self.data_block = 0
        self.indexes = b""
        self.names: list[bytes] = []
        """A directory's names in order, with "." and "..", and beside them whom they name."""
        self.targets: list[_Record] = []
        self.cuts: list[int] = []
        """Index of the first name of each directory block."""


def build_bootstrap(layers: Sequence[WrittenBlob], prefetch: Sequence[bytes] = ()) -> Bootstrap:
    """Merge the layers, the lowest first, into one image.

    Raises:
        FormatError: the layers do not belong together, or there is more than the format can hold.
    """
    tables = BlobTables(layers)
    image = _Image(tables, merge_layers([layer.root for layer in layers]), layers[0] if layers else None)
    missing = image.build(prefetch)
    return Bootstrap(image.data, tuple(missing), tuple(image.warnings))


class _Image:
    def __init__(self, tables: BlobTables, tree: MergedTree, sample: WrittenBlob | None) -> None:
        self._tables = tables
        self._tree = tree
        self._chunk_size = CHUNK_BYTES if sample is None else sample.chunk_size
        self._flags = FLAG_SHA256 | FLAG_OWNERS | FLAG_DIGESTS_INLINED | FLAG_PLAIN_TEXT
        self._flags |= COMPRESSOR_FLAGS["zstd" if sample is None else sample.compressor]
        self._directories: list[_Record] = []
        self._others: list[_Record] = []
        self._meta_block = 0
        self.warnings: list[str] = []
        self.data = bytearray()

    def build(self, prefetch: Sequence[bytes]) -> list[bytes]:
        records = self._collect()
        wanted, missing = self._find(prefetch, records)
        tables = self._tables
        blobs = tables.blob_entries()
        blobs_at = _round_up(DEVICES_OFFSET + DEVICE_SLOT_SIZE * len(tables.blobs))
        wanted_at = blobs_at + len(blobs)
        start = _round_up(wanted_at + 4 * len(wanted))
        self._meta_block = (start >> BLOCK_BITS) - 1
        end = _round_up(self._place_data(self._place(start)))
        chunk_rows = tables.chunk_rows()
        image = self.data = bytearray(_round_up(end + len(chunk_rows)))
        image[blobs_at:wanted_at] = blobs
        for number, record in enumerate(wanted):
            image[wanted_at + 4 * number : wanted_at + 4 * number + 4] = self._nid(record).to_bytes(4, "little")
        image[end : end + len(chunk_rows)] = chunk_rows
        self._pack_inodes()
        self._pack_directories()
        # Each name counts, as the reference builder has it.
        self._pack_super(1 + sum(len(record.inode.children) for record in self._directories))
        EXTENDED_SUPER.pack_into(
            image,
            EXTENDED_SUPER_OFFSET,
            self._flags,
            blobs_at,
            len(blobs),
            self._chunk_size,
            end,
            len(chunk_rows),
            wanted_at if wanted else 0,
            4 * len(wanted),
        )
        slots = tables.device_slots(len(image) >> BLOCK_BITS)
        image[DEVICES_OFFSET : DEVICES_OFFSET + len(slots)] = slots
        return missing

    def _warn(self, text: str) -> None:
        if text not in self.warnings and len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)

    def _nid(self, record: _Record) -> int:
        return (record.position - (self._meta_block << BLOCK_BITS)) // SLOT

    # --- who is there -----------------------------------------------------------------------------------------------------

    def _collect(self) -> dict[int, _Record]:
        """All inodes by `id`, breadth first; the list of directories grows while it is walked."""
        root = self._tree.root
        top = _Record(root, 1)
        top.targets = [top]
        records = {id(root): top}
        areas: dict[tuple[tuple[bytes, bytes], ...], bytes] = {}
        self._directories.append(top)
        for directory in self._directories:
            parent = directory.targets[0]
            children = directory.inode.children
            names = sorted([*children, b".", b".."])
            targets: list[_Record] = []
            directory.links = 2
            for name in names:
                inode = children.get(name)
                if inode is None:
                    targets.append(directory if name == b"." else parent)
                    continue
                record = records.get(id(inode))
                if record is not None:
                    record.links += 1
                else:
                    record = records[id(inode)] = _Record(inode, len(records) + 1)
                    if inode.kind is InodeKind.DIRECTORY:
                        record.targets = [directory]
                        directory.links += 1
                        self._directories.append(record)
                    else:
                        self._describe(record)
                        self._others.append(record)
                targets.append(record)
            directory.names, directory.targets = names, targets
            directory.cuts, directory.size = _cut(names)
        for record in records.values():
            if record.inode.xattrs:
                self._flags |= FLAG_XATTRS
                key = tuple(sorted(record.inode.xattrs.items()))
                if key not in areas:
                    areas[key] = self._xattr_area(record.inode.xattrs)
                record.area = areas[key]
                record.head += len(record.area)
        return records

    def _describe(self, record: _Record) -> None:
        inode = record.inode
        if inode.kind is InodeKind.SYMLINK:
            record.size = len(inode.target)
        elif inode.kind is InodeKind.FILE:
            record.size = inode.size
            record.layout = CHUNKED
            if inode.chunk_count:
                record.indexes = self._tables.indexes_of(inode, self._tree.layers[id(inode)])

    def _xattr_area(self, xattrs: Mapping[bytes, bytes]) -> bytes:
        entries = bytearray()
        for name, value in sorted(xattrs.items()):
            for number, prefix in XATTR_PREFIXES.items():
                is_whole = number in XATTR_ACLS
                if name == prefix if is_whole else name.startswith(prefix):
                    break
            else:
                self._warn(f"extended attribute {name[:80]!r} was dropped: EROFS does not store its namespace")
                continue
            if is_whole and not (value[:4] == b"\2\0\0\0" and len(value) % 8 == 4):
                # The kernel would refuse all access to such a file.
                self._warn(f"extended attribute {name[:80]!r} was dropped: its value is not a POSIX ACL")
                continue
            rest = name[len(prefix) :]
            entry = XATTR_ENTRY.pack(len(rest), number, len(value)) + rest + value
            entry += bytes(-len(entry) % 4)
            if XATTR_HEADER_SIZE + len(entries) + len(entry) > MAX_XATTR_AREA:
                self._warn(f"extended attribute {name[:80]!r} was dropped: no room beside the inode's others")
                continue
            entries += entry
        return bytes(XATTR_HEADER_SIZE) + bytes(entries) if entries else b""

    def _find(self, prefetch: Sequence[bytes], records: dict[int, _Record]) -> tuple[list[_Record], list[bytes]]:
        """The inodes of these paths in their order, and the paths that lead nowhere."""
        found: dict[int, _Record] = {}
        missing: list[bytes] = []
        for path in prefetch:
            inode: Inode | None = self._tree.root
            for name in clean(path).split(b"/"):
                if name and inode is not None:
                    inode = inode.children.get(name)
            if inode is None:
                missing.append(path)
            else:
                found.setdefault(id(inode), records[id(inode)])
        if len(found) > MAX_PREFETCH:
            self._warn(f"{len(found) - MAX_PREFETCH} of the paths to read ahead were left out: the table has {MAX_PREFETCH}")
        return list(found.values())[:MAX_PREFETCH], missing

    # --- where it goes ----------------------------------------------------------------------------------------------------

    def _place(self, position: int) -> int:
        """Give every inode its position, the root first; the result is the end of the last one."""
        root = self._directories[0]
        gaps: list[tuple[int, int]] = []
        rest: list[_Record] = []
        for records in (self._directories, self._others):
            for record in records:
                if record.inode.kind not in (InodeKind.DIRECTORY, InodeKind.SYMLINK):
                    rest.append(record)
                    continue
                total = record.head + record.size % BLOCK
                if record.head < total <= BLOCK:
                    record.layout = FLAT_INLINE
                    if position % BLOCK + total > BLOCK:
                        gaps.append((position, _round_up(position)))
                        position = _round_up(position)
                elif record is root:
                    total = record.head
                else:
                    rest.append(record)
                    continue
                record.position = position
                position = position + total + SLOT - 1 & -SLOT
        free, at, stop = iter(gaps), 0, 0
        for record in rest:
            total = record.head + len(record.indexes)
            if record.indexes:
                total += -record.head % 8
            while at + total > stop:
                at, stop = next(free, (position, 1 << 62))
                if stop == 1 << 62:
                    break
            record.position = at
            at = at + total + SLOT - 1 & -SLOT
        return at if stop == 1 << 62 else position

    def _place_data(self, end: int) -> int:
        """Give directories and symlinks their whole blocks; the result is the end of them."""
        block = _round_up(end) >> BLOCK_BITS
        for records in (self._directories, self._others):
            for record in records:
                if record.inode.kind not in (InodeKind.DIRECTORY, InodeKind.SYMLINK):
                    continue
                is_inline = record.layout == FLAT_INLINE
                count = record.size >> BLOCK_BITS if is_inline else _round_up(record.size) >> BLOCK_BITS
                record.data_block = block if count else record.position >> BLOCK_BITS
                block += count
        return block << BLOCK_BITS

    # --- bytes ------------------------------------------------------------------------------------------------------------

    def _pack_inodes(self) -> None:
        image = self.data
        chunk_format = CHUNK_INDEXES | (self._chunk_size.bit_length() - 1 - BLOCK_BITS)
        for records in (self._directories, self._others):
            for record in records:
                inode, at = record.inode, record.position
                kind = inode.kind
                extra = record.data_block
                if kind is InodeKind.FILE:
                    extra = chunk_format
                elif kind in (InodeKind.CHAR, InodeKind.BLOCK):
                    extra = self._rdev(inode.rdev)
                seconds, nanoseconds = divmod(inode.mtime_ns, 1_000_000_000)
                if not -(1 << 63) <= seconds < 1 << 63:
                    self._warn("a modification time cannot be stored and was replaced by 1970")
                    seconds = nanoseconds = 0
                EXTENDED.pack_into(
                    image,
                    at,
                    record.layout << 1 | FORMAT_EXTENDED,
                    1 + (len(record.area) - XATTR_HEADER_SIZE) // 4 if record.area else 0,
                    TYPE_BITS[kind] | inode.mode & 0o7777,
                    record.size,
                    extra,
                    record.number,
                    inode.uid,
                    inode.gid,
                    seconds,
                    nanoseconds,
                    record.links,
                )
                image[at + EXTENDED.size : at + record.head] = record.area
                at += record.head
                if record.indexes:
                    at = at + 7 & -8
                    image[at : at + len(record.indexes)] = record.indexes
                elif kind is InodeKind.SYMLINK:
                    if record.layout != FLAT_INLINE:
                        at = record.data_block << BLOCK_BITS
                    image[at : at + record.size] = inode.target

    def _rdev(self, rdev: tuple[int, int]) -> int:
        if not (0 <= rdev[0] <= _WORST_RDEV[0] and 0 <= rdev[1] <= _WORST_RDEV[1]):
            self._warn(f"a device {rdev[0]}:{rdev[1]} cannot be stored and was replaced by {_WORST_RDEV[0]}:{_WORST_RDEV[1]}")
            rdev = _WORST_RDEV
        return encode_rdev(*rdev)

    def _pack_directories(self) -> None:
        image = self.data
        for record in self._directories:
            for index, start in enumerate(record.cuts):
                is_last = index + 1 == len(record.cuts)
                stop = len(record.names) if is_last else record.cuts[index + 1]
                names, targets = record.names[start:stop], record.targets[start:stop]
                offsets = accumulate(map(len, names), initial=DIRENT_SIZE * len(names))
                kinds = [int(target.inode.kind) for target in targets]
                data = b"".join([*map(DIRENT.pack, map(self._nid, targets), offsets, kinds), *names])
                at = (record.data_block + index) << BLOCK_BITS
                if is_last and record.layout == FLAT_INLINE:
                    at = record.position + record.head
                image[at : at + len(data)] = data

    def _pack_super(self, inodes: int) -> None:
        if self._nid(self._directories[0]) > 0xFFFF:
            raise FormatError("the image's root is out of reach")
        SUPERBLOCK.pack_into(
            self.data,
            SUPER_OFFSET,
            SUPER_MAGIC,
            0,
            COMPAT_RAFS_V6,
            BLOCK_BITS,
            0,
            self._nid(self._directories[0]),
            inodes,
            0,
            0,
            # Of the devices, as the reference builder has it: its reader refuses blocks without devices.
            sum(blob.uncompressed_size for blob in self._tables.blobs) >> BLOCK_BITS,
            self._meta_block,
            0,
            bytes(16),
            b"",
            INCOMPAT_CHUNKED | INCOMPAT_DEVICES,
            0,
            len(self._tables.blobs),
            DEVICES_OFFSET // DEVICE_SLOT_SIZE,
            *[0] * 9,
        )


def _round_up(size: int) -> int:
    return size + BLOCK - 1 & -BLOCK


def _cut(names: list[bytes]) -> tuple[list[int], int]:
    """Where each block of a directory begins (index of its first name), and the bytes of the whole."""
    cuts, used = [0], 0
    for index, name in enumerate(names):
        need = DIRENT_SIZE + len(name)
        if used + need > BLOCK:
            cuts.append(index)
            used = 0
        used += need
    return cuts, (len(cuts) - 1) * BLOCK + used
