"""Tokens, passwords, helpers: what is sent to whom, how often, and what is said when it is refused."""

import base64
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs

import attrs
import pytest
import trio

from agent.errors import SourceRefused, SourceUnavailable
from agent.formats.model import digest_of
from agent.registry import Descriptor, ImageReference, RegistryClient, StallLimits, open_registry_client
from tests.registry_servers import Asked, Reply, ScriptedServer, open_scripted_server

BLOB = b"config of an image"
SMALL = Descriptor("a/b", digest_of(BLOB), len(BLOB))
QUICK = StallLimits(connect_s=0.5, head_s=0.5, read_s=0.5)


@attrs.define
class TokenRegistry:
    """A registry that wants tokens, and the service that gives them, on two ports."""

    registry: ScriptedServer
    service: ScriptedServer
    valid: set[str] = attrs.field(factory=set)
    given: int = 0
    life: object = 300
    password: str = ""
    scope: str = "repository:{repository}:pull"

    def answer(self, asked: Asked) -> Reply:
        token = asked.headers.get("authorization", "").removeprefix("Bearer ")
        if token in self.valid:
            return Reply(body=BLOB)
        repository = asked.path.removeprefix("/v2/").partition("/blobs/")[0]
        scope = self.scope.format(repository=repository)
        return Reply(
            401, {"WWW-Authenticate": f'Bearer realm="{self.service.url}/token?x=1",service="reg.istry",scope="{scope}"'}, b"{}"
        )

    async def give(self, asked: Asked) -> Reply:
        if self.password:
            expected = "Basic " + base64.b64encode(f"user:{self.password}".encode()).decode()
            if asked.headers.get("authorization") != expected:
                return Reply(401, body=b"{}")
        await trio.testing.wait_all_tasks_blocked(0.01)
        self.given += 1
        token = f"token-{self.given}"
        self.valid.add(token)
        return Reply(body=json.dumps({"access_token": token, "expires_in": self.life}).encode())

    def ref(self, name: str = "team/app") -> ImageReference:
        return ImageReference.parse(f"{self.registry.host}/{name}:1")


@asynccontextmanager
async def token_registry() -> AsyncIterator[TokenRegistry]:
    with trio.fail_after(20):
        async with (
            open_scripted_server(lambda asked: Reply()) as registry,
            open_scripted_server(lambda asked: Reply()) as service,
        ):
            both = TokenRegistry(registry, service)
            registry.handler, service.handler = both.answer, both.give
            yield both


async def test_one_token_for_many_requests() -> None:
    async with token_registry() as both, open_registry_client() as client:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(client.fetch_small, both.ref(), SMALL, 100)
        assert both.given == 1
        query = parse_qs(both.service.asked[0].query)
        assert query == {"x": ["1"], "service": ["reg.istry"], "scope": ["repository:team/app:pull"]}
        assert "authorization" not in both.service.asked[0].headers


async def test_next_repository_needs_no_challenge() -> None:
    async with token_registry() as both, open_registry_client() as client:
        await client.fetch_small(both.ref("one"), SMALL, 100)
        before = len(both.registry.asked)
        await client.fetch_small(both.ref("two"), SMALL, 100)
        assert len(both.registry.asked) == before + 1
        assert parse_qs(both.service.asked[1].query)["scope"] == ["repository:two:pull"]


async def test_scope_of_the_challenge_is_used() -> None:
    async with token_registry() as both, open_registry_client() as client:
        both.scope = "repository:proxy/{repository}:pull"
        await client.fetch_small(both.ref("one"), SMALL, 100)
        await client.fetch_small(both.ref("two"), SMALL, 100)
        assert parse_qs(both.service.asked[1].query)["scope"] == ["repository:proxy/two:pull"]


async def test_token_that_was_revoked_is_replaced_once() -> None:
    async with token_registry() as both, open_registry_client() as client:
        await client.fetch_small(both.ref(), SMALL, 100)
        both.valid.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(client.fetch_small, both.ref(), SMALL, 100)
        assert both.given == 2


