"""What the doctor looks at on the machine itself: privileges, kernel, disks, limits."""

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from agent.config import UNLIMITED, Settings
from agent.observe.findings import Finding, error, note, ok, warning
from fsmount import syscalls

MAX_SOCKET_PATH: Final = 107
"""Bytes of a path in sockaddr_un (unix(7)), less the zero at its end."""
MAX_OPEN_FILES: Final = 65536
"""What the agent raises its own limit to."""
VOLATILE: Final = frozenset({"tmpfs", "ramfs"})
INDIRECT: Final = frozenset({"tmpfs", "ramfs", "overlay", "fuse", "nfs", "nfs4"})
"""File systems whose files cannot back a mount: the kernel answers ENOTBLK, and fsmount mounts the image through its own root."""

_HOLE_START: Final = 64 << 10
_FILE_SIZE: Final = 256 << 10


def check_root() -> list[Finding]:
    """Mounting needs it, and so do most of the other checks."""
    if os.geteuid() == 0:
        return [ok("root", "runs as root")]
    return [error("root", "not root: neither the agent nor most of these checks can work", "sudo shoal doctor")]


def check_fuse() -> list[Finding]:
    """/dev/fuse can be opened. Opening it takes nothing from anybody."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return [error("fuse", "there is no /dev/fuse", "modprobe fuse; in a container: give it the device /dev/fuse")]
    except OSError as exc:
        return [
            error("fuse", f"/dev/fuse cannot be opened: {exc.strerror}", "run as root; in a container: allow the device c 10:229")
        ]
    return [ok("fuse", "/dev/fuse opens")]


def check_file_systems() -> list[Finding]:
    """EROFS and overlayfs are there. A module that nobody has used yet is not in the list; the trial loads it by mounting."""
    listed = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines() if line.strip()}
    found = []
    if "overlay" in listed:
        found.append(ok("overlayfs", "the kernel has it"))
    else:
        found.append(error("overlayfs", "the kernel does not have it, so layers cannot be merged", "modprobe overlay"))
    if "erofs" in listed:
        found.append(ok("erofs", "the kernel has it"))
    else:
        found.append(
            warning(
                "erofs",
                "the kernel does not have it: each look at a directory or an attribute goes through user space",
                "modprobe erofs; Debian and Ubuntu have it in their kernels (linux-modules-extra on Ubuntu)",
            )
        )
    return found


def judge_attempts(attempts: Mapping[str, str], state_dir: Path) -> Iterator[Finding]:
    """Findings on what the trial has done: a FUSE mount, the notice that makes takeover complete, an overlay."""
    if failure := attempts.get("fuse", ""):
        yield error("mounting", f"a FUSE mount fails: {failure}", "give the agent CAP_SYS_ADMIN (in a container: privileged)")
    if "resend" in attempts:
        if failure := attempts["resend"]:
            yield warning(
                "fsmount takeover",
                f"this kernel does not send unanswered reads again ({failure}): a read that is under way when fsmount dies"
                " or is upgraded is never answered",
                "Linux 6.9 or later; before it, upgrade fsmount only while no container runs",
            )
        else:
            yield ok("fsmount takeover", "reads under way survive the death and the upgrade of fsmount")
    if "overlay" in attempts:
        if failure := attempts["overlay"]:
            yield error(
                "state_dir",
                f"overlayfs cannot write to the file system of {state_dir} ({failure}): no container's writable layer can lie there",
                "move --state-dir to a local ext4, xfs or btrfs file system",
            )
        else:
            yield ok("state_dir", "overlayfs can have its upper directories there")


def judge_presentations(presentations: Sequence[str], refused: Mapping[str, str], wanted: str, how: str) -> Finding:
    """What layers can be mounted as; `how` says who tried."""
    subject = "presentations"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    if not presentations:
        return error(
            subject, f"no way of mounting a layer works ({how}){': ' + reasons if reasons else ''}", "see fuse and erofs above"
        )
    if wanted != "auto" and wanted not in presentations:
        return error(
            subject,
            f"--presentation is {wanted}, which does not work here; {', '.join(presentations)} would ({how})",
            "set --presentation auto",
        )
    text = f"{', '.join(presentations)} ({how})"
    best = presentations[0]
    if best == "fuse-tree":
        return warning(
            subject,
            f"only {text}: the kernel mounts no EROFS image, so walking through files is several times slower"
            + (f" [{reasons}]" if reasons else ""),
            "modprobe erofs loop; several devices in an image need Linux 5.16, mounting without loop devices 6.12",
        )
    if best == "erofs-loop":
        return note(subject, f"{text}; without loop devices it needs Linux 6.12 with EROFS_FS_BACKED_BY_FILE")
    return ok(subject, text)


def nearest_directory(path: Path) -> Path:
    """The path itself or, where it does not exist yet, the directory in which it would be made."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def file_system_of(path: Path) -> str:
    """The type of the file system that a path is on. Asks the mount table, never the file system."""
    best, kind = "", "unknown"
    text = str(path.absolute())
    for entry in syscalls.mounted():
        inside = entry.path in {"/", text} or text.startswith(entry.path + "/")
        if inside and len(entry.path) >= len(best):
            best, kind = entry.path, entry.fstype
    return kind


