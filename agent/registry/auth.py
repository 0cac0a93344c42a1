"""Authentication with registries: Bearer tokens (distribution spec "token" flow, OAuth2 for identity tokens) and Basic.

A token is fetched once for a repository and a set of actions, however many requests wait for it, and again shortly before it
ends or when the registry refuses it. Once a registry has shown its challenge, tokens for further repositories are fetched
without asking it first, which saves a round trip.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

import attrs
import structlog
import trio

from agent.errors import SourceRefused, SourceUnavailable
from agent.registry.challenges import Challenge
from agent.registry.connections import Answer, Connections
from agent.registry.credentials import Credentials, CredentialStore
from agent.registry.hosts import RegistryHost, is_loopback

log = structlog.get_logger()

_MAX_TOKEN_BYTES: Final = 1 << 20
_DEFAULT_LIFE_S: Final = 60.0
"""What the token specification says if `expires_in` is absent."""
_CLIENT_ID: Final = "shoal"


@attrs.frozen
class Scope:
    """What a request needs: a repository and actions on it."""

    repository: str
    actions: str = "pull"

    def __str__(self) -> str:
        return f"repository:{self.repository}:{self.actions}"


@attrs.frozen
class _Grant:
    """An Authorization header and how long it is good."""

    header: str = attrs.field(repr=False)
    expires_at: float = math.inf


@attrs.define
class _HostState:
    """What is known of one host's authentication."""

    challenge: Challenge | None = None
    is_predictable: bool = False
    """Did it ask for just the scope that we would have named?"""
    named: dict[Scope, str] = attrs.field(factory=dict)
    """The scope that the host itself named for a request."""
    grants: dict[Scope, _Grant] = attrs.field(factory=dict)
    locks: dict[Scope, trio.Lock] = attrs.field(factory=dict)


