"""Sources of this node: the fleet's peers first, then the registry an image came from."""

import random
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Final

import attrs
import structlog

from agent.errors import SourceLied
from agent.formats.model import BlobPart, Digest, FormatError
from agent.registry import ImageReference, RegistryClient
from agent.resolve.sources import Source
from agent.store import StoredLayer
from agent.swarm import Holder, Swarm, rank
from agent.transfer import PeerBusy, PeerClient

log = structlog.get_logger()

FIRST_ANSWER_S: Final = 0.25
"""How long a layer that is new to this node waits for the fleet's first answers: ten round trips within a region."""
MAX_ORIGINS: Final = 8
"""Images remembered for one blob; the newest are asked first."""


@attrs.frozen
class RegistrySource:
    """The registry (or its mirrors) that an image came from."""

    registry: RegistryClient
    image: ImageReference
    parts: tuple[BlobPart, ...] = ()
    """The registry's blobs that the asked one is made of, for a spliced blob."""

    @property
    def name(self) -> str:
        """The image's repository, with its registry."""
        return self.image.name

    @property
    def kind(self) -> str:
        """Always `registry`."""
        return "registry"

    def fetch(
        self, blob: Digest, blob_size: int, ranges: Sequence[tuple[int, int]]
    ) -> AbstractAsyncContextManager[AsyncIterator[tuple[int, bytes]]]:
        """See `agent.resolve.sources.Source`."""
        if self.parts:
            return aclosing(self._spliced(ranges))
        return self.registry.fetch_ranges(self.image, blob, blob_size, ranges)

    async def _spliced(self, ranges: Sequence[tuple[int, int]]) -> AsyncGenerator[tuple[int, bytes], None]:
        base = 0
        for part in self.parts:
            wanted = [(max(start - base, 0), min(stop - base, part.size)) for start, stop in ranges]
            wanted = [(part.start + start, part.start + stop) for start, stop in wanted if start < stop]
            if wanted:
                async with self.registry.fetch_ranges(self.image, part.digest, part.blob_size, wanted) as stream:
                    async for offset, block in stream:
                        yield base + offset - part.start, block
            base += part.size


@attrs.frozen
class PeerSource:
    """Another node that holds pieces of a blob."""

    client: PeerClient
    holder: Holder

    @property
    def name(self) -> str:
        """The peer's id."""
        return self.holder.peer_id

    @property
    def kind(self) -> str:
        """Always `peer`."""
        return "peer"

    def fetch(
        self, blob: Digest, blob_size: int, ranges: Sequence[tuple[int, int]]
    ) -> AbstractAsyncContextManager[AsyncIterator[tuple[int, bytes]]]:
        """See `agent.resolve.sources.Source`."""
        return self.client.fetch_ranges(self.holder, blob, blob_size, ranges)


class NodeSources:
    """Implements `Sourcing` for the resolver and `IndexSources` for the preparation of layers."""

    def __init__(self, registry: RegistryClient, swarm: Swarm, peers: PeerClient | None, *, zone: str) -> None:
        self._registry = registry
        self._swarm = swarm
        self._peers = peers
        self._zone = zone
        self._origins: dict[Digest, list[ImageReference]] = {}

    def add_origin(self, blob: Digest, image: ImageReference) -> None:
        """Remember an image that has the blob; what was added last is asked first."""
        known = [origin for origin in self._origins.get(blob, ()) if origin.name != image.name]
        self._origins[blob] = [image, *known][:MAX_ORIGINS]

    def registry_source(self, image: ImageReference) -> Source:
        """The registry as a source of the image's blobs."""
        return RegistrySource(self._registry, image)

    def _origins_of(self, layer: StoredLayer) -> list[ImageReference]:
        known = self._origins.get(layer.digest)
        if known is None:
            known = []
            if image := layer.extra.get("image"):
                try:
                    known = [ImageReference.parse(str(image))]
                except FormatError as exc:
                    log.warning("layer_without_origin", layer=layer.digest, reason=str(exc))
            self._origins[layer.digest] = known
        return known

    def _ranked(self, holders: Sequence[Holder], excluded: Collection[str]) -> list[Holder]:
        return rank(holders, zone=self._zone, excluded=excluded, jitter=random.random)

    async def _holders(self, blob: Digest) -> list[Holder]:
        if self._peers is None:
            return []
        await self._swarm.want(blob)
        return self._ranked(await self._swarm.wait_holders(blob, FIRST_ANSWER_S), ())

    async def index_holders(self, blob: Digest) -> list[tuple[Source, int, int]]:
        """Peers with the piece that holds the index: (source, its first byte, the blob's size)."""
        found: list[tuple[Source, int, int]] = []
        for holder in await self._holders(blob):
            possession = holder.possession
            if possession.index_start >= 0 and possession.pieces > 0 and possession.has_piece(possession.pieces - 1):
                assert self._peers is not None
                found.append((PeerSource(self._peers, holder), possession.index_start, possession.blob_size))
        return found

    async def whole_holders(self, blob: Digest, size: int) -> list[Source]:
        """Peers that hold every byte of the blob."""
        return [
            PeerSource(self._peers, holder)
            for holder in await self._holders(blob)
            if self._peers is not None and holder.possession.is_complete and holder.possession.blob_size == size
        ]

    async def announce(self, layer: StoredLayer) -> None:
        """Tell the fleet that this node reads the layer and may hold pieces of it."""
        await self._swarm.want(layer.digest)
        if any(layer.possession()):
            self._swarm.possession_changed(layer.digest)

    def candidates(self, layer: StoredLayer, first: int, stop: int, excluded: Collection[str]) -> list[tuple[Source, int]]:
        """Peers that hold piece `first`, then the registry for as far as no peer has what follows."""
        found: list[tuple[Source, int]] = []
        known = self._swarm.holders(layer.digest) if self._peers is not None else []
        # A peer that has the layer by another index (the same one as plain and as SOCI, say) numbers its pieces in another way.
        alike = [
            peer for peer in known if (peer.possession.blob_size, peer.possession.pieces) == (layer.blob_size, len(layer.pieces))
        ]
        holders = self._ranked(alike, excluded)
        for holder in holders:
            lead = first
            while lead < stop and holder.possession.has_piece(lead):
                lead += 1
            if lead > first and self._peers is not None:
                found.append((PeerSource(self._peers, holder), lead - first))
        lead = first + 1
        while lead < stop and not any(holder.possession.has_piece(lead) for holder in holders):
            lead += 1
        for image in self._origins_of(layer):
            if image.name not in excluded:
                found.append((RegistrySource(self._registry, image, layer.parts), lead - first))
        return found

    def report(self, source: Source, layer: StoredLayer, error: Exception) -> None:
        """A fetch failed."""
        if source.kind == "registry" and isinstance(error, SourceLied):
            log.error("registry_sent_wrong_bytes", layer=layer.digest, registry=source.name, reason=str(error))
        elif source.kind == "peer" and isinstance(error, SourceLied):
            self._swarm.report_liar(source.name, layer.digest)
        elif source.kind == "peer" and not isinstance(error, PeerBusy):  # a busy peer is a good one with many friends
            self._swarm.report_failure(source.name)

    def piece_held(self, layer: StoredLayer, piece: int) -> None:
        """Tell the swarm, which batches."""
        self._swarm.possession_changed(layer.digest, (piece,))

    def pieces_changed(self, blob: Digest, pieces: Sequence[int], *, held: bool) -> None:
        """Pieces were evicted or found bad, or doubtful ones turned out good."""
        if held:
            self._swarm.possession_changed(blob, pieces)
        else:
            self._swarm.possession_lost(blob, pieces)
