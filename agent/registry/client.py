"""The registry client: what the rest of the agent calls. It chooses hosts (mirrors first) and verifies what they give."""

import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

import attrs
import structlog
import trio

from agent.errors import SourceError, SourceLied, SourceRefused
from agent.formats.model import Digest, FormatError, digest_of
from agent.registry.auth import Authorizer, Scope
from agent.registry.blobs import BlobReader
from agent.registry.connections import Connections, StallLimits
from agent.registry.credentials import Credentials, CredentialStore
from agent.registry.exchange import Exchanger, Request
from agent.registry.hosts import RegistryHost, load_hosts
from agent.registry.manifests import (
    ACCEPT,
    MAX_MANIFEST_BYTES,
    Descriptor,
    ImageIndex,
    Manifest,
    Platform,
    ResolvedManifest,
    parse_manifest,
)
from agent.registry.push import Pusher
from agent.registry.ranges import WantedRanges, merge
from agent.registry.references import ImageReference
from agent.registry.referrers import ReferrerReader, fallback_tag, of_type, write_listing

log = structlog.get_logger()

_HOSTS_KEPT_S: Final = 10.0
"""hosts.toml is looked at again after this, so that a change needs no restart."""
_MAX_NESTING: Final = 3
"""Indexes within indexes; the specification allows any number, registries hold one."""
_MIRROR_ATTEMPTS: Final = 2
_OWN_ATTEMPTS: Final = 4


