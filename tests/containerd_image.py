"""A small image for the containerd tests: three layers, one static program, in a registry and as directories."""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import httpx
import trio

from agent.registry import Descriptor, ImageReference, ResolvedManifest
from agent.registry.manifests import parse_manifest
from tests.containerd_service import DirectoryLayers

TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"

PROGRAM = r"""
#include <stdio.h>
int main(int argc, char **argv) {
    for (int at = 1; at < argc; at++) {
        FILE *file = fopen(argv[at], "r");
        if (!file) { perror(argv[at]); return 1; }
        for (int byte; (byte = getc(file)) != EOF;) putchar(byte);
    }
    FILE *own = fopen("/written", "w");
    return own && fputs("mine\n", own) >= 0 && fclose(own) == 0 ? 0 : 2;
}
"""
OUTPUT = "from the second layer\nfrom the third layer\n"


@attrs.frozen
class SampleImage:
    """`trees[i]` is layer i unpacked; `blobs` are all its bytes by digest."""

    config: bytes
    manifest: bytes
    index: bytes
    layers: list[Descriptor]
    diff_ids: list[str]
    trees: list[Path]
    blobs: dict[str, bytes]

    @property
    def manifest_digest(self) -> str:
        return digest(self.manifest)

    def resolved(self) -> ResolvedManifest:
        parsed = parse_manifest(self.manifest)
        return ResolvedManifest(
            digest=digest(self.manifest),
            media_type=parsed.media_type,
            raw=self.manifest,
            config=parsed.config,
            layers=parsed.layers,
            index_digest=digest(self.index),
            index_raw=self.index,
            index_media_type="application/vnd.oci.image.index.v1+json",
        )

    def add_to(self, layers: DirectoryLayers) -> None:
        for layer, tree in zip(self.layers, self.trees, strict=True):
            layers.add(layer.digest, tree)


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def make_image(folder: Path) -> SampleImage:
    """Compile the program and lay out the image under `folder`."""
    trees = [folder / f"tree-{at}" for at in range(3)]
    for tree in trees:
        tree.mkdir(parents=True)
        tree.chmod(0o755)
    source = folder / "read.c"
    source.write_text(PROGRAM)
    subprocess.run(["gcc", "-static", "-Os", "-s", "-o", trees[0] / "read", source], check=True)
    for name in ("dev", "proc", "sys", "etc", "data"):
        (trees[0] / name).mkdir()
    (trees[1] / "data").mkdir()
    (trees[1] / "data" / "second").write_text("from the second layer\n")
    (trees[2] / "data").mkdir()
    (trees[2] / "data" / "third").write_text("from the third layer\n")

    blobs: dict[str, bytes] = {}
    layers: list[dict[str, object]] = []
    diff_ids: list[str] = []
    for at, tree in enumerate(trees):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            tar.add(tree, arcname=".")
        blob = gzip.compress(buffer.getvalue(), mtime=0)
        diff_ids.append(digest(buffer.getvalue()))
        blobs[digest(blob)] = blob
        annotations = {TOC_DIGEST: digest(b"toc %d" % at)}
        layers.append(_descriptor("application/vnd.oci.image.layer.v1.tar+gzip", blob) | {"annotations": annotations})
    config = _json(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/read", "/data/second", "/data/third"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor("application/vnd.oci.image.config.v1+json", config),
            "layers": layers,
        }
    )
    entry = _descriptor("application/vnd.oci.image.manifest.v1+json", manifest)
    entry["platform"] = {"os": "linux", "architecture": "amd64"}
    index = _json({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]})
    blobs[digest(config)] = config
    return SampleImage(config, manifest, index, [Descriptor.from_json(layer) for layer in layers], diff_ids, trees, blobs)


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _descriptor(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data)}


@attrs.frozen
class Registry:
    """A running Debian docker-registry."""

    host: str
    log: Path

    async def push(self, image: SampleImage, name: str) -> ImageReference:
        """Upload everything; gives the reference of the image index."""
        async with httpx.AsyncClient(base_url=f"http://{self.host}/v2/{name}") as client:
            for blob_digest, blob in image.blobs.items():
                begun = await client.post("/blobs/uploads/")
                begun.raise_for_status()
                put = await client.put(
                    begun.headers["location"], params=_with_digest(begun.headers["location"], blob_digest), content=blob
                )
                put.raise_for_status()
            for tag, document in ((image.manifest_digest, image.manifest), ("latest", image.index)):
                kind = json.loads(document)["mediaType"]
                put = await client.put(f"/manifests/{tag}", content=document, headers={"content-type": kind})
                put.raise_for_status()
        return ImageReference.parse(f"{self.host}/{name}:latest")

    def layers_read(self, image: SampleImage) -> set[str]:
        """Digests of the image's layers that somebody got from the registry, by its access log."""
        lines = [line for line in self.log.read_text().splitlines() if '"GET ' in line]
        return {layer.digest for layer in image.layers if any(f"/blobs/{layer.digest}" in line for line in lines)}


def _with_digest(location: str, blob_digest: str) -> httpx.QueryParams:
    return httpx.URL(location).params.set("digest", blob_digest)


@asynccontextmanager
async def open_registry(folder: Path) -> AsyncIterator[Registry]:
    """Start docker-registry on a free loopback port; ends with the block."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    for listener in listeners:
        await listener.aclose()
    folder.mkdir()
    config = folder / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: warn, accesslog: {{disabled: false}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/data}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n"
    )
    log = folder / "registry.log"
    with log.open("wb") as output:
        async with trio.open_nursery() as nursery:
            serve = partial(trio.run_process, ["docker-registry", "serve", config], stdout=output, stderr=output, check=False)
            nursery.start_soon(serve)
            with trio.fail_after(20):
                while True:
                    try:
                        (await trio.open_tcp_stream("127.0.0.1", port)).socket.close()
                        break
                    except OSError:
                        await trio.sleep(0.05)  # the process says nothing when it listens
            yield Registry(f"127.0.0.1:{port}", log)
            nursery.cancel_scope.cancel()
