"""What the fleet shares besides layers, so that an image can be started while its registry is away: manifests, configurations,
which manifest a name meant, and indexes of plain layers.

They travel like blobs of one piece. A manifest or configuration stands under its own digest and is verified by it. A name
record stands under the digest of the reference's text and says which manifest the name had when a node last asked the registry;
no digest vouches for it, only the fleet's secret does, so it is asked for when the registry does not answer and never before.
An index stands under a digest made of its layer's; see `agent.images.fleet_index`.

Records are documents of the store; the small ones, which is most, are in memory as well. Indexes have up to some 20 MB, are read by
the 64 KiB and mean nothing without their layer: each is a file in its layer's own folder, and goes with it.
"""

import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import attrs
import structlog
import trio

from agent.errors import SourceError
from agent.formats.model import Digest, FormatError, digest_of, parse_digest
from agent.registry import ImageReference, Manifest, ResolvedManifest, parse_manifest
from agent.store import Store, StoredLayer
from agent.store.layout import replace_durably
from agent.swarm import Holder, Possession, Swarm
from agent.transfer import PeerClient

log = structlog.get_logger()

KIND: Final = "shared"
MAX_RECORD_BYTES: Final = 8 << 20
MAX_RECORDS: Final = 4096
SMALL_BYTES: Final = 64 << 10
"""Records below this size are kept in memory."""
MAX_LARGE_BYTES: Final = 256 << 20
"""All larger records together; the oldest go first."""
INDEX_FILE: Final = "fleet.index"
MAX_INDEX_BYTES: Final = 2 << 30
"""All indexes together, as above."""
ANSWER_S: Final = 0.25
"""How long the fleet has to name who holds a record; connected peers answer within a round trip."""
FETCH_S: Final = 5.0
MAX_TRIES: Final = 64

Accept = Callable[[str, bytes], Awaitable[bool]]
"""Takes what a peer (its id) gave; true: no other need be asked."""


def name_key(image: ImageReference) -> Digest:
    """Under which digest the record of a name stands."""
    return Digest("sha256:" + hashlib.sha256(f"shoal image name\n{image}".encode()).hexdigest())


def index_key(layer: Digest) -> Digest:
    """Under which digest the index of a layer stands."""
    return Digest("sha256:" + hashlib.sha256(f"shoal layer index\n{layer}".encode()).hexdigest())


@attrs.frozen
class _IndexFile:
    layer: Digest
    path: Path
    size: int
    written_s: float


