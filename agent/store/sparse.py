"""What the store needs of sparse files and the standard library lacks: hole punching, hole finding, real disk usage."""

import ctypes
import errno
import fcntl
import os
import struct
from typing import Final

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_BLOCK: Final = 4096
_ZEROS: Final = bytes(_BLOCK)
_FICLONERANGE: Final = 0x4020940D
_CLONE: Final = struct.Struct("=qQQQ")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


def punch_hole(fd: int, start: int, stop: int) -> bool:
    """Give the disk blocks of [start, stop) back; the bytes read as zeros, those outside the range stay as they are.

    Gives False where the file system cannot do it for a part of a file; a whole file is emptied there by truncation.

    Raises:
        OSError: the disk failed.
    """
    if start >= stop:
        return True
    if _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, start, stop - start) == 0:
        return True
    reason = ctypes.get_errno()
    if reason not in {errno.EOPNOTSUPP, errno.ENOSYS}:
        raise OSError(reason, os.strerror(reason))
    size = os.fstat(fd).st_size
    if start > 0 or stop < size:
        return False
    os.ftruncate(fd, 0)
    os.ftruncate(fd, size)
    return True


def clone_range(source_fd: int, source_offset: int, size: int, fd: int, offset: int) -> bool:
    """Let `fd` share the disk blocks of another file; False where the file system cannot, for these files or this range.

    Raises:
        OSError: the disk failed.
    """
    try:
        fcntl.ioctl(fd, _FICLONERANGE, _CLONE.pack(source_fd, source_offset, size, offset))
    except OSError as exc:
        if exc.errno in {errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.ETXTBSY}:
            return False
        raise
    return True


def has_data(fd: int, start: int, stop: int) -> bool:
    """Whether no block of [start, stop) is a hole. Allocated is not the same as complete: a block may be half written."""
    if start >= stop:
        return True
    try:
        return os.lseek(fd, start, os.SEEK_HOLE) >= stop
    except OSError as exc:
        if exc.errno == errno.ENXIO:  # start lies behind the end of the file
            return False
        raise


def allocated_bytes(fd: int) -> int:
    """Bytes of disk that the file takes."""
    return os.fstat(fd).st_blocks * 512  # st_blocks counts 512-byte units whatever the file system's block is (stat(2))


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """pwrite all of it: the call may write less, on a disk that is about to be full for one."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def write_content(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """`write_all`, but whole blocks of nothing but zeros become a hole: a sparse file in an image takes no disk space here."""
    view = memoryview(data)
    start, stop = -(-offset // _BLOCK) * _BLOCK, (offset + len(view)) // _BLOCK * _BLOCK
    if start < stop and _is_zeros(view) and punch_hole(fd, start, stop):
        write_all(fd, view[: start - offset], offset)
        write_all(fd, view[stop - offset :], stop)
    else:
        write_all(fd, view, offset)


def _is_zeros(view: memoryview) -> bool:
    # In steps, so that nearly every other chunk is told apart by its first bytes.
    return all(bytes(view[at : at + _BLOCK]) == _ZEROS[: min(_BLOCK, len(view) - at)] for at in range(0, len(view), _BLOCK))


def read_exactly(fd: int, offset: int, size: int) -> bytes:
    """pread all of it.

    Raises:
        OSError: the disk failed, or (EIO) the file ends too early.
    """
    data = os.pread(fd, size, offset)
    if len(data) == size:
        return data
    parts = [data]
    got = len(data)
    while got < size:
        data = os.pread(fd, size - got, offset + got)
        if not data:
            raise OSError(errno.EIO, f"the file ends {size - got} bytes too early")
        parts.append(data)
        got += len(data)
    return b"".join(parts)
