"""Making a zstd:chunked blob from a tar, in the dialect of containers/storage (formats.md section 2).

The tar is read twice: once for its headers, then in the order of the blob. It is kept bit for bit, and with it the diff_id, unless
some files are prioritised, or readers could not agree on what it says (`tar_fidelity`): then the headers are written anew, of
several entries for one path the last is kept, and sparse files become ordinary ones. Prioritised files come first, as named, each
with its missing parents and the file that it is a hard link to before it; the TOC says where they end (`toc.PREFETCH_STOP`), for the
format has no landmarks and other readers would show such files.

Every chunk (`content_chunks`) is a zstd frame of its own, as are the headers between two files. Memory: one chunk, the compressed
TOC and tar-split, and the entries. The same input, arguments and libzstd give the same bytes.

The TOC names the tar-split's digest only where both can say the same: JSON has no names that are not UTF-8, nor years beyond 9999.
Without it containers/storage takes such a layer whole.
"""

import base64
import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO, Final

import attrs
import zstandard

from agent.formats.content_chunks import cut_chunks
from agent.formats.crc64 import Crc64
from agent.formats.model import Digest, digest_of
from agent.formats.tar import BLOCK, TarEntry
from agent.formats.tar_fidelity import HeaderFacts, look_at_tar
from agent.formats.tar_headers import encode_header
from agent.formats.tar_source import keep_last, list_entries, prioritize, read_content
from agent.formats.tar_split import Payload, Segment, TarSplitWriter
from agent.formats.toc import PREFETCH_STOP
from agent.formats.zstd_chunked import (
    CHECKSUM,
    MAGIC,
    POSITION,
    PREFIX,
    SKIPPABLE,
    TAR_SPLIT_POSITION,
    TOC_TYPE,
    Position,
)

LEVEL: Final = 9

_HEADERS_MOST: Final = 1 << 20
"""Bytes of headers after which their frame ends, chunk or not."""
_READ: Final = 1 << 20
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_SECOND: Final = -62135596800
_LAST_SECOND: Final = 253402300799
_TYPES: Final = {b"0": "reg", b"1": "hardlink", b"2": "symlink", b"3": "char", b"4": "block", b"5": "dir", b"6": "fifo"}


@attrs.frozen
class WrittenLayer:
    """What was written. `toc_checksum` is that of the compressed TOC; `missing` are the prioritised names that the tar does not
    have; `is_tar_kept`: the tar in the blob is the one that was given."""

    digest: Digest
    size: int
    toc_checksum: Digest
    toc: Position
    tar_split: Position
    diff_id: Digest
    uncompressed_size: int
    is_tar_kept: bool
    missing: tuple[str, ...] = ()

    @property
    def annotations(self) -> dict[str, str]:
        """What the layer's descriptor must carry."""
        toc, split = self.toc, self.tar_split
        return {
            PREFIX + CHECKSUM: self.toc_checksum,
            PREFIX + POSITION: f"{toc.offset}:{toc.length}:{toc.plain_length}:{TOC_TYPE}",
            PREFIX + TAR_SPLIT_POSITION: f"{split.offset}:{split.length}:{split.plain_length}",
        }


def write_zstd_chunked(tar: BinaryIO, out: BinaryIO, *, prioritized: Sequence[str] = (), level: int = LEVEL) -> WrittenLayer:
    """Read the uncompressed, seekable `tar` and write the blob to `out`. `level` is zstd's. Blocking; for a worker thread.

    Raises:
        FormatError: the input is no tar.
    """
    listed = list_entries(tar)
    entries = keep_last(listed)
    first, missing = prioritize(entries, prioritized)
    facts = None if first else look_at_tar(tar, listed)
    writer = _BlobWriter(out, tar, level)
    if facts is None:
        for key in first:
            writer.add(entries.pop(key))
        if first:
            writer.end_prefetch()
        for entry in entries.values():
            writer.add(entry)
        writer.end_tar()
    else:
        at = 0
        for entry, fact in zip(listed, facts, strict=True):
            tar.seek(at)
            writer.keep(entry, tar.read(entry.data_offset - at), fact)
            at = entry.data_offset + entry.size
        writer.keep_end(at)
    return attrs.evolve(writer.finish(), missing=tuple(missing), is_tar_kept=facts is not None)


