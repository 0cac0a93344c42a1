"""Loop devices over files, configured in one step (LOOP_CONFIGURE, Linux 5.8), read-only and freed by their last user.

Blocking; call from a worker thread. See linux/loop.h for the numbers.
"""

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Final

_CTL_GET_FREE: Final = 0x4C82
_CONFIGURE: Final = 0x4C0A
_LOOP_MAJOR: Final = 7
_READ_ONLY: Final = 1
_AUTOCLEAR: Final = 4
_DIRECT_IO: Final = 16
"""Without it the driver reads the file through the page cache, one request after the other: a read that waits for its bytes
would hold up every other read of the device, also of what is present."""
_CONFIG: Final = struct.Struct("<II" + "QQQQQIIII64s64s32sQQ" + "64x")
"""loop_config: fd, block size; then loop_info64: device, inode, rdevice, offset, sizelimit, number, encryption type and key size,
flags, file name, crypt name, key, init[2]; then 8 reserved words."""

_ATTEMPTS: Final = 32


def attach(path: str, readahead_kib: int) -> tuple[int, str]:
    """A block device over the file: its open descriptor and its path.

    The device lives until the descriptor is closed and nothing has it mounted.

    Raises:
        OSError: no loop device can be had, or the file cannot be one.
    """
    backing = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            for _ in range(_ATTEMPTS):
                number = fcntl.ioctl(control, _CTL_GET_FREE)
                device = _node(number)
                fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
                name = os.fsencode(path)[-63:]
                try:
                    fcntl.ioctl(
                        fd,
                        _CONFIGURE,
                        _CONFIG.pack(
                            backing, 4096, 0, 0, 0, 0, 0, 0, 0, 0, _READ_ONLY | _AUTOCLEAR | _DIRECT_IO, name, b"", b"", 0, 0
                        ),
                    )
                except OSError as error:
                    os.close(fd)
                    if error.errno == errno.EBUSY:  # somebody else took it since GET_FREE
                        continue
                    raise
                _set_readahead(number, readahead_kib)
                return fd, device
        finally:
            os.close(control)
    finally:
        os.close(backing)
    raise OSError(errno.EBUSY, "others take every free loop device")


def _node(number: int) -> str:
    """The device file; made where no devtmpfs makes it (containers)."""
    path = f"/dev/loop{number}"
    if not os.path.exists(path):
        try:
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(_LOOP_MAJOR, number))
        except FileExistsError:
            return path
    return path


def _set_readahead(number: int, kib: int) -> None:
    try:
        Path(f"/sys/block/loop{number}/queue/read_ahead_kb").write_text(str(kib))
    except OSError:
        return  # a read-only /sys costs speed, nothing else
