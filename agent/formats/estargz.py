"""eStargz: footer, table of contents, `LayerIndex` (formats.md section 1).

Trust. `parse_toc` is given the digest that the manifest names and checks the TOC's exact bytes against it; every chunk is then
verified by the digest that the TOC names. Yet a TOC with the right digest may still be hostile: `toc` believes nothing in it.
"""

import re
from typing import Final

import attrs
from isal import isal_zlib

from agent.formats import toc as _toc
from agent.formats.inflate import InflateError
from agent.formats.model import MAX_INDEX_BYTES, Digest, FormatError, LayerIndex, digest_of, parse_digest
from agent.formats.opening import AttachedBlob, BlobRange, IndexReader, LayerFacts
from agent.formats.toc import Dialect, TocParser, TocText

TOC_DIGEST: Final = "containerd.io/snapshot/stargz/toc.digest"
LAYER_DIGEST: Final = "containerd.io/snapshot/stargz/layer.digest"
EXTERNAL_TOC_SUFFIX: Final = "-esgztoc"
TOC_NAME: Final = _toc.TOC_NAME
PREFETCH_LANDMARK: Final = _toc.PREFETCH_LANDMARK
NO_PREFETCH_LANDMARK: Final = _toc.NO_PREFETCH_LANDMARK
FOOTER_SIZE: Final = 51
EXTERNAL: Final = -1
"""`Footer.toc_offset` when the TOC is in another image."""

_GUESS_LEAST: Final = 128 << 10
_GUESS_MOST: Final = 2 << 20
# One byte of deflate can become 1032 at most (zlib's technical notes).
_DIALECT: Final = Dialect("estargz", "gzip", max_ratio=1032, ratio_slack=64 << 10, has_ends=False, is_unique=False)
_GZIP_HEAD: Final = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff"
_GZIP_TAIL: Final = b"\x01\0\0\xff\xff" + bytes(8)
_HEX16: Final = re.compile(rb"[0-9a-fA-F]{16}\Z")


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
    return TocParser(_DIALECT, blob_size, toc_offset).parse(TocText.of_bytes(toc_json))


class EstargzFormat:
    """eStargz as `agent.formats.catalogue` lists it."""

    name = "estargz"
    is_only_form = False

    def recognises(self, facts: LayerFacts) -> bool:
        """The manifest names the digest of a TOC, and no other format's."""
        return (
            TOC_DIGEST in facts.annotations
            and not facts.media_type.endswith("zstd")
            and not any("zstd-chunked" in key for key in facts.annotations)
        )

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
