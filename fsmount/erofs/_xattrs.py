"""Extended attributes on their way into an image: which can be stored, which are shared, how an inode's area looks.

An attribute that several inodes have, or that is large, goes once into the shared area and costs each inode four bytes. What
EROFS cannot hold is dropped with a warning: it never makes a layer unusable.
"""

import struct
from collections import Counter
from collections.abc import Mapping
from typing import Final

from fsmount.erofs.layout import (
    MAX_SHARED_XATTRS,
    MAX_XATTR_AREA,
    MAX_XATTR_NAME,
    MAX_XATTR_VALUE,
    XATTR_ACLS,
    XATTR_ENTRY,
    XATTR_HEADER_SIZE,
    XATTR_PREFIXES,
)

_Pairs = tuple[tuple[bytes, bytes], ...]

_SHARE_FROM: Final = 1024
"""A lone attribute of this size moves to the shared area: the inode's inline tail must fit into one block with it."""

_SHARED_ID_SIZE: Final = 4
_MAX_WARNINGS: Final = 100


class Warnings:
    """Sentences for the operator: each once, and bounded in number, as an image may give reason for millions."""

    def __init__(self) -> None:
        self._seen: dict[str, None] = {}
        self._left_out = 0

    def add(self, sentence: str) -> None:
        """Note a sentence unless it is already there."""
        if sentence in self._seen:
            return
        if len(self._seen) < _MAX_WARNINGS:
            self._seen[sentence] = None
        else:
            self._left_out += 1

    def sentences(self) -> list[str]:
        """All of them, in the order of their first appearance."""
        rest = [f"{self._left_out} more warnings were left out"] if self._left_out else []
        return [*self._seen, *rest]


def _is_acl(value: bytes) -> bool:
    """Is it a POSIX ACL as the kernel passes it: version 2, then entries of 8 bytes (a wrong one locks everybody out)."""
    return len(value) >= 4 and (len(value) - 4) % 8 == 0 and value[:4] == b"\2\0\0\0"


def _split_name(name: bytes) -> tuple[int, bytes] | None:
    """Prefix number and the rest of an attribute's name; None if EROFS has no room for it."""
    if len(name) > MAX_XATTR_NAME or b"\0" in name:
        return None
    for number, prefix in XATTR_PREFIXES.items():
        if number in XATTR_ACLS:
            if name == prefix:
                return number, b""
        elif name.startswith(prefix) and len(name) > len(prefix):
            return number, name[len(prefix) :]
    return None


class XattrTable:
    """Collects the attributes of all inodes, then gives each distinct set its area and the shared area's bytes."""

    def __init__(self, warnings: Warnings) -> None:
        self._warnings = warnings
        self._sets: Counter[_Pairs] = Counter()
        self._areas: dict[_Pairs, bytes] = {}
        self._names: dict[bytes, tuple[int, bytes] | None] = {}
        self.shared = bytearray()

    def add(self, xattrs: Mapping[bytes, bytes]) -> _Pairs:
        """Note one inode's attributes; the result is the key to ask its area with."""
        key = tuple(sorted(xattrs.items()))
        self._sets[key] += 1
        return key

    def _encode(self, name: bytes, value: bytes) -> bytes | None:
        split = self._names.get(name, ())
        if split == ():
            split = self._names[name] = _split_name(name)
        if not split:
            self._warnings.add(f"extended attribute {name[:80]!r} was dropped: EROFS does not store its namespace or name")
            return None
        number, rest = split
        if len(value) > MAX_XATTR_VALUE:
            self._warnings.add(f"extended attribute {name[:80]!r} was dropped: its value has {len(value)} bytes")
            return None
        if number in XATTR_ACLS and not _is_acl(value):
            self._warnings.add(f"extended attribute {name[:80]!r} was dropped: its value is not a POSIX ACL")
            return None
        entry = XATTR_ENTRY.pack(len(rest), number, len(value)) + rest + value
        return entry + bytes(-len(entry) % 4)

    def freeze(self) -> None:
        """Decide what is shared and build all areas; nothing may be added after it."""
        counts: Counter[tuple[bytes, bytes]] = Counter()
        for pairs, times in self._sets.items():
            for pair in pairs:
                counts[pair] += times
        places: dict[tuple[bytes, bytes], int] = {}
        for pairs in self._sets:
            ids: list[int] = []
            inline: list[bytes] = []
            room = MAX_XATTR_AREA - XATTR_HEADER_SIZE
            for pair in pairs:
                entry = self._encode(*pair)
                if entry is None:
                    continue
                is_shared = (counts[pair] > 1 or len(entry) >= _SHARE_FROM) and len(ids) < MAX_SHARED_XATTRS
                room -= _SHARED_ID_SIZE if is_shared else len(entry)
                if room < 0:
                    room += _SHARED_ID_SIZE if is_shared else len(entry)
                    self._warnings.add(f"extended attribute {pair[0][:80]!r} was dropped: no room beside the inode's others")
                elif is_shared:
                    if pair not in places:
                        places[pair] = len(self.shared) // 4
                        self.shared += entry
                    ids.append(places[pair])
                else:
                    inline.append(entry)
            header = struct.pack(f"<IB7x{len(ids)}I", 0, len(ids), *ids)
            self._areas[pairs] = header + b"".join(inline) if ids or inline else b""
        self._sets.clear()

    def area(self, key: _Pairs) -> bytes:
        """The area that stands behind an inode with these attributes; empty if none could be stored."""
        return self._areas[key]
