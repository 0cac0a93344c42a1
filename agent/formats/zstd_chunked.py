"""zstd:chunked: annotations, footer, table of contents (formats.md section 2).

A blob is zstd frames, then skippable frames, which plain decoders pass over: the TOC, the tar-split (`tar_split`), the footer.
Two writers of the field speak different dialects. That of containers/storage has chunks that are cut by content, holes, and a
TOC that names every file once; that of stargz-snapshotter is an eStargz TOC in other clothes. Both are read by one parser.

Trust. The manifest's annotations name the SHA-256 of the TOC, of its compressed or of its plain bytes; a layer without either is
not of this format for us. They say where the TOC is too; where they do not, the footer is asked, which nothing vouches for and
nothing has to.
"""

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Final

import attrs

from agent.formats.estargz import TAIL_GUESS, TOC_DIGEST
from agent.formats.inflate import ZstdInflater
from agent.formats.model import MAX_INDEX_BYTES, Digest, FormatError, LayerIndex, digest_of, parse_digest
from agent.formats.opening import BlobRange, IndexReader, LayerFacts
from agent.formats.toc import Dialect, TocParser, TocText

NAME: Final = "zstd-chunked"
PREFIX: Final = "io.github.containers.zstd-chunked."
OLD_PREFIX: Final = "io.containers.zstd-chunked."
"""Of the first years, and of stargz-snapshotter to this day."""
CHECKSUM: Final = "manifest-checksum"
POSITION: Final = "manifest-position"
TAR_SPLIT_POSITION: Final = "tarsplit-position"
TOC_TYPE: Final = 1
SKIPPABLE: Final = b"\x50\x2a\x4d\x18"
SKIPPABLE_HEAD: Final = 8
MAGIC: Final = b"GNUlInUx"
STARGZ_MAGIC: Final = b"GnUlInUx"
FOOTER_BODY: Final = 64
STARGZ_FOOTER_BODY: Final = 40
MAX_TAIL: Final = SKIPPABLE_HEAD + FOOTER_BODY

_MAX_WANTED: Final = 256 << 20
"""Most bytes that are asked for at once: what is behind the TOC is taken along if all of it together has no more."""
_NUMBERS: Final = re.compile(r"[0-9]{1,18}(?::[0-9]{1,18}){2,3}\Z", re.ASCII)
_HEX64: Final = re.compile(r"[0-9a-f]{64}\Z")
# A zstd block of 4 bytes can stand for 128 KiB of one byte (RFC 8878 3.1.1.2).
_MAX_RATIO: Final = 32768
_RATIO_SLACK: Final = 1 << 20
_CONTAINERS: Final = Dialect(NAME, "zstd", _MAX_RATIO, _RATIO_SLACK, has_ends=True, is_unique=True)
_STARGZ: Final = Dialect(NAME, "zstd", _MAX_RATIO, _RATIO_SLACK, has_ends=True, is_unique=False)


@attrs.frozen
class Position:
    """Where a compressed part of the index lies in the blob, without its frame's head, and what it is uncompressed."""

    offset: int
    length: int
    plain_length: int

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.offset + self.length

    def check(self, blob_size: int) -> "Position":
        """Raises FormatError if this cannot be in a blob of that size."""
        if not SKIPPABLE_HEAD <= self.offset <= self.stop <= blob_size:
            raise FormatError(f"an index at {self.offset} of {self.length} bytes in a blob of {blob_size}")
        if not self.length or self.length > MAX_INDEX_BYTES or self.plain_length > MAX_INDEX_BYTES:
            raise FormatError(f"an index of {self.length} bytes, {self.plain_length} uncompressed")
        return self


@attrs.frozen
class Footer:
    """What the footer says. `size` is its bytes at the end of the blob, the frame's head included."""

    toc: Position
    tar_split: Position | None
    size: int


def parse_footer(tail: bytes, blob_size: int) -> Footer | None:
    """Find the footer in a blob's last bytes (`MAX_TAIL` are enough); None if there is none.

    Raises:
        FormatError: there is a footer, but what it says cannot be.
    """
    for body, count in ((FOOTER_BODY, 7), (STARGZ_FOOTER_BODY, 4)):
        frame = bytes(tail[-SKIPPABLE_HEAD - body :])
        if len(frame) != SKIPPABLE_HEAD + body or frame[-8:] not in (MAGIC, STARGZ_MAGIC):
            continue
        if frame[:SKIPPABLE_HEAD] != SKIPPABLE + struct.pack("<I", body):
            continue
        numbers: tuple[int, ...] = struct.unpack_from(f"<{count}Q", frame, SKIPPABLE_HEAD)
        if numbers[3] != TOC_TYPE:
            raise FormatError(f"the TOC is of type {numbers[3]}, not {TOC_TYPE}")
        data_stop = blob_size - len(frame)
        tar_split = Position(*numbers[4:]).check(data_stop) if count == 7 and any(numbers[4:]) else None
        return Footer(Position(*numbers[:3]).check(data_stop), tar_split, len(frame))
    return None


def parse_position(text: str, blob_size: int) -> Position:
    """A position as annotations have it: `offset:length:plain length`, for a TOC with its type behind.

    Raises:
        FormatError: it is something else, or cannot be.
    """
    if not _NUMBERS.match(text):
        raise FormatError(f"not a position: {text[:100]!r}")
    numbers = [int(part) for part in text.split(":")]
    if len(numbers) == 4 and numbers[3] != TOC_TYPE:
        raise FormatError(f"the TOC is of type {numbers[3]}, not {TOC_TYPE}")
    return Position(*numbers[:3]).check(blob_size)


