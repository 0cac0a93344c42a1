"""Layers that cannot be read at random: the blob goes through once, is verified, and then stands like any other layer.

The file data and the blob go to temporary files first. Only when blob digest (and diff_id, where the caller knows it) match is
anything shown to the store: a plain layer has no smaller unit that somebody vouches for.
"""

import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Final, Protocol, Self

import attrs
import structlog
import trio

from agent.errors import SourceError, SourceLied, SourceUnavailable, StoreError
from agent.formats.model import Digest, FormatError
from agent.formats.plain import PlainLayer, PlainLayerParser
from agent.registry import Descriptor, ImageReference
from agent.resolve import Counters, Source
from agent.store import Store, StoredLayer
from fsmount.erofs import write_image

log = structlog.get_logger()

BATCH_BYTES: Final = 1 << 20
"""Compressed bytes that one worker-thread call takes; with one more batch arriving meanwhile this bounds memory."""
MAX_UNCOMPRESSED: Final = 1 << 40


class WholeSources(Protocol):
    """Who may give a whole blob."""

    async def whole_holders(self, blob: Digest, size: int) -> list[Source]:
        """Peers that hold every byte."""

    def registry_source(self, image: ImageReference) -> Source:
        """The registry as a source."""


@attrs.define
class WholeFetcher:
    """Fetches plain layers into the store. `work_dir` lies on the store's file system."""

    store: Store
    sources: WholeSources
    counters: Counters
    work_dir: Path
    cpu: trio.CapacityLimiter

    async def fetch(self, image: ImageReference, layer: Descriptor, digest: Digest, diff_id: str = "") -> StoredLayer:
        """Fetch, verify and store the layer, or complete the one that is stored.

        Raises:
            SourceError: nobody gave it, or what came is not what its digest says.
            FormatError: it is no tar layer.
            StoreError: the disk refused.
        """
        sources = [*await self.sources.whole_holders(digest, layer.size), self.sources.registry_source(image)]
        failure: Exception = SourceUnavailable(f"nobody has layer {digest}")
        for source in sources:
            try:
                return await self._fetch_from(source, image, layer, digest, diff_id)
            except SourceError as exc:
                log.info("source_failed", layer=digest, image=str(image), kind=source.kind, source=source.name, reason=str(exc))
                failure = exc
        raise failure

    async def _fetch_from(
        self, source: Source, image: ImageReference, layer: Descriptor, digest: Digest, diff_id: str
    ) -> StoredLayer:
        with _Scratch(self.work_dir) as scratch:
            try:
                plain = await self._stream(source, layer, digest, scratch)
            except FormatError as exc:
                if source.kind != "peer":
                    raise
                # Damaged bytes seldom survive to the comparison of digests; the peer's word is not worth more than its bytes.
                raise SourceLied(f"{source.name} sent a blob that is no layer: {exc}", source=source.name) from exc
            if plain.blob_digest != digest:
                raise SourceLied(f"{source.name} sent a blob of digest {plain.blob_digest} for {digest}", source=source.name)
            if diff_id and plain.diff_id != diff_id:
                raise FormatError(f"layer {digest} unpacks to {plain.diff_id}, but the image says {diff_id}")
            stored = self.store.layer(digest)
            is_known = stored is not None
            if stored is None:
                meta = await trio.to_thread.run_sync(
                    lambda: write_image(plain.index.root, volume_size=plain.index.volume_size, user_markers=False),
                    limiter=self.cpu,
                )
                extra: dict[str, str | int] = {
                    "image": str(image),
                    "format": f"tar ({plain.compression})",
                    "diff_id": plain.diff_id,
                    "media_type": layer.media_type,
                }
                stored = await self.store.create_layer(digest, plain.index, meta, extra)
            await trio.to_thread.run_sync(scratch.move_into, stored, is_known, limiter=self.cpu)
            self.counters.chunks_verified += len(stored.chunks)
            return stored

    async def _stream(self, source: Source, layer: Descriptor, digest: Digest, scratch: "_Scratch") -> PlainLayer:
        parser = PlainLayerParser(MAX_UNCOMPRESSED)
        got = 0
        async with source.fetch(digest, layer.size, [(0, layer.size)]) as stream:
            async for batch in _batches(stream):
                got += len(batch)
                if source.kind == "peer":
                    self.counters.peer_bytes += len(batch)
                else:
                    self.counters.registry_bytes += len(batch)
                await trio.to_thread.run_sync(scratch.absorb, parser, batch, limiter=self.cpu)
        if got != layer.size:
            raise SourceUnavailable(f"{source.name} sent {got} of {layer.size} bytes of {digest}", source=source.name)
        return await trio.to_thread.run_sync(parser.finish, limiter=self.cpu)


async def _batches(stream: AsyncIterator[tuple[int, bytes]]) -> AsyncIterator[bytes]:
    parts: list[bytes] = []
    due = size = 0
    async for offset, block in stream:
        if offset != due:
            raise SourceUnavailable(f"bytes from offset {offset} came where {due} was due")
        due += len(block)
        parts.append(block)
        size += len(block)
        if size >= BATCH_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    if parts:
        yield b"".join(parts)


class _Scratch:
    """The two temporary files of a layer that is arriving; gone when the block ends."""

    def __init__(self, work_dir: Path) -> None:
        work_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._blob: BinaryIO = tempfile.TemporaryFile(dir=work_dir)  # noqa: SIM115 - closed by __exit__
            self._data: BinaryIO = tempfile.TemporaryFile(dir=work_dir)  # noqa: SIM115
        except OSError as exc:
            raise StoreError(f"cannot make temporary files in {work_dir}: {exc.strerror}", errno=exc.errno or 0) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._blob.close()
        self._data.close()

    def absorb(self, parser: PlainLayerParser, batch: bytes) -> None:
        """Take the next bytes of the blob; in a worker thread."""
        try:
            self._blob.write(batch)
            for offset, run in parser.feed(batch):
                os.pwrite(self._data.fileno(), run, offset)
        except OSError as exc:
            raise StoreError(f"cannot write a layer: {exc.strerror}", errno=exc.errno or 0) from exc

    def move_into(self, stored: StoredLayer, is_known: bool) -> None:
        """Give everything to the store; in a worker thread. The bytes are read from the page cache they were just written to.

        A layer that `is_known` has tables from another run, perhaps by an older agent with another layout.
        """
        chunks = stored.chunks
        try:
            for number in range(len(chunks)):
                if not stored.has_chunk(number):
                    size = chunks.size[number]
                    data = os.pread(self._data.fileno(), size, chunks.volume_offset[number]).ljust(size, b"\0")
                    if is_known and not chunks.is_right(number, data):
                        raise FormatError(f"layer {stored.digest} was stored with another layout")
                    stored.write_chunk(number, data)
            self._blob.flush()
            for piece in range(len(stored.pieces)):
                if not stored.has_piece(piece):
                    start, stop = stored.pieces.extent(piece)
                    stored.write_blob(start, os.pread(self._blob.fileno(), stop - start, start))
                    stored.mark_piece(piece)
        except OSError as exc:
            raise StoreError(f"cannot read back a layer: {exc.strerror}", errno=exc.errno or 0) from exc
