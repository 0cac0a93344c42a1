"""Child processes of a lab: started with a log file, watched, ended for certain."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Final

import attrs
import trio

from agent.errors import ShoalError

READY_S: Final = 30.0
"""A process that is not ready after this long never will be; containerd on a cold disk took 4 s."""


class LabError(ShoalError):
    """Something that the lab started failed; the text has the end of its log."""


@attrs.define(eq=False)
class Child:
    """One running process; `log` holds what it wrote."""

    name: str
    popen: "subprocess.Popen[bytes]"
    log: Path

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.popen.poll() is None

    def tail(self, lines: int = 15) -> str:
        """The last lines of its log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError as exc:
            return f"(no log: {exc})"

    async def wait(self) -> int:
        """Wait for its end; gives the exit status."""
        if self.popen.poll() is None:
            pidfd = os.pidfd_open(self.popen.pid)
            try:
                await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        return self.popen.wait()

    async def stop(self, number: int = signal.SIGTERM, grace_s: float = 10.0) -> None:
        """Send a signal, then SIGKILL if it does not end in time. Cancelling it does not spare the process."""
        if self.is_running():
            self.popen.send_signal(number)
        with trio.CancelScope(shield=True):
            with trio.move_on_after(grace_s):
                await self.wait()
            if self.is_running():
                self.popen.kill()
                await self.wait()

    async def wait_ready(self, is_ready: Callable[[], bool], what: str) -> None:
        """Wait until `is_ready()`.

        Raises:
            LabError: the process ended, or is not ready after `READY_S`.
        """
        # Nothing tells us when another program's socket answers, so it is tried every 20 ms.
        deadline = time.monotonic() + READY_S
        while not is_ready():
            if not self.is_running():
                raise LabError(f"{self.name} ended with status {self.popen.returncode} before {what}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise LabError(f"{self.name}: not {what} after {READY_S:.0f} s:\n{self.tail()}")
            await trio.sleep(0.02)


def start(
    name: str, argv: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None, dies_with_us: bool = True
) -> Child:
    """Start a process whose output goes to `log`.

    With `dies_with_us` the kernel kills it when this process dies (`setpriv --pdeathsig`). The kernel ties that to the thread that
    forked, so this must run on the main thread and does not go through a worker.
    """
    command = [str(word) for word in argv]
    if dies_with_us:
        command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    log.parent.mkdir(parents=True, exist_ok=True)
    output: IO[bytes]
    with log.open("ab") as output:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            start_new_session=True,  # a Ctrl-C at the terminal is ours to handle, in our order
        )
    return Child(name, popen, log)


@asynccontextmanager
async def running(child: Child, *, number: int = signal.SIGTERM, grace_s: float = 10.0) -> AsyncIterator[Child]:
    """Stop the process when the block ends."""
    try:
        yield child
    finally:
        await child.stop(number, grace_s)  # noqa: ASYNC102 - shields itself, and is bounded by SIGKILL


@attrs.frozen
class Finished:
    """How a command went. `first_output_s` is the time to the first byte on its stdout, -1 if there was none."""

    status: int
    stdout: bytes
    stderr: bytes
    elapsed_s: float
    first_output_s: float


async def run_command(argv: Sequence[str | Path], *, timeout_s: float = 300.0, check: bool = True) -> Finished:
    """Run a command to its end and time its first output.

    Raises:
        LabError: it failed (if `check`) or took longer than `timeout_s`.
    """
    command = [str(word) for word in argv]
    stdout, stderr = bytearray(), bytearray()
    first = -1.0
    began = time.monotonic()

    async def collect(stream: trio.abc.ReceiveStream, into: bytearray, *, is_stdout: bool) -> None:
        nonlocal first
        async for data in stream:
            if is_stdout and first < 0:
                first = time.monotonic() - began
            into += data

    # Not trio.run_process: the first output must be timed, and a spawn on a worker thread adds noise to it.
    process = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        with trio.fail_after(timeout_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: collect(process.stdout, stdout, is_stdout=True))
                nursery.start_soon(lambda: collect(process.stderr, stderr, is_stdout=False))
                await process.wait()
    except trio.TooSlowError as exc:
        raise LabError(f"`{' '.join(command)}` took longer than {timeout_s:.0f} s: {_text(stderr)}") from exc
    finally:
        if process.poll() is None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
    elapsed = time.monotonic() - began
    if check and process.returncode:
        raise LabError(f"`{' '.join(command)}` failed with status {process.returncode}: {_text(stderr) or _text(stdout)}")
    return Finished(process.returncode or 0, bytes(stdout), bytes(stderr), elapsed, first)


def _text(data: bytearray) -> str:
    return data[-2000:].decode("utf-8", "replace").strip()


def call(*argv: str | Path) -> str:
    """Run a short system command (ip, mount) and give its output.

    Raises:
        LabError: it failed.
    """
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise LabError(f"`{' '.join(str(word) for word in argv)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def socket_answers(path: Path) -> bool:
    """Whether somebody listens on a unix socket."""
    import socket  # noqa: PLC0415 - trio.socket is the usual one here

    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
    return True