def check_state_dir(settings: Settings, punch_hole: Callable[[int, int, int], bool]) -> list[Finding]:
    """Where what lasts is kept: does it last, can it forget parts of a file, is there room. Leaves no file behind."""
    path = settings.state_dir
    if path.exists() and not path.is_dir():
        return [error("state_dir", f"{path} is not a directory", "choose another --state-dir")]
    place = nearest_directory(path)
    kind = file_system_of(place)
    found = []
    if kind in VOLATILE:
        found.append(
            warning(
                "state_dir",
                f"{path} is on {kind}: everything cached is lost at a reboot, and takes memory until then",
                "move --state-dir to a disk",
            )
        )
    elif kind in INDIRECT:
        found.append(
            note(
                "state_dir",
                f"{path} is on {kind}, which cannot back a mount: images are mounted through fsmount instead, a little slower",
            )
        )
    try:
        # Without a name from the start (O_TMPFILE where the file system has it): nothing to clean up.
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(_FILE_SIZE))
            file.flush()
            os.fsync(file.fileno())
            before = os.fstat(file.fileno()).st_blocks
            is_punched = punch_hole(file.fileno(), _HOLE_START, 2 * _HOLE_START) and os.fstat(file.fileno()).st_blocks < before
    except OSError as exc:
        found.append(
            error("state_dir", f"cannot write to {place} ({kind}): {exc.strerror}", "choose another --state-dir, or make room")
        )
        return found
    if is_punched:
        found.append(ok("state_dir", f"{path} is on {kind}; parts of files can be given back"))
    else:
        found.append(
            warning(
                "state_dir",
                f"{kind} cannot give parts of a file back: layers are evicted whole or not at all",
                "move --state-dir to ext4, xfs or btrfs",
            )
        )
    found.append(_check_room(settings, place))
    return found


def _check_room(settings: Settings, place: Path) -> Finding:
    space = os.statvfs(place)
    free = space.f_bavail * space.f_frsize
    used = _used_by(settings.state_dir / "store" / "layers")
    if settings.cache_quota == UNLIMITED:
        return note(
            "cache_quota", f"unlimited: nothing is evicted before the disk is full ({_gib(free)} free)", "set --cache-quota"
        )
    if settings.cache_quota > free + used:
        room = max(1, int((free + used) * 0.8) >> 30)
        return warning(
            "cache_quota",
            f"the quota is {_gib(settings.cache_quota)}, but with {_gib(used)} cached only {_gib(free)} are free: the disk fills first",
            f"set --cache-quota {room}GiB or less",
        )
    return ok("cache_quota", f"{_gib(settings.cache_quota)}; {_gib(used)} cached, {_gib(free)} free")


def _used_by(layers: Path) -> int:
    used = 0
    try:
        for layer in os.scandir(layers):
            for name in ("data", "blob"):
                try:
                    used += os.stat(os.path.join(layer.path, name)).st_blocks * 512
                except OSError:
                    continue  # being made or removed
    except OSError:
        return used
    return used


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"


