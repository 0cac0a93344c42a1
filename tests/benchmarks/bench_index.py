"""Cost of a large layer in every format: from the bytes of its index to the metadata image, seconds and peak memory.

`python -m tests.benchmarks.bench_index [entries]`; `make bench` has the same in its group `index`. Each format is measured in a
process of its own, so that the peak is its own, too; it includes Python and the modules (some 40 MiB).
"""

import gc
import gzip
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs

from agent.formats.catalogue import find_format
from agent.formats.model import Digest, LayerIndex, digest_of
from agent.formats.opening import BlobRange, LayerFacts, ManifestBytes
from fsmount.erofs import write_image

ENTRIES: Final = 100_000
LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar"


@attrs.frozen
class Blob:
    """A layer in a registry."""

    data: bytes
    annotations: dict[str, str]
    media_type: str


def make_tar(path: Path, entries: int) -> None:
    """A layer of small files, thirty to a folder, each of its own content."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(entries):
            if number % 31 == 0:
                member = tarfile.TarInfo(f"usr/lib/folder{number // 31}")
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(member)
                continue
            data = b"content of file %d\n" % number
            member = tarfile.TarInfo(f"usr/lib/folder{number // 31}/some-file-{number}.py")
            member.size, member.mtime = len(data), 1_700_000_000 + number
            tar.addfile(member, io.BytesIO(data))


def _estargz(tar: Path) -> list[Blob]:
    from agent.formats.estargz_writer import write_estargz

    out = io.BytesIO()
    with tar.open("rb") as source:
        written = write_estargz(source, out, level=1)
    annotations = {"containerd.io/snapshot/stargz/toc.digest": str(written.toc_digest)}
    return [Blob(out.getvalue(), annotations, LAYER_TYPE + "+gzip")]


def _zstd_chunked(tar: Path) -> list[Blob]:
    from agent.formats.zstd_chunked_writer import write_zstd_chunked

    out = io.BytesIO()
    with tar.open("rb") as source:
        written = write_zstd_chunked(source, out, level=1)
    return [Blob(out.getvalue(), dict(written.annotations), LAYER_TYPE + "+zstd")]


def _nydus(tar: Path) -> list[Blob]:
    from agent.formats.nydus_writer import BLOB_MEDIA_TYPE, write_blob, write_bootstrap

    data, bootstrap = io.BytesIO(), io.BytesIO()
    with tar.open("rb") as source:
        blob = write_blob(source, data)
    written = write_bootstrap([blob], bootstrap)
    return [
        Blob(data.getvalue(), dict(blob.annotations), BLOB_MEDIA_TYPE),
        Blob(bootstrap.getvalue(), dict(written.annotations), LAYER_TYPE + "+gzip"),
    ]


def _gzip(tar: Path) -> list[Blob]:
    return [Blob(gzip.compress(tar.read_bytes(), 1, mtime=0), {}, LAYER_TYPE + "+gzip")]


WRITERS: Final[dict[str, Callable[[Path], list[Blob]]]] = {
    "estargz": _estargz,
    "zstd-chunked": _zstd_chunked,
    "nydus": _nydus,
    "soci": _gzip,
    "plain": _gzip,
}


def prepare(folder: Path, entries: int) -> None:
    """Write the layer in every format; the last blob of a format is the layer, before it come others that it needs."""
    tar = folder / "layer.tar"
    make_tar(tar, entries)
    for form, write in WRITERS.items():
        place = folder / form
        place.mkdir()
        blobs = write(tar)
        for number, blob in enumerate(blobs):
            (place / str(number)).write_bytes(blob.data)
        manifest: dict[str, str] = {}
        if form == "soci":
            from tests.soci_writer import build_index, build_ztoc

            ztoc = build_ztoc(blobs[0].data, 4 << 20).data
            index = build_index({digest_of(blobs[0].data): ztoc})
            (place / "ztoc").write_bytes(ztoc)
            (place / "index").write_bytes(index)
            manifest = {"com.amazon.soci.index-digest": digest_of(index)}
        layers = [{"annotations": blob.annotations, "media_type": blob.media_type} for blob in blobs]
        (place / "facts.json").write_text(json.dumps({"layers": layers, "manifest": manifest}))


def _drive(place: Path) -> LayerIndex:
    """The index of a layer, as the agent reads it, from files."""
    known = json.loads((place / "facts.json").read_text())
    paths = [place / str(number) for number in range(len(known["layers"]))]
    others = [place / name for name in ("ztoc", "index") if (place / name).exists()]
    by_digest = {digest_of(path.read_bytes()): path for path in [*paths, *others]}
    digests: dict[Path, Digest] = {path: digest for digest, path in by_digest.items()}
    layers = tuple(
        LayerFacts(digests[path], path.stat().st_size, layer["media_type"], layer["annotations"])
        for path, layer in zip(paths, known["layers"], strict=True)
    )
    facts = attrs.evolve(layers[-1], siblings=layers, manifest_annotations=known["manifest"])
    layer_format = find_format(facts)
    assert layer_format is not None, place
    reader, answer = layer_format.read_index(facts), None
    while True:
        try:
            want = reader.send(answer)  # type: ignore[arg-type]
        except StopIteration as stop:
            index: LayerIndex = stop.value
            return index
        assert isinstance(want, BlobRange | ManifestBytes)
        path = by_digest[want.digest if isinstance(want, ManifestBytes) else want.blob or facts.digest]
        with path.open("rb") as file:
            if isinstance(want, ManifestBytes):
                answer = file.read()
            else:
                file.seek(want.start)
                answer = file.read(want.stop - want.start)


def _stream(place: Path) -> LayerIndex:
    """A plain layer has no index: it is read through."""
    from agent.formats.plain import PlainLayerParser

    parser = PlainLayerParser()
    with (place / "0").open("rb") as file:
        while data := file.read(1 << 20):
            parser.feed(data)
    return parser.finish().index


def measure(place: Path) -> dict[str, float]:
    """In this process: seconds from index bytes to metadata image, and the process's peak in MiB."""
    if place.name != "plain":
        gc.disable()  # as in the process that reads an index
    began = time.perf_counter()
    index = _stream(place) if place.name == "plain" else _drive(place)
    image = write_image(index.root, volume_size=index.volume_size)
    elapsed = time.perf_counter() - began
    # Not ru_maxrss, which a process begins with from the one that started it.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    peak = int(line.split()[1]) / 1024
    return {"seconds": elapsed, "peak_mib": peak, "entries": index.entry_count, "image_mib": len(image) / 2**20}


def measure_all(entries: int = ENTRIES, repeat: int = 1) -> dict[str, list[dict[str, float]]]:
    """Every format in turns."""
    found: dict[str, list[dict[str, float]]] = {form: [] for form in WRITERS}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), entries)
        for _turn in range(repeat):
            for form, values in found.items():
                argv = [sys.executable, "-m", "tests.benchmarks.bench_index", "--measure", str(Path(name) / form)]
                done = subprocess.run(argv, capture_output=True, check=True, text=True, timeout=120)
                values.append(json.loads(done.stdout))
    return found


def main() -> None:
    """Measure one place (`--measure`), or all formats and print them."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
        return
    for form, (value,) in measure_all(int(sys.argv[1]) if len(sys.argv) > 1 else ENTRIES).items():
        print(f"{form:<14} {value['entries']:7.0f} entries: {value['seconds']:.2f} s, peak {value['peak_mib']:.0f} MiB")


if __name__ == "__main__":
    main()
