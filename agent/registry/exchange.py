"""One request to one host of a registry, through everything that stands in its way: authentication, redirects, busy servers.

A cold read takes the fewest round trips that the protocol allows: no ping, no HEAD; a redirect is followed on the first real
request, its signed URL is kept for the blob, and later requests go straight to the store. A store that refuses a kept URL
(401, 403, 404, 410, or S3's 400) is asked again once through the registry.

Authorization and configured headers go to the host's own origin and nowhere else.
"""

import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Final

import attrs
import structlog
import trio

from agent.errors import SourceRefused, SourceUnavailable
from agent.registry.auth import Authorizer, Scope
from agent.registry.challenges import parse_challenges
from agent.registry.complaints import complaint
from agent.registry.connections import Answer, Connections
from agent.registry.hosts import RegistryHost
from agent.registry.redirects import MAX_REDIRECTS, BadRedirect, SignedUrl, next_hop, origin_of
from agent.registry.retries import MAX_WAIT_S, RETRIED_STATUSES, backoff_s, parse_retry_after

log = structlog.get_logger()

Body = bytes | Callable[[], AsyncIterator[bytes]]
"""A request's body; a callable gives it anew for each attempt."""

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_URL_REFUSED: Final = frozenset({400, 401, 403, 404, 410})
_MAX_LOGINS: Final = 2
"""401s answered in one attempt: one for a token that ended or was never there, one for a scope that the first hid."""
_MAX_KEPT_URLS: Final = 2048
_DOWN_S: Final = 10.0
"""A host that could not be reached is asked last for this long."""


@attrs.frozen
class Request:
    """What is asked of a host. `path`, with its query, is below the API's root; `url` replaces it for places the host named."""

    scope: Scope
    path: str = ""
    method: str = "GET"
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    accepted: Collection[int] = (200,)
    """Statuses to hand to the caller; every other one is raised."""
    keep_url_as: str = ""
    """The blob's digest, if the URL that a redirect leads to may serve later requests."""
    url: str = attrs.field(default="", repr=False)
    body: Body | None = attrs.field(default=None, repr=False)
    follows: bool = True