def check_run_dir(settings: Settings) -> list[Finding]:
    """Where sockets and mounts are: paths that fit, and mounts that others see."""
    path = settings.run_dir.absolute()
    found = []
    longest = str(path / "containerd.sock")
    if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
        found.append(
            error(
                "run_dir",
                f"{longest} is longer than the {MAX_SOCKET_PATH} bytes of a socket's address",
                "choose a shorter --run-dir",
            )
        )
    if path.exists() and not path.is_dir():
        return [*found, error("run_dir", f"{path} is not a directory", "choose another --run-dir")]
    place = nearest_directory(path)
    if not os.access(place, os.W_OK):
        return [*found, error("run_dir", f"cannot write to {place}", "choose another --run-dir, or run as root")]
    try:
        is_apart = os.readlink("/proc/1/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    except OSError:
        is_apart = False  # not ours to see
    if is_apart and not _is_shared(place):
        found.append(
            warning(
                "run_dir",
                f"this process has a mount namespace of its own, and {place} is not shared with the machine's: containerd will not see"
                " layers mounted by an agent started from here",
                "mount --make-rshared, for a pod: mountPropagation: Bidirectional, for a systemd unit: no PrivateMounts, PrivateTmp or"
                " ProtectSystem",
            )
        )
    return found or [ok("run_dir", f"{path} can be used")]


def _is_shared(path: Path) -> bool:
    best, shared = "", False
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        fields, _, _ = line.partition(" - ")
        words = fields.split(" ")
        inside = words[4] == "/" or str(path) == words[4] or str(path).startswith(words[4] + "/")
        if inside and len(words[4]) >= len(best):
            best, shared = words[4], any(word.startswith("shared:") for word in words[6:])
    return shared


def check_limits() -> list[Finding]:
    """Open files: two for each stored layer, one for each peer."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < MAX_OPEN_FILES:
        return [
            warning(
                "open files",
                f"at most {hard} may be open; each cached layer takes two and each peer one",
                f"LimitNOFILE={MAX_OPEN_FILES} in the agent's unit, or ulimit -Hn {MAX_OPEN_FILES}",
            )
        ]
    return [ok("open files", "as many as needed")]


def check_clock() -> list[Finding]:
    """A clock before this program was written: registries' certificates are not valid yet."""
    written = Path(__file__).stat().st_mtime
    if time.time() < written - 86400:
        behind = time.strftime("%Y-%m-%d", time.gmtime())
        return [
            warning(
                "clock",
                f"it says {behind}, which is before this program was installed",
                "set the clock (timedatectl set-ntp true)",
            )
        ]
    return []


def judge_status(status: Mapping[str, Any], installed: str) -> Iterator[Finding]:
    """Findings on what a running agent says of itself."""
    pids = status.get("pids", {})
    text = f"process {pids.get('agent')} answers, version {status.get('version')}; {len(status.get('layers', ()))} layers known"
    yield ok("agent", text)
    if installed and status.get("version") not in (installed, "unknown"):
        yield note(
            "agent",
            f"it runs version {status.get('version')}, installed is {installed}",
            "restart it when convenient; containers go on",
        )
    for problem in status.get("problems", ()):
        yield error("agent", str(problem), "see the agent's log and RUN_DIR/fsmount.log")
    for name, reason in dict(status.get("degraded") or {}).items():
        yield warning(
            "agent", f"snapshot layer {name} is degraded: {reason}", "it is tried again at each use; pull its image again"
        )
    if status.get("failed_reads"):
        yield warning(
            "agent",
            f"{status['failed_reads']} reads have failed since it started",
            "look for read_deadline_passed in its log: it names the layer and whom the read waited for",
        )
    if status.get("bad_chunks"):
        yield warning(
            "agent",
            f"{status['bad_chunks']} chunks did not match their digest and were got elsewhere",
            "look for peer_sent_wrong_bytes and registry_sent_wrong_bytes in its log",
        )
