"""The full-FUSE presentation: a layer's whole tree, read from its EROFS metadata image by this process.

For machines whose kernel cannot mount the image itself. Attributes are those that the kernel's EROFS would show, down to the
block count, so that a layer looks the same under every presentation.
"""

import errno
import mmap
import os
import stat
from collections.abc import Sequence
from typing import Final, Protocol

import pyfuse3

from fsmount.erofs import ImageReader
from fsmount.root import FOREVER
from fsmount.volumes import Volume

_NID_MASK: Final = 0xFFFFFFFF


class Emit(Protocol):
    """Adds an entry to a directory listing; false when the kernel's buffer is full."""

    def __call__(self, name: bytes, attributes: pyfuse3.EntryAttributes, next_id: int) -> bool: ...


class Tree:
    """One layer's image, mapped, with the volumes that its devices 1, 2, ... are."""

    def __init__(self, layer_id: int, image_path: str, volumes: Sequence[Volume]) -> None:
        """Maps the image. Raises OSError, ErofsError."""
        self._base = layer_id << 32
        self._volumes = tuple(volumes)
        fd = os.open(image_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._image = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._reader = ImageReader(self._image)

    @property
    def root(self) -> int:
        """FUSE inode number of the tree's root."""
        return self._base | self._reader.root_nid

    def attributes(self, ino: int) -> pyfuse3.EntryAttributes:
        """Attributes of an inode."""
        inode = self._reader.inode(ino & _NID_MASK)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(ino)
        entry.st_mode = pyfuse3.ModeT(inode.mode)
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_size = inode.size
        entry.st_blocks = -(-inode.size // 4096) * 8
        entry.st_rdev = os.makedev(*inode.rdev)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = inode.mtime_ns
        entry.entry_timeout = entry.attr_timeout = FOREVER
        return entry

    def lookup(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        """The entry of a directory."""
        nid = self._reader.lookup(parent & _NID_MASK, name)
        if nid is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.attributes(self._number(nid))

    def list(self, ino: int, start: int, emit: Emit) -> None:
        """Tell the entries of a directory from position `start` on; the first two positions are those of "." and ".."."""
        for position, name in enumerate((b".", b"..")):
            # The kernel ignores the attributes of these two but for the inode number, and that of ".." nobody relies on.
            if start <= position and not emit(name, self.attributes(ino), position + 1):
                return
        for name, nid, _kind, following in self._reader.entries(ino & _NID_MASK, max(0, start - 2)):
            if not emit(name, self.attributes(self._number(nid)), following + 2):
                return

    def readlink(self, ino: int) -> bytes:
        """Target of a symbolic link."""
        return bytes(self._reader.readlink(ino & _NID_MASK))

    def xattrs(self, ino: int, *, is_privileged: bool) -> dict[bytes, bytes]:
        """Extended attributes by full name; `trusted.` ones only for the privileged, as in the kernel."""
        found = self._reader.xattrs(ino & _NID_MASK)
        if is_privileged:
            return found
        return {name: value for name, value in found.items() if not name.startswith(b"trusted.")}

    def is_file(self, ino: int) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self._reader.inode(ino & _NID_MASK).mode)

    async def read(self, ino: int, offset: int, length: int, *, is_direct: bool) -> memoryview | bytes:
        """Bytes of a file, cut at its end; see `Volume.read`. The answer may lie in the volumes' shared buffer."""
        nid = ino & _NID_MASK
        length = min(length, self._reader.inode(nid).size - offset)
        if length <= 0:
            return b""
        extents = self._reader.map_range(nid, offset, length)
        if len(extents) == 1 and extents[0][2] and extents[0][1] == length:
            _at, _length, device, device_offset = extents[0]
            return await self._volumes[device - 1].read(device_offset, length, is_direct=is_direct)
        data = bytearray(length)
        for at, count, device, device_offset in extents:
            if device:
                part = await self._volumes[device - 1].read(device_offset, count, is_direct=is_direct)
                data[at - offset : at - offset + len(part)] = part
        return bytes(data)

    def _number(self, nid: int) -> int:
        if not 0 < nid <= _NID_MASK:
            raise pyfuse3.FUSEError(errno.EIO)
        return self._base | nid
