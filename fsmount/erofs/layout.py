"""EROFS on disk: the numbers and records that the writer and the reader share.

The subset that Shoal writes: 4 KiB blocks, no compression, one extra device (the volume). An image is::

    byte 1024   superblock (128 bytes), then one device slot (128 bytes)
    byte 1280   inodes, the root first; each inode is followed by its xattr area and its chunk index or inline tail
    then        whole blocks of directories and of long symlink targets
    then        the shared xattr area

All integers are little-endian. An inode's number (nid) is its byte position / 32. Facts and names follow the kernel's
fs/erofs/erofs_fs.h; what old kernels demand beyond that is said where it is obeyed.
"""

import struct
from enum import IntEnum
from typing import Final

from fsmount.errors import ShoalError


class ErofsError(ShoalError):
    """A tree that EROFS cannot hold, or bytes that are not a sound EROFS image."""


class FileKind(IntEnum):
    """What an inode is; the numbers are EROFS directory entry types."""

    FILE = 1
    DIRECTORY = 2
    CHAR = 3
    BLOCK = 4
    FIFO = 5
    SOCKET = 6
    SYMLINK = 7


TYPE_BITS: Final = (0, 0o100000, 0o040000, 0o020000, 0o060000, 0o010000, 0o140000, 0o120000)
"""`S_IFMT` part of a mode, by FileKind."""

BLOCK_BITS: Final = 12
BLOCK: Final = 1 << BLOCK_BITS
SLOT: Final = 32
"""Unit of inode positions."""

SUPER_OFFSET: Final = 1024
SUPER_MAGIC: Final = 0xE0F5E1E2
SUPER_END: Final = SUPER_OFFSET + 128
DEVICE_SLOT_SIZE: Final = 128

SUPERBLOCK: Final = struct.Struct("<IIIBBHQqIIII16s16sIHHHBBIQBBHIQ8x")
"""magic, checksum, compat, block bits, ext slots, root nid, inodes, epoch, fixed nsec, blocks, meta block, xattr block, uuid,
volume name, incompat, compression, extra devices, device slot offset / 128, directory block bits, xattr prefix count, xattr
prefix start, packed nid, xattr filter, ishare prefix, reserved, build time, 8-byte root nid."""

DEVICE_SLOT: Final = struct.Struct("<64sIIHH52x")
"""tag, blocks, unified block address, and the high 16 bits of both."""

COMPAT_CHECKSUM: Final = 1
COMPAT_MTIME: Final = 2
INCOMPAT_CHUNKED: Final = 4
INCOMPAT_DEVICES: Final = 8

COMPACT: Final = struct.Struct("<HHHHIIIIHH4x")
"""format, xattr count, mode, nlink, size, mtime, u, ino, uid, gid."""

EXTENDED: Final = struct.Struct("<HHH2xQIIIIqII16x")
"""format, xattr count, mode, size, u, ino, uid, gid, mtime seconds, mtime nanoseconds, nlink."""

FORMAT_EXTENDED: Final = 1
FLAT_PLAIN: Final = 0
FLAT_INLINE: Final = 2
CHUNKED: Final = 4
NULL_BLOCK: Final = 0xFFFFFFFF
CHUNK_BITS_MASK: Final = 0x1F
CHUNK_INDEXES: Final = 0x20

CHUNK_INDEX: Final = struct.Struct("<HHI")
"""high 16 bits of the start block, device id, start block."""

DIRENT: Final = struct.Struct("<QHBx")
"""nid, offset of the name in the block, FileKind."""
DIRENT_SIZE: Final = 12
MAX_NAME: Final = 255
MAX_TARGET: Final = 4095
"""Longest symlink target that Linux follows (PATH_MAX with its NUL)."""

XATTR_HEADER_SIZE: Final = 12
XATTR_ENTRY: Final = struct.Struct("<BBH")
"""length of the name without prefix, prefix number, length of the value; padded to 4 bytes behind the value."""
XATTR_PREFIXES: Final = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
XATTR_ACLS: Final = (2, 3)
MAX_XATTR_AREA: Final = (0xFFFF - 1) * 4 + XATTR_HEADER_SIZE
MAX_XATTR_VALUE: Final = 0xFFFF
MAX_XATTR_NAME: Final = 255
MAX_SHARED_XATTRS: Final = 255


def encode_rdev(major: int, minor: int) -> int:
    """The kernel's `new_encode_dev`: 12 bits of major, 20 bits of minor."""
    return (minor & 0xFF) | major << 8 | (minor & 0xFFF00) << 12


def decode_rdev(rdev: int) -> tuple[int, int]:
    """Major and minor of an on-disk device number."""
    return (rdev >> 8) & 0xFFF, (rdev & 0xFF) | (rdev >> 12) & 0xFFF00
