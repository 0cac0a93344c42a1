"""eStargz: footer, table of contents, `LayerIndex` (formats.md section 1).

Trust. `parse_toc` is given the digest that the manifest names and checks the TOC's exact bytes against it; every chunk is then
verified by the digest that the TOC names. Yet a TOC with the right digest may still be hostile, so nothing in it is believed:
offsets lie inside the blob, chunks fill their files without gap or overlap, and no member claims to inflate to more than
deflate can hold.

A file whose only chunk has no `chunkDigest` is verified by its `digest`; the reference reader allows the same, though only if the
whole TOC has no `chunk` entry.
"""

import binascii
import itertools
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import attrs
from isal import isal_zlib

from agent.formats.inflate import InflateError
from agent.formats.layout import lay_out
from agent.formats.model import (
    MAX_CHUNK_BYTES,
    MAX_INDEX_BYTES,
    ChunkTable,
    Digest,
    FormatError,
    Inode,
    InodeKind,
    LayerIndex,
    digest_of,
    parse_digest,
)
from agent.formats.opening import AttachedBlob, BlobRange, IndexReader, LayerFacts
from agent.formats.pieces import cut_pieces
from agent.formats.tree import TreeBuilder, check_xattrs, walk

TOC_DIGEST: Final = "containerd.io/snapshot/stargz/toc.digest"
LAYER_DIGEST: Final = "containerd.io/snapshot/stargz/layer.digest"
EXTERNAL_TOC_SUFFIX: Final = "-esgztoc"
TOC_NAME: Final = "stargz.index.json"
PREFETCH_LANDMARK: Final = ".prefetch.landmark"
NO_PREFETCH_LANDMARK: Final = ".no.prefetch.landmark"
FOOTER_SIZE: Final = 51
EXTERNAL: Final = -1
"""`Footer.toc_offset` when the TOC is in another image."""

_GUESS_LEAST: Final = 128 << 10
_GUESS_MOST: Final = 2 << 20
_MAX_RATIO: Final = 1032
"""What one byte of deflate can become at most (zlib's technical notes: 1032 to 1)."""
_RATIO_SLACK: Final = 64 << 10
_MAX_U32: Final = 0xFFFFFFFF
_MAX_FILE: Final = 1 << 50
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TIME: Final = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,18}))?(?:Z|([+-])(\d\d):(\d\d))\Z", re.ASCII)
_GZIP_HEAD: Final = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff"
_GZIP_TAIL: Final = b"\x01\0\0\xff\xff" + bytes(8)
_HEX16: Final = re.compile(rb"[0-9a-fA-F]{16}\Z")
_HEX64: Final = re.compile(r"sha256:([0-9a-f]{64})\Z")
_KINDS: Final = {
    "dir": InodeKind.DIRECTORY,
    "symlink": InodeKind.SYMLINK,
    "char": InodeKind.CHAR,
    "block": InodeKind.BLOCK,
    "fifo": InodeKind.FIFO,
}


@attrs.frozen
class Footer:
    """Where the TOC member starts (`EXTERNAL`: in another image) and how many bytes of footer end the blob."""

    toc_offset: int
    footer_size: int


