"""Tables of contents in JSON, from their text to a `LayerIndex`: what eStargz and zstd:chunked have in common.

The text is read in parts and an entry at a time, so that neither it nor all of its entries are ever in memory at once: a TOC may
have 150 MiB, and as Python objects ten times that.

Nothing in a TOC is believed: offsets lie inside the blob, chunks fill their files without gap or overlap, and no member claims to
give more than its compression can hold.

A file whose only chunk has no `chunkDigest` is verified by its `digest`; the reference readers do the same.
"""

import binascii
import codecs
import json
import re
from array import array
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import attrs

from agent.formats.layout import lay_out
from agent.formats.model import MAX_CHUNK_BYTES, MAX_INDEX_BYTES, ChunkTable, FormatError, Inode, InodeKind, LayerIndex
from agent.formats.pieces import cut_pieces
from agent.formats.tree import TreeBuilder, check_xattrs, walk

TOC_NAME: Final = "stargz.index.json"
PREFETCH_LANDMARK: Final = ".prefetch.landmark"
NO_PREFETCH_LANDMARK: Final = ".no.prefetch.landmark"
PREFETCH_STOP: Final = "prefetchStop"
"""Key of ours at the top of a zstd:chunked TOC, which has no landmarks: the blob offset before which all is wanted at start."""
MAX_ENTRIES: Final = 2 << 20
"""Entries of one TOC, chunks included: a layer of 100 GB cut at every 64 KiB has 1.6 million."""

_MAX_VALUE: Final = 4 << 20
"""Characters of one entry: all xattrs that an inode can have are 350 kB in base64."""
_PART: Final = 1 << 20
_MAX_U32: Final = 0xFFFFFFFF
_MAX_FILE: Final = 1 << 50
_MAX_BLOB: Final = 1 << 60
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TIME: Final = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,18}))?(?:Z|([+-])(\d\d):(\d\d))\Z", re.ASCII)
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_HEX64: Final = re.compile(r"sha256:([0-9a-f]{64})\Z")
_DECODE: Final = json.JSONDecoder().raw_decode
_KINDS: Final = {
    "dir": InodeKind.DIRECTORY,
    "symlink": InodeKind.SYMLINK,
    "char": InodeKind.CHAR,
    "block": InodeKind.BLOCK,
    "fifo": InodeKind.FIFO,
}


@attrs.frozen
class Dialect:
    """What the formats do not have in common.

    `max_ratio` is what one byte of the compression can become at most, `ratio_slack` what a member may give beyond. `has_ends`:
    entries may say `endOffset` and chunks may be holes. `is_unique`: a name that comes twice is an error, else the last one counts.
    """

    name: str
    codec: str
    max_ratio: int
    ratio_slack: int
    has_ends: bool
    is_unique: bool


