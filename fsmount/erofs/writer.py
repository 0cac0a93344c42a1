"""Write a tree as an EROFS metadata image over one volume.

This stands in the way of a layer's first start, so it is built for speed: one pass collects (an inode object met again is a
hard link), one places, one packs. No recursion: trees may be as deep as they like. Time and memory are linear in the entries.

Placement. Directories and symlinks carry inline tails, which may not cross a block. They are placed first, densely, and close
to the superblock, as every path walk needs them; the gaps they leave are filled with the other inodes, in directory order.
The kernels before 6.15 want inode, xattrs and tail of a symlink in one block, not just the tail: that is obeyed for both.

Times. A compact inode has the superblock's time on every kernel if its own time field is 0; before 6.15 that field is
ignored. So the superblock carries the most frequent time of the tree, inodes with just that time are compact, all others
extended.
"""

import gc
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate, repeat
from typing import Final, Protocol

from fsmount.erofs._xattrs import Warnings, XattrTable
from fsmount.erofs.checksum import crc32c
from fsmount.erofs.layout import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_BITS_MASK,
    CHUNK_INDEX,
    CHUNK_INDEXES,
    CHUNKED,
    COMPACT,
    COMPAT_CHECKSUM,
    COMPAT_MTIME,
    DEVICE_SLOT,
    DEVICE_SLOT_SIZE,
    DIRENT,
    DIRENT_SIZE,
    EXTENDED,
    FLAT_INLINE,
    FLAT_PLAIN,
    FORMAT_EXTENDED,
    INCOMPAT_CHUNKED,
    INCOMPAT_DEVICES,
    MAX_NAME,
    MAX_TARGET,
    NULL_BLOCK,
    SLOT,
    SUPER_END,
    SUPER_MAGIC,
    SUPER_OFFSET,
    SUPERBLOCK,
    TYPE_BITS,
    XATTR_HEADER_SIZE,
    ErofsError,
    FileKind,
    encode_rdev,
)

MAX_VOLUME: Final = (NULL_BLOCK - 1) << BLOCK_BITS
"""Largest volume, a block under 16 TiB: block numbers have 32 bits and the last one means a hole."""

_OPAQUE: Final = {b"trusted.overlay.opaque": b"y"}
_OPAQUE_USER: Final = {b"user.overlay.opaque": b"y"}
_ORIGIN: Final = {b"trusted.overlay.origin": b""}
_NOBODY: Final = 65534
_WORST_RDEV: Final = (0xFFF, 0xFFFFF)
_MAX_CHUNK_BITS: Final = CHUNK_BITS_MASK + BLOCK_BITS
_SMALL: Final = 512
"""Inodes up to this size, with what belongs to them, look for a place in a gap."""

_FILE, _DIRECTORY, _CHAR, _BLOCK, _SYMLINK = (
    FileKind.FILE.value,
    FileKind.DIRECTORY.value,
    FileKind.CHAR.value,
    FileKind.BLOCK.value,
    FileKind.SYMLINK.value,
)


class Node(Protocol):
    """An inode of the tree to write: the attributes of `agent.formats.model.Inode` that matter here."""

    @property
    def kind(self) -> int:
        """A FileKind."""

    @property
    def mode(self) -> int:
        """Permission bits, 07777."""

    @property
    def uid(self) -> int:
        """Owner."""

    @property
    def gid(self) -> int:
        """Group."""

    @property
    def mtime_ns(self) -> int:
        """Modification time in nanoseconds since 1970, maybe negative."""

    @property
    def size(self) -> int:
        """Bytes of a file."""

    @property
    def target(self) -> bytes:
        """Where a symlink points."""

    @property
    def rdev(self) -> tuple[int, int]:
        """Major and minor of a device; (0, 0) on a CHAR is a whiteout."""

    @property
    def xattrs(self) -> Mapping[bytes, bytes]:
        """Extended attributes by full name."""

    @property
    def children(self) -> Mapping[bytes, "Node"]:
        """A directory's entries; a hard link is the same object under several names."""

    @property
    def is_opaque(self) -> bool:
        """Does the directory hide what lower layers have in it."""

    @property
    def volume_offset(self) -> int:
        """Where a file's data begin in the volume, on a 4 KiB boundary; negative for a file that is one hole."""