class _BlobWriter:
    """Tar bytes in, zstd frames out, and the TOC and tar-split that describe them."""

    def __init__(self, out: BinaryIO, tar: BinaryIO, level: int) -> None:
        self._out, self._tar = out, tar
        self._zstd = zstandard.ZstdCompressor(level=level, write_checksum=True)
        self._blob_hash, self._diff_hash = hashlib.sha256(), hashlib.sha256()
        self._blob_size = self._tar_size = 0
        self._headers = bytearray()
        self._padding = 0
        self._toc = _TocWriter(level)
        self._tar_split = TarSplitWriter(level)

    def add(self, entry: TarEntry) -> None:
        """Write an entry under a new header."""
        self._add(entry, bytes(self._padding) + encode_header(entry), HeaderFacts(entry.mode))
        self._padding = -entry.size % BLOCK if entry.kind == b"0" else 0

    def end_tar(self) -> None:
        """End a tar that was written anew."""
        self._segment(bytes(self._padding + 2 * BLOCK))

    def keep(self, entry: TarEntry, head: bytes, facts: HeaderFacts) -> None:
        """Write an entry under its own headers; `head` is what the tar has between the content before it and its own."""
        self._add(entry, head, facts)

    def keep_end(self, at: int) -> None:
        """What the tar has from `at` on, behind the last content: padding and two empty blocks, and what there is besides."""
        self._tar.seek(at)
        size = -at % BLOCK + 2 * BLOCK
        while data := self._tar.read(size):
            self._segment(data)
            size = _READ

    def end_prefetch(self) -> None:
        """What is wanted at start has been written."""
        self._flush()
        self._toc.prefetch_stop = self._blob_size

    def finish(self) -> WrittenLayer:
        """Write TOC, tar-split and footer."""
        self._flush()
        split, split_length, split_digest = self._tar_split.finish()
        toc, toc_length = self._toc.finish(split_digest)
        toc_at = self._skippable(toc, toc_length)
        split_at = self._skippable(split, split_length)
        numbers = (*attrs.astuple(toc_at), TOC_TYPE, *attrs.astuple(split_at))
        self._skippable(struct.pack("<7Q", *numbers) + MAGIC, 0)
        return WrittenLayer(
            Digest("sha256:" + self._blob_hash.hexdigest()),
            self._blob_size,
            digest_of(toc),
            toc_at,
            split_at,
            Digest("sha256:" + self._diff_hash.hexdigest()),
            self._tar_size,
            is_tar_kept=False,
        )

    # --- one entry --------------------------------------------------------------------------------------------------------

    def _add(self, entry: TarEntry, head: bytes, facts: HeaderFacts) -> None:
        self._segment(head)
        is_file = entry.kind == b"0" and entry.size
        places, digest, checksum = self._write_content(entry) if is_file else ([], "", b"")
        self._tar_split.add(Payload(entry.path, entry.size if is_file else 0, checksum))
        self._toc.add(entry, facts, places, digest, self._blob_size)

    def _write_content(self, entry: TarEntry) -> tuple[list["_Place"], str, bytes]:
        """Write the chunks; gives their places, the file's digest and its CRC-64."""
        self._flush()
        whole, crc, places, offset = hashlib.sha256(), Crc64(), list[_Place](), 0
        for chunk in cut_chunks(self._hashed(read_content(self._tar, entry), crc)):
            data = chunk.data or bytes(chunk.size)
            whole.update(data)
            places.append(_Place(offset, chunk.size, self._blob_size, digest_of(data), chunk.is_hole))
            self._emit(self._zstd.compress(data))
            offset += chunk.size
        return places, "sha256:" + whole.hexdigest(), crc.digest()

    def _hashed(self, blocks: Iterable[bytes], crc: Crc64) -> Iterator[bytes]:
        for block in blocks:
            self._diff_hash.update(block)
            self._tar_size += len(block)
            crc.update(block)
            yield block

    # --- bytes ------------------------------------------------------------------------------------------------------------

    def _segment(self, data: bytes) -> None:
        self._diff_hash.update(data)
        self._tar_size += len(data)
        self._tar_split.add(Segment(data))
        self._headers += data
        if len(self._headers) >= _HEADERS_MOST:
            self._flush()

    def _flush(self) -> None:
        """End the frame of headers, if there are any."""
        if self._headers:
            self._emit(self._zstd.compress(self._headers))
            self._headers.clear()

    def _skippable(self, body: bytes, plain_length: int) -> Position:
        self._emit(SKIPPABLE + struct.pack("<I", len(body)) + body)
        return Position(self._blob_size - len(body), len(body), plain_length)

    def _emit(self, data: bytes) -> None:
        self._blob_hash.update(data)
        self._blob_size += len(data)
        self._out.write(data)


