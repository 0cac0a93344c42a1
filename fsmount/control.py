"""Starting, upgrading and stopping the two processes of fsmount, from outside.

The holder answers on run_dir/holder.sock: one line of JSON asks, one line answers, then the connection ends. Requests:
`{"op": "status"}`, `{"op": "upgrade", "python": ..., "path": ...}` (the program to change to), `{"op": "stop"}`. Answers are
maps; one with the key `error` says why not. `{"op": "wait"}` answers once the worker serves.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import trio

from fsmount.errors import LinkError

_MAX_ANSWER: Final = 65536
_START_S: Final = 30
_UPGRADE_S: Final = 60


def package_path() -> str:
    """The folder from which this program's `fsmount` package comes."""
    return str(Path(__file__).resolve().parent.parent)


async def connect(path: Path) -> trio.SocketStream:
    """A connection to a unix socket whose path may exceed the 107 bytes of a socket address. Raises OSError."""
    directory = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        return await trio.open_unix_socket(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


async def ask_holder(run_dir: Path, request: dict[str, Any]) -> dict[str, Any]:
    """One request to the holder.

    Raises:
        LinkError: no holder answers, or it answers that it cannot.
    """
    path = run_dir / "holder.sock"
    try:
        async with await connect(path) as stream:
            await stream.send_all(json.dumps(request).encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n") and len(answer) < _MAX_ANSWER:
                data = await stream.receive_some(4096)
                if not data:
                    break
                answer += data
    except (OSError, trio.BrokenResourceError) as error:
        raise LinkError(f"no fsmount runs at {run_dir}: {error}") from error
    try:
        found = json.loads(answer)
    except ValueError as error:
        raise LinkError(f"the holder at {path} broke off") from error
    if not isinstance(found, dict):
        raise LinkError(f"the holder at {path} answered nonsense")
    if "error" in found:
        raise LinkError(str(found["error"]))
    return found


async def holder_status(run_dir: Path) -> dict[str, Any]:
    """`holder_pid`, `pid` of the worker, `version`, `restarts`, `is_ready`. Raises LinkError if none runs."""
    return await ask_holder(run_dir, {"op": "status"})


async def start_fsmount(run_dir: Path, *, read_deadline_s: float = 30.0, presentation: str = "auto") -> None:
    """Start fsmount for `run_dir` if none runs; returns when its socket answers.

    It belongs to a session of its own and writes to run_dir/fsmount.log: it outlives the caller and the caller's signals.

    Raises:
        LinkError: it does not start; the text has its last words.
    """
    await trio.to_thread.run_sync(lambda: run_dir.mkdir(parents=True, exist_ok=True))
    try:
        with trio.fail_after(_START_S):
            try:
                await ask_holder(run_dir, {"op": "wait"})
            except LinkError:
                await _spawn(run_dir, read_deadline_s, presentation)
                await ask_holder(run_dir, {"op": "wait"})
    except trio.TooSlowError:
        last = await trio.to_thread.run_sync(_last_words, run_dir)
        raise LinkError(f"fsmount does not start at {run_dir} within {_START_S} s: {last}") from None


async def _spawn(run_dir: Path, read_deadline_s: float, presentation: str) -> None:
    # -S: the holder needs nothing but the standard library, and without `site` it stays small.
    command = [sys.executable, "-S", "-m", "fsmount.holder", "--run-dir", str(run_dir.resolve())]
    command += ["--read-deadline-s", str(read_deadline_s), "--presentation", presentation]
    environment = {**os.environ, "PYTHONPATH": package_path()}
    result = await trio.run_process(
        command,
        stdin=subprocess.DEVNULL,
        capture_stderr=True,
        capture_stdout=True,
        check=False,
        env=environment,
        cwd="/",
        start_new_session=True,
    )
    if result.returncode:
        words = (result.stderr or result.stdout).decode(errors="replace").strip().splitlines()
        raise LinkError(f"fsmount does not start at {run_dir}: {words[-1] if words else f'exit status {result.returncode}'}")


def _last_words(run_dir: Path) -> str:
    try:
        lines = (run_dir / "fsmount.log").read_text(errors="replace").splitlines()
    except OSError as error:
        return str(error)
    return lines[-1] if lines else "it logged nothing"


async def upgrade_fsmount(run_dir: Path) -> dict[str, int]:
    """Change the running fsmount to the program that calls this; readers wait, none fails. Gives `old_pid` and `new_pid`.

    Raises:
        LinkError: none runs, or the new program does not come up (the old one then goes on).
    """
    with trio.move_on_after(_UPGRADE_S):
        found = await ask_holder(run_dir, {"op": "upgrade", "python": sys.executable, "path": package_path()})
        return {"old_pid": int(found["old_pid"]), "new_pid": int(found["new_pid"])}
    raise LinkError(f"the holder at {run_dir} did not finish the upgrade within {_UPGRADE_S} s")


async def stop_fsmount(run_dir: Path) -> None:
    """Unmount everything of `run_dir` and end both processes. None running: no change."""
    try:
        with trio.fail_after(_UPGRADE_S):
            await ask_holder(run_dir, {"op": "stop"})
    except LinkError:
        return
    except trio.TooSlowError:
        raise LinkError(f"the holder at {run_dir} did not stop within {_UPGRADE_S} s") from None
