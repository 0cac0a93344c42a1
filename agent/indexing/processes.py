"""The agent's end: index processes, started when one is needed and ended when none has been for a while.

Why processes. Making a layer's metadata image out of its index is the one long computation in Python on the way of a starting
container. In a thread of the agent it took the interpreter away from everything else that the start waits for: pieces that
arrive, containerd's requests. In a process it runs on another core; what a hostile index makes it take in memory goes with it; and
the agent stays small. The first process takes 80 ms to start, about what the round trips for the manifest take, and forks one for
each index; `expect` starts it ahead.

Nothing but bytes crosses: see `agent.indexing.messages`. The processes have no network and ask the agent for what they want to read.
"""

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import structlog
import trio

import agent
from agent.errors import ShoalError
from agent.formats import catalogue
from agent.formats.model import FormatError, LayerIndex, NoIndex
from agent.formats.opening import Format, LayerFacts, Want
from agent.indexing import messages

log = structlog.get_logger()

IDLE_S: Final = 5.0
"""How long the first process waits for the next index: the layers of an image come within a second. It has some 20 MB."""
MOST: Final = 4
"""Indexes read at once; more wait. Also on two cores: a small layer need not wait for large ones."""

_FD: Final = struct.Struct("i")
_ROOT: Final = Path(next(iter(agent.__path__))).parent


class _Worker:
    """The process that reads one index, and our end of its socket."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._pidfd = -1

    async def hello(self) -> None:
        """Learn which process it is. Raises OSError or EOFError: it is gone."""
        said, ancillary, _, _ = await self._sock.recvmsg(1, socket.CMSG_SPACE(_FD.size), socket.MSG_CMSG_CLOEXEC)
        if not said or not ancillary:
            raise EOFError
        (self._pidfd,) = _FD.unpack_from(ancillary[0][2])

    async def send(self, head: messages.Head, body: bytes = b"") -> None:
        """Raises OSError: it is gone."""
        for data in (messages.pack_head(head, len(body)), body):
            view = memoryview(data)
            while view:
                view = view[await self._sock.send(view) :]

    async def receive(self) -> tuple[messages.Head, bytearray]:
        """The next frame. Raises OSError or EOFError: it is gone."""
        head_size, body_size = messages.lengths(bytes(await self._exactly(messages.HEAD.size)))
        return messages.unpack_head(bytes(await self._exactly(head_size))), await self._exactly(body_size)

    async def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            count = await self._sock.recv_into(view[at:])
            if not count:
                raise EOFError
            at += count
        return data

    def end(self, *, kill: bool) -> None:
        """Let go of it; `kill` one that may be computing for nobody."""
        if self._pidfd >= 0:
            if kill:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1
        self._sock.close()


class IndexProcesses:
    """See the module's text; made by `open_index_processes`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._slots = trio.CapacityLimiter(MOST)
        self._starting = trio.Lock()
        self._first: tuple[trio.Process, socket.socket] | None = None
        self._used_at = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether the first process is there."""
        return self._first is not None

    def expect(self) -> None:
        """An index will be asked for soon: have the first process ready."""
        if self._first is None and not self._starting.locked():
            self._nursery.start_soon(self._start_ahead)

    async def read(
        self, layer_format: Format, facts: LayerFacts, answer: Callable[[Want], Awaitable[bytes]]
    ) -> tuple[LayerIndex, bytearray]:
        """The index of a layer, without its tree, and the metadata image that has it. `answer` gives what the format wants.

        Raises:
            NoIndex: the image has none for this layer.
            FormatError: the bytes are not what the format promises, or took the process with them.
            ShoalError: what `answer` raises, or a defect of ours.
        """
        async with self._slots:
            worker = await self._fork(catalogue.place_of(layer_format))
            has_ended = False
            try:
                await worker.hello()
                await worker.send({"facts": messages.facts_head(facts)})
                while True:
                    head, body = await worker.receive()
                    if "want" not in head:
                        break
                    await worker.send({}, await answer(messages.want_of(head)))
                has_ended = True
            except (OSError, EOFError) as exc:
                raise FormatError(f"the process that read the index of {facts.digest} has died") from exc
            finally:
                worker.end(kill=not has_ended)
                self._used_at = trio.current_time()
        if "no_index" in head:
            raise NoIndex(head["no_index"])
        if "format_error" in head:
            raise FormatError(head["format_error"])
        if "defect" in head:
            log.error("index_not_read", layer=facts.digest, format=layer_format.name, defect=head["defect"])
            raise ShoalError(f"reading the index of {facts.digest} failed: {head['defect'].strip().splitlines()[-1]}")
        return messages.index_of(head["index"], body)

    async def _fork(self, place: str) -> _Worker:
        """A worker, from the first process or, if that is gone, from another one."""
        for _ in range(2):
            try:
                control = await self._started()
            except OSError as exc:
                raise ShoalError(f"cannot start a process to read an index: {exc.strerror}") from exc
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    socket.send_fds(control, [place.encode()], [theirs.fileno()])
                except OSError:  # it died while it was idle
                    ours.close()
                    await self.end_first()
                    continue
            ours.setblocking(False)
            return _Worker(trio.socket.from_stdlib_socket(ours))
        raise ShoalError("processes that read indexes die as soon as they are started")

    async def _started(self) -> socket.socket:
        """The socket of the first process. Raises OSError: none can be started."""
        async with self._starting:
            self._used_at = trio.current_time()
            if self._first is None:
                ours, theirs = socket.socketpair()
                with theirs:
                    try:
                        process = await trio.lowlevel.open_process(
                            [sys.executable, "-m", "agent.indexing.child"],
                            stdin=theirs.fileno(),
                            stdout=subprocess.DEVNULL,
                            cwd=_ROOT,
                        )
                    except BaseException:
                        ours.close()
                        raise
                self._first = process, ours
                self._nursery.start_soon(self._end_when_idle, process)
            return self._first[1]

    async def _start_ahead(self) -> None:
        try:
            await self._started()
        except OSError as exc:
            log.warning("index_process_not_started", reason=str(exc))

    async def _end_when_idle(self, process: trio.Process) -> None:
        while self._first is not None and self._first[0] is process:
            left = self._used_at + IDLE_S - trio.current_time()
            if left <= 0 and not self._slots.borrowed_tokens:
                await self.end_first()
                return
            await trio.sleep(max(left, 0.1 * IDLE_S))

    async def end_first(self) -> None:
        """End the first process, if there is one; workers go on, and are gone with those who asked."""
        if self._first is None:
            await trio.lowlevel.checkpoint()
            return
        process, control = self._first
        self._first = None
        control.close()
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()


@asynccontextmanager
async def open_index_processes() -> AsyncIterator[IndexProcesses]:
    """Index processes that all end with the block."""
    async with trio.open_nursery() as nursery:
        processes = IndexProcesses(nursery)
        try:
            yield processes
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await processes.end_first()