async def test_token_is_replaced_before_it_ends() -> None:
    async with token_registry() as both, open_registry_client() as client:
        both.life = 0.001
        await client.fetch_small(both.ref(), SMALL, 100)
        before = len(both.registry.asked)
        await client.fetch_small(both.ref(), SMALL, 100)
        assert both.given == 2
        assert len(both.registry.asked) == before + 1


async def test_token_that_does_not_help() -> None:
    async with token_registry() as both, open_registry_client() as client:
        both.registry.handler = lambda asked: both.answer(attrs.evolve(asked, headers={}))
        with pytest.raises(SourceRefused, match="refused to let us pull team/app") as caught:
            await client.fetch_small(both.ref(), SMALL, 100)
        assert caught.value.status == 401
        assert both.given <= 3


async def test_password_goes_to_the_token_service_only() -> None:
    async with token_registry() as both, open_registry_client() as client:
        both.password = "hush"
        with pytest.raises(SourceRefused, match="no credentials are known"):
            await client.fetch_small(both.ref(), SMALL, 100)
        client.add_credentials(both.registry.host, "user", "wrong")
        with pytest.raises(SourceRefused, match="answered 401"):
            await client.fetch_small(both.ref(), SMALL, 100)
        client.add_credentials(both.registry.host, "user", "hush")
        await client.fetch_small(both.ref(), SMALL, 100)
        assert not any("Basic" in asked.headers.get("authorization", "") for asked in both.registry.asked)
        assert parse_qs(both.service.asked[-1].query)["account"] == ["user"]


async def test_identity_token_is_posted() -> None:
    async with token_registry() as both, open_registry_client() as client:
        client.add_credentials(both.registry.host, "", identity_token="refresh-me")
        await client.fetch_small(both.ref(), SMALL, 100)
        asked = both.service.asked[0]
        form = parse_qs(asked.body.decode())
        assert asked.method == "POST"
        assert form["grant_type"] == ["refresh_token"]
        assert form["refresh_token"] == ["refresh-me"]
        assert "refresh-me" not in asked.target


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=b"no json"),
        Reply(body=b"[]"),
        Reply(body=b"{}"),
        Reply(body=b'{"token": 5}'),
        Reply(body=b'{"token": "a\\r\\nX: y"}'),
        Reply(body=b'{"token": "' + b"x" * (2 << 20) + b'"}'),
        Reply(500),
        Reply(429),
        Reply(403),
        Reply(302, {"Location": "/elsewhere"}),
        Reply(raw=b""),
        Reply(raw=b"", hangs=True),
    ],
)
async def test_bad_token_service(reply: Reply) -> None:
    async with token_registry() as both, open_registry_client(limits=QUICK) as client:
        both.service.handler = lambda asked: reply
        with pytest.raises((SourceUnavailable, SourceRefused)):
            await client.fetch_small(both.ref(), SMALL, 100)


async def test_busy_token_service_is_asked_again() -> None:
    async with token_registry() as both, open_registry_client() as client:

        async def handler(asked: Asked) -> Reply:
            return Reply(503) if len(both.service.asked) == 1 else await both.give(asked)

        both.service.handler = handler
        await client.fetch_small(both.ref(), SMALL, 100)


@pytest.mark.parametrize(
    "challenge",
    [
        'Bearer realm="file:///etc/passwd"',
        'Bearer realm="https://u:p@x/"',
        "Bearer",
        'Bearer realm="https://[/"',
        "Negotiate",
        "",
        "Digest realm=x",
    ],
)
async def test_challenges_that_lead_nowhere(challenge: str) -> None:
    async with token_registry() as both, open_registry_client() as client:
        both.registry.handler = lambda asked: Reply(401, {"WWW-Authenticate": challenge})
        with pytest.raises(SourceRefused, match=r"401|token service") as caught:
            await client.fetch_small(both.ref(), SMALL, 100)
        assert caught.value.status == 401