@attrs.define(eq=False)
class FleetRecords:
    """The records of this node, and how to get those of others. `load` before use."""

    store: Store
    _sizes: dict[Digest, int] = attrs.field(factory=dict)
    """Of all records, oldest first."""
    _small: dict[Digest, bytes] = attrs.field(factory=dict)
    _last_large: tuple[Digest, bytes] = (Digest(""), b"")
    """A large one is read by several requests, one soon after the other."""
    _indexes: dict[Digest, _IndexFile] = attrs.field(factory=dict)
    """Oldest first."""
    _disk: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(2))

    async def load(self) -> None:
        """Read what earlier agents kept."""
        for key in (await self.store.list_documents(KIND))[:MAX_RECORDS]:
            raw = await self.store.get_document(KIND, key)
            if raw is not None:
                self._note(Digest(key), raw)
        folders = [(layer.digest, layer.root) for layer in self.store.layers()]
        for file in await trio.to_thread.run_sync(_find_indexes, folders, limiter=self._disk):
            self._indexes[index_key(file.layer)] = file

    def _note(self, key: Digest, raw: bytes) -> None:
        self._sizes[key] = len(raw)
        if len(raw) < SMALL_BYTES:
            self._small[key] = raw

    def size(self, key: Digest) -> int | None:
        """Bytes of a record or index of this node."""
        file = self._indexes.get(key)
        if file is None:
            return self._sizes.get(key)
        if self.store.layer(file.layer) is None:
            del self._indexes[key]
            return None
        return file.size

    def indexes(self) -> list[Digest]:
        """Keys of the indexes that this node shares."""
        return [key for key in list(self._indexes) if self.size(key) is not None]

    def possession(self, key: Digest) -> Possession | None:
        """A record or index as the swarm sees it: a blob of one piece, held."""
        size = self.size(key)
        return None if size is None else Possession(key, size, 1, b"\x01", -1)

    async def get(self, key: Digest) -> bytes | None:
        """A record of this node."""
        raw = self._small.get(key)
        if raw is not None or key not in self._sizes:
            await trio.lowlevel.checkpoint()
            return raw
        last_key, last = self._last_large
        if last_key == key:
            await trio.lowlevel.checkpoint()
            return last
        raw = await self.store.get_document(KIND, key)
        if raw is not None:
            self._last_large = key, raw
        return raw

    async def read(self, key: Digest, start: int, stop: int) -> bytes | None:
        """Some bytes of a record or index of this node; None if it is not (any more) here."""
        file = self._indexes.get(key)
        if file is None:
            raw = await self.get(key)
            return None if raw is None else raw[start:stop]
        return await trio.to_thread.run_sync(_read_slice, file.path, start, stop, limiter=self._disk)

    async def keep(self, key: Digest, raw: bytes) -> None:
        """Keep a record and share it."""
        if len(raw) > MAX_RECORD_BYTES or (self._sizes.get(key) == len(raw) and await self.get(key) == raw):
            return
        self._note(key, raw)
        if len(raw) >= SMALL_BYTES:
            self._small.pop(key, None)
            self._last_large = key, raw
        await self.store.put_document(KIND, key, raw)
        large = sum(size for size in self._sizes.values() if size >= SMALL_BYTES)
        for old, size in list(self._sizes.items()):
            if old != key and (len(self._sizes) > MAX_RECORDS or (large > MAX_LARGE_BYTES and size >= SMALL_BYTES)):
                large -= size if size >= SMALL_BYTES else 0
                del self._sizes[old]
                self._small.pop(old, None)
                await self.store.delete_document(KIND, old)

    async def keep_index(self, layer: StoredLayer, raw: bytes) -> None:
        """Keep the index of a stored layer and share it. If the disk refuses, it is not shared."""
        path = layer.root / INDEX_FILE
        try:
            await trio.to_thread.run_sync(replace_durably, path, raw, limiter=self._disk)
        except OSError as exc:
            log.warning("index_not_kept", layer=layer.digest, reason=str(exc.strerror or exc))
            return
        self._indexes.pop(index_key(layer.digest), None)
        self._indexes[index_key(layer.digest)] = _IndexFile(layer.digest, path, len(raw), time.time())
        total = sum(file.size for file in self._indexes.values())
        for key, file in list(self._indexes.items()):
            if total <= MAX_INDEX_BYTES or file.layer == layer.digest:
                break
            total -= file.size
            del self._indexes[key]
            await trio.to_thread.run_sync(_remove, file.path, limiter=self._disk)

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
            names = [await self.get(name_key(image)), *await self._ask_all(name_key(image), swarm, peers)]
            records = [record for raw in names if raw is not None and (record := _name_record(raw, image)) is not None]
            if not records:
                return None
            _, digest, media_type = max(records)
        raw = await self.get(digest)
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
        found: list[bytes] = []

        async def accept(peer_id: str, raw: bytes) -> bool:
            if digest_of(raw) != digest:
                swarm.report_liar(peer_id, digest)
                return False
            found.append(raw)
            await trio.lowlevel.checkpoint()
            return True

        await self.ask(digest, swarm, peers, accept)
        return found[0] if found else None

    async def _ask_all(self, key: Digest, swarm: Swarm, peers: PeerClient | None) -> list[bytes]:
        found: list[bytes] = []

        async def accept(_peer_id: str, raw: bytes) -> bool:
            found.append(raw)
            await trio.lowlevel.checkpoint()
            return False

        await self.ask(key, swarm, peers, accept)
        return found

    async def ask(
        self,
        key: Digest,
        swarm: Swarm,
        peers: PeerClient | None,
        accept: Accept,
        *,
        max_bytes: int = MAX_RECORD_BYTES,
        limit_s: float = FETCH_S,
        max_tries: int = MAX_TRIES,
        is_patient: bool = False,
    ) -> None:
        """Give `accept` what peers have under a key, one after the other, until it takes one. Each has `limit_s` to send it.

        Asked are those that have answered when the first one does; if `is_patient`, and all of these are refused, the others too.
        """
        if peers is None:
            return
        answered_by = trio.current_time() + ANSWER_S
        asked: set[str] = set()
        await swarm.want(key)
        try:
            holders = await swarm.wait_holders(key, ANSWER_S)
            while True:
                new = [holder for holder in holders if holder.peer_id not in asked][: max_tries - len(asked)]
                for holder in new:
                    asked.add(holder.peer_id)
                    raw = await _fetch_whole(peers, holder, key, max_bytes, limit_s)
                    if raw is not None and await accept(holder.peer_id, raw):
                        return
                if not new or not is_patient:
                    return
                await trio.sleep_until(answered_by)
                holders = swarm.holders(key)
        finally:
            swarm.forget(key)


async def _fetch_whole(peers: PeerClient, holder: Holder, key: Digest, max_bytes: int, limit_s: float) -> bytes | None:
    size = holder.possession.blob_size
    if not 0 < size <= max_bytes:
        return None
    raw = bytearray()
    try:
        with trio.fail_after(limit_s):
            async with peers.fetch_ranges(holder, key, size, [(0, size)]) as stream:
                async for _, block in stream:
                    raw += block
    except (SourceError, trio.TooSlowError) as exc:
        log.info("record_not_fetched", record=key, peer=holder.peer_id, reason=str(exc))
        return None
    return bytes(raw)


def _find_indexes(folders: list[tuple[Digest, Path]]) -> list[_IndexFile]:
    found = []
    for layer, folder in folders:
        try:
            facts = (folder / INDEX_FILE).stat()
        except OSError:
            continue
        found.append(_IndexFile(layer, folder / INDEX_FILE, facts.st_size, facts.st_mtime))
    return sorted(found, key=lambda file: file.written_s)


def _read_slice(path: Path, start: int, stop: int) -> bytes | None:
    """Bytes of a file; None if it is gone, or shorter."""
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), stop - start, start)
    except OSError:
        return None
    return data if len(data) == stop - start else None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        log.warning("index_not_removed", path=str(path), reason=exc.strerror)


def _name_record(raw: bytes, image: ImageReference) -> tuple[int, Digest, str] | None:
    """(when it was so, manifest digest, media type) of a name record; None if it is not one for this image."""
    try:
        record = json.loads(raw)
        if record["image"] != str(image):
            return None
        return int(record["resolved_at"]), parse_digest(record["digest"]), str(record["media_type"])
    except (ValueError, KeyError, TypeError, FormatError):
        return None