def TAIL_GUESS(blob_size: int) -> int:  # noqa: N802 - the name other parts were given
    """How many bytes to read from a blob's end so that they usually hold TOC and footer.

    A TOC takes about 45 compressed bytes an entry, which was 0.6 to 3 % of the images looked at.
    """
    return min(blob_size, max(_GUESS_LEAST, min(_GUESS_MOST, blob_size // 64)))


def parse_footer(tail: bytes, blob_size: int) -> Footer | None:
    """Find the footer in a blob's last bytes; None if this is no eStargz (zstd:chunked has other footers and is not one).

    Raises:
        FormatError: there is a footer, but its TOC offset is not inside the blob.
    """
    for size, extra, digits in (
        (51, b"SG\x16\0", 16),
        (47, b"", 16),
        (46, b"SG\x11\0", 0),
    ):
        footer = bytes(tail[-size:])
        if len(footer) != size or not footer.startswith(_GZIP_HEAD) or not footer.endswith(_GZIP_TAIL):
            continue
        field = footer[12:-13]
        if footer[10:12] != len(field).to_bytes(2, "little") or not field.startswith(extra):
            continue
        field = field[len(extra) :]
        if not digits:
            if field == b"STARGZEXTERNALTOC":
                return Footer(EXTERNAL, size)
            continue
        if field[digits:] != b"STARGZ" or not _HEX16.match(field[:digits]):
            continue
        offset = int(field[:digits], 16)
        if offset >= blob_size - size:
            raise FormatError(f"the footer puts the TOC at {offset} in a blob of {blob_size} bytes")
        return Footer(offset, size)
    return None


def unpack_toc(compressed: bytes, toc_digest: Digest | None = None) -> bytes:
    """The TOC's exact JSON bytes from its tar+gzip member, or from the layer of an external TOC image.

    Raises:
        FormatError: no gzip, no such file in it, larger than any TOC may be, or not what `toc_digest` says.
    """
    archive = _inflate(compressed, MAX_INDEX_BYTES + (1 << 20))
    at = 0
    while at + 512 <= len(archive):
        header = bytes(archive[at : at + 512])
        if not any(header):
            break
        try:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
        except ValueError as exc:
            raise FormatError("the TOC's tar header has no size") from exc
        name = header[:100].split(b"\0", 1)[0].removeprefix(b"./").removeprefix(b"/")
        at += 512
        if size < 0 or at + size > len(archive):
            raise FormatError("the TOC ends before its size")
        if name == TOC_NAME.encode() and header[156:157] in (b"0", b"\0"):
            toc = bytes(archive[at : at + size])
            if toc_digest is not None:
                _check_digest(toc, toc_digest)
            return toc
        at += -(-size // 512) * 512
    raise FormatError(f"no {TOC_NAME} where the TOC should be")


def _inflate(data: bytes, limit: int) -> memoryview:
    """All gzip members of `data`, bounded."""
    out = bytearray()
    rest = data
    while rest:
        inflater = isal_zlib.decompressobj(31)
        try:
            while not inflater.eof:
                part = inflater.decompress(rest, 1 << 20)
                rest = inflater.unconsumed_tail
                out += part
                if len(out) > limit:
                    raise FormatError(f"a TOC of more than {limit} bytes")
                if not part and not rest and not inflater.eof:
                    raise FormatError("the compressed TOC is cut short")
        except InflateError as exc:
            raise FormatError(f"the TOC is no gzip: {exc}") from exc
        rest = inflater.unused_data
        if rest and not rest.startswith(b"\x1f\x8b"):
            break
    return memoryview(out)


def _check_digest(toc: bytes, toc_digest: Digest) -> None:
    actual = digest_of(toc)
    if actual != toc_digest:
        raise FormatError(f"the TOC has digest {actual}, the manifest says {toc_digest}")


def parse_toc(toc_json: bytes, *, blob_size: int, toc_offset: int, toc_digest: Digest | None) -> LayerIndex:
    """Make the layer index of an eStargz blob, with volume layout and pieces.

    `toc_offset` is where data end in the blob: the footer's TOC offset, or `blob_size` (or -1) if the TOC is external.

    Raises:
        FormatError: wrong digest, or anything in the TOC that cannot be true.
    """
    if toc_offset == EXTERNAL:
        toc_offset = blob_size
    if not 0 <= toc_offset <= blob_size:
        raise FormatError(f"TOC offset {toc_offset} in a blob of {blob_size} bytes")
    if toc_digest is not None:
        _check_digest(toc_json, toc_digest)
    return _TocParser(blob_size, toc_offset).parse(_load_entries(toc_json))


def _load_entries(toc_json: bytes) -> list[Any]:
    if len(toc_json) > MAX_INDEX_BYTES:
        raise FormatError(f"a TOC of {len(toc_json)} bytes")
    try:
        # Like the reference reader's JSON decoder, which puts U+FFFD in place of bytes that are not UTF-8.
        toc = json.loads(toc_json.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"the TOC is no JSON: {exc}") from exc
    if not isinstance(toc, dict) or toc.get("version") != 1:
        raise FormatError("the TOC is not of version 1")
    entries = toc.get("entries")
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise FormatError("the TOC has no list of entries")
    return entries


class _TocParser:
    """One pass over the entries; chunks of all files as columns, bound to inodes at the end."""

    def __init__(self, blob_size: int, data_stop: int) -> None:
        self._blob_size = blob_size
        self._data_stop = data_stop
        self._tree = TreeBuilder()
        self._times: dict[str, int] = {}
        self._offsets: list[int] = []
        self._inners: list[int] = []
        self._sizes: list[int] = []
        self._digests: list[bytes] = []
        self._files: list[Inode] = []
        self._hidden: list[int] = []
        self._file: Inode | None = None
        self._filled = 0
        self._landmark = self._no_landmark = -1

    def parse(self, entries: list[Any]) -> LayerIndex:
        """Takes the entries out of the list, so that they and what is made of them are not both held: 100,000 are 80 MB."""
        count = len(entries)
        entries.reverse()
        while entries:
            entry = entries.pop()
            try:
                self._add(entry)
            except (KeyError, TypeError, AttributeError) as exc:
                raise FormatError(f"TOC entry that is not one: {str(entry)[:200]}") from exc
        self._close_file()
        root = self._tree.finish()
        files = self._files
        if self._tree.has_replaced:
            alive = {id(inode) for _, inode in walk(root)}
            files = [inode for inode in files if id(inode) in alive]
        chunks = self._tabulate(files)
        volume_size = lay_out(files, chunks)
        prefetch_stop = 0 if self._no_landmark >= 0 else self._landmark
        pieces = cut_pieces(chunks, self._blob_size, self._data_stop, prefetch_stop=prefetch_stop)
        return LayerIndex("estargz", "gzip", root, chunks, pieces, volume_size, count, prefetch_stop, tuple(self._tree.warnings))

    def _add(self, entry: Any) -> None:
        get = entry.get
        kind = get("type")
        if kind == "chunk":
            self._add_chunk(get)
            return
        self._close_file()
        name = entry["name"]
        if kind == "reg":
            path = _encode(name)
            if name.endswith((".landmark", ".json")) and self._is_hidden(name, get):
                return
            inode = self._inode(InodeKind.FILE, get, path)
            size = get("size")
            if size:
                if type(size) is not int or not 0 < size <= _MAX_FILE:
                    raise FormatError(f"{name[:200]!r} has {size} bytes")
                inode.size = size
                inode.first_chunk = len(self._sizes)
                self._file, self._filled = inode, 0
                self._add_chunk(get)
                self._files.append(inode)
            self._tree.add(path, inode)
        elif kind == "hardlink":
            self._tree.link(_encode(name), _encode(entry["linkName"]))
        elif kind in _KINDS:
            path = _encode(name)
            inode = self._inode(_KINDS[kind], get, path)
            if kind == "symlink":
                inode.target = _encode(entry["linkName"])
                inode.size = len(inode.target)
                if not 0 < inode.size < 4096 or b"\0" in inode.target:
                    raise FormatError(f"symlink {name[:200]!r} has a target of {inode.size} bytes")
            elif kind in ("char", "block"):
                inode.rdev = (_number(get("devMajor"), _MAX_U32), _number(get("devMinor"), _MAX_U32))
            self._tree.add(path, inode)
        else:
            raise FormatError(f"TOC entry {str(name)[:200]!r} of unknown type {str(kind)[:20]!r}")

    def _is_hidden(self, name: str, get: Any) -> bool:
        """Whether this is a landmark or the TOC's own file, which are noted but are not files of the layer."""
        base = "/".join(part for part in name.split("/") if part not in ("", "."))
        if base not in (PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK, TOC_NAME):
            return False
        offset = _number(get("offset"), self._data_stop)
        if base == PREFETCH_LANDMARK:
            self._landmark = offset
        elif base == NO_PREFETCH_LANDMARK:
            self._no_landmark = offset
        self._hidden.append(offset)
        return True

    def _inode(self, kind: InodeKind, get: Any, path: bytes) -> Inode:
        mode, uid, gid = get("mode") or 0, get("uid") or 0, get("gid") or 0
        if type(mode) is not int or type(uid) is not int or type(gid) is not int:
            raise FormatError(f"mode or owner of {path[:200]!r} is no number")
        if not 0 <= uid < _MAX_U32 or not 0 <= gid < _MAX_U32:
            raise FormatError(f"owner {uid}:{gid} of {path[:200]!r}")
        time = get("modtime")
        if time is None:
            mtime_ns = 0
        else:
            known = self._times.get(time)
            if known is None:
                known = self._times[time] = _parse_time(time)
            mtime_ns = known
        inode = Inode(kind, mode & 0o7777, uid, gid, mtime_ns)
        xattrs = get("xattrs")
        if xattrs:
            inode.xattrs = check_xattrs(
                ((_encode(key), _decode_base64(value)) for key, value in xattrs.items()), path, self._tree
            )
        return inode

    def _add_chunk(self, get: Any) -> None:
        inode = self._file
        if inode is None:
            raise FormatError("a chunk that belongs to no file")
        offset, chunk_offset, size = get("offset") or 0, get("chunkOffset") or 0, get("chunkSize") or 0
        inner, digest = get("innerOffset") or 0, get("chunkDigest")
        if type(offset) is not int or type(chunk_offset) is not int or type(size) is not int or type(inner) is not int:
            raise FormatError("a chunk's place is no number")
        if chunk_offset != self._filled:
            raise FormatError(f"a chunk at {chunk_offset} of a file where {self._filled} was due")
        size = size or inode.size - chunk_offset
        if not 0 < size <= inode.size - chunk_offset:
            raise FormatError(f"a chunk of {size} bytes at {chunk_offset} of a file of {inode.size}")
        if size > MAX_CHUNK_BYTES:
            raise FormatError(f"a chunk of {size} bytes is more than we decode at once")
        if not 0 <= offset < self._data_stop or not 0 <= inner <= _MAX_U32:
            raise FormatError(f"a chunk at {offset} (inner {inner}), data end at {self._data_stop}")
        if not digest:
            if size != inode.size:
                raise FormatError("a chunk without digest")
            digest = get("digest") or ""
        match = _HEX64.match(digest)
        if match is None:
            raise FormatError(f"not a sha256 digest: {digest[:100]!r}")
        self._filled += size
        self._offsets.append(offset)
        self._inners.append(inner)
        self._sizes.append(size)
        self._digests.append(bytes.fromhex(match[1]))

    def _close_file(self) -> None:
        inode = self._file
        if inode is not None:
            if self._filled != inode.size:
                raise FormatError(f"the chunks of a file end at {self._filled} of {inode.size}")
            inode.chunk_count = len(self._sizes) - inode.first_chunk
            self._file = None

    def _tabulate(self, files: list[Inode]) -> ChunkTable:
        """The chunk table of the living files in blob order; `files` is put in that order and bound to it."""
        offsets, inners, sizes, digests = self._offsets, self._inners, self._sizes, self._digests
        starts = sorted({*offsets, *self._hidden, self._data_stop})
        length_of = dict(zip(starts, (after - start for start, after in itertools.pairwise(starts)), strict=False))
        files.sort(key=lambda inode: (offsets[inode.first_chunk], inners[inode.first_chunk]))
        table = ChunkTable()
        # What an earlier file has claimed: a second one may share all of its chunks (same place, size, digest), not some.
        shared: dict[tuple[int, int], tuple[int, int, int]] = {}
        last_offset, last_end = -1, 0
        order: list[int] = []
        for inode in files:
            source, first = inode.first_chunk, len(table.size) + len(order)
            offset, inner = offsets[source], inners[source]
            if (offset == last_offset and inner < last_end) or offset < last_offset:
                twin = shared.get((offset, inner))
                if twin is None or not self._is_twin(twin, source, inode.chunk_count):
                    raise FormatError(f"two files overlap in the blob at {offset} (inner {inner})")
                inode.first_chunk = twin[1]
                continue
            shared[(offset, inner)] = (source, first, inode.chunk_count)
            inode.first_chunk = first
            for number in range(source, source + inode.chunk_count):
                offset, inner = offsets[number], inners[number]
                if offset < last_offset or (offset == last_offset and inner < last_end):
                    raise FormatError(f"a chunk at {offset} (inner {inner}) lies before the one it follows")
                last_offset, last_end = offset, inner + sizes[number]
                if last_end > length_of[offset] * _MAX_RATIO + _RATIO_SLACK:
                    raise FormatError(f"{last_end} bytes cannot come out of the {length_of[offset]} of the member at {offset}")
                order.append(number)
        if any(length_of[offsets[number]] > _MAX_U32 for number in order):
            raise FormatError("a member of more than 4 GiB")
        for number in order:
            table.append(offsets[number], length_of[offsets[number]], inners[number], sizes[number], digests[number])
        return table

    def _is_twin(self, twin: tuple[int, int, int], source: int, count: int) -> bool:
        theirs, _, their_count = twin
        return count == their_count and all(
            column[theirs : theirs + count] == column[source : source + count]
            for column in (self._offsets, self._inners, self._sizes, self._digests)
        )


def _encode(text: str) -> bytes:
    """A JSON string as path bytes; half a surrogate pair becomes U+FFFD as in the reference reader."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _number(value: object, most: int) -> int:
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= most:
        raise FormatError(f"{str(value)[:40]!r} where a number up to {most} was due")
    return value


def _decode_base64(value: str) -> bytes:
    try:
        return binascii.a2b_base64(value, strict_mode=True)
    except ValueError as exc:
        raise FormatError(f"an xattr that is no base64: {value[:40]!r}") from exc


def _parse_time(text: str) -> int:
    """Nanoseconds since the epoch of an RFC 3339 time."""
    match = _TIME.match(text)
    if match is None:
        raise FormatError(f"not a time: {text[:40]!r}")
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    try:
        moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError as exc:
        raise FormatError(f"not a time: {text[:40]!r}") from exc
    seconds = (moment - _EPOCH) // timedelta(seconds=1)
    if match[8]:
        shift = int(match[9]) * 3600 + int(match[10]) * 60
        seconds -= shift if match[8] == "+" else -shift
    return seconds * 1_000_000_000 + int((match[7] or "").ljust(9, "0")[:9])


class EstargzFormat:
    """eStargz as `agent.formats.catalogue` lists it."""

    name = "estargz"
    is_only_form = False

    def recognises(self, facts: LayerFacts) -> bool:
        """The manifest names the digest of a TOC, and no other format's."""
        return TOC_DIGEST in facts.annotations and not any("zstd-chunked" in key for key in facts.annotations)

    def read_index(self, facts: LayerFacts) -> IndexReader:
        """Footer, then TOC; the TOC from its own image if the footer says so."""
        toc_digest = parse_digest(facts.annotations[TOC_DIGEST])
        tail = yield BlobRange(max(0, facts.size - TAIL_GUESS(facts.size)), facts.size, is_guess=True)
        start = facts.size - len(tail)
        footer = parse_footer(tail, facts.size)
        if footer is None:
            raise FormatError("the manifest names a TOC digest, but the blob does not end in an eStargz footer")
        if footer.toc_offset == EXTERNAL:
            raw = yield AttachedBlob(EXTERNAL_TOC_SUFFIX, LAYER_DIGEST, facts.digest)
            if not raw:
                raise FormatError(f"no image with {EXTERNAL_TOC_SUFFIX} behind its tag has the TOC of layer {facts.digest}")
            toc_start = facts.size
        else:
            toc_start = footer.toc_offset
            if toc_start < start:
                tail = (yield BlobRange(toc_start, start)) + tail
                start = toc_start
            raw = tail[toc_start - start : facts.size - start - footer.footer_size]
        toc = unpack_toc(raw, toc_digest)
        return parse_toc(toc, blob_size=facts.size, toc_offset=toc_start, toc_digest=toc_digest)


FORMAT: Final = EstargzFormat()
