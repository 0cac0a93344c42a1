"""Writing tar headers: ustar, with a pax header in front where ustar cannot say it. The same entry gives the same bytes."""

from typing import Final

from agent.formats.model import FormatError
from agent.formats.tar import BLOCK, TarEntry

_MAX_OCTAL_8: Final = 0o7777777
_MAX_OCTAL_12: Final = 0o77777777777


def encode_header(entry: TarEntry) -> bytes:
    """All headers of an entry, whole blocks; its data, `entry.size` bytes, come behind them.

    Raises:
        FormatError: a device number that tar cannot hold, or a name that ends in a slash and is not a directory's, which readers
            do not agree on.
    """
    if entry.kind != b"5" and entry.path.endswith(b"/"):
        raise FormatError(f"tar entry {entry.path[:200]!r} is no directory")
    records: list[tuple[bytes, bytes]] = []
    prefix, name = _split(entry.path)
    if name is None:
        records.append((b"path", entry.path))
        prefix, name = b"", _ascii(entry.path)[:100]
    link = entry.link
    if len(link) > 100 or not link.isascii():
        records.append((b"linkpath", link))
        link = _ascii(link)[:100]
    owners = []
    for key, number in ((b"uid", entry.uid), (b"gid", entry.gid)):
        if number > _MAX_OCTAL_8:
            records.append((key, str(number).encode()))
        owners.append(number if number <= _MAX_OCTAL_8 else 0)
    names = []
    for key, text in ((b"uname", entry.uname), (b"gname", entry.gname)):
        if len(text) > 31 or not text.isascii():
            records.append((key, text))
        names.append(_ascii(text)[:31])
    size = entry.size
    if size > _MAX_OCTAL_12:
        records.append((b"size", str(size).encode()))
        size = 0
    seconds, nanoseconds = divmod(entry.mtime_ns, 1_000_000_000)
    if nanoseconds or not 0 <= seconds <= _MAX_OCTAL_12:
        records.append((b"mtime", _decimal_time(entry.mtime_ns)))
        seconds = min(max(seconds, 0), _MAX_OCTAL_12)
    if not all(0 <= number <= _MAX_OCTAL_8 for number in entry.rdev):
        raise FormatError(f"device {entry.rdev} of {entry.path[:200]!r} does not fit into a tar")
    records += ((b"SCHILY.xattr." + key, value) for key, value in sorted(entry.xattrs.items()))
    header = _block(name, entry.kind, entry.mode, owners, size, seconds, link, names, entry.rdev, prefix)
    if not records:
        return header
    payload = b"".join(_record(key, value) for key, value in sorted(records))
    head = _block(b"PaxHeaders.0/" + name[:80], b"x", 0o644, [0, 0], len(payload), 0, b"", [b"", b""], (0, 0), b"")
    return head + payload + bytes(-len(payload) % BLOCK) + header


def _block(
    name: bytes,
    kind: bytes,
    mode: int,
    owners: list[int],
    size: int,
    mtime: int,
    link: bytes,
    names: list[bytes],
    rdev: tuple[int, int],
    prefix: bytes,
) -> bytes:
    fields = [
        name.ljust(100, b"\0"),
        b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, *owners, size, mtime),
        b" " * 8,
        kind,
        link.ljust(100, b"\0"),
        b"ustar\x0000",
        names[0].ljust(32, b"\0"),
        names[1].ljust(32, b"\0"),
        b"%07o\0%07o\0" % rdev,
        prefix.ljust(155, b"\0"),
        bytes(12),
    ]
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _split(path: bytes) -> tuple[bytes, bytes | None]:
    """(prefix, name) as ustar has them; no name if the path needs a pax record."""
    if not path.isascii():
        return b"", None
    if len(path) <= 100:
        return b"", path
    cut = path.find(b"/", max(0, len(path) - 101), len(path) - 1)
    if 0 < cut <= 155:
        return path[:cut], path[cut + 1 :]
    return b"", None


def _ascii(text: bytes) -> bytes:
    """A stand-in for readers without pax."""
    return bytes(byte if byte < 0x80 else 0x5F for byte in text)


def _record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    size = len(body) + len(str(len(body)))
    if len(str(size)) != len(str(len(body))):
        size += 1
    return str(size).encode() + body


def _decimal_time(mtime_ns: int) -> bytes:
    whole, fraction = divmod(abs(mtime_ns), 1_000_000_000)
    text = f"{'-' if mtime_ns < 0 else ''}{whole}.{fraction:09d}".rstrip("0").rstrip(".")
    return text.encode()
