"""The table of contents at the end of a data blob (formats.md 3.3): entries of 128 bytes, then a tar header that gives their size.

The blob is a tar to be read from its end, so the TOC is found without any other knowledge of it.
"""

import hashlib
import struct
from typing import Final

import attrs

from agent.formats.model import FormatError

TAIL_SIZE: Final = 4096
"""Enough for the TOC: six names of parts are known."""
_ENTRY: Final = struct.Struct("<I4x16s32sQQQ48x")
_TAR_HEADER: Final = 512
_NAME: Final = b"rafs.blob.toc"
_BOOTSTRAP: Final = "image.boot"
_COMPRESSORS: Final = {1: 0, 2: 3, 4: 1}
"""Flags of an entry, to compressor numbers."""


@attrs.frozen
class TocEntry:
    """One part of a blob; `digest` is the SHA-256 of its uncompressed bytes."""

    name: str
    compressor: int
    digest: bytes
    offset: int
    compressed_size: int
    size: int


@attrs.frozen
class BlobToc:
    """The parts of a blob by name. `digests` are the TOC's own: of its entries, and of them with their header, as both occur in
    blob tables."""

    parts: dict[str, TocEntry]
    digests: tuple[bytes, bytes]


def read_toc(tail: bytes, blob_size: int) -> BlobToc | None:
    """Find the TOC in a blob's last bytes; None if the blob has none.

    Raises:
        FormatError: there is one, but a part of it lies outside the blob.
    """
    header, name, size = _read_header(tail)
    if name != _NAME:
        return None
    if size % _ENTRY.size or not 0 <= size <= len(tail) - _TAR_HEADER:
        raise FormatError(f"the TOC of a blob has {size} bytes")
    entries = tail[len(tail) - _TAR_HEADER - size : len(tail) - _TAR_HEADER]
    parts = {}
    for flags, name, digest, offset, csize, usize in _ENTRY.iter_unpack(entries):
        if offset + csize > blob_size or flags not in _COMPRESSORS:
            raise FormatError(f"a part of a blob has the bytes [{offset}, {offset + csize}) of {blob_size} and flags {flags}")
        text = name.rstrip(b"\0").decode("ascii", "replace")
        parts[text] = TocEntry(text, _COMPRESSORS[flags], digest, offset, csize, usize)
    return BlobToc(parts, (hashlib.sha256(entries).digest(), hashlib.sha256(entries + header).digest()))


def find_bootstrap(tail: bytes, blob_size: int) -> TocEntry | None:
    """Where a blob has a bootstrap of its own: as the TOC says, or as the last part of a blob without TOC (v5).

    Raises:
        FormatError: it lies outside the blob.
    """
    toc = read_toc(tail, blob_size)
    if toc is not None:
        return toc.parts.get(_BOOTSTRAP)
    _, name, size = _read_header(tail)
    if name != _BOOTSTRAP.encode():
        return None
    offset = blob_size - _TAR_HEADER - size
    if offset < 0:
        raise FormatError(f"a bootstrap of {size} bytes in a blob of {blob_size}")
    return TocEntry(_BOOTSTRAP, 0, bytes(32), offset, size, size)


def _read_header(tail: bytes) -> tuple[bytes, bytes, int]:
    """(header, name, size) of the part that ends a blob; empty if there is none."""
    header = tail[-_TAR_HEADER:]
    if len(header) != _TAR_HEADER or header[257:262] != b"ustar":
        return b"", b"", 0
    try:
        size = int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        return b"", b"", 0
    return header, header[:100].rstrip(b"\0"), max(size, 0)
