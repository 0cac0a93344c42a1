"""What plain tools make of converted images: skopeo copies them, umoci and podman unpack them, fsck.erofs and the kernel read nydus.

The tools have traits of their own, whatever the image; `as_unpacked_by_*` says which. GNU tar and zstd are judges in test_convert.py,
containerd in containerd/test_convert_containerd.py.
"""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from agent.config import Settings
from agent.images.convert.command import Request, convert
from fsmount import syscalls
from tests.tree_facts import Facts, differences, facts_of, fixture_truth

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="unpacking owners and mounting need root: sudo make test")

LIMIT_S = 60
LANDMARKS = {"estargz": {"/stargz.index.json", "/.no.prefetch.landmark"}, "zstd-chunked": set()}
TAR_FORMS = sorted(LANDMARKS)
CHUNK_ROW = struct.Struct("<32sIIIIQQQII")


def tool(name: str, package: str = "") -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name}: apt-get install --no-install-recommends {package or name}")
    return path


def run(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def tree_of(root: Path, form: str) -> Facts:
    """An unpacked tree, without what the format puts into the tar for itself."""
    found = facts_of(root)
    assert LANDMARKS[form] <= found.keys()
    return {path: facts for path, facts in found.items() if path not in LANDMARKS[form]}


def as_unpacked_by_go(truth: Facts) -> Facts:
    """Both unpackers lose extended attributes without a value: in a pax header, Go's tar reader takes that for their absence."""
    out: Facts = {}
    for path, facts in truth.items():
        xattrs = {name: value for name, value in facts.get("xattrs", {}).items() if value}
        out[path] = {name: value for name, value in facts.items() if name != "xattrs"} | ({"xattrs": xattrs} if xattrs else {})
    return out


def as_unpacked_by_podman(truth: Facts) -> Facts:
    """Besides, podman knows no times before 1970."""
    return {
        path: facts | {"mtime_ns": max(0, facts["mtime_ns"])} if "mtime_ns" in facts else facts
        for path, facts in as_unpacked_by_go(truth).items()
    }


class Layouts:
    """OCI layouts, one for each format, made when first asked for."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder, self._images = folder, images

    def made(self, form: str, tag: str = "oci") -> Path:
        layout = self.folder / form
        if not layout.exists():
            request = Request(f"oci:{self._images}:{tag}", f"oci:{layout}:x", form, scratch=self.folder)
            convert(Settings(registry_hosts_dir=None), request, lambda _event: None)
        return layout


def manifest_of(layout: Path) -> tuple[bytes, dict[str, Any]]:
    (entry,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    raw = blob_of(layout, entry).read_bytes()
    return raw, json.loads(raw)


def blob_of(layout: Path, descriptor: dict[str, Any]) -> Path:
    return layout.joinpath("blobs", *descriptor["digest"].split(":"))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, shared_fixtures: Path) -> Layouts:
    return Layouts(tmp_path_factory.mktemp("layouts"), shared_fixtures / "images")


@pytest.fixture(scope="module")
def truth(shared_fixtures: Path) -> Facts:
    """The source of the tar formats."""
    return fixture_truth(shared_fixtures, "oci")[1]


@pytest.fixture
def folder() -> Iterator[Path]:
    """On a file system that the kernel's EROFS and overlay can stand on; a short name, for podman's sockets and options."""
    path = Path(tempfile.mkdtemp(prefix="shoal-", dir="/var/tmp"))
    yield path
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in reversed([mount for mount in mounts if mount.startswith(f"{path}/")]):
        syscalls.unmount(mount)
    shutil.rmtree(path)


@pytest.mark.parametrize("form", [*TAR_FORMS, "nydus"])
def test_skopeo_copies_the_image(form: str, layouts: Layouts, tmp_path: Path) -> None:
    skopeo = tool("skopeo")
    source = layouts.made(form, "oci-nydus" if form == "nydus" else "oci")
    raw, manifest = manifest_of(source)
    copy = tmp_path / "copy"
    run(skopeo, "copy", "--preserve-digests", f"oci:{source}:x", f"oci:{copy}:x")
    assert manifest_of(copy)[0] == raw
    run(skopeo, "copy", "--preserve-digests", f"oci:{copy}:x", f"dir:{tmp_path}/dir")
    assert (tmp_path / "dir" / "manifest.json").read_bytes() == raw
    for part in (manifest["config"], *manifest["layers"]):
        data = (tmp_path / "dir" / part["digest"].removeprefix("sha256:")).read_bytes()
        assert (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}") == (part["size"], part["digest"])
    config = json.loads(run(skopeo, "inspect", "--config", f"dir:{tmp_path}/dir"))
    assert len(config["rootfs"]["diff_ids"]) == len(manifest["layers"])


@pytest.mark.parametrize("form", TAR_FORMS)
def test_umoci_unpacks_the_image(form: str, layouts: Layouts, truth: Facts, tmp_path: Path) -> None:
    umoci = tool("umoci")
    source = layouts.made(form)
    if form == "zstd-chunked":
        # This umoci reads no zstd. skopeo puts the tars into gzip; that their diff IDs are right, umoci checks.
        run(tool("skopeo"), "copy", "--dest-compress-format", "gzip", f"oci:{source}:x", f"oci:{tmp_path}/gzip:x")
        source = tmp_path / "gzip"
        assert all(part["mediaType"].endswith("gzip") for part in manifest_of(source)[1]["layers"])
    run(umoci, "unpack", "--image", f"{source}:x", tmp_path / "bundle")
    assert len(truth) > 2600
    assert differences(tree_of(tmp_path / "bundle" / "rootfs", form), as_unpacked_by_go(truth)) == []


@pytest.mark.parametrize("form", TAR_FORMS)
def test_podman_unpacks_the_image(form: str, layouts: Layouts, truth: Facts, folder: Path) -> None:
    podman: list[str | Path] = [
        tool("podman"),
        "--root",
        folder / "root",
        "--runroot",
        folder / "run",
        "--tmpdir",
        folder / "tmp",
    ]
    podman += ["--storage-driver", "overlay", "--events-backend", "none", "--cgroup-manager", "cgroupfs"]
    image = run(*podman, "pull", "--quiet", f"oci:{layouts.made(form)}:x").strip()
    found = tree_of(Path(run(*podman, "image", "mount", image).strip()), form)
    expected = as_unpacked_by_podman(truth)
    # The root is podman's own: made when the image was pulled, for everybody to read.
    for fact in ("mode", "mtime_ns"):
        expected["/"] = expected["/"] | {fact: found["/"][fact]}
    assert differences(found, expected) == []
    run(*podman, "image", "unmount", "--all")


def test_the_bootstrap_is_an_erofs_image(layouts: Layouts, shared_fixtures: Path, folder: Path) -> None:
    layout = layouts.made("nydus", "oci-nydus")
    *layers, last = manifest_of(layout)[1]["layers"]
    with tarfile.open(blob_of(layout, last)) as archive:
        member = archive.extractfile("image/image.boot")
        assert member is not None
        image = member.read()
    boot = folder / "image.boot"
    boot.write_bytes(image)
    # The kernel and fsck.erofs know nothing of compressed blobs: they get as devices what the chunk table says is in them.
    blobs = [blob_of(layout, layer).read_bytes() for layer in layers]
    devices = [folder / str(number) for number in range(len(blobs))]
    table, size = struct.unpack_from("<QQ", image, 1024 + 128 + 24)
    for row in CHUNK_ROW.iter_unpack(image[table : table + size]):
        digest, number, is_compressed, stored, plain, offset, place = row[:7]
        data = blobs[number][offset : offset + stored]
        data = zstandard.decompress(data, plain) if is_compressed else data
        assert hashlib.sha256(data).digest() == digest
        with devices[number].open("r+b" if devices[number].exists() else "w+b") as out:
            out.truncate(max(out.seek(0, 2), place + plain + -plain % 4096))
            out.seek(place)
            out.write(data)
    fsck = tool("fsck.erofs", "erofs-utils")
    run(fsck, *(f"--device={device}" for device in devices), "--extract", boot)
    top = folder / "top"
    top.mkdir()
    syscalls.mount_configured("erofs", str(top), [("source", str(boot)), *(("device", str(device)) for device in devices)])
    assert differences(facts_of(top), fixture_truth(shared_fixtures, "oci-nydus")[1]) == []
    syscalls.unmount(str(top))