def tar_split_position(annotations: Mapping[str, str], blob_size: int) -> Position | None:
    """Where the tar-split is by the annotations; None if they do not say.

    Raises:
        FormatError: they say what cannot be.
    """
    text = annotations.get(PREFIX + TAR_SPLIT_POSITION)
    return parse_position(text, blob_size) if text else None


@attrs.frozen
class Vouchers:
    """By what the manifest vouches for the TOC: digests of its compressed and of its plain bytes, at least one of them."""

    compressed: tuple[Digest, ...]
    plain: Digest | None
    is_stargz: bool

    @classmethod
    def of(cls, annotations: Mapping[str, str]) -> "Vouchers":
        """Raises FormatError if the annotations contradict each other or hold no digests."""
        if TOC_DIGEST in annotations and PREFIX + CHECKSUM in annotations:
            raise FormatError("the manifest has digests of an eStargz TOC and of a zstd:chunked TOC for one layer")
        sums = [annotations[prefix + CHECKSUM] for prefix in (PREFIX, OLD_PREFIX) if prefix + CHECKSUM in annotations]
        plain = annotations.get(TOC_DIGEST)
        if not sums and plain is None:
            raise FormatError("the manifest has no digest of the TOC")
        return cls(
            tuple(parse_digest("sha256:" + text if _HEX64.match(text) else text) for text in sums),
            None if plain is None else parse_digest(plain),
            plain is not None,
        )


def read_toc(compressed: bytes, position: Position, vouchers: Vouchers, blob_size: int) -> LayerIndex:
    """Make the layer index from the compressed TOC that lies at `position`.

    Raises:
        FormatError: wrong digest, no zstd, or anything in the TOC that cannot be true.
    """
    return read_toc_text(compressed, position, vouchers, blob_size)[0]


def read_toc_text(compressed: bytes, position: Position, vouchers: Vouchers, blob_size: int) -> tuple[LayerIndex, TocText]:
    """Like `read_toc`, with the TOC's own fields (`tarSplitDigest`) besides."""
    if len(compressed) != position.length:
        raise FormatError(f"{len(compressed)} bytes of a TOC of {position.length}")
    for digest in vouchers.compressed:
        actual = digest_of(compressed)
        if actual != digest:
            raise FormatError(f"the TOC has checksum {actual}, the manifest says {digest}")
    plain = _Plain(compressed, position.plain_length)
    text = TocText(plain)
    parser = TocParser(_STARGZ if vouchers.is_stargz else _CONTAINERS, blob_size, position.offset - SKIPPABLE_HEAD)
    index = parser.parse(text)  # not given to anyone before its digest is known to be right
    if vouchers.plain is not None and plain.digest != vouchers.plain:
        raise FormatError(f"the TOC has digest {plain.digest}, the manifest says {vouchers.plain}")
    return index, text


class _Plain:
    """The plain bytes of a TOC in parts, never more than were promised; iterate once."""

    def __init__(self, compressed: bytes, plain_length: int) -> None:
        self._compressed = compressed
        self._left = plain_length
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """SHA-256 of what has been given out."""
        return "sha256:" + self._hash.hexdigest()

    def __iter__(self) -> Iterator[bytes]:
        inflater = ZstdInflater()
        for part in inflater.feed(memoryview(self._compressed)):
            self._left -= len(part)
            if self._left < 0:
                raise FormatError("the TOC is larger than promised")
            self._hash.update(part)
            yield part
        inflater.finish()
        if self._left:
            raise FormatError(f"the TOC is {self._left} bytes smaller than promised")


class ZstdChunkedFormat:
    """zstd:chunked as `agent.formats.catalogue` lists it."""

    name = NAME
    is_only_form = False

    def recognises(self, facts: LayerFacts) -> bool:
        """The manifest names the digest of a TOC; one of an eStargz TOC counts where the layer is zstd or has a TOC's place."""
        annotations = facts.annotations
        if PREFIX + CHECKSUM in annotations or OLD_PREFIX + CHECKSUM in annotations:
            return True
        is_zstd = facts.media_type.endswith("zstd") or any("zstd-chunked" in key for key in annotations)
        return TOC_DIGEST in annotations and is_zstd

    def read_index(self, facts: LayerFacts) -> IndexReader:
        """The TOC, of which the annotations or else the footer say where it is."""
        vouchers = Vouchers.of(facts.annotations)
        texts = (facts.annotations.get(prefix + POSITION) for prefix in (PREFIX, OLD_PREFIX))
        text = next((text for text in texts if text), None)
        if text is not None:
            position = parse_position(text, facts.size)
            start = position.offset - SKIPPABLE_HEAD
            # With what is behind it, so that the piece of the index is whole and can be given to others.
            stop = facts.size if facts.size - start <= _MAX_WANTED else position.stop
            data = yield BlobRange(start, stop)
        else:
            data = yield BlobRange(max(0, facts.size - TAIL_GUESS(facts.size)), facts.size, is_guess=True)
            footer = parse_footer(data, facts.size)
            if footer is None:
                raise FormatError("the manifest names a zstd:chunked TOC, but neither it nor a footer says where that is")
            position = footer.toc
            start = facts.size - len(data)
            if position.offset - SKIPPABLE_HEAD < start:
                # Of a TOC far from the end no more than itself: what is between may be anything.
                wanted = position.offset - SKIPPABLE_HEAD
                if facts.size - wanted <= _MAX_WANTED:
                    data = (yield BlobRange(wanted, start)) + data
                else:
                    data = yield BlobRange(wanted, position.stop)
                start = wanted
        compressed = data[position.offset - start : position.stop - start]
        del data
        return read_toc(compressed, position, vouchers, facts.size)


FORMAT: Final = ZstdChunkedFormat()
