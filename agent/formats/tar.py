"""Tar, incrementally: ustar, GNU and pax headers, sparse files, hard links (formats.md 0.3).

`TarParser` is fed the archive in any cut and calls its sink once for each entry and then with the entry's data. What the sink
gets is already decoded: long names, pax records, base-256 numbers, sparse maps (data come with their offset in the file; what
lies between is a hole). Only headers are buffered, and each extended header has a bound.

Raises `FormatError` for what Go's archive/tar, which every container runtime uses, would refuse as well: bad checksums, bad numbers,
unknown types, overlapping sparse maps, a cut-off archive. A missing end of archive, and missing padding behind the last
payload, are accepted.
"""

import binascii
import re
import struct
from collections.abc import Sequence
from enum import Enum, auto
from functools import lru_cache
from typing import Final, Protocol
from urllib.parse import unquote_to_bytes
from zlib import adler32

import attrs

from agent.formats.model import FormatError

BLOCK: Final = 512
MAX_EXTENDED: Final = 1 << 20
"""Bytes of one extended header or long name: the limit of Go's archive/tar."""
MAX_SPARSE_PARTS: Final = 1 << 16
"""Fragments of one sparse file; the map of 1.0 is bounded by `MAX_EXTENDED` too."""
MAX_SIZE: Final = 1 << 60

_ZERO_BLOCK: Final = bytes(BLOCK)
_DIGITS: Final = re.compile(rb"[0-9]{1,19}\Z")
_TIME: Final = re.compile(rb"(-?)([0-9]{1,12})(?:\.([0-9]*))?\Z")
_ACL_KEYS: Final = {b"SCHILY.acl.access": b"system.posix_acl_access", b"SCHILY.acl.default": b"system.posix_acl_default"}


@attrs.define
class TarEntry:
    """One entry of the archive. `kind` is the tar type: 0 (file), 1 hard link, 2 symlink, 3 char, 4 block, 5 directory, 6 fifo.

    `size` is the file's own, `stored_size` what the archive holds of it from `data_offset` on (less for sparse files, with the
    map in front for sparse format 1.0). `header_offset` is where its first header, extended ones included, starts.
    """

    path: bytes
    kind: bytes
    mode: int = 0
    uid: int = 0
    gid: int = 0
    uname: bytes = b""
    gname: bytes = b""
    mtime_ns: int = 0
    size: int = 0
    link: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = attrs.field(factory=dict)
    sparse: list[tuple[int, int]] | None = None
    stored_size: int = 0
    header_offset: int = 0
    data_offset: int = 0


class TarSink(Protocol):
    """Who takes what the parser finds."""

    def entry(self, entry: TarEntry) -> None:
        """The next entry; its data follow."""

    def data(self, offset: int, view: memoryview) -> None:
        """Bytes of the last entry's file, at `offset` in it; ascending. The view is valid during the call only."""

    def end(self) -> None:
        """All data of the last entry have come."""


class _State(Enum):
    HEADER = auto()
    EXTENDED = auto()
    GNU_SPARSE = auto()
    SPARSE_MAP = auto()
    LINK_BODY = auto()
    DATA = auto()
    SKIP = auto()
    END = auto()


