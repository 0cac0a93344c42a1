"""tar-split: what a tar has besides the contents of its files, so that both together give the tar back bit for bit.

zstd of JSON lines, in the order of the archive: segments, which are raw bytes (headers, padding, the end), and payloads, which
stand for the content of a file: its name as in the tar, its size, and a CRC-64. Its reader in containers/storage wants each
segment to hold the headers of one entry, after the padding of the one before.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import attrs
import zstandard

from agent.formats.crc64 import Crc64
from agent.formats.inflate import ZstdInflater
from agent.formats.model import MAX_INDEX_BYTES, Digest, FormatError, digest_of

_PAYLOAD: Final = 1
_SEGMENT: Final = 2
_MAX_LINE: Final = 16 << 20
"""Characters of one line: headers have some KiB, and what is behind the end of a tar may be a segment of some MiB."""
_MAX_SIZE: Final = 1 << 50


@attrs.frozen
class Segment:
    """Raw bytes of the archive."""

    data: bytes


@attrs.frozen
class Payload:
    """The content of the entry `name`. `checksum` is empty where the writer had none, as for entries without content."""

    name: bytes
    size: int
    checksum: bytes = b""


Part = Segment | Payload


def decode_tar_split(compressed: bytes, plain_length: int, digest: Digest | None = None) -> Iterator[Part]:
    """The parts of a tar-split, in order. `digest` is that of the compressed bytes, where a TOC vouches for it.

    Raises:
        FormatError: wrong digest, no zstd, more than `plain_length` bytes, or lines that are no parts.
    """
    if digest is not None and digest_of(compressed) != digest:
        raise FormatError(f"the tar-split does not have the digest {digest} that the TOC names")
    if plain_length > MAX_INDEX_BYTES or len(compressed) > MAX_INDEX_BYTES:
        raise FormatError(f"a tar-split of {len(compressed)} bytes, {plain_length} uncompressed")
    for line in _lines(compressed, plain_length):
        if line.strip():
            yield _parse(line)


def _lines(compressed: bytes, plain_length: int) -> Iterator[bytes]:
    inflater = ZstdInflater()
    rest = bytearray()
    for part in inflater.feed(memoryview(compressed)):
        plain_length -= len(part)
        if plain_length < 0:
            raise FormatError("the tar-split is larger than promised")
        rest += part
        if b"\n" in part:
            *lines, last = rest.split(b"\n")
            for line in lines:
                yield bytes(line)
            rest = last
        if len(rest) > _MAX_LINE:
            raise FormatError(f"a line of the tar-split of more than {_MAX_LINE} bytes")
    inflater.finish()
    yield bytes(rest)


def _parse(line: bytes) -> Part:
    try:
        entry: Any = json.loads(line.decode("utf-8", "replace"))
        kind, payload = entry["type"], binascii.a2b_base64(entry.get("payload") or "", strict_mode=True)
        if type(kind) is int and kind == _SEGMENT:
            return Segment(payload)
        if type(kind) is not int or kind != _PAYLOAD:
            raise FormatError(f"a part of unknown type in the tar-split: {str(kind)[:40]}")
        raw = entry.get("name_raw")
        name = binascii.a2b_base64(raw, strict_mode=True) if raw else entry.get("name", "").encode("utf-8", "replace")
        size = entry.get("size", 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise FormatError(f"a line of the tar-split that is no part: {line[:100]!r}") from exc
    if type(size) is not int or not 0 <= size <= _MAX_SIZE or len(payload) not in (0, 8):
        raise FormatError(f"a line of the tar-split that cannot be: {line[:100]!r}")
    return Payload(name, size, payload)


def rebuild_tar(parts: Iterable[Part], open_file: Callable[[bytes], Iterable[bytes]]) -> Iterator[bytes]:
    """The tar, in parts. `open_file` gives the content of an entry by the name that the tar has for it.

    Raises:
        FormatError: a file has another size or checksum than it had in the tar.
    """
    for part in parts:
        if isinstance(part, Segment):
            yield part.data
        elif part.size:
            size, crc = 0, Crc64()
            for data in open_file(part.name):
                size += len(data)
                if size > part.size:
                    break
                crc.update(data)
                yield data
            if size != part.size:
                raise FormatError(f"{part.name[:200]!r} does not have the {part.size} bytes that it had in the tar")
            if part.checksum and crc.digest() != part.checksum:
                raise FormatError(f"{part.name[:200]!r} is not what it was in the tar")


class TarSplitWriter:
    """Makes a tar-split; the same parts and zstd give the same bytes."""

    def __init__(self, level: int) -> None:
        self._zstd = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=False).compressobj()
        self._out = bytearray()
        self._count = 0
        self._plain_length = 0

    def add(self, part: Part) -> None:
        """Add a part behind the last one."""
        entry: dict[str, Any]
        if isinstance(part, Segment):
            entry = {"type": _SEGMENT, "payload": base64.b64encode(part.data).decode()}
        else:
            entry = {"type": _PAYLOAD}
            try:
                entry["name"] = part.name.decode()
            except UnicodeDecodeError:
                entry["name_raw"] = base64.b64encode(part.name).decode()
            if part.size:
                entry["size"] = part.size
            entry["payload"] = base64.b64encode(part.checksum).decode() if part.checksum else None
        entry["position"] = self._count
        self._count += 1
        line = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._plain_length += len(line)
        self._out += self._zstd.compress(line)

    def finish(self) -> tuple[bytes, int, Digest]:
        """(compressed bytes, their plain length, their digest)."""
        self._out += self._zstd.flush()
        return bytes(self._out), self._plain_length, Digest("sha256:" + hashlib.sha256(self._out).hexdigest())
