"""Making an eStargz blob from a tar (formats.md section 1).

The tar is read twice: once for its headers, then in the order of the blob. That order is: prioritised files as named, each with
its missing parents and the file that it is a hard link to before it, then `.prefetch.landmark`; or, where nothing is prioritised,
`.no.prefetch.landmark`; then the rest as it was. Of several entries for one path the last is kept.

Headers are written anew (pax where needed, sparse files as ordinary ones), so the diff_id differs from the source's. Every chunk
starts a gzip member, or, with `min_chunk`, a member starts only when the one before has grown to that many compressed bytes.
Memory: one chunk, and the entries.

The same input, arguments and zlib give the same bytes. Times keep their nanoseconds in the tar and as a fraction in the TOC: RFC
3339 has it, and the parsers of Go and ours read it; the reference writer rounds to seconds.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO, Final, Protocol

import attrs
from isal import isal_zlib

from agent.formats.estargz import FOOTER_SIZE
from agent.formats.model import MAX_CHUNK_BYTES, Digest, FormatError, digest_of
from agent.formats.tar import BLOCK, TarEntry
from agent.formats.tar_headers import encode_header
from agent.formats.tar_source import keep_last, list_entries, prioritize, read_content
from agent.formats.toc import NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME

CHUNK_BYTES: Final = 4 << 20
"""The reference writer's default."""
LANDMARK_CONTENT: Final = b"\x0f"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TYPES: Final = {b"0": "reg", b"1": "hardlink", b"2": "symlink", b"3": "char", b"4": "block", b"5": "dir", b"6": "fifo"}


@attrs.frozen
class WrittenLayer:
    """What was written. `missing` are the prioritised names that the tar does not have."""

    digest: Digest
    size: int
    toc_digest: Digest
    diff_id: Digest
    uncompressed_size: int
    missing: tuple[str, ...] = ()

    @property
    def annotations(self) -> dict[str, str]:
        """What the layer's descriptor must carry."""
        return {
            "containerd.io/snapshot/stargz/toc.digest": self.toc_digest,
            "io.containers.estargz.uncompressed-size": str(self.uncompressed_size),
        }


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def write_estargz(
    tar: BinaryIO,
    out: BinaryIO,
    *,
    prioritized: Sequence[str] = (),
    chunk_size: int = CHUNK_BYTES,
    level: int = 6,
    min_chunk: int = 0,
    is_fast: bool = False,
) -> WrittenLayer:
    """Read the uncompressed, seekable `tar` and write the blob to `out`.

    `level` is zlib's 1 to 9. `is_fast` compresses with isal instead (levels 0 to 3 of `level`): measured on program files, 200 to
    400 MB/s to 39 % against 26 MB/s to 35 % with zlib 6. Blocking; for a worker thread.

    Raises:
        FormatError: the input is no tar, or the chunk size is not one that readers take.
    """
    if not 0 < chunk_size <= MAX_CHUNK_BYTES:
        raise FormatError(f"a chunk size of {chunk_size} bytes")
    entries = keep_last(list_entries(tar))
    first, missing = prioritize(entries, prioritized)
    writer = _BlobWriter(out, tar, chunk_size, level, min_chunk, is_fast=is_fast)
    for key in first:
        writer.add(entries.pop(key))
    writer.add_landmark(PREFETCH_LANDMARK if first else NO_PREFETCH_LANDMARK)
    for entry in entries.values():
        writer.add(entry)
    return attrs.evolve(writer.finish(), missing=tuple(missing))


