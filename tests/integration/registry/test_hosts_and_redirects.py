"""Redirects to stores with signed URLs, and mirrors from hosts.toml: who is asked, what is sent to whom, what happens on failure."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
import trustme

from agent.errors import SourceRefused, SourceUnavailable
from agent.formats.model import digest_of
from agent.registry import OCI_MANIFEST, Descriptor, ImageReference, RegistryClient, open_registry_client
from tests.registry_servers import Asked, Reply, ScriptedServer, closed_port, open_scripted_server

BLOB = bytes(range(256)) * 1000
DIGEST = digest_of(BLOB)
SMALL = Descriptor("a/b", DIGEST, len(BLOB))


def serve_blob(asked: Asked) -> Reply:
    span = asked.range()
    if span is None:
        return Reply(body=BLOB)
    return Reply(206, {"Content-Range": f"bytes {span[0]}-{span[1] - 1}/{len(BLOB)}"}, BLOB[span[0] : span[1]])


@attrs.define
class Redirecting:
    """A registry with Basic authentication that redirects blobs to a store, whose URLs hold a signature that can end."""

    registry: ScriptedServer
    store: ScriptedServer
    signature: int = 1
    query: str = "?sig=a%2Fb~c+d%20e'(f)*,;&n={n}"
    status: int = 307
    refusal: int = 403

    def at_registry(self, asked: Asked) -> Reply:
        if not asked.headers.get("authorization"):
            return Reply(401, {"WWW-Authenticate": "Basic"})
        return Reply(self.status, {"Location": f"{self.store.url}/bucket/blob{self.query.format(n=self.signature)}"})

    def at_store(self, asked: Asked) -> Reply:
        if asked.query != self.query.format(n=self.signature)[1:]:
            return Reply(self.refusal, body=b"<Error>Request has expired</Error>")
        return serve_blob(asked)


@asynccontextmanager
async def redirecting() -> AsyncIterator[tuple[Redirecting, RegistryClient, ImageReference]]:
    with trio.fail_after(20):
        async with open_scripted_server(serve_blob) as registry, open_scripted_server(serve_blob) as store:
            both = Redirecting(registry, store)
            registry.handler, store.handler = both.at_registry, both.at_store
            async with open_registry_client() as client:
                client.add_credentials(registry.host, "user", "hush")
                yield both, client, ImageReference.parse(f"{registry.host}/team/app")


async def read(client: RegistryClient, ref: ImageReference, start: int = 10, stop: int = 200_000) -> None:
    got = b""
    async with client.fetch_ranges(ref, DIGEST, len(BLOB), [(start, stop)]) as stream:
        async for _, part in stream:
            got += part
    assert got == BLOB[start:stop]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_signed_url_is_kept_and_gets_no_credentials(status: int) -> None:
    async with redirecting() as (both, client, ref):
        both.status = status
        for _ in range(3):
            await read(client, ref)
        assert len(both.registry.asked) == 2  # the challenge, and the redirect
        assert len(both.store.asked) == 3
        assert not any("authorization" in asked.headers or "cookie" in asked.headers for asked in both.store.asked)
        assert both.store.asked[0].headers["range"] == "bytes=10-199999"


@pytest.mark.parametrize("refusal", [400, 401, 403, 404, 410])
async def test_url_that_ended_is_asked_for_again(refusal: int) -> None:
    async with redirecting() as (both, client, ref):
        both.refusal = refusal
        await read(client, ref)
        both.signature = 2
        await read(client, ref)
        await read(client, ref)
        assert len(both.registry.asked) == 3
        assert [asked.query[-1] for asked in both.store.asked] == ["1", "1", "2", "2"]


async def test_url_that_says_when_it_ends_is_not_tried_later() -> None:
    async with redirecting() as (both, client, ref):
        both.query = "?Expires=1000&Signature={n}"
        await read(client, ref)
        await read(client, ref)
        assert len(both.registry.asked) == 3
        assert len(both.store.asked) == 2


async def test_store_that_refuses_fresh_urls() -> None:
    async with redirecting() as (both, client, ref):
        both.store.handler = lambda asked: Reply(403)
        with pytest.raises(SourceRefused, match="answered 403"):
            await read(client, ref)
        assert len(both.store.asked) == 2


async def test_store_that_breaks_off() -> None:
    async with redirecting() as (both, client, ref):

        def handler(asked: Asked) -> Reply:
            reply = both.at_store(asked)
            if len(both.store.asked) < 3:
                reply.cut = 70_000
            return reply

        both.store.handler = handler
        await read(client, ref)
        assert [asked.range() for asked in both.store.asked] == [(10, 200_000), (70_010, 200_000), (140_010, 200_000)]


async def test_store_that_is_gone() -> None:
    async with redirecting() as (both, client, ref):
        both.registry.handler = lambda asked: Reply(302, {"Location": f"http://127.0.0.1:{closed_port()}/x"})
        with pytest.raises(SourceUnavailable, match="cannot be reached"):
            await read(client, ref)


async def test_nested_redirects() -> None:
    async with redirecting() as (both, client, ref):

        def at_store(asked: Asked) -> Reply:
            step = int(asked.path.rpartition("/")[2] or 0)
            return serve_blob(asked) if step == 4 else Reply(302, {"Location": f"../a/{step + 1}"})

        both.registry.handler = lambda asked: Reply(302, {"Location": f"{both.store.url}/a/1"})
        both.store.handler = at_store
        await read(client, ref)
        await read(client, ref)
        assert [asked.path for asked in both.store.asked] == ["/a/1", "/a/2", "/a/3", "/a/4", "/a/4"]


async def test_redirect_within_the_registry_keeps_credentials() -> None:
    async with redirecting() as (both, client, ref):

        def handler(asked: Asked) -> Reply:
            if not asked.headers.get("authorization"):
                return Reply(401, {"WWW-Authenticate": "Basic"})
            return serve_blob(asked) if asked.path == "/other" else Reply(307, {"Location": "/other"})

        both.registry.handler = handler
        await read(client, ref)


@pytest.mark.parametrize("location", ["", "/loop", "ftp://x/y", "http://u:p@127.0.0.1/", "http://[/", "file:///etc/passwd"])
async def test_redirects_that_lead_nowhere(location: str) -> None:
    async with redirecting() as (both, client, ref):
        both.registry.handler = lambda asked: Reply(302, {"Location": location} if location else {})
        with pytest.raises(SourceRefused, match="redirect"):
            await read(client, ref)
        assert len(both.registry.asked) <= 6


def write_hosts(folder: Path, registry: str, text: str) -> None:
    place = folder / (registry.replace(":", "_") + "_")
    place.mkdir(parents=True, exist_ok=True)
    (place / "hosts.toml").write_text(text)


async def test_mirror_first_then_the_registry(tmp_path: Path) -> None:
    async with open_scripted_server(serve_blob) as mirror, open_scripted_server(serve_blob) as registry:
        write_hosts(tmp_path, registry.host, f'[host."{mirror.url}/cache"]\n[host."{mirror.url}/cache".header]\nx-key = "hush"')
        ref = ImageReference.parse(f"{registry.host}/team/app")
        async with open_registry_client(tmp_path) as client:
            await read(client, ref)
            (asked,) = mirror.asked
            assert asked.target == f"/cache/v2/team/app/blobs/{DIGEST}?ns={registry.host}"
            assert asked.headers["x-key"] == "hush"
            assert not registry.asked
            mirror.handler = lambda asked: Reply(404)
            await read(client, ref)
            assert registry.asked[0].target == f"/v2/team/app/blobs/{DIGEST}"
            assert "x-key" not in registry.asked[0].headers


async def test_mirror_that_lies_or_breaks_off_is_replaced_in_the_middle(tmp_path: Path) -> None:
    async with open_scripted_server(serve_blob) as mirror, open_scripted_server(serve_blob) as registry:
        write_hosts(tmp_path, registry.host, f'[host."{mirror.url}"]')
        ref = ImageReference.parse(f"{registry.host}/team/app")
        async with open_registry_client(tmp_path) as client:
            mirror.handler = lambda asked: attrs.evolve(serve_blob(asked), cut=50_000)
            await read(client, ref)
            assert registry.asked[0].range() == (100_010, 200_000)
            mirror.handler = lambda asked: Reply(body=BLOB[::-1])
            assert await client.fetch_small(ref, SMALL, 1 << 20) == BLOB


async def test_mirror_that_is_down_is_asked_last(tmp_path: Path) -> None:
    async with open_scripted_server(serve_blob) as registry:
        write_hosts(tmp_path, registry.host, f'[host."http://127.0.0.1:{closed_port()}"]')
        ref = ImageReference.parse(f"{registry.host}/team/app")
        async with open_registry_client(tmp_path) as client:
            with trio.fail_after(5):
                for _ in range(20):
                    await read(client, ref)
            registry.handler = lambda asked: Reply(404)
            with pytest.raises(SourceRefused, match="answered 404"):
                await read(client, ref)


async def test_capabilities(tmp_path: Path) -> None:
    raw = b'{"mediaType": "%b", "config": {"digest": "%b", "size": 5}, "layers": []}' % (OCI_MANIFEST.encode(), DIGEST.encode())
    async with (
        open_scripted_server(lambda asked: Reply(body=raw)) as mirror,
        open_scripted_server(lambda asked: Reply(body=raw)) as registry,
    ):
        write_hosts(
            tmp_path, registry.host, f'capabilities = ["pull", "resolve"]\n[host."{mirror.url}"]\ncapabilities = ["pull"]'
        )
        ref = ImageReference.parse(f"{registry.host}/team/app:1")
        async with open_registry_client(tmp_path) as client:
            resolved = await client.resolve(ref)
            assert (len(mirror.asked), len(registry.asked)) == (0, 1)
            await client.resolve(attrs.evolve(ref, tag=None, digest=resolved.digest))
            assert (len(mirror.asked), len(registry.asked)) == (1, 1)
            with pytest.raises(SourceRefused, match="does not let anybody push"):
                await client.push_manifest(ref, raw, OCI_MANIFEST)


async def test_broken_hosts_file_is_passed_over(tmp_path: Path) -> None:
    async with open_scripted_server(serve_blob) as registry:
        write_hosts(tmp_path, registry.host, "= nonsense")
        async with open_registry_client(tmp_path) as client:
            await read(client, ImageReference.parse(f"{registry.host}/team/app"))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(authority: trustme.CA, *, wants_client: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    if wants_client:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


async def test_tls_with_a_configured_authority_and_client_certificate(tmp_path: Path, authority: trustme.CA) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    mine = authority.issue_cert("client.example")
    mine.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "client.pem"))
    async with open_scripted_server(serve_blob, ssl_context=server_context(authority, wants_client=True)) as registry:
        ref = ImageReference.parse(f"{registry.host}/team/app")
        tls = f'server = "{registry.url}"\nca = "{tmp_path}/ca.pem"\n'
        write_hosts(tmp_path, registry.host, f'{tls}client = "{tmp_path}/client.pem"')
        async with open_registry_client(tmp_path) as client:
            await read(client, ref)
        write_hosts(tmp_path, registry.host, f'{tls}client = "{tmp_path}/none.pem"')
        async with open_registry_client(tmp_path) as client:
            with pytest.raises(SourceRefused, match=r"none\.pem"):
                await read(client, ref)
        write_hosts(tmp_path, registry.host, tls)
        async with open_registry_client(tmp_path) as client:
            with pytest.raises(SourceUnavailable):
                await read(client, ref)


async def test_tls_of_an_unknown_authority(tmp_path: Path, authority: trustme.CA) -> None:
    async with open_scripted_server(serve_blob, ssl_context=server_context(authority)) as registry:
        ref = ImageReference.parse(f"{registry.host}/team/app")
        write_hosts(tmp_path, registry.host, f'server = "{registry.url}"')
        async with open_registry_client(tmp_path) as client:
            with pytest.raises(SourceRefused, match="add its CA"):
                await read(client, ref)
        write_hosts(tmp_path, registry.host, f'server = "{registry.url}"\nskip_verify = true')
        async with open_registry_client(tmp_path) as client:
            await read(client, ref)
        assert registry.asked[0].headers["host"] == registry.host


async def test_redirect_out_of_tls_is_refused(tmp_path: Path, authority: trustme.CA) -> None:
    async with (
        open_scripted_server(serve_blob) as store,
        open_scripted_server(
            lambda asked: Reply(302, {"Location": f"{store.url}/x"}), ssl_context=server_context(authority)
        ) as registry,
    ):
        write_hosts(tmp_path, registry.host, f'server = "{registry.url}"\nskip_verify = true')
        async with open_registry_client(tmp_path) as client:
            with pytest.raises(SourceRefused, match="from HTTPS to plain HTTP"):
                await read(client, ImageReference.parse(f"{registry.host}/team/app"))
        assert not store.asked


async def test_other_hosts_are_https(authority: trustme.CA) -> None:
    """A host that is not loopback is never asked in plain text unless it is listed."""
    async with open_registry_client() as client:
        ref = ImageReference.parse("shoal.invalid:5000/app")
        with pytest.raises(SourceUnavailable):
            await client.resolve(ref)
    async with open_scripted_server(serve_blob, name="localhost") as registry:
        async with open_registry_client(insecure=["localhost"]) as client:
            await read(client, ImageReference.parse(f"{registry.host}/app"))
