"""Who owns the store's directory, and whether the machine went down without warning since it was last closed.

`lock` is flocked by the agent that has the store open (its text is that agent's process id). `format` says what the directory
is. `boot` has one line, `<boot id> running` or `<boot id> clean`. Memory that the kernel had not yet written survives a killed
process but not a power cut; so `running` under another boot id means that what the maps say is in doubt.
"""

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from agent.errors import StoreError
from agent.store.layout import replace_durably

FORMAT: Final = b"shoal store 1\n"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class StoreLock:
    """The directory, owned until `release`."""

    def __init__(self, path: Path) -> None:
        """Make the directory if it is not there, and own it.

        Raises:
            StoreError: another agent has it (EBUSY), it is something else, or the disk refused.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise StoreError(f"cannot open the store {path}: {exc.strerror}", errno=exc.errno or 0) from exc
        try:
            self._take(path)
        except BaseException:
            os.close(self._fd)
            raise

    def _take(self, path: Path) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno != errno.EWOULDBLOCK:
                raise StoreError(f"cannot lock the store {path}: {exc.strerror}", errno=exc.errno or 0) from exc
            owner = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise StoreError(
                f"another agent (process {owner}) uses the store {path}; stop it, or give this one another --state-dir",
                errno=errno.EBUSY,
            ) from exc
        os.pwrite(self._fd, b"%-20d\n" % os.getpid(), 0)  # in place: on a full disk there may be no block for a new content
        marker = path / "format"
        found = marker.read_bytes() if marker.exists() else b""
        if not found:
            replace_durably(marker, FORMAT)
        elif found != FORMAT:
            raise StoreError(f"{path} is not a store of this version: its format file says {found[:40]!r}")

    def release(self) -> None:
        """Let another agent have it."""
        os.close(self._fd)


def current_boot_id() -> str:
    """The kernel's name for this boot."""
    return _BOOT_ID.read_text("ascii").strip()


def read_boot(path: Path) -> tuple[str, bool]:
    """(boot id, whether the store was closed properly) of the last one who had it open; ("", False) if nobody knows."""
    try:
        words = (path / "boot").read_text("ascii").split()
    except (FileNotFoundError, UnicodeDecodeError):
        return "", False
    return (words[0], words[1] == "clean") if len(words) == 2 else ("", False)


def write_boot(path: Path, boot_id: str, *, is_clean: bool) -> None:
    """Say, durably, that the store is open in this boot, or was closed properly."""
    replace_durably(path / "boot", f"{boot_id} {'clean' if is_clean else 'running'}\n".encode("ascii"))
