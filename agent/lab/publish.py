"""From the sample's tars to images in a registry: as eStargz by our own writer, and as plain gzip for comparison.

Converted layers are kept in a folder named for their content, so that the second demo does not compress again.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Literal

import attrs
import trio

from agent.formats.model import Digest
from agent.lab.sample import Sample, build_sample, sample_key
from agent.registry import ImageReference, open_registry_client

Form = Literal["esgz", "gzip"]
LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
TOC_DIGEST: Final = "containerd.io/snapshot/stargz/toc.digest"
UNCOMPRESSED_SIZE: Final = "io.containers.estargz.uncompressed-size"
READ: Final = 1 << 20
KEPT: Final = 4


@attrs.frozen
class ImageLayer:
    """A compressed layer on this disk."""

    path: Path
    digest: Digest
    size: int
    diff_id: Digest
    annotations: dict[str, str]


@attrs.frozen
class BuiltImage:
    """A compressed image on this disk, ready to be pushed."""

    layers: tuple[ImageLayer, ...]
    command: tuple[str, ...]
    environment: tuple[str, ...]
    expected_output: str

    @property
    def size(self) -> int:
        """Bytes of its layers, compressed."""
        return sum(layer.size for layer in self.layers)

    def config(self) -> bytes:
        """The image configuration."""
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
        return json.dumps(
            {
                "architecture": machine,
                "os": "linux",
                "config": {"Cmd": list(self.command), "Env": list(self.environment), "WorkingDir": "/"},
                "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in self.layers]},
            },
            sort_keys=True,
        ).encode()

    def manifest(self) -> bytes:
        """The image manifest."""
        config = self.config()
        return json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "config": {"mediaType": CONFIG_TYPE, "digest": _digest(config), "size": len(config)},
                "layers": [
                    {"mediaType": LAYER_TYPE, "digest": layer.digest, "size": layer.size, "annotations": layer.annotations}
                    for layer in self.layers
                ],
            },
            sort_keys=True,
        ).encode()


def default_cache() -> Path:
    """Where the sample image is kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "shoal" / "sample"


def _digest(data: bytes) -> Digest:
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def _to_gzip(tar: Path, output: Path) -> ImageLayer:
    plain, packed, size = hashlib.sha256(), hashlib.sha256(), 0
    compressor = zlib.compressobj(6, zlib.DEFLATED, 31)
    with tar.open("rb") as source, output.open("wb") as sink:
        while True:
            data = source.read(READ)
            plain.update(data)
            out = compressor.compress(data) if data else compressor.flush()
            packed.update(out)
            size += sink.write(out)
            if not data:
                break
    return ImageLayer(output, Digest("sha256:" + packed.hexdigest()), size, Digest("sha256:" + plain.hexdigest()), {})


def _to_estargz(tar: Path, output: Path, prioritized: Sequence[str]) -> ImageLayer:
    from agent.formats.estargz_writer import write_estargz  # noqa: PLC0415 - only a lab that converts needs it

    with tar.open("rb") as source, output.open("wb") as sink:
        written = write_estargz(source, sink, prioritized=prioritized)
    annotations = {TOC_DIGEST: str(written.toc_digest), UNCOMPRESSED_SIZE: str(written.uncompressed_size)}
    return ImageLayer(output, written.digest, written.size, written.diff_id, annotations)


async def build_image(
    cache: Path, form: Form, *, size: int = 315_000_000, progress: Callable[[str], None] = lambda _text: None
) -> BuiltImage:
    """The sample image in one of the two forms, from `cache` if it was made before."""
    key = await trio.to_thread.run_sync(sample_key, size)
    folder = cache / key / form
    record = folder / "image.json"
    if record.exists():
        return _load(record)
    progress("collecting software for the sample image")
    tars = cache / key / f"tars-{os.getpid()}"
    part = folder.with_name(f"{form}-{os.getpid()}.part")
    try:
        sample = await trio.to_thread.run_sync(partial(build_sample, tars, size=size))
        progress(f"compressing {sample.size / 1e6:.0f} MB ({form})")
        part.mkdir(parents=True, exist_ok=True)
        image = await _compress(sample, part, form)
        (part / "image.json").write_text(json.dumps(attrs.asdict(image), default=str))
        if not folder.exists():  # else another process was faster
            part.rename(folder)
        _forget_older(cache)
    finally:
        for leftover in (tars, part):
            shutil.rmtree(leftover, ignore_errors=True)
    return _load(record)


def _forget_older(cache: Path) -> None:
    """Keep the images of the last few states of this machine; each is some 200 MB."""
    kept = sorted((path for path in cache.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in kept[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)


async def _compress(sample: Sample, folder: Path, form: Form) -> BuiltImage:
    done: dict[str, ImageLayer] = {}
    limiter = trio.CapacityLimiter(os.cpu_count() or 1)  # compression: one thread per core

    async def compress(name: str, tar: Path, prioritized: Sequence[str]) -> None:
        output = folder / f"{name}.blob"
        work = partial(_to_estargz, tar, output, prioritized) if form == "esgz" else partial(_to_gzip, tar, output)
        done[name] = await trio.to_thread.run_sync(work, limiter=limiter)

    async with trio.open_nursery() as nursery:
        for layer in sample.layers:
            nursery.start_soon(compress, layer.name, layer.tar, layer.prioritized)
    layers = tuple(done[layer.name] for layer in sample.layers)
    return BuiltImage(layers, sample.command, sample.environment, sample.expected_output)


def _load(record: Path) -> BuiltImage:
    raw = json.loads(record.read_text())
    layers = tuple(
        ImageLayer(
            record.parent / Path(layer["path"]).name,
            Digest(layer["digest"]),
            layer["size"],
            Digest(layer["diff_id"]),
            layer["annotations"],
        )
        for layer in raw["layers"]
    )
    return BuiltImage(layers, tuple(raw["command"]), tuple(raw["environment"]), raw["expected_output"])


async def push_image(image: BuiltImage, reference: str) -> None:
    """Put the image into a registry under the reference."""
    target = ImageReference.parse(reference)
    config, manifest = image.config(), image.manifest()
    async with open_registry_client(None, None) as registry:
        async with trio.open_nursery() as nursery:
            for layer in image.layers:
                nursery.start_soon(registry.push_blob, target, layer.path, layer.digest)
            nursery.start_soon(registry.push_blob, target, config, _digest(config))
        await registry.push_manifest(target, manifest, MANIFEST_TYPE)
