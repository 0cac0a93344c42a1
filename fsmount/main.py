"""The worker process of fsmount: `python -m fsmount.main`, started by the holder and by nobody else.

It loads, walks libfuse through the handshake and says `prepared`. At `go` it reads the mount table, takes the FUSE descriptor,
and serves the root and the link until it is told to drain or stop, or until the mount is gone. It may be killed at any moment:
the table says what is mounted, the kernel sends again what was not answered.
"""

import logging
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Final, NoReturn

import trio

from fsmount import syscalls
from fsmount.arguments import parse_flags
from fsmount.link_server import LinkServer
from fsmount.mounts import READAHEAD_PARTIAL_KIB, Mounts
from fsmount.needs import Needs
from fsmount.root import Root
from fsmount.table import Table, TableError, load_table, store_table
from fsmount.takeover import Session
from fsmount.volumes import VolumeReader

log = logging.getLogger("fsmount")

_QUIESCE_S: Final = 10


class Control:
    """The socket pair to the holder, in words, one a line."""

    def __init__(self, fd: int) -> None:
        self._socket = trio.socket.from_stdlib_socket(socket.socket(fileno=fd))
        self._buffer = b""

    async def say(self, word: str) -> None:
        """Tell the holder. A dead holder is noticed by `hear`."""
        try:
            await self._socket.send(word.encode() + b"\n")
        except OSError as error:
            log.warning("holder_gone word=%s error=%s", word, error)

    async def hear(self) -> str | None:
        """The next word; None when the holder is gone."""
        while b"\n" not in self._buffer:
            try:
                data = await self._socket.recv(4096)
            except OSError:
                return None
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace")


