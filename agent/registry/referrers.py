"""What refers to a manifest (OCI distribution spec 1.1, "Listing Referrers" and "Referrers Tag Schema").

Nobody vouches for such a list: whoever may push to the repository adds to it. A registry without the API has it, if at all, as an
image index under a tag that clients write.
"""

import json
import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import quote

import attrs

from agent.errors import SourceRefused
from agent.formats.model import Digest, FormatError
from agent.registry.auth import Scope
from agent.registry.exchange import Exchanger, Request
from agent.registry.hosts import RegistryHost
from agent.registry.manifests import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_MANIFEST_BYTES,
    OCI_INDEX,
    Descriptor,
    ImageIndex,
    Manifest,
    parse_manifest,
)
from agent.registry.redirects import BadRedirect, next_hop

_MAX_PAGES: Final = 8
"""More are not asked for; registries put a hundred or more descriptors on a page."""
_MAX_LISTED: Final = 256
"""Descriptors of one artifact type that are kept: an image has a handful."""

_LINK = re.compile(r"<([^<>]*)>([^<,]*)")
_IS_NEXT = re.compile(r';\s*rel\s*=\s*"?next"?\s*(?:;|\Z)', re.IGNORECASE)


def fallback_tag(subject: Digest) -> str:
    """The tag under which clients list what refers to a manifest, where the registry does not."""
    return subject.replace(":", "-")


def next_page(header: str) -> str | None:
    """Where a `Link` header says that the list goes on (RFC 8288), as it is written there; None if the list ends."""
    for target, parameters in _LINK.findall(header):
        if _IS_NEXT.search(parameters):
            return str(target)
    return None


def of_type(document: Manifest | ImageIndex, artifact_type: str) -> list[Descriptor]:
    """The manifests of an artifact type in a list. A registry may filter, and says whether it did; that is not relied on.

    Raises:
        FormatError: it is no list.
    """
    if not isinstance(document, ImageIndex):
        raise FormatError("a list of referrers that is no image index")
    kinds = {*MANIFEST_TYPES, *INDEX_TYPES}
    return [entry for entry in document.manifests if entry.artifact_type == artifact_type and entry.media_type in kinds]


def write_listing(listed: Sequence[Descriptor]) -> bytes:
    """An OCI image index of these manifests, without what nobody here asks for."""
    manifests = [
        {"mediaType": entry.media_type, "digest": entry.digest, "size": entry.size, "artifactType": entry.artifact_type}
        for entry in listed[:_MAX_LISTED]
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).encode()


@attrs.frozen
class ReferrerReader:
    """Asks one host for its list, page by page."""

    _exchanger: Exchanger

    async def read(
        self, host: RegistryHost, repository: str, subject: Digest, artifact_type: str, attempts: int
    ) -> list[Descriptor] | None:
        """The manifests of the type that refer to `subject`, not verified; None if the host does not know the API.

        All pages together may have as many bytes as one manifest.

        Raises:
            SourceError: the host did not tell, or too much.
            FormatError: what it told is no image index.
        """
        path = f"{repository}/referrers/{subject}?artifactType={quote(artifact_type, safe='')}"
        request = Request(Scope(repository), path, headers={"Accept": OCI_INDEX}, accepted=(200, 404))
        found: list[Descriptor] = []
        left = MAX_MANIFEST_BYTES
        for _ in range(_MAX_PAGES):
            answer = await self._exchanger.send(host, request, attempts=attempts)
            try:
                if answer.status == 404:
                    await answer.drain()
                    return None
                raw = await answer.read(left)
            finally:
                await answer.aclose()
            left -= len(raw)
            found += of_type(parse_manifest(raw, OCI_INDEX), artifact_type)
            following = next_page(answer.headers.get("link", ""))
            if following is None or len(found) >= _MAX_LISTED:
                break
            try:
                url = next_hop(answer.url, following)
            except BadRedirect as exc:
                raise SourceRefused(f"{host.name} names no usable next page of referrers: {exc}", source=host.name) from exc
            request = attrs.evolve(request, url=url, accepted=(200,))
        return found
