"""The tar that a converter reads: its entries first, then their contents in any order."""

from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Final

import attrs

from agent.formats.model import FormatError
from agent.formats.tar import TarEntry, TarParser
from agent.formats.toc import NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME

OWN_NAMES: Final = {name.encode() for name in (TOC_NAME, PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK)}
"""What converters put into a tar besides its files; not taken over."""

_READ: Final = 1 << 20


class _Collector:
    def __init__(self) -> None:
        self.entries: list[TarEntry] = []

    def entry(self, entry: TarEntry) -> None:
        self.entries.append(entry)

    def data(self, offset: int, view: memoryview) -> None:
        """The second reading takes the data."""

    def end(self) -> None:
        """Nothing to close."""


def list_entries(tar: BinaryIO) -> list[TarEntry]:
    """All entries, in order.

    Raises:
        FormatError: it is no tar.
    """
    collector = _Collector()
    parser = TarParser(collector)
    tar.seek(0)
    while block := tar.read(_READ):
        parser.feed(block)
    parser.finish()
    return collector.entries


def keep_last(entries: Iterable[TarEntry]) -> dict[bytes, TarEntry]:
    """The entries that count, by clean path: the last one of each, in its own place, without `OWN_NAMES`.

    Where a name that is not a directory's ends in a slash, the slash goes: for container runtimes it says nothing, GNU tar and
    libarchive would make a directory of a file that has it.
    """
    kept: dict[bytes, TarEntry] = {}
    for entry in entries:
        key = clean_path(entry.path)
        if key in OWN_NAMES:
            continue
        kept.pop(key, None)
        if entry.kind != b"5" and key and entry.path.endswith(b"/"):
            entry = attrs.evolve(entry, path=entry.path.rstrip(b"/"))
        kept[key] = entry
    return kept


def clean_path(path: bytes) -> bytes:
    """A path without empty components, "." and ".."; the root is empty."""
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            parts = parts[:-1]
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def prioritize(entries: dict[bytes, TarEntry], names: Sequence[str]) -> tuple[dict[bytes, None], list[str]]:
    """The keys of what goes first, in order, and the names that are not there.

    Parents come before what is in them, and the source of a hard link before the link.
    """
    order: dict[bytes, None] = {}
    missing: list[str] = []
    for name in names:
        key = clean_path(name.encode("utf-8", "surrogateescape"))
        if key not in entries:
            missing.append(name)
            continue
        # Sources of links are followed by a loop: a hostile tar may chain many. `chain` also ends circles.
        chain: dict[bytes, None] = {}
        at: bytes | None = key
        while at is not None and at in entries and at not in chain:
            chain[at] = None
            at = clean_path(entries[at].link) if entries[at].kind == b"1" else None
        for member in reversed(chain):
            parts = member.split(b"/")
            for depth in range(len(parts)):
                parent = b"/".join(parts[:depth])
                if parent in entries:
                    order.setdefault(parent)
            order.setdefault(member)
    return order, missing


def read_content(tar: BinaryIO, entry: TarEntry, block: int = _READ) -> Iterator[bytes]:
    """The content of a file in blocks of that size, the last one less; the holes of a sparse one as zeros.

    Raises:
        FormatError: the tar has become shorter.
    """
    parts = [(0, entry.size)] if entry.sparse is None else [part for part in entry.sparse if part[1]]
    packed = entry.data_offset
    if entry.sparse is not None:
        packed += entry.stored_size - sum(size for _, size in parts)
    at = 0
    for start in range(0, entry.size, block):
        stop = min(start + block, entry.size)
        chunk = bytearray(stop - start) if entry.sparse is not None else b""
        while at < len(parts) and parts[at][0] < stop:
            offset, size = parts[at]
            low, high = max(offset, start), min(offset + size, stop)
            tar.seek(packed + low - offset)
            data = tar.read(high - low)
            if len(data) != high - low:
                raise FormatError("the tar became shorter while it was read")
            if entry.sparse is None:
                chunk = data
            else:
                chunk[low - start : high - start] = data  # type: ignore[index]  # a bytearray exactly when sparse
            if offset + size > stop:
                break
            packed += size
            at += 1
        yield bytes(chunk)
