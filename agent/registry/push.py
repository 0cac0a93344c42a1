"""Pushing blobs and manifests (distribution spec 1.1 "Push"): for the demo, for conversion, and for tests."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import urljoin

import attrs
import structlog
import trio

from agent.errors import SourceLied, SourceRefused, SourceUnavailable
from agent.formats.model import Digest, digest_of
from agent.registry.auth import Scope
from agent.registry.connections import Answer
from agent.registry.exchange import Body, Exchanger, Request
from agent.registry.hosts import RegistryHost
from agent.registry.ranges import BLOCK_BYTES

log = structlog.get_logger()

_READ_BYTES: Final = 1 << 20
"""One thread hop for each of these; written on in blocks of 64 KiB."""
_MAX_UPLOADS: Final = 3
_EXISTS: Final = (200, 301, 302, 303, 307, 308)
"""A registry that redirects a HEAD has the blob; the store behind may refuse HEAD, so it is not asked."""


@attrs.define
class Pusher:
    """Uploads to the registry's own host."""

    _exchanger: Exchanger
    _disk: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(4), repr=False)

    async def has_blob(self, host: RegistryHost, repository: str, digest: Digest) -> bool:
        """Does the repository have the blob? Asks with the right to push, as an upload follows.

        Raises:
            SourceError: the registry did not tell.
        """
        request = Request(
            Scope(repository, "pull,push"), f"{repository}/blobs/{digest}", "HEAD", accepted=(*_EXISTS, 404), follows=False
        )
        probe = await self._exchanger.send(host, request)
        await probe.aclose()
        return probe.status in _EXISTS

    async def push_blob(
        self, host: RegistryHost, repository: str, source: Path | bytes, digest: Digest, chunk_bytes: int | None = None
    ) -> bool:
        """Upload a blob unless the registry has it; False if it had. `chunk_bytes` sends it as PATCH requests of that size.

        Raises:
            SourceError: the registry did not take it.
        """
        if await self.has_blob(host, repository, digest):
            return False
        scope = Scope(repository, "pull,push")
        size = len(source) if isinstance(source, bytes) else (await trio.Path(source).stat()).st_size
        for attempt in range(1, _MAX_UPLOADS + 1):
            try:
                await self._upload(host, scope, source, size, digest, chunk_bytes)
                break
            except SourceUnavailable as exc:
                if attempt == _MAX_UPLOADS:
                    raise
                log.debug("upload_restarted", host=host.name, digest=digest, reason=str(exc))
        log.debug("blob_pushed", host=host.name, repository=repository, digest=digest, size_bytes=size)
        return True

    async def _upload(
        self, host: RegistryHost, scope: Scope, source: Path | bytes, size: int, digest: Digest, chunk_bytes: int | None
    ) -> None:
        start = Request(scope, f"{scope.repository}/blobs/uploads/", "POST", {"Content-Length": "0"}, (202,), body=b"")
        begun = await self._exchanger.send(host, start)
        place = _place(f"{host.base_url}/{start.path}", begun)
        await begun.drain()
        sent = 0
        while chunk_bytes is not None and sent < size:
            stop = min(size, sent + chunk_bytes)
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(stop - sent),
                "Content-Range": f"{sent}-{stop - 1}",
            }
            patch = Request(scope, "", "PATCH", headers, (202,), url=place, body=self._body(source, sent, stop))
            # one attempt: whether a broken one was taken is not known, so the upload starts over
            patched = await self._exchanger.send(host, patch, attempts=1)
            place = _place(place, patched)
            await patched.drain()
            sent = stop
        place += ("&" if "?" in place else "?") + f"digest={digest.replace(':', '%3A')}"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size - sent)}
        put = Request(scope, "", "PUT", headers, (201,), url=place, body=self._body(source, sent, size))
        done = await self._exchanger.send(host, put, attempts=1)
        await done.drain()

    def _body(self, source: Path | bytes, start: int, stop: int) -> Body:
        if isinstance(source, bytes) and stop - start <= BLOCK_BYTES:
            return source[start:stop]
        return lambda: self._blocks(source, start, stop)

    async def _blocks(self, source: Path | bytes, start: int, stop: int) -> AsyncIterator[bytes]:
        if isinstance(source, bytes):
            for at in range(start, stop, BLOCK_BYTES):
                yield source[at : min(stop, at + BLOCK_BYTES)]
            return
        file: BinaryIO = await trio.to_thread.run_sync(source.open, "rb", limiter=self._disk)
        try:
            file.seek(start)
            while start < stop:
                data = await trio.to_thread.run_sync(file.read, min(_READ_BYTES, stop - start), limiter=self._disk)
                if not data:
                    raise SourceRefused(f"{source} became shorter while it was pushed")
                start += len(data)
                for at in range(0, len(data), BLOCK_BYTES):
                    yield data[at : at + BLOCK_BYTES]
        finally:
            file.close()

    async def push_manifest(self, host: RegistryHost, repository: str, locator: str, raw: bytes, media_type: str) -> Digest:
        """Put a manifest or image index under a tag or its digest; gives its digest.

        Raises:
            SourceError: the registry did not take it.
        """
        headers = {"Content-Type": media_type, "Content-Length": str(len(raw))}
        request = Request(Scope(repository, "pull,push"), f"{repository}/manifests/{locator}", "PUT", headers, (201,), body=raw)
        answer = await self._exchanger.send(host, request)
        await answer.drain()
        digest = digest_of(raw)
        stored = answer.headers.get("docker-content-digest")
        if stored is not None and stored.startswith("sha256:") and stored != digest:
            raise SourceLied(f"{host.name} stored a manifest as {stored[:100]}, not as {digest}", source=host.name)
        return digest


def _place(base: str, answer: Answer) -> str:
    location = answer.headers.get("location")
    if not location:
        raise SourceUnavailable(f"{answer.host} did not say where to upload to", source=answer.host)
    return str(urljoin(base, location))