@attrs.define
class RegistryClient:
    """See the module's text; made by `open_registry_client`."""

    _exchanger: Exchanger
    _blobs: BlobReader
    _pusher: Pusher
    _referrers: ReferrerReader
    _credentials: CredentialStore = attrs.field(repr=False)
    _platform: Platform
    _hosts_dir: Path | None
    _insecure: frozenset[str]
    _hosts: dict[str, tuple[float, tuple[RegistryHost, ...]]] = attrs.field(factory=dict, repr=False)
    _complained: set[str] = attrs.field(factory=set, repr=False)
    _disk: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(2), repr=False)

    def add_credentials(self, host: str, username: str, password: str = "", *, identity_token: str = "") -> None:
        """Use these for a registry from now on, before any from a file or helper."""
        self._credentials.add(host, Credentials(username, password, identity_token))

    async def resolve(self, ref: ImageReference, platform: Platform | None = None) -> ResolvedManifest:
        """The manifest of an image for a platform (this machine's, unless named), through an image index if there is one.

        Raises:
            SourceError: no host gave it.
            FormatError: it is not a manifest, or has nothing for the platform.
        """
        digest, raw, document = await self._manifest(ref.registry, ref.repository, ref.locator, ref.digest)
        index: tuple[Digest, bytes, str] | None = None
        for _ in range(_MAX_NESTING):
            if isinstance(document, Manifest):
                break
            index = index or (digest, raw, document.media_type)
            chosen = document.choose(platform or self._platform)
            digest, raw, document = await self._manifest(
                ref.registry, ref.repository, chosen.digest, chosen.digest, chosen.media_type
            )
        if not isinstance(document, Manifest):
            raise FormatError(f"{ref}: more than {_MAX_NESTING} image indexes within one another")
        return ResolvedManifest(
            digest, document.media_type, raw, document.config, document.layers, *(index or (None, None, None))
        )

    async def _manifest(
        self, registry: str, repository: str, locator: str, expected: Digest | None, media_type: str = ""
    ) -> tuple[Digest, bytes, Manifest | ImageIndex]:
        hosts = await self._serving(registry, "pull" if expected else "resolve")
        failure: SourceError | FormatError | None = None
        for host, attempts in hosts:
            try:
                return await self._manifest_from(host, repository, locator, expected, media_type, attempts)
            except (SourceError, FormatError) as exc:
                failure = _weightier(failure, host, exc)
        raise failure or SourceRefused(f"no host may resolve images of {registry}; see its hosts.toml", source=registry)

    async def _manifest_from(
        self, host: RegistryHost, repository: str, locator: str, expected: Digest | None, media_type: str, attempts: int
    ) -> tuple[Digest, bytes, Manifest | ImageIndex]:
        request = Request(Scope(repository), f"{repository}/manifests/{locator}", headers={"Accept": ACCEPT})
        answer = await self._exchanger.send(host, request, attempts=attempts)
        try:
            raw = await answer.read(MAX_MANIFEST_BYTES)
        finally:
            await answer.aclose()
        digest = digest_of(raw)
        promised = expected or answer.headers.get("docker-content-digest")
        if promised is not None and promised.startswith("sha256:") and promised != digest:
            raise SourceLied(f"{host.name} sent a manifest with digest {digest} as {promised[:100]}", source=host.name)
        return digest, raw, parse_manifest(raw, answer.headers.get("content-type", "") or media_type)

    async def fetch_manifest(self, ref: ImageReference) -> tuple[Digest, bytes, Manifest | ImageIndex]:
        """What the reference names itself, be it an image index: its digest, its bytes, verified, and what they say.

        Raises:
            SourceError: no host gave it.
            FormatError: it is no manifest.
        """
        return await self._manifest(ref.registry, ref.repository, ref.locator, ref.digest)

    async def referrers(self, ref: ImageReference, subject: Digest, artifact_type: str) -> bytes:
        """An OCI image index of the manifests of a type that refer to a manifest of the repository. Nobody vouches for it.

        Raises:
            SourceError: no host told.
            FormatError: what was told is no image index.
        """
        failure: SourceError | FormatError | None = None
        is_told = False
        for host, attempts in await self._serving(ref.registry, "referrers"):
            try:
                listed = await self._referrers_at(host, ref.repository, subject, artifact_type, attempts)
            except (SourceError, FormatError) as exc:
                failure = _weightier(failure, host, exc)
                continue
            if listed or not host.is_mirror:
                return write_listing(listed)
            is_told = True  # but a mirror need not have what the registry has
        if failure is None and is_told:
            return write_listing([])
        raise failure or SourceRefused(
            f"no host may list what refers to images of {ref.registry}; see its hosts.toml", source=ref.registry
        )

    async def _referrers_at(
        self, host: RegistryHost, repository: str, subject: Digest, artifact_type: str, attempts: int
    ) -> list[Descriptor]:
        listed = await self._referrers.read(host, repository, subject, artifact_type, attempts)
        if listed is not None or "resolve" not in host.capabilities:
            return listed or []
        try:
            _, _, document = await self._manifest_from(host, repository, fallback_tag(subject), None, "", attempts)
        except SourceRefused as exc:
            if exc.status != 404:
                raise
            return []
        return of_type(document, artifact_type)

    async def fetch_small(self, ref: ImageReference, descriptor: Descriptor, max_bytes: int) -> bytes:
        """A blob whole and verified: a config, a TOC.

        Raises:
            SourceError: no host gave it.
            FormatError: it is larger than `max_bytes`.
        """
        size = descriptor.size
        if not 0 <= size <= max_bytes:
            raise FormatError(f"blob {descriptor.digest} has {size} bytes; at most {max_bytes} are read here")
        data = bytearray(size)
        failure: SourceError | None = None
        for host, attempts in await self._serving(ref.registry, "pull"):
            try:
                wanted = WantedRanges(merge([(0, size)], size))
                async with aclosing(self._blobs.read(host, ref.repository, descriptor.digest, size, wanted, attempts)) as stream:
                    async for offset, block in stream:
                        data[offset : offset + len(block)] = block
                if size > 256 << 10:
                    found = await trio.to_thread.run_sync(digest_of, data, limiter=self._disk)
                else:
                    found = digest_of(data)
                if found != descriptor.digest:
                    raise SourceLied(f"{host.name} sent bytes with digest {found} as {descriptor.digest}", source=host.name)
                return bytes(data)
            except SourceError as exc:
                failure = _weightier(failure, host, exc)
        raise failure or SourceRefused(f"no host may serve blobs of {ref.registry}; see its hosts.toml", source=ref.registry)

    def fetch_ranges(
        self, ref: ImageReference, digest: Digest, blob_size: int, ranges: Sequence[tuple[int, int]]
    ) -> AbstractAsyncContextManager[AsyncIterator[tuple[int, bytes]]]:
        """Stream half-open ranges of a blob as (blob offset, at most 64 KiB), each byte once, in the order in which they come.
        The bytes are not verified.

        Raises:
            ValueError: a range is not inside the blob.
            SourceError: while streaming; no host could go on.
        """
        wanted = WantedRanges(merge(ranges, blob_size))
        return aclosing(self._ranges(ref, digest, blob_size, wanted))

    async def _ranges(
        self, ref: ImageReference, digest: Digest, blob_size: int, wanted: WantedRanges
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        if not wanted:
            await trio.lowlevel.checkpoint()
            return
        hosts = await self._serving(ref.registry, "pull")
        failure: SourceError | None = None
        for host, attempts in hosts:
            try:
                async with aclosing(self._blobs.read(host, ref.repository, digest, blob_size, wanted, attempts)) as stream:
                    async for item in stream:
                        yield item
                return
            except SourceError as exc:
                failure = _weightier(failure, host, exc)
        raise failure or SourceRefused(f"no host may serve blobs of {ref.registry}; see its hosts.toml", source=ref.registry)

    async def push_blob(
        self, ref: ImageReference, source: Path | bytes, digest: Digest | None = None, *, chunk_bytes: int | None = None
    ) -> bool:
        """Upload a blob from a file or memory unless the registry has it; False if it had.

        Raises:
            SourceError: the registry did not take it.
        """
        if digest is None:
            digest = (
                digest_of(source)
                if isinstance(source, bytes)
                else await trio.to_thread.run_sync(_digest_file, source, limiter=self._disk)
            )
        return await self._pusher.push_blob(await self._own_host(ref.registry), ref.repository, source, digest, chunk_bytes)

    async def has_blob(self, ref: ImageReference, digest: Digest) -> bool:
        """Is the blob in the repository of the registry to which `push_blob` would upload it?

        Raises:
            SourceError: the registry did not tell.
        """
        return await self._pusher.has_blob(await self._own_host(ref.registry), ref.repository, digest)

    async def push_manifest(self, ref: ImageReference, raw: bytes, media_type: str) -> Digest:
        """Put a manifest or image index under the reference's tag, or under its digest if it has none; gives the digest.

        Raises:
            SourceError: the registry did not take it.
        """
        locator = ref.tag or digest_of(raw)
        return await self._pusher.push_manifest(await self._own_host(ref.registry), ref.repository, locator, raw, media_type)

    async def _own_host(self, registry: str) -> RegistryHost:
        able = [host for host, _ in await self._serving(registry, "push") if not host.is_mirror]
        if not able:
            raise SourceRefused(f"hosts.toml of {registry} does not let anybody push to it", source=registry)
        return able[-1]

    async def _serving(self, registry: str, capability: str) -> list[tuple[RegistryHost, int]]:
        """Hosts to try in this order, each with its number of attempts."""
        known = self._hosts.get(registry)
        if known is None or known[0] <= trio.current_time():
            hosts, trouble = await trio.to_thread.run_sync(
                load_hosts, self._hosts_dir, registry, self._insecure, limiter=self._disk
            )
            if trouble and trouble not in self._complained:
                self._complained.add(trouble)
                log.warning("hosts_file_passed_over", registry=registry, reason=trouble)
            known = self._hosts[registry] = trio.current_time() + _HOSTS_KEPT_S, hosts
        able = [host for host in known[1] if capability in host.capabilities]
        able.sort(key=self._exchanger.is_down)  # stable: the file's order, those that are down last
        last = len(able) - 1
        return [(host, _OWN_ATTEMPTS if at == last else _MIRROR_ATTEMPTS) for at, host in enumerate(able)]


@asynccontextmanager
async def open_registry_client(
    hosts_dir: Path | None = None,
    docker_config: Path | None = None,
    *,
    insecure: Collection[str] = (),
    platform: Platform | None = None,
    limits: StallLimits | None = None,
) -> AsyncIterator[RegistryClient]:
    """A client whose connections live as long as the block.

    Args:
        hosts_dir: containerd's `certs.d` with `hosts.toml` files.
        docker_config: a Docker config file with credentials; it need not exist.
        insecure: registries (host or host:port) reached over plain HTTP, besides loopback ones.
        platform: which image to take from an index; this machine's if None.
        limits: how long a server may be silent.
    """
    # their DEBUG lines hold Authorization headers and signed URLs
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    async with AsyncExitStack() as stack:
        connections = Connections(limits or StallLimits(), stack)
        credentials = CredentialStore(docker_config)
        exchanger = Exchanger(connections, Authorizer(connections, credentials))
        yield RegistryClient(
            exchanger,
            BlobReader(exchanger),
            Pusher(exchanger),
            ReferrerReader(exchanger),
            credentials,
            platform or Platform.of_this_machine(),
            hosts_dir,
            frozenset(insecure),
        )


_Failure = TypeVar("_Failure", bound=SourceError | FormatError)


def _weightier(known: _Failure | None, host: RegistryHost, failure: _Failure) -> _Failure:
    """Which failure to raise if all hosts fail: the registry's own says more than a mirror's."""
    if host.is_mirror:
        log.info("mirror_passed_over", mirror=host.name, registry=host.registry, reason=str(failure))
    return failure if known is None or not host.is_mirror else known


def _digest_file(path: Path) -> Digest:
    with path.open("rb") as file:
        return Digest("sha256:" + hashlib.file_digest(file, "sha256").hexdigest())