class TarParser:
    """See the module's text."""

    def __init__(self, sink: TarSink) -> None:
        self._sink = sink
        self._state = _State.HEADER
        self._buffer = bytearray()
        self._need = BLOCK
        self._position = 0
        self._padding = 0
        self._global: dict[bytes, bytes] = {}
        self._records: list[tuple[bytes, bytes]] = []
        self._extended_kind = b""
        self._long_name: bytes | None = None
        self._long_link: bytes | None = None
        self._header_offset = -1
        self._entry = TarEntry(b"", b"")
        self._parts: list[tuple[int, int]] = []
        self._part = 0
        self._part_at = 0
        self._map = b""

    @property
    def position(self) -> int:
        """Bytes of the archive taken so far."""
        return self._position

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the archive.

        Raises:
            FormatError: they are no tar.
        """
        view = memoryview(data)
        at, size = 0, len(view)
        while at < size:
            state = self._state
            if state is _State.DATA:
                taken = min(self._need, size - at)
                self._give(view[at : at + taken])
                self._need -= taken
                at += taken
                self._position += taken
                if not self._need:
                    self._sink.end()
                    self._skip(self._padding)
            elif state is _State.SKIP:
                taken = min(self._need, size - at)
                self._need -= taken
                at += taken
                self._position += taken
                if not self._need:
                    self._expect(_State.HEADER, BLOCK)
            elif state is _State.END:
                self._position += size - at
                return
            else:
                taken = min(self._need - len(self._buffer), size - at)
                if not self._buffer and taken == self._need:
                    block = bytes(view[at : at + taken])
                else:
                    self._buffer += view[at : at + taken]
                    block = b""
                at += taken
                self._position += taken
                if not block:
                    if len(self._buffer) < self._need:
                        return
                    block = bytes(self._buffer)
                    self._buffer.clear()
                self._take_block(block)

    def finish(self) -> None:
        """The archive has ended.

        Raises:
            FormatError: in the middle of something.
        """
        state = self._state
        if state is _State.END or (state is _State.SKIP and self._need <= self._padding):
            return
        if state in (_State.HEADER, _State.LINK_BODY) and not self._buffer and self._header_offset < 0:
            return
        if state is _State.HEADER and not any(self._buffer) and self._header_offset < 0:
            return
        raise FormatError(f"the tar ends in the middle of an entry, after {self._position} bytes")

    # --- states -----------------------------------------------------------------------------------------------------------

    def _expect(self, state: _State, need: int) -> None:
        self._state, self._need = state, need

    def _skip(self, size: int) -> None:
        if size:
            self._expect(_State.SKIP, size)
        else:
            self._expect(_State.HEADER, BLOCK)

    def _take_block(self, block: bytes) -> None:
        state = self._state
        if state is _State.LINK_BODY:
            # Some old tars put a hard link's data behind it, most do not: only the next block can tell.
            if block == _ZERO_BLOCK or _has_checksum(block):
                self._take_header(block)
            else:
                rest = self._padding
                self._padding = BLOCK
                self._skip(rest - BLOCK)
        elif state is _State.HEADER:
            self._take_header(block)
        elif state is _State.EXTENDED:
            self._take_extended(block)
        elif state is _State.GNU_SPARSE:
            self._take_gnu_map(block, 21, 504)
        else:
            self._take_map(block)

    def _take_header(self, block: bytes) -> None:
        if block == _ZERO_BLOCK:
            if self._header_offset >= 0:
                raise FormatError("the tar ends behind an extended header")
            self._expect(_State.END, 0)
            return
        if not _has_checksum(block):
            raise FormatError(f"bad tar header at {self._position - BLOCK}")
        if self._header_offset < 0:
            self._header_offset = self._position - BLOCK
        kind = block[156:157]
        if kind in (b"x", b"g", b"X", b"L", b"K"):
            size = parse_number(block[124:136])
            if not 0 <= size <= MAX_EXTENDED:
                raise FormatError(f"a tar extended header of {size} bytes")
            self._extended_kind = kind
            if size:
                self._padding = -size % BLOCK
                self._expect(_State.EXTENDED, size + self._padding)
            else:
                self._take_extended(b"")
            return
        self._begin_entry(block, kind)

    def _take_extended(self, block: bytes) -> None:
        payload = block[: len(block) - self._padding] if block else b""
        kind = self._extended_kind
        if kind == b"L":
            self._long_name = payload.split(b"\0", 1)[0]
        elif kind == b"K":
            self._long_link = payload.split(b"\0", 1)[0]
        elif kind == b"g":
            for key, value in parse_pax_records(payload):
                if value:
                    self._global[key] = value
                else:
                    self._global.pop(key, None)
            if len(self._global) > 10_000:
                raise FormatError("too many global pax records")
            if not self._records and self._long_name is None and self._long_link is None:
                self._header_offset = -1
        else:
            self._records += parse_pax_records(payload)
            if len(self._records) > 100_000:
                raise FormatError("too many pax records for one entry")
        self._expect(_State.HEADER, BLOCK)

    def _begin_entry(self, block: bytes, kind: bytes) -> None:
        entry = _parse_header(block, kind)
        if self._long_name is not None:
            entry.path = self._long_name
        if self._long_link is not None:
            entry.link = self._long_link
        pax = {**self._global, **dict(self._records)} if self._records or self._global else {}
        if pax:
            apply_pax(entry, pax)
        entry.header_offset = self._header_offset
        self._entry = entry
        if kind == b"V":
            self._reset()
            self._skip_payload(entry.size)
            return
        if kind == b"D":
            entry.kind, entry.stored_size, entry.size = b"5", entry.size, 0
        elif kind in (b"0", b"\0", b"7", b"S"):
            entry.stored_size = entry.size
            is_old_directory = kind == b"\0" and entry.path.endswith(b"/")
            entry.kind = b"5" if is_old_directory else b"0"
            if is_old_directory:
                entry.size = 0
        elif kind not in (b"1", b"2", b"3", b"4", b"5", b"6"):
            raise FormatError(f"tar entry {entry.path[:200]!r} of unknown type {kind!r}")
        if kind == b"S":
            entry.size = parse_number(block[483:495])
            entry.sparse = []
            self._take_gnu_map(block[386:483], 4, 96)
        elif pax and entry.kind == b"0" and b"GNU.sparse." in b"\n".join(pax):
            self._begin_pax_sparse(entry, pax)
        else:
            self._begin_data()

    def _begin_pax_sparse(self, entry: TarEntry, pax: dict[bytes, bytes]) -> None:
        entry.path = pax.get(b"GNU.sparse.name", entry.path)
        size = pax.get(b"GNU.sparse.realsize", pax.get(b"GNU.sparse.size"))
        if size is None:
            self._begin_data()
            return
        entry.size = _decimal(size)
        entry.sparse = []
        if pax.get(b"GNU.sparse.major") == b"1":
            if entry.stored_size < BLOCK:
                raise FormatError("a sparse file without room for its map")
            self._parts = []
            self._map = b""
            self._expect(_State.SPARSE_MAP, BLOCK)
            return
        if b"GNU.sparse.map" in pax:
            numbers = [_decimal(text) for text in pax[b"GNU.sparse.map"].split(b",") if text]
        else:
            numbers = [_decimal(value) for key, value in self._records if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes")]
        if len(numbers) % 2:
            raise FormatError("a sparse map with an odd count of numbers")
        entry.sparse = list(zip(numbers[::2], numbers[1::2], strict=True))
        self._begin_data()

    def _take_gnu_map(self, block: bytes, count: int, flag_at: int) -> None:
        sparse = self._entry.sparse
        assert sparse is not None
        for at in range(0, 24 * count, 24):
            if not block[at : at + 12].strip(b"\0 ") and not block[at + 12 : at + 24].strip(b"\0 "):
                break
            sparse.append((parse_number(block[at : at + 12]), parse_number(block[at + 12 : at + 24])))
        if len(sparse) > MAX_SPARSE_PARTS:
            raise FormatError("a sparse file of too many parts")
        if block[flag_at] not in (0, 0x30):
            self._expect(_State.GNU_SPARSE, BLOCK)
        else:
            self._begin_data()

    def _take_map(self, block: bytes) -> None:
        """Blocks of the map that sparse format 1.0 puts in front of the data: decimal lines, count first."""
        self._map += block
        if len(self._map) > MAX_EXTENDED:
            raise FormatError("a sparse map that does not end")
        lines = self._map.split(b"\n")
        count = _decimal(lines[0]) if len(lines) > 1 else 0
        if count > MAX_SPARSE_PARTS:
            raise FormatError("a sparse file of too many parts")
        if len(lines) < 2 + 2 * count:
            if len(self._map) + BLOCK > self._entry.stored_size:
                raise FormatError("a sparse map that is longer than its entry")
            return
        numbers = [_decimal(line) for line in lines[1 : 1 + 2 * count]]
        self._entry.sparse = list(zip(numbers[::2], numbers[1::2], strict=True))
        self._begin_data(len(self._map))

    def _begin_data(self, used: int = 0) -> None:
        """The entry is complete; `used` bytes of its payload were read as its map."""
        entry = self._entry
        self._reset()
        entry.data_offset = self._position - used
        if entry.kind in (b"1", b"2", b"3", b"4", b"5", b"6") and not entry.stored_size:
            body, entry.size = entry.size, 0
            self._sink.entry(entry)
            self._sink.end()
            if entry.kind == b"1" and body:
                self._expect(_State.LINK_BODY, BLOCK)
                self._padding = -(-body // BLOCK) * BLOCK
            else:
                self._skip(0)
            return
        if entry.size > MAX_SIZE or entry.stored_size > MAX_SIZE:
            raise FormatError(f"tar entry {entry.path[:200]!r} has {entry.size} bytes")
        stored = entry.stored_size - used
        if entry.kind != b"0":
            self._sink.entry(entry)
            self._sink.end()
            self._skip_payload(stored)
            return
        if entry.sparse is None:
            self._parts = [(0, stored)]
        else:
            _check_sparse(entry.sparse, entry.size, stored)
            self._parts = [part for part in entry.sparse if part[1]]
        self._part = self._part_at = 0
        self._sink.entry(entry)
        if stored:
            self._padding = -stored % BLOCK
            self._expect(_State.DATA, stored)
        else:
            self._sink.end()
            self._skip(0)

    def _skip_payload(self, size: int) -> None:
        self._padding = -size % BLOCK
        self._skip(size + self._padding)

    def _reset(self) -> None:
        self._records = []
        self._long_name = self._long_link = None
        self._header_offset = -1
        self._map = b""

    def _give(self, view: memoryview) -> None:
        while view:
            offset, size = self._parts[self._part]
            taken = min(len(view), size - self._part_at)
            self._sink.data(offset + self._part_at, view[:taken])
            view = view[taken:]
            self._part_at += taken
            if self._part_at == size:
                self._part += 1
                self._part_at = 0


def _has_checksum(block: bytes) -> bool:
    try:
        stated = parse_number(block[148:156])
    except FormatError:
        return False
    # The low half of an Adler-32 is one more than the sum of the bytes, exactly so for up to 256 of them.
    total = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2
    if stated == 256 + total - sum(block[148:156]):
        return True
    # Some old tars summed signed bytes.
    signed: tuple[int, ...] = struct.unpack("148b8x356b", block)
    return stated == 256 + sum(signed)


@lru_cache(maxsize=4096)  # modes, owners and times of a layer are few; a hit takes a tenth of the time
def parse_number(field: bytes) -> int:
    """A header's number: octal text, or base-256 where the first bit is set.

    Raises:
        FormatError: it is neither.
    """
    first = field[0]
    if first & 0x80:
        if first == 0xFF:
            return int.from_bytes(field, "big", signed=True)
        return int.from_bytes(bytes([first & 0x7F]) + field[1:], "big")
    text = field.strip(b" \0").split(b"\0", 1)[0].rstrip(b" ")
    if not text:
        return 0
    if text.strip(b"01234567"):
        raise FormatError(f"not a tar number: {field!r}")
    return int(text, 8)


def _decimal(text: bytes) -> int:
    if not _DIGITS.match(text):
        raise FormatError(f"not a decimal number: {text[:40]!r}")
    return int(text)


def _parse_header(block: bytes, kind: bytes) -> TarEntry:
    size = parse_number(block[124:136])
    mtime = parse_number(block[136:148])
    if size < 0 or abs(mtime) > MAX_SIZE:
        raise FormatError(f"a tar entry of {size} bytes and time {mtime}")
    entry = TarEntry(
        block[:100].split(b"\0", 1)[0],
        kind,
        mode=parse_number(block[100:108]) & 0o7777,
        uid=parse_number(block[108:116]),
        gid=parse_number(block[116:124]),
        mtime_ns=mtime * 1_000_000_000,
        size=size,
        link=block[157:257].split(b"\0", 1)[0],
    )
    magic = block[257:263]
    if magic in (b"ustar\0", b"ustar "):
        entry.uname = block[265:297].split(b"\0", 1)[0]
        entry.gname = block[297:329].split(b"\0", 1)[0]
        if kind in (b"3", b"4"):
            entry.rdev = (parse_number(block[329:337]), parse_number(block[337:345]))
        if magic == b"ustar\0":
            prefix = block[345:476] if block[508:512] == b"tar\0" else block[345:500]
            prefix = prefix.split(b"\0", 1)[0]
            if prefix:
                entry.path = prefix + b"/" + entry.path
    return entry


def parse_pax_records(payload: bytes) -> list[tuple[bytes, bytes]]:
    """`<length> <key>=<value>\\n` records, cut by length.

    Raises:
        FormatError: they are not that.
    """
    records = []
    at = 0
    while at < len(payload):
        space = payload.find(b" ", at, at + 20)
        text = payload[at:space] if space > 0 else b""
        if not text.isdigit():
            raise FormatError(f"a bad pax record: {payload[at : at + 40]!r}")
        stop = at + int(text)
        if stop > len(payload) or stop <= space + 1 or payload[stop - 1] != 0x0A:
            raise FormatError(f"a pax record of a wrong length: {payload[at : at + 40]!r}")
        key, equals, value = payload[space + 1 : stop - 1].partition(b"=")
        if not equals or not key:
            raise FormatError(f"a pax record without key: {payload[at : at + 40]!r}")
        records.append((key, value))
        at = stop
    return records


def apply_pax(entry: TarEntry, pax: dict[bytes, bytes]) -> None:
    """Let pax records replace what the entry's header says.

    Raises:
        FormatError: one of them cannot be read.
    """
    late: dict[bytes, bytes] = {}
    for key, value in pax.items():
        if key.startswith(b"SCHILY.xattr."):
            entry.xattrs[key[13:]] = value
        elif not value:
            continue
        elif key == b"path":
            entry.path = value.split(b"\0", 1)[0] if b"\0" in value else value
        elif key == b"linkpath":
            entry.link = value
        elif key == b"size":
            entry.size = _decimal(value)
        elif key == b"uid":
            entry.uid = _decimal(value)
        elif key == b"gid":
            entry.gid = _decimal(value)
        elif key == b"uname":
            entry.uname = value
        elif key == b"gname":
            entry.gname = value
        elif key == b"mtime":
            entry.mtime_ns = parse_time(value)
        elif key == b"SCHILY.devmajor":
            entry.rdev = (_decimal(value), entry.rdev[1])
        elif key == b"SCHILY.devminor":
            entry.rdev = (entry.rdev[0], _decimal(value))
        elif key.startswith(b"LIBARCHIVE.xattr."):
            try:
                late[unquote_to_bytes(key[17:])] = binascii.a2b_base64(value)
            except ValueError as exc:
                raise FormatError(f"an xattr that is no base64: {key[:80]!r}") from exc
        elif key in _ACL_KEYS:
            acl = encode_acl(value)
            if acl is not None:
                late[_ACL_KEYS[key]] = acl
    for key, value in late.items():
        entry.xattrs.setdefault(key, value)


def parse_time(text: bytes) -> int:
    """Nanoseconds of a pax time, `[-]seconds[.fraction]`; digits beyond nine are cut off.

    Raises:
        FormatError: it is no number.
    """
    match = _TIME.match(text)
    if match is None:
        raise FormatError(f"not a pax time: {text[:40]!r}")
    nanoseconds = int(match[2]) * 1_000_000_000 + int((match[3] or b"").ljust(9, b"0")[:9])
    return -nanoseconds if match[1] else nanoseconds


def _check_sparse(parts: Sequence[tuple[int, int]], size: int, stored: int) -> None:
    end = total = 0
    for offset, length in parts:
        if offset < end or length < 0 or offset + length > size:
            raise FormatError(f"a sparse part at {offset} of {length} bytes in a file of {size}")
        end = offset + length
        total += length
    if total != stored:
        raise FormatError(f"a sparse file whose parts have {total} bytes, stored are {stored}")


_ACL_TAGS: Final = {b"user": (0x01, 0x02), b"group": (0x04, 0x08), b"mask": (0x10, 0x10), b"other": (0x20, 0x20)}


def encode_acl(text: bytes) -> bytes | None:
    """A textual POSIX ACL (`user::rwx,user:1000:r--,…`) as the kernel's xattr value; None if it cannot be expressed.

    Names are taken as numbers, or by the number that star puts in a fourth field: a layer has no user database of ours.
    """
    entries = []
    for item in text.replace(b"\n", b",").split(b","):
        item = item.split(b"#", 1)[0].strip()
        if not item:
            continue
        fields = item.split(b":")
        tags = _ACL_TAGS.get({b"u": b"user", b"g": b"group", b"m": b"mask", b"o": b"other"}.get(fields[0], fields[0]))
        if tags is None or not 2 <= len(fields) <= 4:
            return None
        qualifier = fields[1] if len(fields) > 2 else b""
        permissions = fields[2] if len(fields) > 2 else fields[1]
        if permissions.strip(b"rwx-"):
            return None
        bits = sum(bit for letter, bit in ((b"r", 4), (b"w", 2), (b"x", 1)) if letter in permissions)
        number = 0xFFFFFFFF
        if qualifier:
            digits = fields[3] if len(fields) == 4 else qualifier
            if not digits.isdigit() or int(digits) >= 0xFFFFFFFF:
                return None
            number = int(digits)
        entries.append((tags[1] if qualifier else tags[0], bits, number))
    if not entries or len(entries) > 1000:
        return None
    entries.sort(key=lambda entry: (entry[0], entry[2]))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
