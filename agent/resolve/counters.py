"""What one agent has fetched and verified since it started."""

import attrs


@attrs.define
class Counters:
    """Running totals. Bytes are compressed blob bytes; `cache` counts chunks found on this node and not fetched again.

    `abandoned` bytes were asked for and then given up for something more urgent: a source may have sent up to so many that never
    came here.
    """

    registry_bytes: int = 0
    peer_bytes: int = 0
    cache_bytes: int = 0
    abandoned_bytes: int = 0
    served_bytes: int = 0
    chunks_verified: int = 0
    bad_chunks: int = 0
    demand_waits: int = 0
    failed_reads: int = 0

    def count(self, kind: str, size: int) -> None:
        """Bytes came from a source of that kind (`agent.resolve.sources.Source.kind`)."""
        if kind == "peer":
            self.peer_bytes += size
        elif kind == "registry":
            self.registry_bytes += size
