"""zTOCs and SOCI indexes made from a layer, by other means than the reader's: libz through ctypes, and the standard library's tar.

`build_ztoc` follows the reference builder: the first checkpoint is behind the gzip header, others at the first deflate block that
begins more than a span after the one before; span digests cover the byte that two spans share in both of them.
"""

import ctypes
import ctypes.util
import hashlib
import io
import json
import struct
import tarfile
import zlib
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs

WINDOW = 32 << 10
_POINT = struct.Struct("<qqB")
_KINDS = {
    tarfile.REGTYPE: b"reg",
    tarfile.AREGTYPE: b"reg",
    tarfile.DIRTYPE: b"dir",
    tarfile.SYMTYPE: b"symlink",
    tarfile.LNKTYPE: b"hardlink",
    tarfile.CHRTYPE: b"char",
    tarfile.BLKTYPE: b"block",
    tarfile.FIFOTYPE: b"fifo",
}


# --- checkpoints ----------------------------------------------------------------------------------------------------------


class _Stream(ctypes.Structure):
    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


@attrs.frozen
class Point:
    """A checkpoint; `window` is what came before it."""

    place: int
    out: int
    bits: int
    window: bytes


def find_points(blob: bytes, span: int) -> tuple[list[Point], bytes]:
    """Checkpoints of a gzip blob, through all of its members, and the tar."""
    libz = ctypes.CDLL(ctypes.util.find_library("z"))
    libz.zlibVersion.restype = ctypes.c_char_p
    source = ctypes.create_string_buffer(blob, len(blob))
    block = ctypes.create_string_buffer(1 << 16)
    points: list[Point] = []
    tar = bytearray()
    at, last = 0, -1
    while at < len(blob) and any(blob[at:]):
        stream = _Stream(next_in=ctypes.addressof(source) + at, avail_in=len(blob) - at)
        assert libz.inflateInit2_(ctypes.byref(stream), 31, libz.zlibVersion(), ctypes.sizeof(stream)) == 0
        while True:
            stream.next_out, stream.avail_out = ctypes.addressof(block), len(block)
            result = libz.inflate(ctypes.byref(stream), 5)  # Z_BLOCK
            tar += ctypes.string_at(block, len(block) - stream.avail_out)
            assert result in (0, 1), result
            if result == 1:
                break
            if stream.data_type & 128 and not stream.data_type & 64 and (last < 0 or len(tar) - last > span):
                place = len(blob) - stream.avail_in
                window = bytes(tar[-WINDOW:]).rjust(WINDOW, b"\0")
                points.append(Point(place, len(tar), stream.data_type & 7, window))
                last = len(tar)
        at = len(blob) - stream.avail_in
        libz.inflateEnd(ctypes.byref(stream))
    return points, bytes(tar)


def inflate_from(data: bytes, bits: int, window: bytes, size: int) -> bytes:
    """The first `size` bytes of output from a checkpoint on; `data` begins with the byte that it lies in, if it lies in one."""
    libz = ctypes.CDLL(ctypes.util.find_library("z"))
    libz.zlibVersion.restype = ctypes.c_char_p
    source = ctypes.create_string_buffer(data, len(data))
    target = ctypes.create_string_buffer(size + 1)
    stream = _Stream(next_in=ctypes.addressof(source), avail_in=len(data), next_out=ctypes.addressof(target), avail_out=size)
    assert libz.inflateInit2_(ctypes.byref(stream), -15, libz.zlibVersion(), ctypes.sizeof(stream)) == 0
    if bits:
        assert libz.inflatePrime(ctypes.byref(stream), bits, data[0] >> (8 - bits)) == 0
        stream.next_in, stream.avail_in = ctypes.addressof(source) + 1, len(data) - 1
    assert libz.inflateSetDictionary(ctypes.byref(stream), window, len(window)) == 0
    while stream.avail_out:
        result = libz.inflate(ctypes.byref(stream), 2)
        if result == 1 and stream.avail_out:  # on to the next member, behind the checksum and length of this one
            rest = stream.avail_in - 8
            assert rest > 0
            stream.next_in, stream.avail_in = ctypes.addressof(source) + len(data) - rest, rest
            assert libz.inflateReset2(ctypes.byref(stream), 31) == 0
        else:
            assert result in (0, 1), result
    libz.inflateEnd(ctypes.byref(stream))
    return target.raw[:size]