class TocText:
    """Splits the text of a TOC, as it comes, into entries.

    `fields` are the other things at the top of the TOC, complete when the last entry has been taken: integers and short strings,
    for the rest None.
    """

    def __init__(self, parts: Iterable[bytes]) -> None:
        self.fields: dict[str, Any] = {}
        self._parts = iter(parts)
        # Like the reference reader's JSON decoder, which puts U+FFFD in place of bytes that are not UTF-8.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._at = 0
        self._total = 0
        self._has_ended = False

    @classmethod
    def of_bytes(cls, toc_json: bytes) -> "TocText":
        """The text of a TOC that is in memory."""
        view = memoryview(toc_json)
        return cls(bytes(view[at : at + _PART]) for at in range(0, len(view), _PART))

    def entries(self) -> Iterator[Any]:
        """The entries, whatever JSON they are.

        Raises:
            FormatError: the text is no JSON, no TOC of version 1, or too long.
        """
        self._take("{")
        has_entries = False
        while self._peek() != "}" or self.fields or has_entries:
            key = self._value()
            if not isinstance(key, str):
                raise FormatError("the TOC is no JSON")
            self._take(":")
            if key == "entries":
                if has_entries:
                    raise FormatError("the TOC has two lists of entries")
                has_entries = True
                if self._peek() == "[":
                    yield from self._list()
                elif self._value() is not None:
                    raise FormatError("the TOC has no list of entries")
            else:
                value = self._value()
                is_known = isinstance(value, int) or (isinstance(value, str) and len(value) <= 100)
                self.fields[key[:100]] = value if is_known else None
                if len(self.fields) > 1000:
                    raise FormatError("a TOC with more than 1000 fields")
            if self._peek() == "}":
                break
            self._take(",")
        self._take("}")
        if self._peek():
            raise FormatError("the TOC goes on behind its end")
        version = self.fields.get("version")
        if version != 1 or version is True:
            raise FormatError("the TOC is not of version 1")

    def _list(self) -> Iterator[Any]:
        self._take("[")
        if self._peek() == "]":
            self._take("]")
            return
        count, between = 0, ""
        while True:
            count += 1
            if count > MAX_ENTRIES:
                raise FormatError(f"a TOC of more than {MAX_ENTRIES} entries")
            yield self._value()
            # Writers put the same between all entries: one comparison then, instead of two searches.
            while between and count < MAX_ENTRIES and self._text.startswith(between, self._at):
                try:
                    value, stop = _DECODE(self._text, self._at + len(between))
                except (ValueError, RecursionError):
                    break
                if stop == len(self._text):
                    break  # it may go on in the next part, or is wrong, as above: `_value` tells
                self._at = stop
                count += 1
                yield value
            text, end = self._text, self._at
            mark = self._peek()
            self._at += 1
            if mark == "]":
                return
            if mark != ",":
                raise FormatError("the TOC is no JSON: a list does not go on")
            self._peek()
            if self._text is text:
                between = text[end : self._at]

    def _fill(self) -> None:
        part = next(self._parts, None)
        if part is None:
            self._has_ended = True
            text = self._decoder.decode(b"", final=True)
        else:
            self._total += len(part)
            if self._total > MAX_INDEX_BYTES:
                raise FormatError(f"a TOC of more than {MAX_INDEX_BYTES} bytes")
            text = self._decoder.decode(part)
        self._text = self._text[self._at :] + text
        self._at = 0

    def _peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if self._has_ended:
                return ""
            self._fill()

    def _take(self, mark: str) -> None:
        if self._peek() != mark:
            raise FormatError(f"the TOC is no JSON: {mark!r} is missing")
        self._at += 1

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = _DECODE(self._text, self._at)
            except (ValueError, RecursionError) as exc:
                if self._has_ended or isinstance(exc, RecursionError):
                    raise FormatError(f"the TOC is no JSON: {exc}") from exc
            else:
                if end < len(self._text) or self._has_ended:  # else a number may go on in the next part
                    self._at = end
                    return value
            if len(self._text) - self._at > _MAX_VALUE:
                raise FormatError(f"a TOC entry of more than {_MAX_VALUE} characters")
            self._fill()


