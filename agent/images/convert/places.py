"""Where images are converted from and to, and how a user writes that."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import attrs

from agent.errors import SettingsError, ShoalError
from agent.formats.model import Digest, FormatError, parse_digest
from agent.registry import ImageReference

_TAG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}\Z")

Tick = Callable[[int], None]
"""Told how many bytes were moved since the last call; may be called in any thread."""


class PlaceError(ShoalError):
    """A place lacks what it should have, or cannot take what it is given."""


@attrs.frozen
class Document:
    """A manifest or an image index, its bytes verified."""

    digest: Digest
    media_type: str
    raw: bytes = attrs.field(repr=False)


class Source(Protocol):
    """Gives an image. Only `read_*` verify; what `fetch` gives is hashed by its caller, who reads it anyway."""

    async def read_root(self) -> Document:
        """The document that the place's name stands for."""

    async def read_document(self, digest: Digest, size: int, media_type: str) -> Document | None:
        """Another document, by its descriptor; None where the place holds only part of the image and not this."""

    async def read_small(self, digest: Digest, size: int, max_bytes: int) -> bytes:
        """A blob whole and verified."""

    async def read_tail(self, digest: Digest, size: int, count: int) -> bytes:
        """The last `count` bytes of a blob, or all if it has fewer; not verified."""

    async def fetch(self, digest: Digest, size: int, into: Path, tick: Tick) -> Path:
        """A file with the blob: `into`, or one of the place's own, which must not be changed."""


class Target(Protocol):
    """Takes an image. Blobs come before the documents that name them, the root last, so that half an image is never seen."""

    async def has_blob(self, digest: Digest) -> bool:
        """Is it there already?"""

    async def put_blob(self, digest: Digest, size: int, data: Path | bytes) -> None:
        """Take a blob that is not there."""

    async def put_document(self, document: Document) -> None:
        """Take a manifest or index that is not the root."""

    async def put_root(self, document: Document) -> None:
        """Take the root and give it the place's name."""


@attrs.frozen
class LayoutName:
    """`oci:DIRECTORY[:TAG]` or `oci:DIRECTORY@DIGEST`."""

    folder: Path
    tag: str | None = None
    digest: Digest | None = None

    def __str__(self) -> str:
        suffix = f":{self.tag}" if self.tag else f"@{self.digest}" if self.digest else ""
        return f"oci:{self.folder}{suffix}"


@attrs.frozen
class ContainerdName:
    """`containerd:NAME`: an image record."""

    name: str

    def __str__(self) -> str:
        return f"containerd:{self.name}"


PlaceName = LayoutName | ContainerdName | ImageReference


def parse_place(text: str, *, is_target: bool) -> PlaceName:
    """Read SOURCE or TARGET as a user writes it.

    Raises:
        SettingsError: it is no place.
    """
    kind, colon, rest = text.partition(":")
    try:
        if colon and kind == "oci":
            name: PlaceName = _layout(rest)
        elif colon and kind == "containerd":
            # Where it is written to it gets the full name, which is how containerd's other clients look for it.
            name = ContainerdName(str(ImageReference.parse(rest)) if is_target else rest)
        else:
            name = ImageReference.parse(text.removeprefix("docker://"))
    except FormatError as exc:
        raise SettingsError(f"{text!r}: {exc}") from exc
    if not rest and kind in ("oci", "containerd"):
        raise SettingsError(f"{text!r} says no {'directory' if kind == 'oci' else 'image'}; write {kind}:NAME")
    is_pinned = isinstance(name, LayoutName | ImageReference) and name.digest is not None
    if is_target and (is_pinned or (isinstance(name, ContainerdName) and "@" in name.name)):
        raise SettingsError(f"{text!r} names a digest; the result has another one, so a target needs a tag")
    return name


def _layout(text: str) -> LayoutName:
    folder, at, digest = text.rpartition("@")
    if at and digest.startswith("sha256:"):
        return LayoutName(Path(folder), digest=parse_digest(digest))
    folder, colon, tag = text.rpartition(":")
    if colon and "/" not in tag:
        if not _TAG.match(tag):
            raise FormatError(f"{tag!r} is no tag")
        return LayoutName(Path(folder), tag)
    return LayoutName(Path(text))