def pack_points(points: list[Point], span: int, *, is_old: bool = False) -> bytes:
    """The zinfo blob; an old one has no first checkpoint."""
    kept = points[1:] if is_old else points
    return struct.pack("<iq", len(points), span) + b"".join(
        _POINT.pack(point.place, point.out, point.bits) + point.window for point in kept
    )


def span_extents(points: list[Point], size: int) -> list[tuple[int, int]]:
    """Bytes of the blob of each span."""
    stops = [point.place for point in points[1:]] + [size]
    return [(point.place - (1 if point.bits else 0), stop) for point, stop in zip(points, stops, strict=True)]


# --- flatbuffers ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Scalar:
    """A number in a table: a struct code and its value."""

    code: str
    value: int


Value = Scalar | bytes | list[Any] | dict[int, Any]


class _FlatWriter:
    """Tables are dicts from field number to value, vectors lists, strings and byte vectors bytes."""

    def __init__(self) -> None:
        self.out = bytearray(4)

    def finish(self, root: dict[int, Any]) -> bytes:
        struct.pack_into("<I", self.out, 0, self._table(root))
        return bytes(self.out)

    def _value(self, value: Value) -> int:
        if isinstance(value, dict):
            return self._table(value)
        self.out += bytes(-len(self.out) % 4)
        at = len(self.out)
        self.out += struct.pack("<I", len(value))  # type: ignore[arg-type]
        if isinstance(value, bytes):
            self.out += value + b"\0"
            return at
        assert isinstance(value, list)
        self.out += bytes(4 * len(value))
        for number, item in enumerate(value):
            place = at + 4 + 4 * number
            target = self._value(item)
            struct.pack_into("<I", self.out, place, target - place)
        return at

    def _table(self, fields: dict[int, Any]) -> int:
        width = max(fields, default=-1) + 1
        offsets, body = [0] * width, bytearray(4)
        for field in sorted(fields):
            value = fields[field]
            code = value.code if isinstance(value, Scalar) else "I"
            body += bytes(-len(body) % struct.calcsize(code))
            offsets[field] = len(body)
            body += struct.pack("<" + code, value.value if isinstance(value, Scalar) else 0)
        self.out += bytes(-len(self.out) % 8)
        vtable = len(self.out)
        self.out += struct.pack(f"<HH{width}H", 4 + 2 * width, len(body), *offsets)
        self.out += bytes(-len(self.out) % 8)
        at = len(self.out)
        self.out += body
        struct.pack_into("<i", self.out, at, at - vtable)
        for field, value in fields.items():
            if not isinstance(value, Scalar):
                place = at + offsets[field]
                target = self._value(value)
                struct.pack_into("<I", self.out, place, target - place)
        return at


def write_flatbuffer(root: dict[int, Any]) -> bytes:
    """A flatbuffer from nested dicts, lists, bytes and `Scalar`s."""
    return _FlatWriter().finish(root)


# --- zTOC -----------------------------------------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape")


def _time(member: tarfile.TarInfo) -> bytes:
    seconds, _, fraction = member.pax_headers.get("mtime", str(int(member.mtime))).partition(".")
    nanoseconds = int(fraction[:9].ljust(9, "0") or "0")
    whole = int(seconds)
    if seconds.startswith("-") and nanoseconds:
        whole, nanoseconds = whole - 1, 1_000_000_000 - nanoseconds
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=whole)
    digits = f".{nanoseconds:09}".rstrip("0") if nanoseconds else ""
    return f"{moment:%Y-%m-%dT%H:%M:%S}{digits}Z".encode()


