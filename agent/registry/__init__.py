"""The OCI distribution client: resolve images, stream ranges of blobs, push. See docs of `RegistryClient`."""

from agent.registry.client import RegistryClient, open_registry_client
from agent.registry.connections import StallLimits
from agent.registry.credentials import Credentials
from agent.registry.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    ImageIndex,
    Manifest,
    Platform,
    ResolvedManifest,
    parse_manifest,
)
from agent.registry.references import ImageReference

__all__ = [
    "DOCKER_LIST",
    "DOCKER_MANIFEST",
    "OCI_INDEX",
    "OCI_MANIFEST",
    "Credentials",
    "Descriptor",
    "ImageIndex",
    "ImageReference",
    "Manifest",
    "Platform",
    "RegistryClient",
    "ResolvedManifest",
    "StallLimits",
    "open_registry_client",
    "parse_manifest",
]