class TocParser:
    """One pass over the entries; chunks of all files as columns, bound to inodes at the end."""

    def __init__(self, dialect: Dialect, blob_size: int, data_stop: int) -> None:
        if not 0 <= data_stop <= blob_size <= _MAX_BLOB:
            raise FormatError(f"data end at {data_stop} in a blob of {blob_size} bytes")
        self._dialect = dialect
        self._blob_size = blob_size
        self._data_stop = data_stop
        self._tree = TreeBuilder()
        self._times: dict[str, int] = {}
        self._names: set[str] = set()
        self._offsets = array("Q")
        self._inners = array("I")
        self._sizes = array("I")
        self._places = array("Q")
        self._digests = bytearray()
        self._files: list[Inode] = []
        self._empty: list[Inode] = []
        self._marks = array("Q")
        self._has_holes = False
        self._file: Inode | None = None
        self._filled = 0
        self._last_offset = 0
        self._end_offset = 0
        self._landmark = self._no_landmark = -1

    def parse(self, toc: TocText) -> LayerIndex:
        """Raises FormatError for anything that cannot be true."""
        count = 0
        for entry in toc.entries():
            count += 1
            try:
                self._add(entry)
            except (KeyError, TypeError, AttributeError) as exc:
                raise FormatError(f"TOC entry that is not one: {str(entry)[:200]}") from exc
        self._close_file()
        self._names.clear()
        root = self._tree.finish()
        files, empty = self._files, self._empty
        if self._tree.has_replaced:
            alive = {id(inode) for _, inode in walk(root)}
            files = [inode for inode in files if id(inode) in alive]
            empty = [inode for inode in empty if id(inode) in alive]
        chunks, file_offset = self._tabulate(files)
        for inode in empty:
            inode.first_chunk = len(chunks)
        volume_size = lay_out(files + empty, chunks, file_offset if self._has_holes else None)
        prefetch_stop = 0 if self._no_landmark >= 0 else self._landmark
        if self._dialect.has_ends and PREFETCH_STOP in toc.fields:
            prefetch_stop = _number(toc.fields[PREFETCH_STOP], self._data_stop)
        return LayerIndex(
            self._dialect.name,
            self._dialect.codec,
            root,
            chunks,
            cut_pieces(chunks, self._blob_size, self._data_stop, prefetch_stop=prefetch_stop),
            volume_size,
            count,
            prefetch_stop,
            tuple(self._tree.warnings),
        )

    def _add(self, entry: Any) -> None:
        get = entry.get
        kind = get("type")
        if kind == "chunk":
            self._add_chunk(get)
            return
        self._close_file()
        name = entry["name"]
        if self._dialect.is_unique:
            if name in self._names:
                raise FormatError(f"the TOC has {name[:200]!r} twice")
            self._names.add(name)
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
                if self._dialect.has_ends:
                    self._end_offset = _number(get("endOffset"), self._data_stop)
                self._add_chunk(get)
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
        self._marks.append(offset)
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
                known = self._times[time] = parse_rfc3339(time)
            mtime_ns = known
        inode = Inode(kind, mode & 0o7777, uid, gid, mtime_ns)
        xattrs = get("xattrs")
        if xattrs:
            inode.xattrs = check_xattrs(
                ((_encode(key), _decode_base64(value)) for key, value in xattrs.items()), path, self._tree
            )
        return inode

    # --- chunks -----------------------------------------------------------------------------------------------------------

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
        if not 0 <= offset < self._data_stop or not 0 <= inner <= _MAX_U32:
            raise FormatError(f"a chunk at {offset} (inner {inner}), data end at {self._data_stop}")
        self._filled += size
        self._last_offset = max(self._last_offset, offset)
        if self._dialect.has_ends and get("chunkType"):
            if get("chunkType") != "zeros":
                raise FormatError(f"a chunk of unknown type {str(get('chunkType'))[:20]!r}")
            self._has_holes = True
            self._marks.append(offset)
            return
        if size > MAX_CHUNK_BYTES:
            raise FormatError(f"a chunk of {size} bytes is more than we decode at once")
        if not digest:
            if size != inode.size:
                raise FormatError("a chunk without digest")
            digest = get("digest") or ""
        match = _HEX64.match(digest)
        if match is None:
            raise FormatError(f"not a sha256 digest: {digest[:100]!r}")
        self._offsets.append(offset)
        self._inners.append(inner)
        self._sizes.append(size)
        self._places.append(chunk_offset)
        self._digests += bytes.fromhex(match[1])

    def _close_file(self) -> None:
        inode = self._file
        if inode is None:
            return
        if self._filled != inode.size:
            raise FormatError(f"the chunks of a file end at {self._filled} of {inode.size}")
        if self._end_offset:
            if self._last_offset >= self._end_offset:
                raise FormatError(f"a chunk at {self._last_offset} of a file that ends at {self._end_offset}")
            self._marks.append(self._end_offset)
        inode.chunk_count = len(self._sizes) - inode.first_chunk
        (self._files if inode.chunk_count else self._empty).append(inode)
        self._file = None
        self._last_offset = self._end_offset = 0

    def _tabulate(self, files: list[Inode]) -> tuple[ChunkTable, "array[int]"]:
        """The chunk table of the living files in blob order, and where in its file each chunk is; `files` is put in that order
        and bound to the table."""
        offsets, inners, sizes = self._offsets, self._inners, self._sizes
        max_ratio, slack = self._dialect.max_ratio, self._dialect.ratio_slack
        starts = array("Q", sorted(offsets + self._marks))
        starts.append(self._data_stop)
        next_start = 0
        files.sort(key=lambda inode: (offsets[inode.first_chunk], inners[inode.first_chunk]))
        table, file_offset = ChunkTable(), array("Q")
        # What an earlier file has claimed: a second one may share all of its chunks (same place, size, digest), not some.
        shared: dict[tuple[int, int], tuple[int, int, int]] = {}
        last_offset, last_end = -1, 0
        for inode in files:
            source, first = inode.first_chunk, len(table)
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
                while starts[next_start] <= offset:  # offsets ascend
                    next_start += 1
                length = starts[next_start] - offset
                if last_end > length * max_ratio + slack:
                    raise FormatError(f"{last_end} bytes cannot come out of the {length} of the member at {offset}")
                if length > _MAX_U32:
                    raise FormatError("a member of more than 4 GiB")
                table.append(offset, length, inner, sizes[number], bytes(self._digests[32 * number : 32 * number + 32]))
                file_offset.append(self._places[number])
        return table, file_offset

    def _is_twin(self, twin: tuple[int, int, int], source: int, count: int) -> bool:
        theirs, _, their_count = twin
        return (
            count == their_count
            and all(
                column[theirs : theirs + count] == column[source : source + count]
                for column in (self._offsets, self._inners, self._sizes, self._places)
            )
            and self._digests[32 * theirs : 32 * (theirs + count)] == self._digests[32 * source : 32 * (source + count)]
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


def parse_rfc3339(text: str) -> int:
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