def describe_member(member: tarfile.TarInfo) -> dict[int, Any]:
    """A FileMetadata table. Numbers that are zero are left out, as the builder's library does."""
    size = member.size if member.isreg() else 0
    numbers = {
        2: Scalar("q", member.offset_data),
        3: Scalar("q", size),
        5: Scalar("q", member.mode),
        6: Scalar("I", member.uid),
        7: Scalar("I", member.gid),
        11: Scalar("q", member.devmajor if member.isdev() else 0),
        12: Scalar("q", member.devminor if member.isdev() else 0),
    }
    table: dict[int, Any] = {field: number for field, number in numbers.items() if number.value}
    table |= {
        0: _text(member.name + ("/" if member.isdir() else "")),
        1: _KINDS[member.type],
        4: _text(member.linkname),
        8: _text(member.uname),
        9: _text(member.gname),
        10: _time(member),
        13: [{0: _text(key), 1: _text(value)} for key, value in sorted(member.pax_headers.items())],
    }
    return table


def describe_tar(tar: bytes) -> list[dict[int, Any]]:
    """The FileMetadata of all entries of a tar."""
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        return [describe_member(member) for member in archive]


def digest_text(data: bytes) -> str:
    """`sha256:…` of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


@attrs.frozen
class Built:
    """A zTOC, as the nested tables that it was written from and as bytes."""

    root: dict[int, Any]
    data: bytes
    tar: bytes
    extents: list[tuple[int, int]]


def build_ztoc(blob: bytes, span: int, *, is_old: bool = False, entries: list[dict[int, Any]] | None = None) -> Built:
    """The zTOC of a layer, gzip or uncompressed."""
    if blob.startswith(b"\x1f\x8b"):
        points, tar = find_points(blob, span)
        extents = span_extents(points, len(blob))
        algorithm, zinfo = 1, pack_points(points, span, is_old=is_old)
    else:
        tar = blob
        extents = [(at, min(at + span, len(blob))) for at in range(0, len(blob), span)]
        algorithm, zinfo = 2, struct.pack("<iqq", 2, span, len(blob))
    root: dict[int, Any] = {
        0: b"0.9",
        1: b"tests",
        2: Scalar("q", len(blob)),
        3: Scalar("q", len(tar)),
        4: {0: describe_tar(tar) if entries is None else entries},
        5: {
            1: Scalar("i", len(extents) - 1),
            2: [digest_text(blob[start:stop]).encode() for start, stop in extents],
            3: zinfo,
        },
    }
    if algorithm != 1:
        root[5][0] = Scalar("b", algorithm)
    return Built(root, write_flatbuffer(root), tar, extents)


def build_index(ztocs: dict[str, bytes], *, is_v1: bool = False, subject: dict[str, Any] | None = None) -> bytes:
    """The manifest of a SOCI index; `ztocs` by the digest of their layer. `subject`: the descriptor of what it refers to."""
    return json.dumps(
        {
            **({"subject": subject} if subject else {}),
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": f"application/vnd.amazon.soci.index.v{1 if is_v1 else 2}+json",
                "digest": digest_text(b"{}"),
                "size": 2,
            },
            "layers": [
                {
                    "mediaType": "application/octet-stream",
                    "digest": digest_text(ztoc),
                    "size": len(ztoc),
                    "annotations": {"com.amazon.soci.image-layer-digest": layer},
                }
                for layer, ztoc in ztocs.items()
            ],
            "annotations": {"com.amazon.soci.build-tool-identifier": "tests"},
        }
    ).encode()


def compress_members(tar: bytes, size: int, *, level: int = 6, name: bytes = b"") -> bytes:
    """gzip members of `size` bytes each, as parallel compressors write them; each header has a file's name if one is given."""
    out = bytearray()
    for at in range(0, len(tar), size):
        part = tar[at : at + size]
        deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
        body = deflate.compress(part) + deflate.flush()
        flags, field = (8, name + b"\0") if name else (0, b"")
        out += b"\x1f\x8b\x08" + bytes([flags]) + bytes(4) + b"\0\xff" + field + body
        out += struct.pack("<II", zlib.crc32(part), len(part) & 0xFFFFFFFF)
    return bytes(out)