class Worker:
    """All parts of the process."""

    def __init__(self, flags: dict[str, str]) -> None:
        self.flags = flags
        self.run_dir = Path(flags["run-dir"])
        self.fuse_fd = int(flags["fuse-fd"])
        self.listen_fd = int(flags["listen-fd"])
        for fd in (self.fuse_fd, self.listen_fd, int(flags["control-fd"])):
            os.set_inheritable(fd, False)
        self.holder_pid = int(flags["holder-pid"])
        self.control = Control(int(flags["control-fd"]))
        self.needs = Needs(float(flags["read-deadline-s"]))
        self.forgotten, self._forgotten = trio.open_memory_channel[int](100_000)
        self.reader = VolumeReader(self.needs)
        self.root = Root(self.reader, self.on_forgotten)
        self.session = Session(self.root)

    def on_forgotten(self, record_id: int) -> None:
        """The kernel let a retired record go; the table is told by a task of its own (full: at the next takeover)."""
        try:
            self.forgotten.send_nowait(record_id)
        except trio.WouldBlock:
            log.warning("forgotten_not_recorded id=%d", record_id)

    def load(self) -> Table:
        """The table of this FUSE mount; an empty one if there is none or it belongs to another, whose roots are taken away."""
        path = self.run_dir / "fsmount.state"
        boot, mount = syscalls.boot_id(), self.flags["mount"]
        try:
            table = load_table(path)
        except (TableError, OSError) as error:
            log.error("table_dropped error=%s", error)
            table = None
        if table is not None and (table.boot_id, table.mount) == (boot, mount):
            return table
        if table is not None and table.boot_id == boot:
            for root in table.roots:
                try:
                    syscalls.unmount(root.target)
                except OSError as error:
                    log.warning("stale_root target=%s error=%s", root.target, error)
        table = Table(boot, mount)
        store_table(path, table.to_bytes())
        return table

    async def run(self) -> None:
        """From the handshake to the end."""
        await self.session.prepare()
        await self.control.say("prepared")
        while (word := await self.control.hear()) != "go":
            if word is None:
                return  # no holder, and not yet needed by anybody
        table = await trio.to_thread.run_sync(self.load)
        mounts = Mounts(self.run_dir, self.root, table, self.flags["presentation"])
        await mounts.restore()
        server = LinkServer(mounts, self.needs, lambda: self.holder_pid)
        self.session.take(self.fuse_fd)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.serve_kernel, nursery.cancel_scope)
            await trio.to_thread.run_sync(mounts.set_readahead, READAHEAD_PARTIAL_KIB)
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(socket.socket(fileno=self.listen_fd)))
            nursery.start_soon(server.serve, listener)
            nursery.start_soon(self.record_forgotten, mounts)
            nursery.start_soon(self.probe, mounts, server)
            nursery.start_soon(self.obey, mounts)
            await self.control.say("ready")

    async def serve_kernel(self, scope: trio.CancelScope) -> None:
        """Answer FUSE requests; the end of the mount is the end of the process."""
        await self.session.serve()
        log.warning("fuse_unmounted")
        scope.cancel()

    async def record_forgotten(self, mounts: Mounts) -> None:
        """Take forgotten records out of the table."""
        async for record_id in self._forgotten:
            try:
                await mounts.forget(record_id)
            except OSError as error:  # a full disk must not end the service; a successor drops the record again
                log.error("forgotten_not_recorded id=%d error=%s", record_id, error)

    async def probe(self, mounts: Mounts, server: LinkServer) -> None:
        """Find out what this machine can mount; connections wait for it."""
        if mounts.presentations:
            server.probed.set()
            return
        from fsmount.probe import Probe  # noqa: PLC0415  needed once in the life of a mount; a successor saves the memory

        probe = Probe(self.run_dir, mounts)
        try:
            log.info("probed presentations=%s", ",".join(await mounts.probe(probe.attempt)))
        finally:
            await probe.clean_up()
            server.probed.set()

    async def obey(self, mounts: Mounts) -> None:
        """Do what the holder says; start another if it dies."""
        while True:
            word = await self.control.hear()
            if word == "drain":
                # What was read from the kernel and not answered is sent again to the successor.
                with trio.move_on_after(_QUIESCE_S):
                    await mounts.quiesce()
                _end(0)
            if word == "stop":
                await mounts.unmount_everything()
                await self.control.say("unmounted")
                _end(0)
            if word is None:
                await self.replace_holder()

    async def replace_holder(self) -> None:
        """The holder died: start another, which adopts us."""
        ours, theirs = socket.socketpair()
        adopt = f"{self.fuse_fd},{self.listen_fd},-1,-1,{theirs.fileno()},{os.getpid()}"
        command = [sys.executable, "-S", "-m", "fsmount.holder", "--run-dir", str(self.run_dir), "--adopt", adopt]
        for name in ("mount", "read-deadline-s", "presentation"):
            command += [f"--{name}", self.flags[name]]
        for fd in (self.fuse_fd, self.listen_fd, theirs.fileno()):
            os.set_inheritable(fd, True)
        try:
            self.holder_pid = os.posix_spawn(sys.executable, command, os.environ, setsid=True)  # noqa: ASYNC221  0.5 ms, once
        finally:
            for fd in (self.fuse_fd, self.listen_fd):
                os.set_inheritable(fd, False)
            theirs.close()
        self.control = Control(ours.detach())
        log.warning("holder_replaced holder=%d", self.holder_pid)


def _end(status: int) -> NoReturn:
    """End at once, without the interpreter's own end: threads may hang in the kernel."""
    logging.shutdown()
    os._exit(status)


async def _run(flags: dict[str, str]) -> None:
    await Worker(flags).run()


def main() -> NoReturn:
    """The program."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.INFO)
    logging.Formatter.converter = time.gmtime
    flags = parse_flags(sys.argv[1:])
    syscalls.name_process("shoal-fsmount")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    status = 1
    try:
        trio.run(_run, flags)
        status = 0
    except BaseException:
        log.exception("worker_failed")
    _end(status)


if __name__ == "__main__":
    main()
