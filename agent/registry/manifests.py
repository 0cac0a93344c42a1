"""Manifests and image indexes (OCI image spec 1.1, Docker manifest v2 schema 2): parsed, bounded, one platform chosen."""

import json
import platform as machine_facts
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Self

import attrs

from agent.formats.model import Digest, FormatError, parse_digest

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"

MANIFEST_TYPES: Final = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES: Final = (OCI_INDEX, DOCKER_LIST)
ACCEPT: Final = ", ".join([*MANIFEST_TYPES, *INDEX_TYPES])

MAX_MANIFEST_BYTES: Final = 4 << 20
"""Registries must take manifests of this size (distribution spec 1.1, "Pushing manifests") and need not take larger ones."""

_MAX_DESCRIPTORS: Final = 4096
"""Layers or platforms in one manifest: far above overlayfs' 500 lower directories and any index seen."""

_ARCHITECTURES: Final = {
    "x86_64": ("amd64", None),
    "amd64": ("amd64", None),
    "i386": ("386", None),
    "i686": ("386", None),
    "aarch64": ("arm64", None),
    "arm64": ("arm64", None),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "ppc64le": ("ppc64le", None),
    "s390x": ("s390x", None),
    "riscv64": ("riscv64", None),
}
_IMPLIED_VARIANT: Final = {"arm64": "v8", "amd64": "v1", "arm": "v7"}
"""The variant that a missing one means (containerd platforms.Normalize)."""


@attrs.frozen
class Platform:
    """Operating system and processor that an image is for, in Go's words."""

    os: str = "linux"
    architecture: str = "amd64"
    variant: str | None = None

    @classmethod
    def of_this_machine(cls) -> Self:
        """Linux on this machine's processor."""
        architecture, variant = _ARCHITECTURES.get(machine_facts.machine(), (machine_facts.machine(), None))
        return cls("linux", architecture, variant)

    def preference(self, offered: "Platform") -> int:
        """How well an image for `offered` suits this platform: 0 best, -1 not at all."""
        if (self.os, self.architecture) != (offered.os, offered.architecture):
            return -1
        implied = _IMPLIED_VARIANT.get(self.architecture)
        wanted, got = self.variant or implied, offered.variant or implied
        if wanted == got:
            return 0
        # an older 32-bit ARM or x86-64 level runs on a newer one, not the other way round
        if self.architecture in {"arm", "amd64"} and wanted and got and got < wanted:
            return ord(wanted[-1]) - ord(got[-1])
        return -1

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


@attrs.frozen
class Descriptor:
    """What a manifest says of one blob or manifest."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = attrs.field(default=_NOTHING, hash=False)
    urls: tuple[str, ...] = ()
    platform: Platform | None = None
    artifact_type: str = ""

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read a descriptor object.

        Raises:
            FormatError: a field is missing or of the wrong type.
        """
        fields = _object(value, "descriptor")
        size = fields.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 62:
            raise FormatError(f"descriptor has no valid size: {size!r:.50}")
        digest, media_type = fields.get("digest"), fields.get("mediaType", "")
        if not isinstance(digest, str) or not isinstance(media_type, str):
            raise FormatError("descriptor has no digest or media type")
        annotations = _object(fields.get("annotations") or {}, "annotations")
        urls = fields.get("urls") or []
        if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
            raise FormatError("descriptor has bad urls")
        artifact_type = fields.get("artifactType")
        return cls(
            media_type,
            parse_digest(digest),
            size,
            {key: text for key, text in annotations.items() if isinstance(text, str)},
            tuple(urls),
            _platform(fields.get("platform")),
            artifact_type if isinstance(artifact_type, str) else "",
        )


@attrs.frozen
class Manifest:
    """One image: its config and its layers, bottom first."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]


@attrs.frozen
class ImageIndex:
    """Manifests of one image, one for each platform."""

    media_type: str
    manifests: tuple[Descriptor, ...]

    def choose(self, wanted: Platform) -> Descriptor:
        """The entry that suits the platform best; of equals the first. An entry without platform suits all, badly.

        Raises:
            FormatError: there is none; the text lists what there is.
        """
        best: tuple[int, Descriptor] | None = None
        for entry in self.manifests:
            rank = 1000 if entry.platform is None else wanted.preference(entry.platform)
            if rank >= 0 and (best is None or rank < best[0]):
                best = rank, entry
        if best is None:
            offered = ", ".join(sorted({str(entry.platform) for entry in self.manifests})[:20]) or "nothing"
            raise FormatError(f"the image index has no image for {wanted}; it has {offered}")
        return best[1]


def parse_manifest(raw: bytes, content_type: str = "") -> Manifest | ImageIndex:
    """Read a manifest or image index. `content_type` is the registry's word, used if the document does not say itself.

    Raises:
        FormatError: not JSON, an unknown kind, both kinds at once (CVE-2021-41190), or a bad descriptor.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        raise FormatError(f"manifest of {len(raw)} bytes; the limit is {MAX_MANIFEST_BYTES}")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise FormatError("manifest is not JSON") from exc
    fields = _object(document, "manifest")
    media_type = fields.get("mediaType") or content_type.partition(";")[0].strip().lower()
    if not isinstance(media_type, str):
        raise FormatError("manifest's mediaType is not text")
    if fields.get("schemaVersion") == 1:
        raise FormatError("Docker manifest schema 1 is not supported; push the image again with a current tool")
    if "manifests" in fields and ("layers" in fields or "config" in fields):
        raise FormatError("manifest claims to be an image and an index at once")
    if "manifests" in fields:
        if media_type not in INDEX_TYPES:
            media_type = OCI_INDEX
        return ImageIndex(media_type, _descriptors(fields["manifests"], "manifests"))
    if "layers" not in fields or "config" not in fields:
        raise FormatError(f"neither an image manifest nor an image index: {media_type[:100] or 'no media type'}")
    if media_type not in MANIFEST_TYPES:
        media_type = OCI_MANIFEST
    annotations = _object(fields.get("annotations") or {}, "annotations")
    return Manifest(
        media_type,
        Descriptor.from_json(fields["config"]),
        _descriptors(fields["layers"], "layers"),
        {key: text for key, text in annotations.items() if isinstance(text, str)},
    )


@attrs.frozen
class ResolvedManifest:
    """An image manifest for one platform, its bytes verified; `index_*` if an image index led to it."""

    digest: Digest
    media_type: str
    raw: bytes = attrs.field(repr=False)
    config: Descriptor = attrs.field(repr=False)
    layers: tuple[Descriptor, ...] = attrs.field(repr=False)
    index_digest: Digest | None = None
    index_raw: bytes | None = attrs.field(default=None, repr=False)
    index_media_type: str | None = None


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object")
    return value


def _descriptors(value: object, what: str) -> tuple[Descriptor, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise FormatError(f"{what} is not a list")
    if len(value) > _MAX_DESCRIPTORS:
        raise FormatError(f"{len(value)} {what}; the limit is {_MAX_DESCRIPTORS}")
    return tuple(Descriptor.from_json(item) for item in value)


def _platform(value: object) -> Platform | None:
    if value is None:
        return None
    fields = _object(value, "platform")
    os, architecture, variant = fields.get("os"), fields.get("architecture"), fields.get("variant")
    if not isinstance(os, str) or not isinstance(architecture, str):
        raise FormatError("platform has no os or architecture")
    return Platform(os, architecture, variant if isinstance(variant, str) and variant else None)
