"""What refers to a manifest: by the API, page by page, or by the tag in its place; from mirrors, and from hosts that lie."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import attrs
import pytest
import trio

from agent.errors import SourceRefused, SourceUnavailable
from agent.formats.model import Digest, FormatError, digest_of
from agent.registry import OCI_INDEX, OCI_MANIFEST, ImageReference, RegistryClient, open_registry_client
from tests.registry_servers import Asked, Handler, RealRegistry, Reply, ScriptedServer, open_real_registry, open_scripted_server

WANTED = "application/vnd.example.index.v1+json"
OTHER = "application/vnd.example.signature"
SUBJECT = digest_of(b"an image")
API = f"/v2/team/app/referrers/{SUBJECT}"
TAG = f"/v2/team/app/manifests/sha256-{SUBJECT.removeprefix('sha256:')}"


def entry(content: bytes, artifact_type: object = WANTED, **more: object) -> dict[str, Any]:
    found = {"mediaType": OCI_MANIFEST, "digest": digest_of(content), "size": len(content), "artifactType": artifact_type}
    return {**found, "annotations": {"org.example": "x"}, **more}


def listing(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


def answer(body: bytes, **headers: str) -> Reply:
    return Reply(200, {"Content-Type": OCI_INDEX, **headers}, body)


@asynccontextmanager
async def serving(
    handler: Handler, hosts: Path | None = None
) -> AsyncIterator[tuple[ScriptedServer, RegistryClient, ImageReference]]:
    with trio.fail_after(20):
        async with open_scripted_server(handler) as server, open_registry_client(hosts) as client:
            yield server, client, ImageReference.parse(f"{server.host}/team/app:1")


async def find(client: RegistryClient, ref: ImageReference) -> list[str]:
    """The digests of what was told."""
    document = json.loads(await client.referrers(ref, SUBJECT, WANTED))
    assert document["mediaType"] == OCI_INDEX
    assert all(found["artifactType"] == WANTED for found in document["manifests"])
    return [found["digest"] for found in document["manifests"]]


async def test_the_api_is_asked_once_and_what_it_says_is_filtered() -> None:
    told = listing(
        entry(b"1", OTHER), entry(b"2"), entry(b"3", ["?"]), entry(b"4"), entry(b"5", mediaType="text/html"), entry(b"6", None)
    )
    async with serving(lambda asked: answer(told, **{"OCI-Filters-Applied": "artifactType"})) as (server, client, ref):
        assert await find(client, ref) == [digest_of(b"2"), digest_of(b"4")]
        (asked,) = server.asked
        assert (asked.method, asked.path, parse_qs(asked.query)) == ("GET", API, {"artifactType": [WANTED]})
        assert asked.headers["accept"] == OCI_INDEX


async def test_nothing_refers_to_it() -> None:
    async with serving(lambda asked: answer(listing())) as (server, client, ref):
        assert await find(client, ref) == []
        assert [asked.path for asked in server.asked] == [API]


@pytest.mark.parametrize(
    "link", ['<{api}?last={n}>; rel="next"', "<{url}{api}?last={n}>;rel=next", '</v2/>; rel="first", <?last={n}>; REL="next"; x']
)
async def test_pages(link: str) -> None:
    def handler(asked: Asked) -> Reply:
        number = int(parse_qs(asked.query).get("last", ["0"])[0])
        headers = {"Link": link.format(api=API, url=server.url, n=number + 1)} if number < 2 else {}
        return answer(listing(entry(b"?", OTHER), entry(bytes([number]))), **headers)

    async with serving(handler) as (server, client, ref):
        assert await find(client, ref) == [digest_of(bytes([number])) for number in range(3)]
        assert len(server.asked) == 3


async def test_pages_without_end() -> None:
    async with serving(lambda asked: answer(listing(entry(b"1")), Link=f'<{API}>; rel="next"')) as (server, client, ref):
        assert set(await find(client, ref)) == {digest_of(b"1")}
        assert len(server.asked) < 20


async def test_more_than_anybody_needs() -> None:
    many = listing(*(entry(b"%d" % number) for number in range(4000)))
    async with serving(lambda asked: answer(many, Link=f'<{API}>; rel="next"')) as (server, client, ref):
        assert 0 < len(await find(client, ref)) < 1000
        assert len(server.asked) == 1


async def test_all_pages_together_are_bounded() -> None:
    padded = listing(entry(b"1", OTHER, annotations={"x": "y" * (3 << 20)}))
    async with serving(lambda asked: answer(padded, Link=f'<{API}>; rel="next"')) as (server, client, ref):
        with pytest.raises(SourceRefused, match="more than"):
            await find(client, ref)
        assert len(server.asked) == 2


@pytest.mark.parametrize("link", ["ftp://x/y", "http://u:p@127.0.0.1/", "http://[/"])
async def test_a_next_page_that_is_nowhere(link: str) -> None:
    async with serving(lambda asked: answer(listing(), Link=f'<{link}>; rel="next"')) as (_, client, ref):
        with pytest.raises(SourceRefused, match="next page"):
            await find(client, ref)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b" " * (5 << 20), SourceRefused),
        (b"<html>", FormatError),
        (b"", FormatError),
        (b"[" * 100_000, FormatError),
        (b'{"manifests": 5}', FormatError),
        (b'{"manifests": [{"digest": "sha256:x", "size": 1}]}', FormatError),
        (listing(entry(b"1", size=-1)), FormatError),
        (json.dumps({"config": entry(b"1"), "layers": []}).encode(), FormatError),
    ],
)
@pytest.mark.parametrize("has_api", [True, False])
async def test_what_is_no_list(body: bytes, error: type[Exception], has_api: bool) -> None:
    def handler(asked: Asked) -> Reply:
        return answer(body) if has_api or asked.path == TAG else Reply(404)

    async with serving(handler) as (_, client, ref):
        with pytest.raises(error):
            await find(client, ref)


async def test_the_tag_in_place_of_the_api() -> None:
    def handler(asked: Asked) -> Reply:
        return answer(listing(entry(b"1", OTHER), entry(b"2"))) if asked.path == TAG else Reply(404, body=b"{}")

    async with serving(handler) as (server, client, ref):
        assert await find(client, ref) == [digest_of(b"2")]
        assert [asked.path for asked in server.asked] == [API, TAG]
        server.handler = lambda asked: Reply(404)
        assert await find(client, ref) == []


@pytest.mark.parametrize("status", [400, 401, 403])
async def test_a_registry_that_will_not_tell(status: int) -> None:
    async with serving(lambda asked: Reply(status)) as (server, client, ref):
        with pytest.raises(SourceRefused):
            await find(client, ref)
        server.handler = lambda asked: Reply(status) if asked.path == TAG else Reply(404)
        with pytest.raises(SourceRefused):
            await find(client, ref)


def write_hosts(folder: Path, registry: str, text: str) -> None:
    place = folder / (registry.replace(":", "_") + "_")
    place.mkdir(parents=True, exist_ok=True)
    (place / "hosts.toml").write_text(text)


async def test_mirrors(tmp_path: Path) -> None:
    async with (
        open_scripted_server(lambda asked: answer(listing(entry(b"1")))) as mirror,
        serving(lambda asked: answer(listing(entry(b"2"))), tmp_path) as (registry, client, ref),
    ):
        write_hosts(tmp_path, registry.host, f'[host."{mirror.url}"]')
        assert await find(client, ref) == [digest_of(b"1")]
        (asked,) = mirror.asked
        assert parse_qs(asked.query) == {"artifactType": [WANTED], "ns": [registry.host]}
        assert not registry.asked
        # What a mirror does not know, or cannot say, the registry may.
        for reply in (Reply(404), answer(listing()), Reply(403)):
            mirror.handler = lambda asked, reply=reply: reply  # type: ignore[misc]
            assert await find(client, ref) == [digest_of(b"2")]
        # And the mirror says what the registry cannot; but its silence is not an answer in the registry's place.
        registry.handler = lambda asked: Reply(403)
        with pytest.raises(SourceRefused, match="403"):
            await find(client, ref)
        mirror.handler = lambda asked: Reply(404)
        with pytest.raises(SourceRefused, match="403"):
            await find(client, ref)


async def test_only_hosts_that_may_are_asked(tmp_path: Path) -> None:
    async with (
        open_scripted_server(lambda asked: Reply(404)) as mirror,
        serving(lambda asked: answer(listing(entry(b"2"))), tmp_path) as (registry, client, ref),
    ):
        write_hosts(tmp_path, registry.host, f'[host."{mirror.url}"]\ncapabilities = ["pull", "resolve"]')
        assert await find(client, ref) == [digest_of(b"2")]
        assert not mirror.asked
    capabilities = 'capabilities = ["pull", "resolve"]'
    async with (
        open_scripted_server(lambda asked: Reply(404)) as mirror,
        serving(lambda asked: Reply(404), tmp_path) as (registry, client, ref),
    ):
        write_hosts(tmp_path, registry.host, f'{capabilities}\n[host."{mirror.url}"]\ncapabilities = ["referrers"]')
        assert await find(client, ref) == []
        assert [asked.path for asked in mirror.asked] == [API]  # tags are not this mirror's affair
        assert not registry.asked
    async with serving(lambda asked: Reply(404), tmp_path) as (registry, client, ref):
        write_hosts(tmp_path, registry.host, capabilities)
        with pytest.raises(SourceRefused, match="no host may list"):
            await find(client, ref)


async def test_a_registry_that_breaks_off() -> None:
    replies = iter([Reply(503), attrs.evolve(answer(listing(entry(b"1"))), raw=b""), answer(listing(entry(b"1")))])
    async with serving(lambda asked: next(replies)) as (server, client, ref):
        assert await find(client, ref) == [digest_of(b"1")]
        server.handler = lambda asked: attrs.evolve(answer(listing(entry(b"1"))), cut=20)
        with pytest.raises(SourceUnavailable):
            await find(client, ref)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    with open_real_registry(tmp_path_factory.mktemp("registry")) as server:
        yield server


async def test_a_real_registry_without_the_api(real: RealRegistry) -> None:
    ref = ImageReference.parse(f"{real.host}/team/app:1")
    with trio.fail_after(30):
        async with open_registry_client() as client:
            assert await find(client, ref) == []
            config = b"{}"
            await client.push_blob(ref, config, digest_of(config))
            referrer = json.dumps(
                {
                    "schemaVersion": 2,
                    "mediaType": OCI_MANIFEST,
                    "config": {"mediaType": WANTED, "digest": digest_of(config), "size": 2},
                    "layers": [],
                    "subject": {"mediaType": OCI_MANIFEST, "digest": SUBJECT, "size": 8},
                }
            ).encode()
            await client.push_manifest(attrs.evolve(ref, tag=None, digest=digest_of(referrer)), referrer, OCI_MANIFEST)
            tag = attrs.evolve(ref, tag=SUBJECT.replace(":", "-"))
            await client.push_manifest(tag, listing(entry(referrer)), OCI_INDEX)
            (found,) = await find(client, ref)
            assert (await client.resolve(attrs.evolve(ref, tag=None, digest=Digest(found)))).raw == referrer
