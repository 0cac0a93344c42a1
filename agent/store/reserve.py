"""A little disk space set aside, so that a full disk does not keep the store from noting what would make room.

Unpinning a layer, closing the store or opening it again each need a few blocks of their own. The file `reserve` holds them; it
is given up when the disk is full, at the start and at the end, and taken again when there is room.
"""

import os
from pathlib import Path
from typing import Final

RESERVE_BYTES: Final = 256 << 10
"""Sixty-four pages; the largest of those notes, a SQLite transaction with its WAL index, takes a dozen."""


def give_up_reserve(store: Path) -> bool:
    """Free the space; False if it was not there."""
    try:
        (store / "reserve").unlink()
    except FileNotFoundError:
        return False
    return True


def take_reserve(store: Path) -> bool:
    """Set the space aside unless it is already; False if there is no room."""
    path = store / "reserve"
    if path.exists():
        return True
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, RESERVE_BYTES)
        finally:
            os.close(fd)
    except OSError:
        give_up_reserve(store)
        return False
    return True
