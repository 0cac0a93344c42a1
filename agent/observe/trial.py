"""Tries what the kernel can do, in a mount namespace and a process namespace of its own: nothing it does is seen outside.

Two ends. `Trial` starts this file as a program under unshare(1) and reads what it says; whatever becomes of the doctor, the
kernel ends the namespaces with it (setpriv, unshare --kill-child). The program runs without site-packages, for speed. It prints
one line of JSON for each attempt, and then becomes the holder of a private fsmount in the scratch directory, whose own probe mounts a
tiny layer under each presentation and reads it back.
"""

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_READY: Final = " is ready"
_REFUSED: Final = "presentation_unavailable"


class Trial:
    """The doctor's end; see `open_trial`."""

    def __init__(self, process: "subprocess.Popen[bytes]", scratch: Path, *, with_fsmount: bool) -> None:
        self._process = process
        self.with_fsmount: Final = with_fsmount
        self.scratch: Final = scratch
        self.attempts: dict[str, str] = {}
        """What was tried and how it failed; empty text: it works."""
        self.refused: dict[str, str] = {}
        """Presentations that do not work, and the kernel's reason."""
        self.last_words: Final[list[str]] = []

    def wait(self, seconds: float) -> bool:
        """In a thread: until the private fsmount serves. False if it ended, or the time is up."""
        output = self._process.stdout
        assert output is not None
        deadline, buffer = time.monotonic() + seconds, b""
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([output], [], [], left)[0]:
                return False
            data = os.read(output.fileno(), 4096)
            if not data:
                return False
            *lines, buffer = (buffer + data).split(b"\n")
            is_ready = [self._hear(line.decode(errors="replace")) for line in lines]  # all of them, not up to the first
            if any(is_ready):
                return True
        return False

    def hear_rest(self) -> None:
        """Read what has been said since, without waiting: after the probe, why a presentation does not work."""
        output = self._process.stdout
        assert output is not None
        if select.select([output], [], [], 0)[0]:
            for line in os.read(output.fileno(), 65536).decode(errors="replace").splitlines():
                self._hear(line)

    def _hear(self, line: str) -> bool:
        if line.startswith("{"):
            with suppress(ValueError, KeyError):
                said = json.loads(line)
                self.attempts[str(said["what"])] = str(said["error"])
            return False
        if _REFUSED in line:
            _, _, facts = line.partition("presentation=")
            name, _, reason = facts.partition(" reason=")
            self.refused[name] = reason
        if line.strip():
            self.last_words.append(line.strip())
        return _READY in line


@contextmanager
def open_trial(state_parent: Path | None, *, with_fsmount: bool) -> Iterator[Trial]:
    """Start trying. `state_parent` is a directory of the file system that is to hold container's writable layers.

    The two scratch directories are gone when the block ends. Raises OSError if not even a scratch directory can be made.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-doctor-", ignore_cleanup_errors=True) as scratch:
        upper = None if state_parent is None else tempfile.mkdtemp(prefix=".shoal-doctor-", dir=state_parent)
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command += [sys.executable, "-S", __file__, scratch, upper or "", "fsmount" if with_fsmount else ""]
        package = str(Path(__file__).resolve().parent.parent.parent)
        process: subprocess.Popen[bytes] | None = None
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={**os.environ, "PYTHONPATH": package},
            )
            yield Trial(process, Path(scratch), with_fsmount=with_fsmount)
        finally:
            if process is not None:
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()
            if upper is not None:
                shutil.rmtree(upper, ignore_errors=True)


def _say(what: str, failure: str) -> None:
    print(json.dumps({"what": what, "error": failure}), flush=True)


def _try_resend(scratch: str) -> None:
    from fsmount import syscalls  # noqa: PLC0415 - only the program has what it needs
    from fsmount.handshake import resend_notice  # noqa: PLC0415
    from fsmount.holder import open_mount  # noqa: PLC0415

    what = "fuse"
    try:
        os.makedirs(f"{scratch}/resend")
        device = open_mount(f"{scratch}/resend")
        _say(what, "")
        what = "resend"
        os.write(device, resend_notice())
        _say(what, "")
        syscalls.unmount(f"{scratch}/resend/fs")
        os.close(device)
    except OSError as exc:
        _say(what, exc.strerror or str(exc))


def _try_overlay(scratch: str, upper: str) -> None:
    from fsmount import syscalls  # noqa: PLC0415

    try:
        for name in ("lower", "merged"):
            os.makedirs(f"{scratch}/overlay/{name}")
        for name in ("upper", "work"):
            os.makedirs(f"{upper}/{name}")
        Path(f"{scratch}/overlay/lower/file").write_bytes(b"lower")
        options = f"lowerdir={scratch}/overlay/lower,upperdir={upper}/upper,workdir={upper}/work"
        syscalls.mount("overlay", f"{scratch}/overlay/merged", "overlay", 0, options)
        # A whiteout and a file over another: what a container's first seconds do.
        Path(f"{scratch}/overlay/merged/file").unlink()
        Path(f"{scratch}/overlay/merged/file").write_bytes(b"upper")
        syscalls.unmount(f"{scratch}/overlay/merged")
        _say("overlay", "")
    except OSError as exc:
        _say("overlay", exc.strerror or str(exc))


def _main() -> None:
    scratch, upper, with_fsmount = sys.argv[1:]
    sys.path[0] = os.environ["PYTHONPATH"]  # not this folder, whose modules are no top-level ones
    _try_resend(scratch)
    if upper:
        _try_overlay(scratch, upper)
    if with_fsmount:
        os.execv(  # noqa: S606 - our own program
            sys.executable,
            [sys.executable, "-S", "-m", "fsmount.holder", "--run-dir", f"{scratch}/run", "--foreground", "yes"],
        )


if __name__ == "__main__":
    _main()
