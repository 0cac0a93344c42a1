"""Linux calls that the standard library lacks: mounting, and the list of what is mounted.

Standard library only, because the holder uses it too. Every function may block for as long as a file system does, and mounting
something that lies on our own FUSE root makes the kernel call back into this process: call them from a worker thread (ctypes
releases the interpreter lock), never from the event loop.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY: Final = 1
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8

# New mount API; numbers are the same on every architecture (Linux 5.2).
_MOVE_MOUNT: Final = 429
_FSOPEN: Final = 430
_FSCONFIG: Final = 431
_FSMOUNT: Final = 432
_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_MOUNT_ATTR_RDONLY: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_AT_FDCWD: Final = -100

_PR_SET_NAME: Final = 15


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """mount(2). Raises OSError."""
    result = _libc.mount(os.fsencode(source), os.fsencode(target), fstype.encode(), ctypes.c_ulong(flags), os.fsencode(data))
    _check(result, f"mount {fstype} at {target}")


def bind(source: str, target: str, *, read_only: bool = True) -> None:
    """Show the tree at `source` also at `target`. Raises OSError."""
    mount(source, target, "none", MS_BIND, "")
    if read_only:
        mount("none", target, "none", MS_BIND | MS_REMOUNT | MS_RDONLY, "")


def mount_configured(fstype: str, target: str, options: Sequence[tuple[str, str]]) -> None:
    """Mount read-only through fsopen, fsconfig, fsmount and move_mount; unlike mount(2) no page limit and no quoting.

    Each value is limited to 255 bytes by the kernel. Raises OSError; its text carries the kernel's own messages.
    """
    context = _check(_libc.syscall(_FSOPEN, fstype.encode(), _FSOPEN_CLOEXEC), f"fsopen {fstype}")
    try:
        try:
            for key, value in options:
                _check(
                    _libc.syscall(_FSCONFIG, context, _FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0),
                    f"{fstype} {key}={value}",
                )
            _check(_libc.syscall(_FSCONFIG, context, _FSCONFIG_SET_FLAG, b"ro", None, 0), f"{fstype} ro")
            _check(_libc.syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), f"mount {fstype} at {target}")
        except OSError as error:
            notes = "; ".join(_messages(context))
            raise OSError(error.errno, f"{error.strerror} ({notes})" if notes else error.strerror) from error
        made = _check(_libc.syscall(_FSMOUNT, context, _FSMOUNT_CLOEXEC, _MOUNT_ATTR_RDONLY), f"fsmount {fstype}")
        try:
            result = _libc.syscall(_MOVE_MOUNT, made, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
            _check(result, f"move_mount to {target}")
        finally:
            os.close(made)
    finally:
        os.close(context)


def _messages(context: int) -> Iterator[str]:
    for _ in range(16):
        try:
            yield os.read(context, 4096).decode(errors="replace").strip()
        except OSError:
            return


def unmount(target: str, *, lazy: bool = True) -> bool:
    """umount2(2), by default detached at once while users of it may go on. False if nothing was mounted there. Raises OSError."""
    result = _libc.umount2(os.fsencode(target), (MNT_DETACH if lazy else 0) | _UMOUNT_NOFOLLOW)
    if result < 0 and ctypes.get_errno() in (22, 2):  # EINVAL: not a mount point; ENOENT: not even a path
        return False
    _check(result, f"unmount {target}")
    return True


class Mounted(NamedTuple):
    """One line of /proc/self/mountinfo."""

    mount_id: int
    device: str
    path: str
    fstype: str
    source: str


def mounted() -> list[Mounted]:
    """What is mounted in this namespace, in the order of mounting. Asks no file system, so it never blocks on one."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        before, _, after = line.partition(b" - ")
        fields, rest = before.split(b" "), after.split(b" ")
        found.append(
            Mounted(
                int(fields[0]),
                fields[2].decode(),
                _unescape(fields[4]),
                rest[0].decode(),
                _unescape(rest[1] if len(rest) > 1 else b""),
            )
        )
    return found


def _unescape(field: bytes) -> str:
    if b"\\" in field:
        for code, char in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
            field = field.replace(code, char)
    return os.fsdecode(field)


def boot_id() -> str:
    """Changes with every boot of the machine: mounts and maps of another boot are gone."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def name_process(name: str) -> None:
    """Name shown by ps and top; at most 15 bytes."""
    _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
