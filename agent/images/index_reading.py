"""Reading the index of a layer for whichever format it has: the side of the conversation (`agent.formats.opening`) that does I/O.

A peer that holds the layer's index gives it in one request; the registry is asked for ranges. Whatever comes is believed only as
far as the format can verify it. What was read of the piece that holds the index is kept, so that this node can give it to others.
"""

import hashlib
from typing import Final, Protocol

import attrs
import structlog
import trio

from agent.errors import SourceError, SourceRefused, SourceUnavailable
from agent.formats.model import Digest, FormatError, LayerIndex
from agent.formats.opening import AttachedBlob, BlobRange, Format, IndexReader, LayerFacts, ManifestBytes, ReferrersOf, Want
from agent.registry import Descriptor, ImageReference, RegistryClient
from agent.resolve import Resolver, Source
from agent.store import StoredLayer
from fsmount.erofs import write_image

log = structlog.get_logger()

PEER_INDEX_S: Final = 3.0
"""A peer that has not sent an index (about 1 MB) after this long is passed over for the registry."""
MAX_ATTACHED_BYTES: Final = 64 << 20
MAX_WANTED_BYTES: Final = 256 << 20
"""Most that a format may want at once: nydus bootstraps of the largest images have 100 MB."""


class IndexSources(Protocol):
    """Who may hold a layer's index, before the layer is known."""

    async def index_holders(self, blob: Digest) -> list[tuple[Source, int, int]]:
        """Peers that hold the index piece: (source, its first byte, the blob's size). May wait for one round trip."""

    def registry_source(self, image: ImageReference) -> Source:
        """The registry as a source."""


@attrs.frozen
class ReadIndex:
    """An index, its metadata image, and the bytes of its index piece (empty if they did not all pass)."""

    index: LayerIndex
    meta: bytearray
    index_bytes: bytes

    def keep_index_piece(self, stored: StoredLayer) -> None:
        """Have the index served to others; in a worker thread."""
        number = stored.pieces.index_piece
        if number >= 0 and self.index_bytes and not stored.has_piece(number):
            stored.write_blob(stored.pieces.starts[number], self.index_bytes)
            stored.mark_piece(number)