class _BlobWriter:
    """Tar bytes in, gzip members out, and the TOC that describes them."""

    def __init__(self, out: BinaryIO, tar: BinaryIO, chunk_size: int, level: int, min_chunk: int, *, is_fast: bool) -> None:
        self._out, self._tar = out, tar
        self._chunk_size, self._min_chunk = chunk_size, min_chunk
        self._level, self._is_fast = level, is_fast
        self._blob_hash, self._diff_hash = hashlib.sha256(), hashlib.sha256()
        self._blob_size = self._tar_size = 0
        self._member_start = self._member_inner = 0
        self._compressor = self._open_member()
        self._toc: list[str] = []
        self._user_of: dict[int, bytes] = {}
        self._group_of: dict[int, bytes] = {}

    def add(self, entry: TarEntry) -> None:
        """Write an entry with its data."""
        record = self._describe(entry)
        if entry.kind != b"0" or not entry.size:
            if entry.kind == b"0":
                record["digest"] = digest_of(b"")
            self._write(encode_header(entry))
            self._note(record)
            return
        self._write(encode_header(entry))
        records, whole, offset = [record], hashlib.sha256(), 0
        for chunk in read_content(self._tar, entry, self._chunk_size):
            if offset:
                records.append({"name": record["name"], "type": "chunk"})
            at = records[-1]
            self._cut()
            at["offset"] = self._member_start
            if self._member_inner:
                at["innerOffset"] = self._member_inner
            if offset:
                at["chunkOffset"] = offset
            if entry.size - offset >= self._chunk_size:
                at["chunkSize"] = self._chunk_size
            at["chunkDigest"] = digest_of(chunk)
            if len(chunk) < entry.size:
                whole.update(chunk)
            self._write(chunk)
            offset += len(chunk)
        record["digest"] = record["chunkDigest"] if len(records) == 1 else "sha256:" + whole.hexdigest()
        self._write(bytes(-entry.size % BLOCK))
        for at in records:
            self._note(at)

    def add_landmark(self, name: str) -> None:
        """Write a landmark, which always opens a member."""
        self._write(encode_header(TarEntry(name.encode(), b"0", size=1)))
        self._cut(is_forced=True)
        digest = digest_of(LANDMARK_CONTENT)
        self._note(
            {"name": name, "type": "reg", "size": 1, "offset": self._member_start, "digest": digest, "chunkDigest": digest}
        )
        self._write(LANDMARK_CONTENT + bytes(BLOCK - 1))

    def finish(self) -> WrittenLayer:
        """Write TOC and footer."""
        body = ",\n".join(self._toc)
        toc = f'{{\n\t"version": 1,\n\t"entries": [\n{body}\n\t]\n}}'.encode()
        self._cut(is_forced=True)
        toc_offset = self._member_start
        self._write(encode_header(TarEntry(TOC_NAME.encode(), b"0", size=len(toc))))
        self._write(toc + bytes(-len(toc) % BLOCK) + bytes(2 * BLOCK))
        self._emit(self._compressor.flush())
        footer = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0%016xSTARGZ\x01\0\0\xff\xff" % toc_offset + bytes(8)
        assert len(footer) == FOOTER_SIZE
        self._emit(footer)
        return WrittenLayer(
            Digest("sha256:" + self._blob_hash.hexdigest()),
            self._blob_size,
            digest_of(toc),
            Digest("sha256:" + self._diff_hash.hexdigest()),
            self._tar_size,
        )

    # --- bytes ------------------------------------------------------------------------------------------------------------

    def _open_member(self) -> _Compressor:
        compressor: _Compressor
        if self._is_fast:
            compressor = isal_zlib.compressobj(min(self._level, 3), isal_zlib.DEFLATED, 31)
        else:
            compressor = zlib.compressobj(self._level, zlib.DEFLATED, 31)
        return compressor

    def _cut(self, *, is_forced: bool = False) -> None:
        """Start a member here, if the one before is large enough."""
        if not is_forced and self._blob_size - self._member_start < self._min_chunk:
            return
        self._emit(self._compressor.flush())
        self._compressor = self._open_member()
        self._member_start, self._member_inner = self._blob_size, 0

    def _write(self, data: bytes) -> None:
        if data:
            self._diff_hash.update(data)
            self._tar_size += len(data)
            self._member_inner += len(data)
            self._emit(self._compressor.compress(data))

    def _emit(self, data: bytes) -> None:
        self._blob_hash.update(data)
        self._blob_size += len(data)
        self._out.write(data)

    # --- the TOC ----------------------------------------------------------------------------------------------------------

    def _describe(self, entry: TarEntry) -> dict[str, Any]:
        record: dict[str, Any] = {"name": entry.path.decode("utf-8", "replace"), "type": _TYPES[entry.kind]}
        if entry.kind == b"0" and entry.size:
            record["size"] = entry.size
        if entry.mtime_ns:
            record["modtime"] = _format_time(entry.mtime_ns)
        if entry.kind in (b"1", b"2"):
            record["linkName"] = entry.link.decode("utf-8", "replace")
        numbers = {"mode": entry.mode, "uid": entry.uid, "gid": entry.gid}
        record |= {key: number for key, number in numbers.items() if number}
        # A name stands at the first entry of its id, and again when it changes: readers carry it forward.
        for key, text, number, known in (
            ("userName", entry.uname, entry.uid, self._user_of),
            ("groupName", entry.gname, entry.gid, self._group_of),
        ):
            if known.get(number, b"") != text:
                known[number] = text
                record[key] = text.decode("utf-8", "replace")
        if entry.kind in (b"3", b"4"):
            numbers = {"devMajor": entry.rdev[0], "devMinor": entry.rdev[1]}
            record |= {key: number for key, number in numbers.items() if number}
        if entry.xattrs:
            record["xattrs"] = {
                key.decode("utf-8", "replace"): base64.b64encode(value).decode() for key, value in sorted(entry.xattrs.items())
            }
        return record

    def _note(self, record: dict[str, Any]) -> None:
        lines = []
        for key, value in record.items():
            text = (
                json.dumps(value, ensure_ascii=False, indent="\t")
                if isinstance(value, dict)
                else json.dumps(value, ensure_ascii=False)
            )
            lines.append(f"\t\t\t{json.dumps(key)}: " + text.replace("\n", "\n\t\t\t"))
        self._toc.append("\t\t{\n" + ",\n".join(lines) + "\n\t\t}")


def _format_time(mtime_ns: int) -> str:
    """RFC 3339; years that it cannot write are cut to the first or last that it can."""
    seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
    seconds = min(max(seconds, -62135596800), 253402300799)
    text = (_EPOCH + timedelta(seconds=seconds)).strftime("%m-%dT%H:%M:%S")
    year = (_EPOCH + timedelta(seconds=seconds)).year
    fraction = f".{nanoseconds:09d}".rstrip("0") if nanoseconds else ""
    return f"{year:04d}-{text}{fraction}Z"
