"""Small things that the fleet shares, so that an image can be started while its registry is away: manifests, configurations, and
which manifest a name meant.

They travel like blobs of one piece. A manifest or configuration stands under its own digest and is verified by it. A name
record stands under the digest of the reference's text and says which manifest the name had when a node last asked the registry;
no digest vouches for it, only the fleet's secret does, so it is asked for when the registry does not answer and never before.
"""

import hashlib
import json
import time
from typing import Final

import attrs
import structlog
import trio

from agent.errors import SourceError
from agent.formats.model import Digest, FormatError, digest_of, parse_digest
from agent.registry import ImageReference, Manifest, ResolvedManifest, parse_manifest
from agent.store import Store
from agent.swarm import Possession, Swarm
from agent.transfer import PeerClient

log = structlog.get_logger()

KIND: Final = "shared"
MAX_RECORD_BYTES: Final = 8 << 20
MAX_RECORDS: Final = 4096
ANSWER_S: Final = 0.25
"""How long the fleet has to name who holds a record; connected peers answer within a round trip."""
FETCH_S: Final = 5.0


def name_key(image: ImageReference) -> Digest:
    """Under which digest the record of a name stands."""
    return Digest("sha256:" + hashlib.sha256(f"shoal image name\n{image}".encode()).hexdigest())


@attrs.define(eq=False)
class FleetRecords:
    """The records of this node, and how to get those of others. `load` before use."""

    store: Store
    _records: dict[Digest, bytes] = attrs.field(factory=dict)

    async def load(self) -> None:
        """Read what earlier agents kept."""
        for key in (await self.store.list_documents(KIND))[:MAX_RECORDS]:
            raw = await self.store.get_document(KIND, key)
            if raw is not None:
                self._records[Digest(key)] = raw

    def get(self, key: Digest) -> bytes | None:
        """A record of this node."""
        return self._records.get(key)

    def possession(self, key: Digest) -> Possession | None:
        """A record as the swarm sees it: a blob of one piece, held."""
        raw = self._records.get(key)
        return None if raw is None else Possession(key, len(raw), 1, b"\x01", -1)

    async def keep(self, key: Digest, raw: bytes) -> None:
        """Keep a record and share it."""
        if self._records.get(key) == raw or len(raw) > MAX_RECORD_BYTES:
            return
        if len(self._records) >= MAX_RECORDS and key not in self._records:
            oldest = next(iter(self._records))
            del self._records[oldest]
            await self.store.delete_document(KIND, oldest)
        self._records[key] = raw
        await self.store.put_document(KIND, key, raw)

    async def keep_image(self, image: ImageReference, resolved: ResolvedManifest) -> None:
        """Keep what a registry said an image is."""
        await self.keep(resolved.digest, resolved.raw)
        record = {
            "image": str(image),
            "digest": resolved.digest,
            "media_type": resolved.media_type,
            "resolved_at": int(time.time()),
        }
        await self.keep(name_key(image), json.dumps(record).encode())

    async def find_image(self, image: ImageReference, swarm: Swarm, peers: PeerClient | None) -> ResolvedManifest | None:
        """What the fleet knows of an image whose registry is away: the newest answer of this node and its peers."""
        digest, media_type = image.digest, ""
        if digest is None:
            names = [self._records.get(name_key(image)), *await self._ask(name_key(image), swarm, peers, every=True)]
            records = [record for raw in names if raw is not None and (record := _name_record(raw, image)) is not None]
            if not records:
                return None
            _, digest, media_type = max(records)
        raw = self._records.get(digest)
        if raw is None:
            raw = await self.fetch(digest, swarm, peers)
            if raw is None:
                return None
            await self.keep(digest, raw)
        manifest = parse_manifest(raw, media_type)
        if not isinstance(manifest, Manifest):
            return None
        return ResolvedManifest(digest, manifest.media_type, raw, manifest.config, manifest.layers)

    async def fetch(self, digest: Digest, swarm: Swarm, peers: PeerClient | None) -> bytes | None:
        """A record that its digest vouches for, from another node; None if none has it."""
        for raw in await self._ask(digest, swarm, peers, every=False):
            return raw
        return None

    async def _ask(self, key: Digest, swarm: Swarm, peers: PeerClient | None, *, every: bool) -> list[bytes]:
        """What peers have under a key: the first right answer, or with `every` (a name record) all of them."""
        if peers is None:
            return []
        found: list[bytes] = []
        await swarm.want(key)
        try:
            for holder in await swarm.wait_holders(key, ANSWER_S):
                size = holder.possession.blob_size
                if not 0 < size <= MAX_RECORD_BYTES:
                    continue
                parts: list[bytes] = []
                try:
                    with trio.fail_after(FETCH_S):
                        async with peers.fetch_ranges(holder, key, size, [(0, size)]) as stream:
                            async for _, block in stream:
                                parts.append(block)
                except (SourceError, trio.TooSlowError) as exc:
                    log.info("record_not_fetched", record=key, peer=holder.peer_id, reason=str(exc))
                    continue
                raw = b"".join(parts)
                if not every and digest_of(raw) != key:
                    swarm.report_liar(holder.peer_id, key)
                    continue
                found.append(raw)
                if not every:
                    break
        finally:
            swarm.forget(key)
        return found


def _name_record(raw: bytes, image: ImageReference) -> tuple[int, Digest, str] | None:
    """(when it was so, manifest digest, media type) of a name record; None if it is not one for this image."""
    try:
        record = json.loads(raw)
        if record["image"] != str(image):
            return None
        return int(record["resolved_at"]), parse_digest(record["digest"]), str(record["media_type"])
    except (ValueError, KeyError, TypeError, FormatError):
        return None
