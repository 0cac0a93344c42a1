"""Reading the index of a layer for whichever format it has: the side of the conversation (`agent.formats.opening`) that does I/O.

A peer that holds the layer's index gives it in one request; the registry is asked for ranges. Whatever comes is believed only as
far as the format can verify it; the format itself runs in a process of its own (`agent.indexing`). What was read of the piece
that holds the index is kept, so that this node can give it to others.
"""

import hashlib
from typing import Final, Protocol

import attrs
import structlog
import trio

from agent.errors import SourceError, SourceRefused, SourceUnavailable
from agent.formats.model import Digest, FormatError, LayerIndex
from agent.formats.opening import AttachedBlob, BlobRange, Format, LayerFacts, ManifestBytes, ReferrersOf, Want
from agent.images.referrers import KnownReferrers
from agent.indexing.processes import IndexProcesses
from agent.registry import Descriptor, ImageReference, RegistryClient
from agent.resolve import Resolver, Source
from agent.store import StoredLayer

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
    processes: IndexProcesses
    cpu: trio.CapacityLimiter
    referrers: KnownReferrers = attrs.field(
        init=False, default=attrs.Factory(lambda self: KnownReferrers(self.registry), takes_self=True)
    )

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
        async def answer(want: Want) -> bytes:
            return await self._answer(image, facts, want, kept)

        index, meta = await self.processes.read(layer_format, facts, answer)
        return await trio.to_thread.run_sync(_finish, index, meta, facts.size, kept, limiter=self.cpu)

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
            return await self._referrers(image, facts, want)
        return await self._attached(image, want)

    async def _manifest(self, image: ImageReference, want: ManifestBytes) -> bytes:
        try:
            return (await self.registry.resolve(attrs.evolve(image, tag=None, digest=want.digest))).raw
        except SourceRefused:
            return b""

    async def _referrers(self, image: ImageReference, facts: LayerFacts, want: ReferrersOf) -> bytes:
        subject = want.subject or facts.manifest_digest or image.digest
        if not subject:
            await trio.lowlevel.checkpoint()
            return b""
        return await self.referrers.find(image, subject, want.artifact_type)

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


def _finish(index: LayerIndex, meta: bytearray, own_size: int, kept: _Kept) -> ReadIndex:
    """With the digest by which the index piece is known from now on; in a worker thread."""
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