class _Record:
    """A node on its way into the image."""

    __slots__ = ("area", "cuts", "data_block", "format", "head", "links", "names", "nid", "node", "number", "size", "targets")

    def __init__(self, node: Node, number: int) -> None:
        self.node = node
        self.number = number
        self.links = 1
        self.nid = 0
        self.format = FLAT_PLAIN << 1
        self.size = 0
        self.head = 0
        """Bytes of inode and xattr area."""
        self.area = b""
        self.data_block = 0
        self.names: list[bytes] = []
        """A directory's names in order, with "." and "..", and beside them whom they name."""
        self.targets: list[_Record] = []
        self.cuts: list[int] = []
        """Index of the first name of each directory block."""


def write_image(
    root: Node,
    *,
    volume_size: int,
    uuid: bytes = b"\0" * 16,
    warnings: list[str] | None = None,
    user_markers: bool = True,
) -> bytearray:
    """Make the metadata image of a tree whose file data lie in a volume of `volume_size` bytes (device 1).

    The same tree gives the same bytes. What cannot be stored exactly (foreign xattr namespaces, absurd ids) is left out or
    replaced, and told in `warnings` (sentences are appended). `user_markers` writes `user.overlay.opaque` beside
    `trusted.overlay.opaque`, for overlays mounted with `userxattr`.

    Raises:
        ErofsError: the tree cannot be a file system (bad names, a directory under two names, data outside the volume).
    """
    if not 0 <= volume_size <= MAX_VOLUME:
        raise ErofsError(f"a volume of {volume_size} bytes does not fit into EROFS with 4 KiB blocks")
    notes = Warnings()
    writer = _Writer(volume_size, notes, user_markers)
    # Nothing below leaves cyclic garbage, but its many objects would set off full collections, each of which holds every
    # thread still: 4 of 110 to 240 ms with 100,000 entries. A second writer at the same time at worst gets them back.
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        image = writer.write(root, uuid)
    finally:
        if was_collecting:
            gc.enable()
    if warnings is not None:
        warnings += notes.sentences()
    return image


def _cut_directory(names: list[bytes]) -> tuple[list[int], int]:
    """Where each 4 KiB block of a directory begins (index of its first name), and the bytes of the whole."""
    total = DIRENT_SIZE * len(names) + sum(map(len, names))
    if total <= BLOCK:
        return [0], total
    cuts, used = [0], 0
    for index, name in enumerate(names):
        need = DIRENT_SIZE + len(name)
        if used + need > BLOCK:
            cuts.append(index)
            used = 0
        used += need
    return cuts, (len(cuts) - 1) * BLOCK + used


