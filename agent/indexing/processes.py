"""The agent's end: index processes, started when one is needed and ended when none has been for a while.

Why processes. Making a layer's metadata image out of its index is the one long computation in Python on the way of a starting
container. In a thread of the agent it took the interpreter away from everything else that the start waits for: pieces that
arrive, containerd's requests. In a process it runs on another core; what a hostile index makes it take in memory goes with it; and
the agent stays small. A process takes 60 ms to start, about what the round trips for the manifest take: `expect` starts one ahead.

Nothing but bytes crosses: see `agent.indexing.messages`. The process has no network and asks the agent for what it wants to read.
"""

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
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
"""How long a process waits for the next index: the layers of an image come within a second."""
MOST: Final = max(1, min(2, os.cpu_count() or 1))
"""Processes at once; more layers wait. Each has some 20 MB while it lives."""

_ROOT: Final = Path(next(iter(agent.__path__))).parent


class _Child:
    """One process and our end of its socket."""

    def __init__(self, process: trio.Process, sock: trio.socket.SocketType) -> None:
        self.process = process
        self.idle_since = 0.0
        self._sock = sock

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

    async def end(self) -> int:
        """End it, whatever it does; gives its status."""
        self._sock.close()
        with trio.CancelScope(shield=True):
            self.process.kill()
            return await self.process.wait()


class IndexProcesses:
    """See the module's text; made by `open_index_processes`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._slots = trio.CapacityLimiter(MOST)
        self._idle: list[_Child] = []
        self._starting = 0
        self._changed = trio.Event()

    @property
    def idle(self) -> int:
        """Processes that wait for work."""
        return len(self._idle)

    def expect(self) -> None:
        """An index will be asked for soon: have a process ready."""
        if not self._idle and not self._starting and not self._slots.borrowed_tokens:
            self._starting += 1
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
            child = await self._take()
            is_ready = False
            try:
                await child.send({"read": catalogue.place_of(layer_format), "facts": messages.facts_head(facts)})
                while True:
                    head, body = await child.receive()
                    if "want" not in head:
                        break
                    await child.send({}, await answer(messages.want_of(head)))
                is_ready = True
            except (OSError, EOFError) as exc:
                status = await child.end()
                raise FormatError(f"the process that read the index of {facts.digest} ended with status {status}") from exc
            finally:
                if is_ready:
                    self._give_back(child)
                elif child.process.returncode is None:  # it waits for an answer, or computes for nobody
                    await child.end()
        if "no_index" in head:
            raise NoIndex(head["no_index"])
        if "format_error" in head:
            raise FormatError(head["format_error"])
        if "defect" in head:
            log.error("index_not_read", layer=facts.digest, format=layer_format.name, defect=head["defect"])
            raise ShoalError(f"reading the index of {facts.digest} failed: {head['defect'].strip().splitlines()[-1]}")
        return messages.index_of(head["index"], body)

    async def _take(self) -> _Child:
        while not self._idle and self._starting:
            await self._changed.wait()
        while self._idle:
            child = self._idle.pop()
            if child.process.poll() is None:
                return child
            await child.end()
        try:
            return await self._start()
        except OSError as exc:
            raise ShoalError(f"cannot start a process to read an index: {exc.strerror}") from exc

    def _give_back(self, child: _Child) -> None:
        child.idle_since = trio.current_time()
        self._idle.append(child)
        self._nursery.start_soon(self._expire, child)

    async def _expire(self, child: _Child) -> None:
        """End a process that nobody takes for a while; of one that is taken and given back, the task of that moment sees to it."""
        await trio.sleep(IDLE_S)
        if child in self._idle and trio.current_time() - child.idle_since >= IDLE_S:
            self._idle.remove(child)
            await child.end()

    async def _start_ahead(self) -> None:
        try:
            child = await self._start()
            self._give_back(child)
        except OSError as exc:
            log.warning("index_process_not_started", reason=str(exc))
        finally:
            self._starting -= 1
            self._changed.set()
            self._changed = trio.Event()

    async def _start(self) -> _Child:
        """A new process. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await trio.lowlevel.open_process(
                    [sys.executable, "-m", "agent.indexing.child"], stdin=theirs.fileno(), stdout=subprocess.DEVNULL, cwd=_ROOT
                )
            except BaseException:
                ours.close()
                raise
        return _Child(process, trio.socket.from_stdlib_socket(ours))

    async def aclose(self) -> None:
        """End every process that waits."""
        while self._idle:
            await self._idle.pop().end()


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
                await processes.aclose()
