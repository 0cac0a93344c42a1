"""An image in containerd's content store as source or target."""

import io
import json
from pathlib import Path
from typing import Any, BinaryIO, Final

import attrs
import trio

from agent.formats.model import Digest, FormatError, digest_of, parse_digest
from agent.images.convert.places import Document, PlaceError, Tick
from agent.registry import ImageReference
from agent.registry.manifests import MAX_MANIFEST_BYTES
from agent.runtimes.containerd.contents import ContentClient

_PART: Final = 8 << 20
"""Read at a time; between them the progress moves."""
_GC_CONTENT: Final = "containerd.io/gc.ref.content"


@attrs.frozen
class ContainerdPlace:
    """An image record in a namespace. A lease is needed to write."""

    client: ContentClient
    namespace: str
    name: str
    lease: str = ""
    _disk: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(2), repr=False)

    async def read_root(self) -> Document:
        """See `Source`."""
        found = await self.client.find_image(self.namespace, self.name)
        if found is None:
            # containerd's records bear full names, and people write short ones
            try:
                found = await self.client.find_image(self.namespace, str(ImageReference.parse(self.name)))
            except FormatError:
                found = None
        if found is None:
            raise PlaceError(f"containerd has no image {self.name!r} in namespace {self.namespace!r}; see `ctr images ls`")
        media_type, digest, size = found
        document = await self.read_document(parse_digest(digest), size, media_type)
        if document is None:
            raise PlaceError(f"containerd has the image {self.name!r} and not its manifest; pull it again")
        return document

    async def read_document(self, digest: Digest, size: int, media_type: str) -> Document | None:
        """See `Source`."""
        if not await self.client.has_blob(self.namespace, digest):
            return None
        return Document(digest, media_type, await self.read_small(digest, size, MAX_MANIFEST_BYTES))

    async def read_small(self, digest: Digest, size: int, max_bytes: int) -> bytes:
        """See `Source`."""
        if not 0 <= size <= max_bytes:
            raise FormatError(f"blob {digest} has {size} bytes; at most {max_bytes} are read here")
        await self._check(digest)
        data = await self._part(digest, 0, size)
        if digest_of(data) != digest:
            raise PlaceError(f"containerd's blob {digest} is damaged")
        return data

    async def read_tail(self, digest: Digest, size: int, count: int) -> bytes:
        """See `Source`."""
        await self._check(digest)
        start = max(0, size - count)
        return await self._part(digest, start, size - start)

    async def _part(self, digest: Digest, start: int, size: int) -> bytes:
        output = io.BytesIO()
        if size:
            await self.client.read_blob(self.namespace, digest, start, size, output)
        return output.getvalue()

    async def _check(self, digest: Digest) -> None:
        if not await self.client.has_blob(self.namespace, digest):
            raise PlaceError(
                f"containerd does not have {digest} of {self.name} (the image was pulled lazily, for another platform, or its layers"
                " were discarded once unpacked); convert from the registry, or run `ctr content fetch` first"
            )

    async def fetch(self, digest: Digest, size: int, into: Path, tick: Tick) -> Path:
        """See `Source`."""
        await self._check(digest)
        file: BinaryIO = await trio.to_thread.run_sync(into.open, "wb", limiter=self._disk)
        try:
            for start in range(0, size, _PART):
                count = min(_PART, size - start)
                await self.client.read_blob(self.namespace, digest, start, count, file)
                tick(count)
        finally:
            file.close()
        return into

    async def has_blob(self, digest: Digest) -> bool:
        """See `Target`."""
        return await self.client.has_blob(self.namespace, digest, self.lease)

    async def put_blob(self, digest: Digest, size: int, data: Path | bytes) -> None:
        """See `Target`."""
        await self.client.write_blob(self.namespace, self.lease, digest, size, data, {})

    async def put_document(self, document: Document) -> None:
        """See `Target`."""
        labels = _references(document.raw)
        await self.client.write_blob(self.namespace, self.lease, document.digest, len(document.raw), document.raw, labels)

    async def put_root(self, document: Document) -> None:
        """See `Target`."""
        await self.put_document(document)
        await self.client.put_image(self.namespace, self.name, document.media_type, document.digest, len(document.raw))


def _references(raw: bytes) -> dict[str, str]:
    """The labels that containerd's garbage collector follows from a document."""
    document: dict[str, Any] = json.loads(raw)
    labels = {f"{_GC_CONTENT}.m.{at}": entry["digest"] for at, entry in enumerate(document.get("manifests") or [])}
    labels |= {f"{_GC_CONTENT}.l.{at}": layer["digest"] for at, layer in enumerate(document.get("layers") or [])}
    return labels | ({f"{_GC_CONTENT}.config": document["config"]["digest"]} if "config" in document else {})
