"""Whether a tar can stay as it is under a table of contents that says the same.

Readers of zstd:chunked in containers/storage parse the headers in the tar-split with Go's archive/tar and refuse a layer whose TOC
says anything else, or names a file twice. Where our parser understands more than that one does (sparse files, ACLs as xattrs, global
headers, old types), an entry is superseded by a later one, or a file's name ends in a slash, the headers have to be written anew.
"""

from typing import BinaryIO, Final

import attrs

from agent.formats.model import FormatError
from agent.formats.tar import BLOCK, TarEntry, parse_number, parse_pax_records, parse_time
from agent.formats.tar_source import OWN_NAMES, clean_path

_KINDS: Final = b"\x000123456"
_XATTR: Final = b"SCHILY.xattr."


@attrs.frozen
class HeaderFacts:
    """What the headers of an entry say that a `TarEntry` does not. Times are None where the headers have none."""

    mode: int
    atime_ns: int | None = None
    ctime_ns: int | None = None


def look_at_tar(tar: BinaryIO, entries: list[TarEntry]) -> list[HeaderFacts] | None:
    """The facts of each entry's headers; None if the tar cannot stay as it is."""
    size = tar.seek(0, 2)
    at = 0
    names: set[bytes] = set()
    found: list[HeaderFacts] = []
    for entry in entries:
        name = clean_path(entry.path)
        if entry.kind != b"5" and entry.path.endswith(b"/"):
            return None
        if entry.header_offset != at or entry.sparse is not None or name in names or name in OWN_NAMES:
            return None
        names.add(name)
        tar.seek(at)
        try:
            facts = _look_at_headers(tar.read(entry.data_offset - at), entry)
        except FormatError:
            return None
        if facts is None:
            return None
        found.append(facts)
        at = entry.data_offset + (-(-entry.size // BLOCK) * BLOCK if entry.kind == b"0" else 0)
    return found if at <= size else None


def _look_at_headers(raw: bytes, entry: TarEntry) -> HeaderFacts | None:
    records: dict[bytes, bytes] | None = None
    at = 0
    while raw[at + 156 : at + 157] in (b"x", b"L", b"K"):
        size = parse_number(raw[at + 124 : at + 136])
        at += BLOCK
        if raw[at - BLOCK + 156 : at - BLOCK + 157] == b"x":
            if records is not None:
                return None
            records = dict(parse_pax_records(raw[at : at + size]))
        at += -(-size // BLOCK) * BLOCK
    block, records = raw[at:], records or {}
    if len(block) != BLOCK or block[156] not in _KINDS:
        return None
    magic = block[257:263]
    if magic not in (b"ustar\0", b"ustar ") or block[508:512] == b"tar\0":
        return None
    devices = parse_number(block[329:337]), parse_number(block[337:345])
    if devices != entry.rdev or (entry.kind not in (b"3", b"4") and any(devices)):
        return None
    if entry.kind != b"0" and (parse_number(block[124:136]) or b"size" in records):
        return None
    if magic == b"ustar " and any(block[345:369]):  # times of GNU's incremental archives
        return None
    if entry.xattrs != {key[len(_XATTR) :]: value for key, value in records.items() if key.startswith(_XATTR)}:
        return None
    times = [parse_time(records[key]) if records.get(key) else None for key in (b"atime", b"ctime")]
    return HeaderFacts(parse_number(block[100:108]), *times)
