"""Lets many threads write a layer at once, and one take things away from it alone.

A chunk's bytes are written before its bit is set, and eviction clears bits before it punches the bytes out. Without the gate
the two could interleave: bytes written, old bit cleared, bytes punched, bit set. So whoever puts something in, or reads with
the bits in mind, holds the gate shared; whoever takes something out holds it alone. The event loop never touches it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """A readers-writer lock of threads in which an exclusive holder goes first. Neither side may be nested."""

    __slots__ = ("_changed", "_inside", "_waiting")

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside = 0
        self._waiting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it along with others."""
        with self._changed:
            while self._waiting:
                self._changed.wait()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                if self._inside == 0:
                    self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold it alone; those who come later wait."""
        with self._changed:
            self._waiting += 1
            try:
                while self._inside:
                    self._changed.wait()
            except BaseException:
                self._waiting -= 1
                self._changed.notify_all()
                raise
            self._inside = 1
        try:
            yield
        finally:
            with self._changed:
                self._inside = 0
                self._waiting -= 1
                self._changed.notify_all()
