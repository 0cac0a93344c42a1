"""A little disk space set aside, so that a full disk does not keep the store from noting what would make room.

Unpinning a layer, closing the store or opening it again each need a few blocks of their own. The file `reserve` holds them. It
is lent to one such note at a time, while those who write layers' data wait, and what is left of it is taken back at once: bytes
of images never get it. What other programs on the same disk took meanwhile is taken back when there is room again.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from agent.store.gate import Gate

RESERVE_BYTES: Final = 512 << 10
"""Twice the catalogue's write-ahead log, which a transaction may have to bring into the database before it gets its own room."""

_STEP: Final = 16 << 10


class Reserve:
    """The space below one store. `gate` is held shared by whoever writes a layer's data, outside of the layer's own gate."""

    def __init__(self, store: Path) -> None:
        self._path = store / "reserve"
        self.gate = Gate()
        self._turn = threading.Lock()

    def give_up(self) -> bool:
        """Free the space; False if there was none. For when nobody else writes; may fail no more than the disk does."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return False
        if size:  # emptied, not unlinked: the name and the inode stay ours
            os.truncate(self._path, 0)
        return size > 0

    def take(self) -> bool:
        """Set the space aside unless it is already; False if there was not room for all of it, then it is as much as there was."""
        with self._turn:  # not while it is lent
            return self._take()

    def _take(self) -> bool:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return False
        try:
            size = os.fstat(fd).st_size
            with suppress(OSError):
                if size == 0:
                    os.posix_fallocate(fd, 0, RESERVE_BYTES)
                    size = RESERVE_BYTES
            with suppress(OSError):
                while size < RESERVE_BYTES:
                    os.posix_fallocate(fd, size, min(_STEP, RESERVE_BYTES - size))
                    size += _STEP
            return size >= RESERVE_BYTES
        finally:
            os.close(fd)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block the space is free, and nobody writes data of layers. Not to be nested; may block."""
        with self._turn, self.gate.exclusive():
            self.give_up()
            try:
                yield
            finally:
                self._take()
