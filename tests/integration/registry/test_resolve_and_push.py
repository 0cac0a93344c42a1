"""Manifests that are not what was asked for, and uploads that break off."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from agent.errors import SourceError, SourceLied, SourceRefused, SourceUnavailable
from agent.formats.model import FormatError, digest_of
from agent.registry import OCI_INDEX, OCI_MANIFEST, Descriptor, ImageReference, Platform, RegistryClient, open_registry_client
from tests.registry_servers import Asked, Handler, Reply, ScriptedServer, open_scripted_server

CONFIG = {"mediaType": "a/b", "digest": digest_of(b"{}"), "size": 2}


def manifest(**more: object) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": CONFIG, "layers": [], **more}).encode()


def index(*entries: tuple[bytes, str]) -> bytes:
    listed = [
        {
            "mediaType": "x/y",
            "digest": digest_of(raw),
            "size": len(raw),
            "platform": {"os": "linux", "architecture": architecture},
        }
        for raw, architecture in entries
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}).encode()


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[tuple[ScriptedServer, RegistryClient, ImageReference]]:
    with trio.fail_after(20):
        async with open_scripted_server(handler) as server, open_registry_client(platform=Platform()) as client:
            yield server, client, ImageReference.parse(f"{server.host}/app:1")


def library(*documents: bytes, top: bytes) -> Handler:
    known = {digest_of(raw): raw for raw in documents}

    def handler(asked: Asked) -> Reply:
        locator = asked.path.rpartition("/")[2]
        raw = top if locator == "1" else known.get(locator)  # type: ignore[call-overload]
        return Reply(404) if raw is None else Reply(200, {"Content-Type": "application/json"}, raw)

    return handler


async def test_index_of_indexes() -> None:
    image, other = manifest(), manifest(annotations={"a": "b"})
    inner = index((other, "arm64"), (image, "amd64"))
    outer = index((inner, "amd64"))
    async with serving(library(image, inner, top=outer)) as (server, client, ref):
        resolved = await client.resolve(ref)
        assert (resolved.raw, resolved.index_raw, resolved.index_digest) == (image, outer, digest_of(outer))
        assert [asked.method for asked in server.asked] == ["GET"] * 3
        assert all(
            "image.index" in asked.headers["accept"] and "manifest.list" in asked.headers["accept"] for asked in server.asked
        )


async def test_indexes_without_end() -> None:
    documents = [manifest()]
    for _ in range(6):
        documents.append(index((documents[-1], "amd64")))
    async with serving(library(*documents, top=documents[-1])) as (_, client, ref):
        with pytest.raises(FormatError, match="within one another"):
            await client.resolve(ref)


async def test_nothing_for_this_platform() -> None:
    async with serving(library(top=index((b"x", "s390x")))) as (_, client, ref):
        with pytest.raises(FormatError, match="it has linux/s390x"):
            await client.resolve(ref)


async def test_manifest_with_another_digest() -> None:
    image = manifest()
    async with serving(lambda asked: Reply(body=image + b" ")) as (_, client, ref):
        with pytest.raises(SourceLied, match="sent a manifest with digest"):
            await client.resolve(attrs.evolve(ref, digest=digest_of(image)))
    wrong = {"Docker-Content-Digest": digest_of(b"something else")}
    async with serving(lambda asked: Reply(200, wrong, image)) as (_, client, ref):
        with pytest.raises(SourceLied):
            await client.resolve(ref)


@pytest.mark.parametrize(
    "reply", [Reply(body=b" " * (5 << 20)), Reply(body=b"<html>"), Reply(body=b""), Reply(204), Reply(206, body=manifest())]
)
async def test_no_manifest(reply: Reply) -> None:
    async with serving(lambda asked: reply) as (_, client, ref):
        with pytest.raises((SourceError, FormatError)):
            await client.resolve(ref)


async def test_small_blob_that_is_too_large_is_not_asked_for() -> None:
    async with serving(lambda asked: Reply()) as (server, client, ref):
        with pytest.raises(FormatError, match="at most 10"):
            await client.fetch_small(ref, Descriptor("a/b", digest_of(b"x"), 11), 10)
        assert await client.fetch_small(ref, Descriptor("a/b", digest_of(b""), 0), 10) == b""
        assert not server.asked


@attrs.define
class Upload:
    """The upload half of a registry."""

    server: ScriptedServer | None = None
    blobs: list[bytes] = attrs.field(factory=list)
    parts: list[tuple[str, bytes]] = attrs.field(factory=list)
    breaks: int = 0
    status: int = 201
    location: str = "/upload?_state=a%3D"

    def answer(self, asked: Asked) -> Reply:
        if asked.method == "HEAD":
            return Reply(404)
        if asked.method == "POST":
            return Reply(202, {"Location": self.location} if self.location else {})
        if asked.method == "PATCH":
            self.parts.append((asked.headers["content-range"], asked.body))
            return Reply(202, {"Location": f"/upload?_state={len(self.parts)}"})
        if self.breaks:
            self.breaks -= 1
            return Reply(raw=b"")
        self.blobs.append(asked.body)
        return Reply(self.status)


async def test_upload_that_breaks_off_starts_over(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    (tmp_path / "blob").write_bytes(data)
    upload = Upload(breaks=2)
    async with serving(upload.answer) as (server, client, ref):
        assert await client.push_blob(ref, tmp_path / "blob")
        assert upload.blobs == [data]
        assert server.asked[-1].target == f"/upload?_state=a%3D&digest={digest_of(data).replace(':', '%3A')}"
        assert "transfer-encoding" not in server.asked[-1].headers
        upload.breaks = 100
        with pytest.raises(SourceUnavailable):
            await client.push_blob(ref, b"x")


async def test_upload_in_chunks() -> None:
    upload = Upload()
    async with serving(upload.answer) as (server, client, ref):
        await client.push_blob(ref, b"0123456789", chunk_bytes=4)
        assert upload.parts == [("0-3", b"0123"), ("4-7", b"4567"), ("8-9", b"89")]
        assert upload.blobs == [b""]
        assert server.asked[-1].target.startswith("/upload?_state=3&digest=")


async def test_upload_to_another_host_gets_no_credentials() -> None:
    upload = Upload()
    async with open_scripted_server(upload.answer) as other:
        upload.location = f"{other.url}/upload"

        def handler(asked: Asked) -> Reply:
            return upload.answer(asked) if "authorization" in asked.headers else Reply(401, {"WWW-Authenticate": "Basic"})

        async with serving(handler) as (server, client, ref):
            client.add_credentials(server.host, "user", "hush")
            await client.push_blob(ref, b"x" * 100_000)
    assert upload.blobs == [b"x" * 100_000]
    assert "authorization" not in other.asked[0].headers


async def test_upload_refused() -> None:
    upload = Upload(status=413)
    async with serving(upload.answer) as (_, client, ref):
        with pytest.raises(SourceRefused, match="413"):
            await client.push_blob(ref, b"x")
        upload.location = ""
        with pytest.raises(SourceUnavailable, match="where to upload"):
            await client.push_blob(ref, b"x")