@attrs.frozen
class IndexFetcher:
    """See the module's text."""

    registry: RegistryClient
    sources: IndexSources
    resolver: Resolver
    cpu: trio.CapacityLimiter

    async def fetch(self, image: ImageReference, facts: LayerFacts, layer_format: Format) -> ReadIndex:
        """Read the index from a peer or the registry.

        Raises:
            FormatError: what the registry has is not what the format promises.
            SourceError: nobody gave it.
        """
        for source, start, size in await self.sources.index_holders(facts.digest):
            own_start = facts.size - (size - start)  # of a spliced blob the layer's own is the end
            if not 0 <= own_start <= facts.size:
                continue
            try:
                with trio.fail_after(PEER_INDEX_S):
                    tail = await self._read(source, facts.digest, size, start, size)
                return await self._run(image, facts, layer_format, _Kept({own_start: tail}))
            except (SourceError, FormatError, trio.TooSlowError) as exc:
                log.info("peer_index_refused", layer=facts.digest, peer=source.name, reason=str(exc))
        return await self._run(image, facts, layer_format, _Kept({}))

    async def _run(self, image: ImageReference, facts: LayerFacts, layer_format: Format, kept: "_Kept") -> ReadIndex:
        reader = layer_format.read_index(facts)
        answer: bytes | None = None
        while True:
            with self.resolver.holding_prefetch():
                step = await trio.to_thread.run_sync(_step, reader, answer, limiter=self.cpu)
            if isinstance(step, LayerIndex):
                break
            answer = await self._answer(image, facts, step, kept)
        with self.resolver.holding_prefetch():
            return await trio.to_thread.run_sync(_finish, step, facts.size, kept, limiter=self.cpu)

    async def _answer(self, image: ImageReference, facts: LayerFacts, want: Want, kept: "_Kept") -> bytes:
        if isinstance(want, BlobRange):
            blob, size = (want.blob, want.blob_size) if want.blob else (facts.digest, facts.size)
            if not 0 <= want.start <= want.stop <= size or want.stop - want.start > MAX_WANTED_BYTES:
                raise FormatError(f"the index of {facts.digest} wants bytes {want.start}-{want.stop} of {blob}, which has {size}")
            known = None
            if not want.blob:
                known = kept.end(want.stop) if want.is_guess else kept.get(want.start, want.stop)
            if known is None:
                known = await self._read(self.sources.registry_source(image), blob, size, want.start, want.stop)
                if not want.blob:
                    kept.add(want.start, known)
            return known
        if isinstance(want, ManifestBytes):
            return await self._manifest(image, want)
        if isinstance(want, ReferrersOf):
            raise FormatError(f"what refers to {image} is not looked for")
        return await self._attached(image, want)

    async def _manifest(self, image: ImageReference, want: ManifestBytes) -> bytes:
        try:
            return (await self.registry.resolve(attrs.evolve(image, tag=None, digest=want.digest))).raw
        except SourceRefused:
            return b""

    async def _attached(self, image: ImageReference, want: AttachedBlob) -> bytes:
        if not image.tag:
            raise FormatError(f"{image} has no tag, so the image with {want.tag_suffix} behind its tag cannot be named")
        other = attrs.evolve(image, tag=image.tag + want.tag_suffix, digest=None)
        try:
            resolved = await self.registry.resolve(other)
        except SourceRefused:
            return b""
        for layer in resolved.layers:
            if layer.annotations.get(want.annotation) == want.value:
                return await self._whole(other, layer)
        return b""

    async def _whole(self, image: ImageReference, layer: Descriptor) -> bytes:
        raw = await self.registry.fetch_small(image, layer, max_bytes=MAX_ATTACHED_BYTES)
        self.resolver.counters.count("registry", len(raw))
        return raw

    async def _read(self, source: Source, digest: Digest, size: int, start: int, stop: int) -> bytes:
        """One range, whole, in memory."""
        if start == stop:
            await trio.lowlevel.checkpoint()
            return b""
        data = bytearray(stop - start)
        got = 0
        async with source.fetch(digest, size, [(start, stop)]) as stream:
            async for offset, block in stream:
                data[offset - start : offset - start + len(block)] = block
                got += len(block)
        self.resolver.counters.count(source.kind, got)
        if got != stop - start or len(data) != stop - start:
            raise SourceUnavailable(f"{source.name} sent {got} of {stop - start} bytes", source=source.name)
        return bytes(data)


class _Kept:
    """Bytes of the layer's own blob that have been read, by offset."""

    def __init__(self, parts: dict[int, bytes]) -> None:
        self._parts = parts

    def add(self, start: int, data: bytes) -> None:
        self._parts[start] = data

    def end(self, stop: int) -> bytes | None:
        """What was read up to `stop`, if anything."""
        for offset, part in self._parts.items():
            if offset < stop <= offset + len(part):
                return part[: stop - offset]
        return None

    def get(self, start: int, stop: int) -> bytes | None:
        """The range, if all of it was read."""
        found: list[bytes] = []
        at = start
        for offset in sorted(self._parts):
            part = self._parts[offset]
            if offset <= at < offset + len(part):
                found.append(part[at - offset : stop - offset])
                at += len(found[-1])
            if at >= stop:
                return b"".join(found) if len(found) != 1 else found[0]
        return None


def _step(reader: IndexReader, answer: bytes | None) -> Want | LayerIndex:
    """Let the format go on until it wants something or is done; in a worker thread."""
    try:
        return reader.send(answer)  # type: ignore[arg-type]  # the first thing sent to a generator is None
    except StopIteration as stop:
        result: LayerIndex = stop.value
        return result


def _finish(index: LayerIndex, own_size: int, kept: _Kept) -> ReadIndex:
    """The metadata image, and the digest by which the index piece is known from now on; in a worker thread."""
    meta = write_image(index.root, volume_size=index.volume_size, user_markers=False)
    pieces, index_bytes = index.pieces, b""
    if pieces.index_piece >= 0:
        start, stop = pieces.extent(pieces.index_piece)
        before = pieces.blob_size - own_size
        index_bytes = kept.get(start - before, stop - before) or b""
    if index_bytes:
        digests = bytearray(pieces.digests or bytes(32 * len(pieces)))
        at = 32 * pieces.index_piece
        digests[at : at + 32] = hashlib.sha256(index_bytes).digest()
        index = attrs.evolve(index, pieces=attrs.evolve(pieces, digests=bytes(digests)))
    return ReadIndex(index, meta, index_bytes)
