"""Image references: `registry/repository:tag@digest`, with Docker's defaults.

Grammar of github.com/distribution/reference: the part before the first "/" is a registry if it has a "." or a ":" in it, is
`localhost`, or has an upper-case letter; otherwise the registry is `docker.io`, and a name without "/" lives in `library/`.
"""

import re
from typing import Final, Self

import attrs

from agent.formats.model import Digest, FormatError, parse_digest

DOCKER_HUB: Final = "docker.io"
_DOCKER_HUB_ALIASES: Final = frozenset({DOCKER_HUB, "index.docker.io", "registry-1.docker.io"})

_LABEL = r"(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?\Z")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_MAX_NAME: Final = 255
"""Of the whole name with its registry; the limit of the reference grammar."""


@attrs.frozen
class ImageReference:
    """Where an image is: a registry's name (with port), a repository in it, and a tag, a digest or both."""

    registry: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a reference as a user or containerd writes it; without tag and digest the tag is `latest`.

        Raises:
            FormatError: it is not a reference; the text says what is wrong with it.
        """
        name, at, digest_text = text.partition("@")
        digest = parse_digest(digest_text) if at else None
        slash, colon = name.rfind("/"), name.rfind(":")
        tag = None
        if colon > slash and (slash >= 0 or name.count(":") == 1):
            name, tag = name[:colon], name[colon + 1 :]
            if not _TAG.match(tag):
                raise FormatError(f"not an image reference: {text[:300]!r} has a bad tag")
        if tag is None and digest is None:
            tag = "latest"
        first, has_slash, rest = name.partition("/")
        if has_slash and (first == "localhost" or "." in first or ":" in first or first != first.lower()):
            registry, repository = first, rest
        else:
            registry, repository = DOCKER_HUB, name
        if registry in _DOCKER_HUB_ALIASES:
            registry = DOCKER_HUB
            if "/" not in repository:
                repository = f"library/{repository}"
        if len(registry) + 1 + len(repository) > _MAX_NAME:
            raise FormatError(f"not an image reference: the name is longer than {_MAX_NAME} characters")
        if not _REGISTRY.match(registry) or not _valid_port(registry):
            raise FormatError(f"not an image reference: {text[:300]!r} has a bad registry name")
        if not all(_COMPONENT.match(part) for part in repository.split("/")):
            raise FormatError(f"not an image reference: {text[:300]!r} has a bad repository name (lower case only)")
        return cls(registry, repository, tag, digest)

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    @property
    def locator(self) -> str:
        """What stands for the manifest in a registry's URL: the digest if there is one, else the tag."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        return self.name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def _valid_port(registry: str) -> bool:
    port = re.search(r":(\d{1,5})\Z", registry)
    return port is None or 0 < int(port[1]) < 65536


def is_docker_hub(host: str) -> bool:
    """Is `host` one of the names of Docker Hub?"""
    return host in _DOCKER_HUB_ALIASES