@attrs.frozen
class _Place:
    """A chunk: where in its file and how large, where in the blob, what."""

    file_offset: int
    size: int
    blob_offset: int
    digest: Digest
    is_hole: bool

    def describe(self) -> dict[str, Any]:
        """The keys that a chunk has where a file has several."""
        facts: dict[str, Any] = {"offset": self.blob_offset, "chunkSize": self.size}
        if self.file_offset:
            facts["chunkOffset"] = self.file_offset
        facts["chunkDigest"] = self.digest
        if self.is_hole:
            facts["chunkType"] = "zeros"
        return facts


class _TocWriter:
    """Compact JSON, compressed as it comes."""

    def __init__(self, level: int) -> None:
        self.prefetch_stop = -1
        self._zstd = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=False).compressobj()
        self._out = bytearray()
        self._length = 0
        self._between = '{"version":1,"entries":['
        self._is_exact = True

    def add(self, entry: TarEntry, facts: HeaderFacts, places: list[_Place], digest: str, blob_end: int) -> None:
        """Describe an entry whose chunks are at `places` and end at `blob_end`."""
        record: dict[str, Any] = {"type": _TYPES[entry.kind], "name": self._text(entry.path)}
        if entry.link:
            record["linkName"] = self._text(entry.link)
        size = entry.size if entry.kind == b"0" else 0
        numbers = {"mode": facts.mode, "size": size, "uid": entry.uid, "gid": entry.gid}
        record |= {key: number for key, number in numbers.items() if number}
        times = {"modtime": entry.mtime_ns, "accesstime": facts.atime_ns, "changetime": facts.ctime_ns}
        record |= {key: self._time(time) for key, time in times.items() if time is not None}
        record |= {key: number for key, number in zip(("devMajor", "devMinor"), entry.rdev, strict=True) if number}
        if entry.xattrs:
            pairs = sorted(entry.xattrs.items())
            record["xattrs"] = {self._text(key): base64.b64encode(value).decode() for key, value in pairs}
        if places:
            record |= {"digest": digest, "offset": places[0].blob_offset, "endOffset": blob_end}
        if len(places) > 1:
            record |= places[0].describe()
        self._note(record)
        for place in places[1:]:
            self._note({"type": "chunk", "name": record["name"], **place.describe()})

    def finish(self, tar_split: Digest) -> tuple[bytes, int]:
        """(compressed TOC, its plain length)."""
        if self._between != ",":
            self._put(self._between)
        more: dict[str, Any] = {}
        if self.prefetch_stop >= 0:
            more[PREFETCH_STOP] = self.prefetch_stop
        if self._is_exact:
            more["tarSplitDigest"] = tar_split
        self._put("]" + "".join(f",{_json(key)}:{_json(value)}" for key, value in more.items()) + "}")
        self._out += self._zstd.flush()
        return bytes(self._out), self._length

    def _note(self, record: dict[str, Any]) -> None:
        self._put(self._between + _json(record))
        self._between = ","

    def _put(self, text: str) -> None:
        data = text.encode()
        self._length += len(data)
        self._out += self._zstd.compress(data)

    def _text(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._is_exact = False
            return raw.decode("utf-8", "replace")

    def _time(self, time_ns: int) -> str:
        """RFC 3339 with nanoseconds; years that it cannot write are cut to the first or last that it can."""
        seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
        if not _FIRST_SECOND <= seconds <= _LAST_SECOND:
            self._is_exact = False
            seconds = min(max(seconds, _FIRST_SECOND), _LAST_SECOND)
        moment = _EPOCH + timedelta(seconds=seconds)
        fraction = f".{nanoseconds:09d}".rstrip("0") if nanoseconds else ""
        return f"{moment.year:04d}-{moment:%m-%dT%H:%M:%S}{fraction}Z"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
