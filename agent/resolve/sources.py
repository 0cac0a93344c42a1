"""What the resolver asks of the world: sources of blob ranges, in the order in which to try them."""

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from agent.formats.model import Digest
from agent.store import StoredLayer


class Source(Protocol):
    """Something that can answer a range of a blob: a peer, a mirror, the registry, this node's own blob file."""

    @property
    def name(self) -> str:
        """Peer id or host, for logs and for remembering failures."""

    @property
    def kind(self) -> str:
        """`peer`, `registry` or `self`."""

    def fetch(
        self, blob: Digest, blob_size: int, ranges: Sequence[tuple[int, int]]
    ) -> AbstractAsyncContextManager[AsyncIterator[tuple[int, bytes]]]:
        """Stream the half-open `ranges` as (blob offset, at most 64 KiB).

        Raises:
            SourceError: on entry or while streaming.
        """


class Sourcing(Protocol):
    """The choice of sources, so that the resolver knows neither the swarm nor the registry."""

    def candidates(self, layer: StoredLayer, first: int, stop: int, excluded: Collection[str]) -> list[tuple[Source, int]]:
        """Sources that hold piece `first`, best first, each with the number of pieces from `first` on that it holds,
        at most `stop - first`; none whose name is in `excluded`."""

    def report(self, source: Source, layer: StoredLayer, error: Exception) -> None:
        """`source` failed or lied."""

    def piece_held(self, layer: StoredLayer, piece: int) -> None:
        """This node now holds a piece and may tell others."""
