"""Read an EROFS image as a file tree, trusting nothing in it.

Serves the full-FUSE presentation: the bytes may come from anywhere, so every offset, length and count is bounded by the
image before it is used, and the only error that comes out is `ErofsError`. Understood is what `writer` makes and what other
writers make of the same parts: 4 KiB blocks, plain, inline and chunk-based layouts, any number of extra devices.

Work is bounded too: a lookup costs the logarithm of a directory's blocks, a listing its entries, `walk` at most as many
entries as an image of this size can hold without overlaps (overlapping directories could otherwise make it quadratic).
"""

import struct
from collections.abc import Iterator
from mmap import mmap
from typing import Final, NamedTuple

from fsmount.erofs.layout import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_BITS_MASK,
    CHUNK_INDEX,
    CHUNK_INDEXES,
    CHUNKED,
    COMPACT,
    DEVICE_SLOT,
    DEVICE_SLOT_SIZE,
    DIRENT,
    DIRENT_SIZE,
    EXTENDED,
    FLAT_INLINE,
    FLAT_PLAIN,
    INCOMPAT_CHUNKED,
    INCOMPAT_DEVICES,
    MAX_NAME,
    MAX_TARGET,
    NULL_BLOCK,
    SLOT,
    SUPER_MAGIC,
    SUPER_OFFSET,
    SUPERBLOCK,
    TYPE_BITS,
    XATTR_ACLS,
    XATTR_ENTRY,
    XATTR_HEADER_SIZE,
    XATTR_PREFIXES,
    ErofsError,
    FileKind,
    decode_rdev,
)

_KINDS: Final = {bits: FileKind(number) for number, bits in enumerate(TYPE_BITS) if bits}
_MAX_DEVICES: Final = 4096
_SMALLEST_ENTRY: Final = DIRENT_SIZE + 1
_UINT16: Final = struct.Struct("<H")


class InodeView(NamedTuple):
    """What stat tells of an inode; `mode` has the type bits."""

    kind: FileKind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    rdev: tuple[int, int]
    nlink: int


class _Raw(NamedTuple):
    """An inode with the places of its parts."""

    view: InodeView
    layout: int
    extra: int
    xattr_start: int
    xattr_stop: int