async def test_cancelled_login_does_not_harm_the_others() -> None:
    async with token_registry() as both, open_registry_client() as client:
        gate = trio.Event()

        async def handler(asked: Asked) -> Reply:
            await gate.wait()
            return await both.give(asked)

        both.service.handler = handler
        got: list[bytes] = []

        async def fetch(scope: trio.CancelScope) -> None:
            with scope:
                got.append(await client.fetch_small(both.ref(), SMALL, 100))

        async with trio.open_nursery() as nursery:
            first = trio.CancelScope()
            nursery.start_soon(fetch, first)
            while not both.service.asked:
                await trio.lowlevel.checkpoint()
            nursery.start_soon(fetch, trio.CancelScope())
            first.cancel()
            gate.set()
        assert got == [BLOB]


def helper(folder: Path, name: str, script: str) -> None:
    path = folder / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


async def fetch_with_helper(client: RegistryClient, server: ScriptedServer, expected: str) -> None:
    def handler(asked: Asked) -> Reply:
        if asked.headers.get("authorization") == "Basic " + base64.b64encode(expected.encode()).decode():
            return Reply(body=BLOB)
        return Reply(401, {"WWW-Authenticate": 'Basic realm="x"'})

    server.handler = handler
    await client.fetch_small(ImageReference.parse(f"{server.host}/team/app"), SMALL, 100)


async def test_credential_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    helper(
        tmp_path, "good", f'cat > {tmp_path}/question; echo x >> {tmp_path}/calls; echo \'{{"Username": "u", "Secret": "s"}}\''
    )
    helper(tmp_path, "none", "echo 'credentials not found in native keychain'; exit 1")
    config = tmp_path / "config.json"
    async with open_scripted_server(lambda asked: Reply()) as server:
        for document, expected in [
            ({"credHelpers": {server.host: "good"}}, "u:s"),
            ({"credsStore": "good", "auths": {server.host: {"username": "a", "password": "b"}}}, "u:s"),
            ({"credsStore": "none", "auths": {server.host: {"username": "a", "password": "b"}}}, "a:b"),
            ({"credsStore": "not-installed", "auths": {f"{server.host}/team": {"username": "a", "password": "b"}}}, "a:b"),
        ]:
            config.write_text(json.dumps(document))
            async with open_registry_client(docker_config=config) as client:
                await fetch_with_helper(client, server, expected)
        assert (tmp_path / "question").read_text() == server.host
        assert (tmp_path / "calls").read_text() == "x\nx\n"


async def test_credential_helper_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    helper(tmp_path, "slow", "exec sleep 1000")
    config = tmp_path / "config.json"
    autojump_clock.autojump_threshold = 0.3
    async with open_scripted_server(lambda asked: Reply()) as server:
        config.write_text(json.dumps({"credsStore": "slow"}))
        async with open_registry_client(docker_config=config) as client:
            with pytest.raises(SourceRefused, match="none are known"):
                await fetch_with_helper(client, server, "u:s")


async def test_unreadable_docker_config_means_anonymous(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("{")
    async with open_scripted_server(lambda asked: Reply(401, {"WWW-Authenticate": "Basic"})) as server:
        async with open_registry_client(docker_config=config) as client:
            with pytest.raises(SourceRefused, match="none are known"):
                await client.fetch_small(ImageReference.parse(f"{server.host}/a"), SMALL, 100)


async def test_nothing_secret_is_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    async with token_registry() as both, open_registry_client() as client:
        both.password = "hush-hush"
        client.add_credentials(both.registry.host, "user", "hush-hush")
        await client.fetch_small(both.ref(), SMALL, 100)
    captured = capfd.readouterr()
    text = captured.out + captured.err + caplog.text
    assert "registry_exchange" in text
    for secret in ("hush-hush", base64.b64encode(b"user:hush-hush").decode(), "token-1"):
        assert secret not in text
