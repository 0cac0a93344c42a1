"""Puts pyfuse3 on a FUSE descriptor that another process mounted and perhaps another one served.

libfuse wants to see an INIT request first. It gets one from us over a SOCK_SEQPACKET pair; then its main loop is ended, and
dup2 moves the real descriptor over the number that libfuse knows. From there on everything is stock pyfuse3.

pyfuse3's loop ends with an error in one harmless case: a request vanishes (its reader was killed) between the poll that
announces it and the read, so the read gives EAGAIN. The handlers that were running are cancelled then and have not answered;
`serve` starts the loop again and asks the kernel to send unanswered requests once more, as after a takeover.
"""

import errno
import logging
import os
import socket

import pyfuse3
import trio

from fsmount.handshake import made_up_init, resend_notice

log = logging.getLogger("fsmount")

_MAX_TASKS = 2048
"""Handlers at once. A parked miss holds one, so it bounds parked misses too; each costs about 5 KiB."""

_IDLE_TASKS = 4


class Session:
    """pyfuse3 initialised on a stand-in; `take` gives it the kernel."""

    def __init__(self, operations: pyfuse3.Operations) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setblocking(False)
        self._fd = theirs.detach()
        os.set_inheritable(self._fd, True)  # libfuse takes /dev/fd/N only so
        pyfuse3.init(operations, f"/dev/fd/{self._fd}", {"fsname=shoal"})
        os.set_inheritable(self._fd, False)

    async def prepare(self) -> None:
        """Walk libfuse through the handshake. Raises trio.TooSlowError if it does not answer."""
        self._ours.setblocking(False)
        self._ours.send(made_up_init())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            with trio.fail_after(10):
                await trio.lowlevel.wait_readable(self._ours.fileno())
            self._ours.recv(65536)
            # The loop looks at its descriptor in turns; each turn must find it closing, so tell it until it has ended.
            while nursery.child_tasks:
                trio.lowlevel.notify_closing(self._fd)
                await trio.sleep(0.001)

    def take(self, fuse_fd: int) -> None:
        """Put the kernel's descriptor in place. The predecessor must have stopped reading it."""
        os.dup2(fuse_fd, self._fd, inheritable=False)
        os.set_blocking(self._fd, False)
        self._ours.close()

    def ask_again(self) -> None:
        """Have the kernel send again what was read and never answered."""
        try:
            os.write(self._fd, resend_notice())
        except OSError as error:
            log.error("resend_refused error=%s: reads in flight are lost; Linux 6.9 or later is needed", error)

    async def serve(self) -> None:
        """Answer requests until the file system is unmounted."""
        while True:
            self.ask_again()
            try:
                await pyfuse3.main(_IDLE_TASKS, _MAX_TASKS)
                return
            except* OSError as group:
                if not all(isinstance(error, OSError) and error.errno == errno.EAGAIN for error in _leaves(group)):
                    raise


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
