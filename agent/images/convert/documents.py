"""Manifests, indexes and configs as JSON objects: what they are, and how they change when layers do.

They are rewritten as they came, unknown keys and the order of keys included, because they carry more than Shoal knows.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from enum import Enum, auto
from typing import Any, Final

import attrs

from agent.formats.model import Digest, FormatError, digest_of, parse_digest
from agent.registry.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MAX_MANIFEST_BYTES,
    OCI_INDEX,
    OCI_MANIFEST,
    Manifest,
    Platform,
    parse_manifest,
)

Json = dict[str, Any]

OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar"
NYDUS_BLOB: Final = "application/vnd.oci.image.layer.nydus.blob.v1"
NYDUS_ARTIFACT: Final = "application/vnd.nydus.image.manifest.v1+json"
NYDUS_BOOTSTRAP: Final = "containerd.io/snapshot/nydus-bootstrap"

MAX_CONFIG_BYTES: Final = 8 << 20
"""Twice what registries take as a manifest; configs of the field are below 100 KiB."""

_FOREIGN: Final = ("nondistributable", "diff.tar.foreign", "rootfs.foreign")
_LAYER_TYPES: Final = {
    *(OCI_LAYER + suffix for suffix in ("", "+gzip", "+zstd")),
    *(DOCKER_LAYER + suffix for suffix in ("", ".gzip", ".zstd")),
}
_TO_OCI: Final = {DOCKER_MANIFEST: OCI_MANIFEST, DOCKER_LIST: OCI_INDEX, DOCKER_CONFIG: OCI_CONFIG}
_STALE: Final = (
    "containerd.io/snapshot/stargz/",
    "containerd.io/snapshot/nydus-",
    "io.containers.estargz.",
    "io.containers.zstd-chunked.",
    "io.github.containers.zstd-chunked.",
    "com.amazon.soci.",
)
"""Annotations by formats, true of the bytes as they were."""


class Kind(Enum):
    """What a manifest is to a converter."""

    IMAGE = auto()
    NYDUS = auto()
    ATTESTATION = auto()
    SOCI = auto()
    ARTIFACT = auto()


class LayerKind(Enum):
    """What a layer is to a converter."""

    TAR = auto()
    FOREIGN = auto()
    NYDUS = auto()
    UNKNOWN = auto()


@attrs.frozen
class NewLayer:
    """A layer of the result: its descriptor, and its diff ID."""

    descriptor: Json
    diff_id: str


def parse_json(raw: bytes, what: str) -> Json:
    """A JSON object.

    Raises:
        FormatError: it is none.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"{what} is not JSON") from exc
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object")
    return value


def dump_json(value: Json) -> bytes:
    """The bytes of a document; the same for the same value."""
    return json.dumps(value, separators=(",", ":")).encode()


def descriptor_of(media_type: str, raw: bytes) -> Json:
    """A descriptor of bytes that are here."""
    return {"mediaType": media_type, "digest": digest_of(raw), "size": len(raw)}


def parse_image(raw: bytes, media_type: str) -> tuple[Manifest, Json]:
    """A manifest both ways: checked, and whole.

    Raises:
        FormatError: it is no image manifest.
    """
    parsed = parse_manifest(raw, media_type)
    if not isinstance(parsed, Manifest):
        raise FormatError("an image index where an image manifest was expected")
    return parsed, parse_json(raw, "manifest")


def kind_of(manifest: Manifest, raw: Json, entry: Json | None) -> Kind:
    """What a manifest is; `entry` is its descriptor in an index."""
    entry = entry or {}
    artifact = str(raw.get("artifactType") or entry.get("artifactType") or "")
    annotations = entry.get("annotations") or {}
    if "vnd.docker.reference.type" in annotations or _os_of(entry) == "unknown":
        return Kind.ATTESTATION
    if artifact.startswith("application/vnd.amazon.soci.") or manifest.config.media_type.startswith(
        "application/vnd.amazon.soci."
    ):
        return Kind.SOCI
    is_nydus = any(layer.media_type == NYDUS_BLOB or NYDUS_BOOTSTRAP in layer.annotations for layer in manifest.layers)
    if is_nydus or artifact == NYDUS_ARTIFACT:
        return Kind.NYDUS
    if artifact or manifest.config.media_type not in (OCI_CONFIG, DOCKER_CONFIG):
        return Kind.ARTIFACT
    return Kind.IMAGE


def _os_of(entry: Json) -> object:
    platform = entry.get("platform")
    return platform.get("os") if isinstance(platform, dict) else None


