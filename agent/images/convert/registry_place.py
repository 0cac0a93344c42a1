"""A registry as source or target."""

import os
from pathlib import Path
from typing import BinaryIO, Final

import attrs
import trio

from agent.errors import SourceLied
from agent.formats.model import Digest, FormatError
from agent.images.convert.places import Document, Tick
from agent.registry import Descriptor, ImageReference, RegistryClient

_BATCH: Final = 1 << 20
"""One thread hop for so many bytes written."""


@attrs.frozen
class RegistryPlace:
    """An image reference and who asks for it."""

    client: RegistryClient
    ref: ImageReference
    _disk: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(2), repr=False)

    async def read_root(self) -> Document:
        """See `Source`."""
        digest, raw, parsed = await self.client.fetch_manifest(self.ref)
        return Document(digest, parsed.media_type, raw)

    async def read_document(self, digest: Digest, size: int, media_type: str) -> Document | None:
        """See `Source`."""
        _, raw, parsed = await self.client.fetch_manifest(attrs.evolve(self.ref, tag=None, digest=digest))
        if len(raw) != size:
            raise FormatError(f"manifest {digest} has {len(raw)} bytes, and its descriptor says {size}")
        return Document(digest, media_type or parsed.media_type, raw)

    async def read_small(self, digest: Digest, size: int, max_bytes: int) -> bytes:
        """See `Source`."""
        return await self.client.fetch_small(self.ref, Descriptor("", digest, size), max_bytes)

    async def read_tail(self, digest: Digest, size: int, count: int) -> bytes:
        """See `Source`."""
        start = max(0, size - count)
        tail = bytearray(size - start)
        if start == size:
            return b""
        async with self.client.fetch_ranges(self.ref, digest, size, [(start, size)]) as blocks:
            async for offset, block in blocks:
                tail[offset - start : offset - start + len(block)] = block
        return bytes(tail)

    async def fetch(self, digest: Digest, size: int, into: Path, tick: Tick) -> Path:
        """See `Source`."""
        file: BinaryIO = await trio.to_thread.run_sync(into.open, "wb", limiter=self._disk)
        try:
            if size:
                await self._fetch(digest, size, file, tick)
        finally:
            file.close()
        return into

    async def _fetch(self, digest: Digest, size: int, file: BinaryIO, tick: Tick) -> None:
        batch, start, got = bytearray(), 0, 0
        async with self.client.fetch_ranges(self.ref, digest, size, [(0, size)]) as blocks:
            async for offset, block in blocks:
                # One range is told in order; a host that answers with parts may not keep to it.
                if offset != start + len(batch) or len(batch) >= _BATCH:
                    await trio.to_thread.run_sync(_write_at, file, bytes(batch), start, limiter=self._disk)
                    batch.clear()
                    start = offset
                batch += block
                got += len(block)
                tick(len(block))
        await trio.to_thread.run_sync(_write_at, file, bytes(batch), start, limiter=self._disk)
        if got != size:
            raise SourceLied(f"{self.ref.registry} sent {got} of the {size} bytes of {digest}", source=self.ref.registry)

    async def has_blob(self, digest: Digest) -> bool:
        """See `Target`."""
        return await self.client.has_blob(self.ref, digest)

    async def put_blob(self, digest: Digest, size: int, data: Path | bytes) -> None:
        """See `Target`."""
        del size
        await self.client.push_blob(self.ref, data, digest)

    async def put_document(self, document: Document) -> None:
        """See `Target`."""
        ref = attrs.evolve(self.ref, tag=None, digest=document.digest)
        await self.client.push_manifest(ref, document.raw, document.media_type)

    async def put_root(self, document: Document) -> None:
        """See `Target`."""
        await self.client.push_manifest(self.ref, document.raw, document.media_type)


def _write_at(file: BinaryIO, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written