class Authorizer:
    """Gives the Authorization header for a request, and a better one after a 401."""

    def __init__(self, connections: Connections, credentials: CredentialStore) -> None:
        self._connections = connections
        self._credentials = credentials
        self._hosts: dict[tuple[str, str], _HostState] = {}

    def _state(self, host: RegistryHost) -> _HostState:
        return self._hosts.setdefault((host.registry, host.base_url), _HostState())

    async def header(self, host: RegistryHost, scope: Scope) -> str | None:
        """What to send with a request; None before the host has asked for anything.

        Raises:
            SourceUnavailable, SourceRefused: a token was due and its service did not give one.
        """
        state = self._state(host)
        grant = state.grants.get(scope)
        if grant is not None and grant.expires_at > trio.current_time():
            await trio.lowlevel.checkpoint()
            return grant.header
        if state.challenge is None or not (grant or state.is_predictable or state.challenge.scheme == "basic"):
            await trio.lowlevel.checkpoint()
            return None
        return await self._grant(host, state, scope, state.challenge, grant.header if grant else None)

    async def answer(self, host: RegistryHost, scope: Scope, challenges: Sequence[Challenge], used: str | None) -> str:
        """A header to try again with, after a 401 to a request that had `used`.

        Raises:
            SourceUnavailable: the token service did not answer.
            SourceRefused: there are no credentials, or they were refused.
        """
        known = {challenge.scheme: challenge for challenge in reversed(challenges)}
        challenge = known.get("bearer") or known.get("basic")
        if challenge is None:
            raise SourceRefused(
                f"{host.name} answered 401 and names no way to log in that is known here", source=host.name, status=401
            )
        state = self._state(host)
        state.challenge = challenge
        state.named[scope] = challenge.params.get("scope") or str(scope)
        state.is_predictable = challenge.scheme == "bearer" and state.named[scope] == str(scope)
        return await self._grant(host, state, scope, challenge, used)

    async def _grant(self, host: RegistryHost, state: _HostState, scope: Scope, challenge: Challenge, used: str | None) -> str:
        """A grant that is not `used`; one task fetches it, the others wait for that."""
        async with state.locks.setdefault(scope, trio.Lock()):
            grant = state.grants.get(scope)
            if grant is not None and grant.header != used and grant.expires_at > trio.current_time():
                return grant.header
            if used is not None:
                self._credentials.forget(host.name)
            credentials = await self._credentials.lookup(host.name, scope.repository)
            if challenge.scheme == "basic":
                grant = _basic(host, credentials, used)
            else:
                grant = await self._fetch_token(host, scope, state.named.get(scope, str(scope)), challenge, credentials)
            state.grants[scope] = grant
            return grant.header

    async def _fetch_token(
        self, host: RegistryHost, scope: Scope, named: str, challenge: Challenge, credentials: Credentials | None
    ) -> _Grant:
        realm, service = challenge.params.get("realm", ""), challenge.params.get("service", "")
        try:
            parts = urlsplit(realm)
            hostname = parts.hostname or ""
        except ValueError:
            parts, hostname = urlsplit(""), ""
        if parts.scheme not in {"http", "https"} or not hostname or parts.username is not None:
            raise SourceRefused(f"{host.name} names no usable token service: {realm!r:.100}", source=host.name, status=401)
        if credentials is not None and parts.scheme == "http" and not host.is_plain and not is_loopback(hostname):
            raise SourceRefused(f"{host.name} wants credentials sent to {hostname} over plain HTTP", source=host.name, status=401)
        fields = {"service": service} if service else {}
        fields["scope"] = named
        headers, method, url, body = {"Accept": "application/json"}, "GET", realm, None
        if credentials is not None and credentials.identity_token:
            method = "POST"
            fields |= {"grant_type": "refresh_token", "refresh_token": credentials.identity_token, "client_id": _CLIENT_ID}
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            body = urlencode(fields).encode()
        else:
            if credentials is not None:
                headers["Authorization"] = credentials.basic()
                fields = {"account": credentials.username, **fields}
            url = realm + ("&" if parts.query else "?") + urlencode(fields)
        asked_at = trio.current_time()
        tls = host.tls if parts.netloc == host.name else host.tls.without_client()
        answer = await self._ask(method, url, headers, body, tls)
        try:
            if answer.status != 200:
                raise _token_error(answer, host, scope, is_anonymous=credentials is None)
            raw = await answer.read(_MAX_TOKEN_BYTES)
        finally:
            await answer.aclose()
        token, life = _parse_token(raw, answer.host)
        log.debug("registry_token_fetched", host=host.name, service=answer.host, repository=scope.repository, life_s=life)
        # a tenth of its life early, so that it does not end on its way
        return _Grant(f"Bearer {token}", asked_at + life * 0.9)

    async def _ask(self, method: str, url: str, headers: dict[str, str], body: bytes | None, tls: Any) -> Answer:
        """Once more if the connection broke or the service is busy: all of an image's layers wait for this."""
        try:
            answer = await self._connections.exchange(method, url, headers, tls=tls, body=body)
            if answer.status < 500:
                return answer
            await answer.drain()
        except SourceUnavailable as exc:
            log.debug("token_service_unavailable", reason=str(exc))
        return await self._connections.exchange(method, url, headers, tls=tls, body=body)


def _basic(host: RegistryHost, credentials: Credentials | None, used: str | None) -> _Grant:
    if credentials is None or not credentials.username:
        raise SourceRefused(f"{host.name} wants a user and password, and none are known for it", source=host.name, status=401)
    header = credentials.basic()
    if header == used:
        raise SourceRefused(f"{host.name} refused the credentials of user {credentials.username!r}", source=host.name, status=401)
    return _Grant(header)


def _token_error(answer: Answer, host: RegistryHost, scope: Scope, *, is_anonymous: bool) -> SourceRefused | SourceUnavailable:
    if answer.status == 429 or answer.status >= 500:
        return SourceUnavailable(f"token service {answer.host} of {host.name} answered {answer.status}", source=host.name)
    hint = "; no credentials are known for it" if is_anonymous else ""
    return SourceRefused(
        f"token service {answer.host} of {host.name} answered {answer.status} for {scope}{hint}",
        source=host.name,
        status=answer.status,
    )


def _parse_token(raw: bytes, service: str) -> tuple[str, float]:
    try:
        fields = json.loads(raw)
        token = fields.get("token") or fields.get("access_token")
        life = fields.get("expires_in") or _DEFAULT_LIFE_S
    except (ValueError, AttributeError, RecursionError) as exc:
        raise SourceUnavailable(f"token service {service} sent no JSON object", source=service) from exc
    if not isinstance(token, str) or not token.isascii() or not token.isprintable() or not token:
        raise SourceUnavailable(f"token service {service} sent no token", source=service)
    if not isinstance(life, int | float) or isinstance(life, bool) or not 0 < life < 1e9:
        life = _DEFAULT_LIFE_S
    return token, float(life)
