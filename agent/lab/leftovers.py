"""Finding and removing what a lab left behind: processes, mounts, network namespaces, cgroups, its folder.

Every lab has an id, the name of its folder under `LABS`. Its owner holds a lock on `LABS/<id>/owner`; a folder whose lock is free
belongs to nobody any more. Everything is found by the id alone, so that it works after the owner was killed:

- processes: the folder is on their command line, or their cgroup is named for the lab (`shoal-<id>-…`, containers);
- mounts: below the folder; network namespaces: `/run/netns/shoal-<id>-…`; cgroups: `shoal-<id>-…`.
"""

import contextlib
import ctypes
import fcntl
import os
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from agent.lab.processes import LabError, call

LABS: Final = Path("/var/tmp/shoal-labs")
"""On a disk, not a tmpfs: images and caches must not count as memory. Short, because unix socket paths end at 107 bytes."""

MNT_DETACH: Final = 2
KILL_S: Final = 5.0


def lab_name(lab: Path, what: str) -> str:
    """The name of something outside the folder that belongs to the lab."""
    return f"shoal-{lab.name}-{what}"


@contextmanager
def own_lab_folder() -> Iterator[Path]:
    """A new lab's folder, after those of dead owners were removed; removed with all that belongs to it when the block ends."""
    LABS.mkdir(parents=True, exist_ok=True)
    with _locked(LABS / ".lock"):  # a folder that is made and not yet locked would look like a dead owner's
        for old in LABS.iterdir():
            if old.is_dir() and (fd := _lock(old / "owner", fcntl.LOCK_NB)) is not None:
                remove_lab(old)
                os.close(fd)
        lab = LABS / secrets.token_hex(3)
        lab.mkdir(mode=0o700)
        held = _lock(lab / "owner", 0)
        assert held is not None
        owner = held
    try:
        yield lab
    finally:
        remove_lab(lab)
        os.close(owner)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = _lock(path, 0)
    assert fd is not None
    try:
        yield
    finally:
        os.close(fd)


def _lock(path: Path, flags: int) -> int | None:
    """An open, locked file; None if somebody else has the lock (with LOCK_NB) or the folder is gone."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | flags)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def remove_lab(lab: Path) -> None:
    """End and remove everything that belongs to the lab; what is already gone is no error."""
    _end_processes(lab)
    unmount_below(lab)
    _remove_cgroups(lab)
    _remove_netns(lab)
    shutil.rmtree(lab, ignore_errors=True)


def _belongs(pid: int, lab: Path) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        cgroups = Path(f"/proc/{pid}/cgroup").read_bytes()
    except OSError:
        return False
    return os.fsencode(lab) + b"/" in command or b"/" + lab_name(lab, "").encode() in cgroups


def lab_processes(lab: Path) -> list[int]:
    """Process ids of what belongs to the lab, without this process and its parents."""
    spared = {os.getpid(), os.getppid()}
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [pid for pid in pids if pid not in spared and _belongs(pid, lab)]


def _end_processes(lab: Path) -> None:
    deadline = time.monotonic() + KILL_S
    while pids := lab_processes(lab):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # our own children stay in /proc until they are waited for
                continue
        if all(_is_zombie(pid) for pid in pids) or time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return True


def unmount_below(folder: Path) -> None:
    """Unmount everything below a folder, lazily where it is busy."""
    libc = ctypes.CDLL(None, use_errno=True)
    prefix = os.fsencode(folder) + b"/"
    for _round in range(5):  # a mount may be hidden under another
        points = []
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            point = line.split()[4]
            for code, char in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\134", b"\\")):
                point = point.replace(code, char)
            if point.startswith(prefix):
                points.append(point)
        if not points:
            return
        for point in reversed(points):
            libc.umount2(point, MNT_DETACH)


def _remove_cgroups(lab: Path) -> None:
    pattern = lab_name(lab, "*")
    for depth in ("*/*", "*/*/*", "*"):
        for folder in Path("/sys/fs/cgroup").glob(f"{depth}/{pattern}"):
            for inner in sorted(folder.rglob("*"), reverse=True):
                if inner.is_dir():
                    with contextlib.suppress(OSError):
                        inner.rmdir()
            for empty in (folder, folder.parent):  # the parent is shared by labs, and goes with the last
                with contextlib.suppress(OSError):
                    empty.rmdir()


def _remove_netns(lab: Path) -> None:
    for path in Path("/run/netns").glob(lab_name(lab, "*")):
        with contextlib.suppress(LabError):
            call("ip", "netns", "delete", path.name)