class ImageReader:
    """One image; the buffer must stay as it is while the reader is used.

    Directories' "." and ".." are not shown. Device ids count from 1, in the order of the superblock's table.
    """

    def __init__(self, data: bytes | bytearray | memoryview | mmap) -> None:
        """Check the superblock.

        Raises:
            ErofsError: not an EROFS image, or one with features that this reader lacks.
        """
        self._data = data
        self._size = len(data)
        if self._size < BLOCK:
            raise ErofsError(f"an image of {self._size} bytes is too short for EROFS")
        fields = SUPERBLOCK.unpack_from(data, SUPER_OFFSET)
        magic, block_bits, root, self._epoch, self._epoch_ns = fields[0], fields[3], fields[5], fields[7], fields[8]
        meta_block, xattr_block, incompat, devices, slot = fields[10], fields[11], fields[14], fields[16], fields[17]
        if magic != SUPER_MAGIC:
            raise ErofsError("not an EROFS image: wrong magic number")
        if block_bits != BLOCK_BITS:
            raise ErofsError(f"EROFS blocks of 2^{block_bits} bytes are not supported, only 4096")
        if incompat & ~(INCOMPAT_CHUNKED | INCOMPAT_DEVICES):
            raise ErofsError(f"EROFS features {incompat:#x} are not all supported")
        if self._epoch_ns >= 1_000_000_000:
            raise ErofsError("the superblock's time is not one")
        self._meta = meta_block << BLOCK_BITS
        self._xattr_base = xattr_block << BLOCK_BITS
        self._device_sizes = self._read_devices(devices, slot * DEVICE_SLOT_SIZE) if incompat & INCOMPAT_DEVICES else ()
        self.root_nid: int = root
        if self.inode(root).kind is not FileKind.DIRECTORY:
            raise ErofsError("the root inode is not a directory")

    def _read_devices(self, count: int, start: int) -> tuple[int, ...]:
        if count > _MAX_DEVICES:
            raise ErofsError(f"{count} extra devices are too many")
        self._check(start, count * DEVICE_SLOT_SIZE)
        slots = (DEVICE_SLOT.unpack_from(self._data, start + number * DEVICE_SLOT_SIZE) for number in range(count))
        return tuple((low | high << 32) << BLOCK_BITS for _, low, _, high, _ in slots)

    @property
    def device_sizes(self) -> tuple[int, ...]:
        """Bytes of each extra device, rounded up to blocks; device id 1 first."""
        return self._device_sizes

    def _check(self, start: int, length: int) -> None:
        # `unpack_from` takes negative offsets from the end, and slices shrink silently: both are refused here, first.
        if start < 0 or length < 0 or start + length > self._size:
            raise ErofsError(f"bytes [{start}, {start + length}) lie outside the image of {self._size}")

    def _bytes(self, start: int, length: int) -> bytes:
        self._check(start, length)
        return bytes(self._data[start : start + length])

    # -- inodes --

    def _raw(self, nid: int) -> _Raw:
        at = self._meta + nid * SLOT
        self._check(at, COMPACT.size)
        (i_format,) = _UINT16.unpack_from(self._data, at)
        layout = i_format >> 1 & 7
        if i_format & ~0xF or layout not in (FLAT_PLAIN, FLAT_INLINE, CHUNKED):
            raise ErofsError(f"inode {nid} has the unknown format {i_format:#x}")
        if i_format & 1:
            self._check(at, EXTENDED.size)
            _, count, mode, size, extra, _, uid, gid, seconds, nanoseconds, nlink = EXTENDED.unpack_from(self._data, at)
            at += EXTENDED.size
            if nanoseconds >= 1_000_000_000:
                raise ErofsError(f"inode {nid} has {nanoseconds} nanoseconds in its time")
        else:
            _, count, mode, nlink, size, later, extra, _, uid, gid = COMPACT.unpack_from(self._data, at)
            at += COMPACT.size
            seconds, nanoseconds = self._epoch + later, self._epoch_ns
        kind = _KINDS.get(mode & 0o170000)
        if kind is None:
            raise ErofsError(f"inode {nid} has the unknown mode {mode:#o}")
        if size >= 1 << 63:
            raise ErofsError(f"inode {nid} has {size} bytes")
        area = XATTR_HEADER_SIZE + 4 * (count - 1) if count else 0
        self._check(at, area)
        rdev = decode_rdev(extra) if kind is FileKind.CHAR or kind is FileKind.BLOCK else (0, 0)
        view = InodeView(kind, mode, uid, gid, seconds * 1_000_000_000 + nanoseconds, size, rdev, nlink)
        return _Raw(view, layout, extra, at, at + area)

    def inode(self, nid: int) -> InodeView:
        """Attributes of an inode.

        Raises:
            ErofsError: no sound inode is there.
        """
        return self._raw(nid).view

    def _content(self, raw: _Raw, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of a directory or symlink; they must not cross a block unless the layout is plain."""
        if raw.layout == FLAT_PLAIN:
            return self._bytes((raw.extra << BLOCK_BITS) + start, length)
        if raw.layout != FLAT_INLINE:
            raise ErofsError("a directory or symlink is kept in chunks")
        whole = raw.view.size & -BLOCK
        if start >= whole:
            return self._bytes(raw.xattr_stop + start - whole, length)
        return self._bytes((raw.extra << BLOCK_BITS) + start, length)

    # -- directories --

    def _directory(self, nid: int) -> _Raw:
        raw = self._raw(nid)
        if raw.view.kind is not FileKind.DIRECTORY:
            raise ErofsError(f"inode {nid} is not a directory")
        if raw.view.size > self._size:
            raise ErofsError(f"directory {nid} has {raw.view.size} bytes, more than the image")
        return raw

    def _block(self, raw: _Raw, index: int) -> tuple[bytes, int]:
        """A directory's block and its count of entries."""
        start = index << BLOCK_BITS
        block = self._content(raw, start, min(BLOCK, raw.view.size - start))
        if len(block) < DIRENT_SIZE:
            raise ErofsError("a directory block is too short for one entry")
        (names,) = _UINT16.unpack_from(block, 8)
        if names % DIRENT_SIZE or not DIRENT_SIZE <= names < len(block):
            raise ErofsError(f"a directory block's names begin at {names}")
        return block, names // DIRENT_SIZE

    @staticmethod
    def _entry(block: bytes, count: int, index: int) -> tuple[int, bytes, int]:
        """nid, name and kind number of an entry."""
        nid, start, kind = DIRENT.unpack_from(block, index * DIRENT_SIZE)
        if index + 1 < count:
            (stop,) = _UINT16.unpack_from(block, (index + 1) * DIRENT_SIZE + 8)
        else:
            stop = block.find(b"\0", start)
            if stop < 0:
                stop = len(block)
        if not (count * DIRENT_SIZE <= start < stop <= len(block) and stop - start <= MAX_NAME):
            raise ErofsError(f"a directory entry's name lies at [{start}, {stop}) of its block")
        name = block[start:stop]
        if b"/" in name or b"\0" in name:
            raise ErofsError("a directory entry's name has a byte that no name can have")
        return nid, name, kind

    def lookup(self, nid: int, name: bytes) -> int | None:
        """The inode that `name` stands for in directory `nid`; None if there is no such entry.

        Raises:
            ErofsError: not a sound directory.
        """
        raw = self._directory(nid)
        if name in (b".", b"..") or not raw.view.size:
            return None
        low, high = 0, (raw.view.size - 1) >> BLOCK_BITS
        while low < high:
            # The last block whose first name is not behind the one that is looked for.
            middle = (low + high + 1) >> 1
            block, count = self._block(raw, middle)
            if self._entry(block, count, 0)[1] <= name:
                low = middle
            else:
                high = middle - 1
        block, count = self._block(raw, low)
        low, high = 0, count
        while low < high:
            middle = (low + high) >> 1
            found, other, _ = self._entry(block, count, middle)
            if other == name:
                return found
            if other < name:
                low = middle + 1
            else:
                high = middle
        return None

    def entries(self, nid: int, start: int = 0) -> Iterator[tuple[bytes, int, FileKind, int]]:
        """Entries (name, nid, kind, next) of a directory in order; `start` is 0 or the `next` of the last entry seen.

        Raises:
            ErofsError: not a sound directory, when the unsound part is reached.
        """
        raw = self._directory(nid)
        position = max(0, start)
        while position < raw.view.size:
            index = position >> BLOCK_BITS
            block, count = self._block(raw, index)
            for number in range((position % BLOCK + DIRENT_SIZE - 1) // DIRENT_SIZE, count):
                child, name, kind = self._entry(block, count, number)
                if name in (b".", b".."):
                    continue
                if not 1 <= kind <= FileKind.SYMLINK:
                    raise ErofsError(f"a directory entry has the unknown type {kind}")
                last = number + 1 == count
                yield (
                    name,
                    child,
                    FileKind(kind),
                    (index + 1 << BLOCK_BITS if last else (index << BLOCK_BITS) + (number + 1) * DIRENT_SIZE),
                )
            position = (index + 1) << BLOCK_BITS

    def walk(self) -> Iterator[tuple[bytes, int, InodeView]]:
        """Everything below the root as (path, nid, inode), parents first; paths begin with "/", the root is "/".

        Raises:
            ErofsError: something is unsound, a directory has two names, or there are more entries than fit.
        """
        budget = self._size // _SMALLEST_ENTRY
        seen = {self.root_nid}
        yield b"/", self.root_nid, self.inode(self.root_nid)
        pending = [(b"/", self.root_nid)]
        while pending:
            path, nid = pending.pop()
            for name, child, kind, _ in self.entries(nid):
                budget -= 1
                if budget < 0:
                    raise ErofsError("the image has more directory entries than it has room for: directories overlap")
                view = self.inode(child)
                if view.kind is not kind:
                    raise ErofsError(f"inode {child} is not of the type that its directory says")
                child_path = path + name
                yield child_path, child, view
                if kind is FileKind.DIRECTORY:
                    if child in seen:
                        raise ErofsError(f"directory {child} is in the tree twice")
                    seen.add(child)
                    pending.append((child_path + b"/", child))

    # -- symlinks, attributes, data --

    def readlink(self, nid: int) -> bytes:
        """Where a symlink points.

        Raises:
            ErofsError: not a sound symlink.
        """
        raw = self._raw(nid)
        if raw.view.kind is not FileKind.SYMLINK:
            raise ErofsError(f"inode {nid} is not a symlink")
        if raw.view.size > MAX_TARGET:
            raise ErofsError(f"symlink {nid} has a target of {raw.view.size} bytes")
        return self._content(raw, 0, raw.view.size)

    def _xattr(self, at: int, stop: int) -> tuple[bytes | None, bytes, int]:
        """Full name (None: a prefix unknown here), value and end of the entry at `at`, which must end by `stop`."""
        if at + XATTR_ENTRY.size > stop:
            raise ErofsError("an extended attribute is cut off")
        self._check(at, XATTR_ENTRY.size)
        name_length, number, value_length = XATTR_ENTRY.unpack_from(self._data, at)
        at += XATTR_ENTRY.size
        if at + name_length + value_length > stop:
            raise ErofsError("an extended attribute is cut off")
        rest = self._bytes(at, name_length)
        value = self._bytes(at + name_length, value_length)
        prefix = XATTR_PREFIXES.get(number)
        name = None if prefix is None or (number in XATTR_ACLS and rest) or b"\0" in rest else prefix + rest
        return name, value, at + (name_length + value_length + 3 & -4)

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        """Extended attributes by full name.

        Raises:
            ErofsError: not a sound inode, or its attributes are not.
        """
        raw = self._raw(nid)
        at, stop = raw.xattr_start, raw.xattr_stop
        found: dict[bytes, bytes] = {}
        if at == stop:
            return found
        shared = self._data[at + 4]
        at += XATTR_HEADER_SIZE
        if at + 4 * shared > stop:
            raise ErofsError(f"inode {nid} has {shared} shared attributes in an area too small for them")
        places = struct.unpack_from(f"<{shared}I", self._data, at)
        at += 4 * shared
        while at < stop:
            name, value, at = self._xattr(at, stop)
            if name is not None:
                found.setdefault(name, value)
        for place in places:
            name, value, _ = self._xattr(self._xattr_base + 4 * place, self._size)
            if name is not None:
                found.setdefault(name, value)
        return found

    def map_range(self, nid: int, offset: int, length: int) -> list[tuple[int, int, int, int]]:
        """Where bytes [offset, offset + length) of a file are, cut at its end: (file offset, length, device id, device offset)
        in order; device id 0 stands for zeros that are stored nowhere.

        Raises:
            ErofsError: not a sound file, or its data are outside every extra device.
        """
        raw = self._raw(nid)
        if raw.view.kind is not FileKind.FILE:
            raise ErofsError(f"inode {nid} is not a file")
        if offset < 0 or length < 0:
            raise ErofsError(f"no bytes [{offset}, {offset + length}) in a file")
        stop = min(offset + length, raw.view.size)
        if offset >= stop:
            return []
        if raw.layout != CHUNKED:
            raise ErofsError(f"file {nid} has its data in the metadata image")
        if raw.extra & ~(CHUNK_BITS_MASK | CHUNK_INDEXES) or not raw.extra & CHUNK_INDEXES:
            raise ErofsError(f"file {nid} has the unknown chunk format {raw.extra:#x}")
        bits = BLOCK_BITS + (raw.extra & CHUNK_BITS_MASK)
        table = (raw.xattr_stop + 7) & -8
        first, last = offset >> bits, (stop - 1) >> bits
        self._check(table + first * CHUNK_INDEX.size, (last - first + 1) * CHUNK_INDEX.size)
        extents: list[tuple[int, int, int, int]] = []
        for number in range(first, last + 1):
            _, device, block = CHUNK_INDEX.unpack_from(self._data, table + number * CHUNK_INDEX.size)
            start = max(offset, number << bits)
            size = min(stop, (number + 1) << bits) - start
            if block == NULL_BLOCK:
                device, place = 0, 0
            else:
                place = (block << BLOCK_BITS) + start - (number << bits)
                if not 1 <= device <= len(self._device_sizes) or place + size > self._device_sizes[device - 1]:
                    raise ErofsError(f"file {nid} has data at {place} of device {device}, outside of it")
            if extents:
                before = extents[-1]
                if before[2] == device and (device == 0 or before[3] + before[1] == place):
                    extents[-1] = (before[0], before[1] + size, device, before[3])
                    continue
            extents.append((start, size, device, place))
        return extents