@attrs.define
class Exchanger:
    """Sends requests; remembers signed URLs and which hosts are down."""

    _connections: Connections
    _authorizer: Authorizer
    _kept: dict[tuple[str, str, str], SignedUrl] = attrs.field(factory=dict, repr=False)
    _down_until: dict[str, float] = attrs.field(factory=dict)

    def is_down(self, host: RegistryHost) -> bool:
        """Was the host unreachable a moment ago?"""
        return self._down_until.get(host.base_url, 0.0) > trio.current_time()

    async def send(self, host: RegistryHost, request: Request, *, attempts: int = 4) -> Answer:
        """Send and, while the host is busy or breaks off, send again. The caller must close the answer.

        Raises:
            SourceUnavailable: all attempts failed, or the host asked for a longer pause than is sensible to wait.
            SourceRefused: a final no.
        """
        attempt = 0
        while True:
            wait_s = backoff_s(attempt, random.random())
            try:
                answer = await self._attempt(host, request)
            except SourceUnavailable as exc:
                failure = exc
                self._forget_url(host, request)
                if attempt == 0:
                    wait_s = 0.0  # most often a kept connection that the server had closed
            except BadRedirect as exc:
                raise SourceRefused(f"{host.name} answered with {exc}", source=host.name) from exc
            else:
                if answer.status in request.accepted:
                    self._down_until.pop(host.base_url, None)
                    return answer
                failure = await self._busy(host, request, answer)
            attempt += 1
            wait_s = max(wait_s, failure.retry_after_s or 0.0)
            if attempt >= attempts or wait_s > MAX_WAIT_S:
                self._down_until[host.base_url] = trio.current_time() + _DOWN_S
                raise failure
            log.debug("registry_retry", host=host.name, attempt=attempt, wait_s=round(wait_s, 3), reason=str(failure))
            await trio.sleep(wait_s)

    async def _busy(self, host: RegistryHost, request: Request, answer: Answer) -> SourceUnavailable:
        """What to raise for a busy server, if it goes on; raises for any other status."""
        text = complaint(await answer.drain())
        message = f"{answer.host} answered {answer.status}{text} to {request.method} for {request.scope.repository}"
        if answer.status in RETRIED_STATUSES:
            retry_after = parse_retry_after(answer.headers.get("retry-after"), datetime.now(UTC))
            return SourceUnavailable(message, source=host.name, retry_after_s=retry_after)
        raise SourceRefused(message, source=host.name, status=answer.status)

    async def _attempt(self, host: RegistryHost, request: Request) -> Answer:
        logins, stale_urls = 0, 0
        fresh: str | None = None
        while True:
            kept = self._kept_url(host, request)
            if kept is not None:
                answer = await self._follow(host, request, kept.url, {}, 0)
                if answer.status in _URL_REFUSED:
                    log.debug("signed_url_refused", host=kept.host, status=answer.status)
                    await answer.drain()
                    self._forget_url(host, request)
                    continue
                return answer
            url = request.url or self._url(host, request)
            used = None
            headers: dict[str, str] = {}
            if origin_of(url) == origin_of(host.base_url):
                headers.update(host.headers)
                # a token just given is used even if its life is over at once
                used = fresh or await self._authorizer.header(host, request.scope)
                if used is not None:
                    headers["Authorization"] = used
            answer = await self._follow(host, request, url, headers, 0)
            is_own = origin_of(answer.url) == origin_of(host.base_url)
            if answer.status == 401 and is_own:
                challenges = parse_challenges(answer.headers.get_list("www-authenticate"))
                text = complaint(await answer.drain())
                logins += 1
                if logins > _MAX_LOGINS:
                    raise SourceRefused(
                        f"{host.name} refused to let us {request.scope.actions} {request.scope.repository}{text}",
                        source=host.name,
                        status=401,
                    )
                fresh = await self._authorizer.answer(host, request.scope, challenges, used)
                continue
            if not is_own and answer.status in {401, 403, 404, 410} and stale_urls == 0:
                # the registry itself may have handed out a kept URL that ended; it makes a new one
                stale_urls = 1
                await answer.drain()
                continue
            if not is_own and answer.status < 300 and request.keep_url_as:
                self._keep_url(host, request, answer.url)
            return answer

    async def _follow(self, host: RegistryHost, request: Request, url: str, own_headers: Mapping[str, str], hops: int) -> Answer:
        """Send to `url` and follow redirects; `own_headers` go to the host's origin alone."""
        while True:
            is_own = origin_of(url) == origin_of(host.base_url)
            answer = await self._connections.exchange(
                request.method,
                url,
                {**(own_headers if is_own else {}), **request.headers},
                tls=host.tls if is_own else host.tls.without_client(),
                connect_timeout_s=host.connect_timeout_s,
                body=request.body() if callable(request.body) else request.body,
            )
            if answer.status not in _REDIRECTS or not request.follows or answer.status in request.accepted:
                return answer
            await answer.drain()
            hops += 1
            if hops > MAX_REDIRECTS:
                raise BadRedirect(f"more than {MAX_REDIRECTS} redirects")
            url = next_hop(url, answer.headers.get("location"))

    def _url(self, host: RegistryHost, request: Request) -> str:
        query = f"{'&' if '?' in request.path else '?'}ns={host.registry}" if host.is_mirror else ""
        return f"{host.base_url}/{request.path}{query}"

    def _key(self, host: RegistryHost, request: Request) -> tuple[str, str, str]:
        return host.base_url, request.scope.repository, request.keep_url_as

    def _kept_url(self, host: RegistryHost, request: Request) -> SignedUrl | None:
        if not request.keep_url_as:
            return None
        kept = self._kept.get(self._key(host, request))
        if kept is not None and kept.expires_at <= time.time():
            del self._kept[self._key(host, request)]
            return None
        return kept

    def _keep_url(self, host: RegistryHost, request: Request, url: str) -> None:
        if len(self._kept) >= _MAX_KEPT_URLS:
            del self._kept[next(iter(self._kept))]
        self._kept[self._key(host, request)] = SignedUrl.of(url, time.time())

    def _forget_url(self, host: RegistryHost, request: Request) -> None:
        self._kept.pop(self._key(host, request), None)
