"""Digests of chunks that the index of a layer does not name, learnt when the chunks were written.

Formats that vouch for compressed bytes only (SOCI) leave them out. A chunk that came out of a verified piece is hashed once
more, so that a scrub, or the doubts after a power cut, can tell later whether its bytes are still those.

`chunks.learnt` has 32 bytes a chunk, zeros for what is not known. Nothing depends on its order with other writes: a digest that
was lost or damaged makes its chunk look bad, and it is fetched again.
"""

import hashlib
import os
from pathlib import Path
from typing import Self

from agent.formats.model import ChunkTable
from agent.store.sparse import read_exactly, write_all

_SIZE = 32


class LearntDigests:
    """The open file; safe from any thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @staticmethod
    def create(path: Path, count: int) -> None:
        """Make the file of a layer with `count` chunks."""
        with path.open("wb") as file:
            file.truncate(_SIZE * count)

    @classmethod
    def open(cls, path: Path, chunks: ChunkTable) -> Self | None:
        """The file of a layer; None if the layer's index names all digests.

        Raises:
            ValueError: it is of another size.
            OSError: it cannot be opened.
        """
        if chunks.is_complete:
            return None
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        if os.fstat(fd).st_size != _SIZE * len(chunks):
            os.close(fd)
            raise ValueError(f"{path.name} is not of {len(chunks)} chunks")
        return cls(fd)

    def learn(self, number: int, data: bytes | bytearray | memoryview) -> None:
        """Note what a chunk's bytes are; before the chunk is said to be here."""
        write_all(self._fd, hashlib.sha256(data).digest(), _SIZE * number)

    def is_right(self, number: int, data: bytes) -> bool:
        """Whether these are the bytes that were learnt."""
        return read_exactly(self._fd, _SIZE * number, _SIZE) == hashlib.sha256(data).digest()

    def fileno(self) -> int:
        """For fdatasync."""
        return self._fd

    def close(self) -> None:
        """End all use."""
        os.close(self._fd)