class _Writer:
    def __init__(self, volume_size: int, warnings: Warnings, user_markers: bool) -> None:
        self._device_blocks = -(-volume_size // BLOCK)
        self._warnings = warnings
        self._opaque = _OPAQUE | _OPAQUE_USER if user_markers else _OPAQUE
        self._xattrs = XattrTable(warnings)
        self._directories: list[_Record] = []
        self._others: list[_Record] = []
        self._keyed: list[tuple[_Record, tuple[tuple[bytes, bytes], ...]]] = []
        self._times: Counter[int] = Counter()
        self._epoch = 0
        self._epoch_ns = 0

    def write(self, root: Node, uuid: bytes) -> bytearray:
        self._collect(root)
        self._xattrs.freeze()
        for record, key in self._keyed:
            record.area = self._xattrs.area(key)
        self._choose_epoch()
        end = self._place()
        image = bytearray(self._place_data(end) << BLOCK_BITS)
        xattr_block = len(image) >> BLOCK_BITS
        image += self._xattrs.shared
        image += bytes(-len(image) % BLOCK)
        self._pack_inodes(image)
        self._pack_directories(image)
        self._pack_super(image, xattr_block, uuid)
        return image

    # -- first pass: who is there --

    def _collect(self, root: Node) -> None:
        """Breadth first: the list of directories grows while it is walked."""
        if root.kind != _DIRECTORY:
            raise ErofsError("the root of a tree must be a directory")
        top = _Record(root, 1)
        by_id: dict[int, _Record] = {id(root): top}
        directories, others = self._directories, self._others
        directories.append(top)
        top.targets = [top]
        for directory in directories:
            parent = directory.targets[0]
            children = directory.node.children
            names = self._check_names(list(children))
            names += (b".", b"..")
            names.sort()
            targets: list[_Record] = []
            subdirectories, has_whiteouts = 0, False
            for name in names:
                node = children.get(name)
                if node is None:
                    targets.append(directory if name == b"." else parent)
                    continue
                identity = id(node)
                kind = node.kind
                if identity in by_id:
                    record = by_id[identity]
                    if kind == _DIRECTORY:
                        raise ErofsError(f"directory {name[:80]!r} is in the tree twice")
                    record.links += 1
                else:
                    record = by_id[identity] = _Record(node, len(by_id) + 1)
                    if kind == _DIRECTORY:
                        record.targets = [directory]
                        directories.append(record)
                        subdirectories += 1
                    else:
                        others.append(record)
                        self._note(record)
                if kind == _CHAR and node.rdev == (0, 0):
                    has_whiteouts = True
                targets.append(record)
            directory.names, directory.targets = names, targets
            directory.links = 2 + subdirectories
            directory.cuts, directory.size = _cut_directory(names)
            self._note(directory, has_whiteouts)

    @staticmethod
    def _check_names(names: list[bytes]) -> list[bytes]:
        if names:
            joined = b"".join(names)
            if b"/" in joined or b"\0" in joined or b"." in names or b".." in names:
                raise ErofsError("a directory has a name that no file can have")
            lengths = set(map(len, names))
            if min(lengths) < 1 or max(lengths) > MAX_NAME:
                raise ErofsError(
                    f"a directory has a name of {min(lengths)} or {max(lengths)} bytes; 1 to {MAX_NAME} are possible"
                )
        return names

    def _note(self, record: _Record, has_whiteouts: bool = False) -> None:
        node = record.node
        self._times[node.mtime_ns] += 1
        xattrs = node.xattrs
        if node.is_opaque and node.kind == _DIRECTORY:
            xattrs = {**xattrs, **self._opaque}
        if has_whiteouts:
            # Without it overlayfs lists the whiteouts of a directory that exists in one layer only.
            xattrs = {**xattrs, **_ORIGIN}
        if xattrs:
            self._keyed.append((record, self._xattrs.add(xattrs)))

    # -- second pass: where they go --

    def _choose_epoch(self) -> None:
        time_ns, _ = max(self._times.items(), key=lambda item: (item[1], item[0]))
        self._epoch, self._epoch_ns = divmod(time_ns, 1_000_000_000)
        if not 0 <= self._epoch < 1 << 62:
            self._epoch, self._epoch_ns = 0, 0

    def _measure(self, records: Iterable[_Record]) -> None:
        """Choose compact or extended (bit 0 of `format`) and find the size of inode and xattr area."""
        epoch = self._epoch * 1_000_000_000 + self._epoch_ns
        for record in records:
            node = record.node
            if (
                node.mtime_ns == epoch
                and 0 <= node.uid <= 0xFFFF
                and 0 <= node.gid <= 0xFFFF
                and record.links <= 0xFFFF
                and node.size <= 0xFFFFFFFF
            ):
                record.format = FLAT_PLAIN << 1
                record.head = COMPACT.size + len(record.area)
            else:
                record.format = FLAT_PLAIN << 1 | FORMAT_EXTENDED
                record.head = EXTENDED.size + len(record.area)

    def _place(self) -> int:
        """Give every inode its position; the result is the end of the last one."""
        self._measure(self._directories)
        self._measure(self._others)
        position = SUPER_END + DEVICE_SLOT_SIZE
        gaps: list[tuple[int, int]] = []
        rest: list[_Record] = []
        root = self._directories[0]
        for records in (self._directories, self._others):
            for record in records:
                kind = record.node.kind
                if kind == _SYMLINK:
                    target = record.node.target
                    if len(target) > MAX_TARGET or b"\0" in target:
                        raise ErofsError(f"a symlink's target of {len(target)} bytes is too long or holds NUL")
                    record.size = len(target)
                elif kind != _DIRECTORY:
                    rest.append(record)
                    continue
                total = record.head + record.size % BLOCK
                is_inline = record.head < total <= BLOCK
                if not is_inline and record is not root:  # the root's number must fit into 16 bits
                    rest.append(record)  # its data are whole blocks elsewhere
                    continue
                if not is_inline:
                    total = record.head
                elif position % BLOCK + total > BLOCK:
                    start = position
                    position += -position % BLOCK
                    gaps.append((start, position))
                if is_inline:
                    record.format |= FLAT_INLINE << 1
                record.nid = position // SLOT
                position = (position + total + SLOT - 1) & -SLOT
        return self._fill(rest, gaps, position)

    def _fill(self, records: list[_Record], gaps: list[tuple[int, int]], end: int) -> int:
        """Place what has no inline tail: in the gaps while they last, then behind everything."""
        hollow = iter(gaps)
        position, stop = next(hollow, (end, 0))
        for record in records:
            total = record.head
            if record.node.kind == _FILE:
                size = record.size = record.node.size
                if size:
                    if not 0 < size <= MAX_VOLUME:
                        raise ErofsError(f"a file of {size} bytes does not fit into EROFS with 4 KiB blocks")
                    record.format |= CHUNKED << 1
                    # Twice the largest chunk is more than any volume: there are one or two indexes.
                    total = (total + 7 & -8) + CHUNK_INDEX.size * -(-size >> _MAX_CHUNK_BITS)
            if total > _SMALL:
                record.nid = end // SLOT
                end = (end + total + SLOT - 1) & -SLOT
                continue
            while stop and position + total > stop:
                position, stop = next(hollow, (end, 0))
            if not stop:
                position = end
            record.nid = position // SLOT
            position = (position + total + SLOT - 1) & -SLOT
            if not stop:
                end = position
        return end

    def _place_data(self, end: int) -> int:
        """Give directories and symlinks their whole blocks; the result is the count of blocks so far."""
        block = (end + BLOCK - 1) >> BLOCK_BITS
        for records in (self._directories, self._others):
            for record in records:
                if record.node.kind not in (_DIRECTORY, _SYMLINK):
                    continue
                is_inline = record.format & FLAT_INLINE << 1
                count = record.size >> BLOCK_BITS if is_inline else (record.size + BLOCK - 1) >> BLOCK_BITS
                record.data_block = block if count else NULL_BLOCK if is_inline else 0
                block += count
        return block

    # -- third pass: bytes --

    def _pack_inodes(self, image: bytearray) -> None:
        pack_compact, pack_extended = COMPACT.pack_into, EXTENDED.pack_into
        for records in (self._directories, self._others):
            for record in records:
                node, at, area = record.node, record.nid * SLOT, record.area
                kind = node.kind
                i_format = record.format
                if i_format >> 1 == CHUNKED:
                    extra = self._pack_chunks(image, record)
                elif kind in (_CHAR, _BLOCK):
                    extra = self._rdev(node.rdev)
                else:
                    extra = record.data_block
                count = 1 + (len(area) - XATTR_HEADER_SIZE) // 4 if area else 0
                mode = TYPE_BITS[kind] | node.mode & 0o7777
                if i_format & FORMAT_EXTENDED:
                    seconds, nanoseconds = divmod(node.mtime_ns, 1_000_000_000)
                    if not -(1 << 63) <= seconds < 1 << 63:
                        seconds, nanoseconds = self._replace("modification time", seconds, 0), 0
                    uid, gid = node.uid, node.gid
                    if not 0 <= uid <= 0xFFFFFFFF:
                        uid = self._replace("owner", uid, _NOBODY)
                    if not 0 <= gid <= 0xFFFFFFFF:
                        gid = self._replace("group", gid, _NOBODY)
                    pack_extended(
                        image,
                        at,
                        i_format,
                        count,
                        mode,
                        record.size,
                        extra,
                        record.number,
                        uid,
                        gid,
                        seconds,
                        nanoseconds,
                        record.links,
                    )
                    at += EXTENDED.size
                else:
                    pack_compact(
                        image, at, i_format, count, mode, record.links, record.size, 0, extra, record.number, node.uid, node.gid
                    )
                    at += COMPACT.size
                if area:
                    image[at : at + len(area)] = area
                if kind == _SYMLINK:
                    if not i_format & FLAT_INLINE << 1:
                        at = record.data_block << BLOCK_BITS
                    else:
                        at += len(area)
                    image[at : at + record.size] = node.target

    def _pack_chunks(self, image: bytearray, record: _Record) -> int:
        """Write the index of a file's one extent; the result is the chunk format."""
        size, offset = record.size, record.node.volume_offset
        blocks = (size + BLOCK - 1) >> BLOCK_BITS
        first = NULL_BLOCK
        if offset >= 0:
            if offset % BLOCK or (offset >> BLOCK_BITS) + blocks > self._device_blocks:
                raise ErofsError(f"a file's {size} bytes at {offset} of the volume are not on blocks of it")
            first = offset >> BLOCK_BITS
        bits = min((blocks - 1).bit_length(), CHUNK_BITS_MASK)
        at = (record.nid * SLOT + record.head + 7) & -8
        while blocks > 0:
            CHUNK_INDEX.pack_into(image, at, 0, 1 if offset >= 0 else 0, first)
            if offset >= 0:
                first += 1 << bits
            at += CHUNK_INDEX.size
            blocks -= 1 << bits
        return bits | CHUNK_INDEXES

    def _replace(self, what: str, value: int, by: int) -> int:
        self._warnings.add(f"{what} {value:.3g} cannot be stored and was replaced by {by}")
        return by

    def _rdev(self, rdev: tuple[int, int]) -> int:
        major, minor = rdev
        if not (0 <= major <= _WORST_RDEV[0] and 0 <= minor <= _WORST_RDEV[1]):
            # Not cut to what fits: 0:0 would come out as a whiteout.
            self._warnings.add(f"a device {major}:{minor} cannot be stored and was replaced by {_WORST_RDEV[0]}:{_WORST_RDEV[1]}")
            major, minor = _WORST_RDEV
        return encode_rdev(major, minor)

    def _pack_directories(self, image: bytearray) -> None:
        pack = DIRENT.pack
        for record in self._directories:
            names, targets, cuts = record.names, record.targets, record.cuts
            inline_at = record.nid * SLOT + record.head
            last = len(cuts) - 1
            for index, start in enumerate(cuts):
                stop = cuts[index + 1] if index < last else len(names)
                block_names = names[start:stop]
                block_targets = targets[start:stop]
                offsets = accumulate(map(len, block_names), initial=DIRENT_SIZE * len(block_names))
                head = b"".join(map(pack, [t.nid for t in block_targets], offsets, [t.node.kind for t in block_targets]))
                data = head + b"".join(block_names)
                at = (record.data_block + index) << BLOCK_BITS
                if index == last and record.format & FLAT_INLINE << 1:
                    at = inline_at
                image[at : at + len(data)] = data
            # Parents and children hold each other; let go bit by bit, or all of it waits for one long garbage collection.
            record.names, record.targets = [], []

    def _pack_super(self, image: bytearray, xattr_block: int, uuid: bytes) -> None:
        blocks = len(image) >> BLOCK_BITS
        if blocks >= NULL_BLOCK:
            raise ErofsError("the tree needs more than 16 TiB of metadata")
        SUPERBLOCK.pack_into(
            image,
            SUPER_OFFSET,
            SUPER_MAGIC,
            0,
            COMPAT_CHECKSUM | COMPAT_MTIME,
            BLOCK_BITS,
            0,
            self._directories[0].nid,
            len(self._directories) + len(self._others),
            self._epoch,
            self._epoch_ns,
            blocks,
            0,
            xattr_block,
            uuid,
            b"shoal",
            INCOMPAT_CHUNKED | INCOMPAT_DEVICES,
            0,
            1,
            SUPER_END // DEVICE_SLOT_SIZE,
            *repeat(0, 9),
        )
        DEVICE_SLOT.pack_into(image, SUPER_END, b"", self._device_blocks, blocks, 0, 0)
        # The sum is CRC-32C without the final inversion, over the rest of the first block.
        checksum = crc32c(memoryview(image)[SUPER_OFFSET:BLOCK]) ^ 0xFFFFFFFF
        struct.pack_into("<I", image, SUPER_OFFSET + 4, checksum)