def layer_kind(media_type: str) -> LayerKind:
    """By media type; what compression a tar has is seen in its bytes."""
    if any(word in media_type for word in _FOREIGN):
        return LayerKind.FOREIGN
    if media_type == NYDUS_BLOB:
        return LayerKind.NYDUS
    return LayerKind.TAR if media_type in _LAYER_TYPES else LayerKind.UNKNOWN


def is_docker(media_type: str) -> bool:
    """Is it one of Docker's layer types?"""
    return media_type.startswith(DOCKER_LAYER)


def to_oci(media_type: str) -> str:
    """The OCI type that says the same as Docker's."""
    if media_type.startswith("application/vnd.docker.image.rootfs.foreign"):
        suffix = "+gzip" if media_type.endswith("gzip") else ""
        return f"application/vnd.oci.image.layer.nondistributable.v1.tar{suffix}"
    if media_type.startswith(DOCKER_LAYER):
        return OCI_LAYER + media_type.removeprefix(DOCKER_LAYER).replace(".", "+")
    return _TO_OCI.get(media_type, media_type)


def platform_of(config: Json) -> Platform:
    """The platform that an image config names."""
    os, architecture, variant = config.get("os"), config.get("architecture"), config.get("variant")
    return Platform(
        os if isinstance(os, str) and os else "linux",
        architecture if isinstance(architecture, str) and architecture else "amd64",
        variant if isinstance(variant, str) and variant else None,
    )


def is_wanted(platform: Platform, wanted: Sequence[Platform]) -> bool:
    """Is this exactly one of the platforms asked for? (A variant that is not named means the usual one.)"""
    return not wanted or any(one.preference(platform) == 0 for one in wanted)


def diff_ids_of(config: Json, count: int) -> tuple[Digest, ...]:
    """The diff IDs of `count` layers.

    Raises:
        FormatError: the config does not have them.
    """
    rootfs = config.get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or len(found) != count:
        raise FormatError(f"the config names {len(found) if isinstance(found, list) else 'no'} diff IDs for {count} layers")
    return tuple(parse_digest(str(one)) for one in found)


def converted_descriptor(old: Json, media_type: str, digest: Digest, size: int, annotations: Mapping[str, str]) -> Json:
    """The descriptor of what a layer has become."""
    new = {key: value for key, value in old.items() if key not in ("data", "urls", "annotations")}
    new |= {"mediaType": media_type, "digest": digest, "size": size}
    old_annotations = old.get("annotations")
    kept = _without_stale(old_annotations if isinstance(old_annotations, dict) else {})
    kept |= annotations
    return new | ({"annotations": kept} if kept else {})


def _without_stale(annotations: Mapping[str, Any]) -> Json:
    return {key: value for key, value in annotations.items() if not key.startswith(_STALE)}


def rewrite_config(config: Json, diff_ids: Sequence[str], dropped: Collection[int] = (), added: Json | None = None) -> bytes:
    """The config with other diff IDs. Its history stays: the steps that made the layers `dropped` (counted from the lowest) have
    no layer from now on, and `added` is one step more."""
    new = config | {"rootfs": {**config["rootfs"], "diff_ids": list(diff_ids)}}
    history = config.get("history")
    if isinstance(history, list) and (dropped or added):
        steps, layer = [], 0
        for step in history:
            if isinstance(step, dict) and not step.get("empty_layer"):
                steps.append(step | {"empty_layer": True} if layer in dropped else step)
                layer += 1
            else:
                steps.append(step)
        new["history"] = steps + ([added] if added else [])
    return dump_json(new)


def rewrite_manifest(
    manifest: Json, media_type: str, config: Json, layers: Sequence[NewLayer], annotations: Mapping[str, str]
) -> bytes:
    """The manifest with another config and other layers.

    Raises:
        FormatError: it became too large for registries.
    """
    new = manifest | {"mediaType": media_type, "config": config, "layers": [layer.descriptor for layer in layers]}
    old = manifest.get("annotations")
    kept = _without_stale(old if isinstance(old, dict) else {}) | dict(annotations)
    new.pop("annotations", None)
    raw = dump_json(new | ({"annotations": kept} if kept else {}))
    if len(raw) > MAX_MANIFEST_BYTES:
        raise FormatError(f"the new manifest has {len(raw)} bytes; registries take {MAX_MANIFEST_BYTES}")
    return raw


def rewrite_index(index: Json, media_type: str, entries: Sequence[Json]) -> bytes:
    """The index with other entries."""
    return dump_json(index | {"mediaType": media_type, "manifests": list(entries)})
