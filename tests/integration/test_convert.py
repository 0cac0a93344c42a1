"""`shoal convert` between layouts and a real registry: same bytes for plain tools, same digests, nothing left behind."""

import gzip
import io
import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import zstandard

from agent.config import Settings
from agent.errors import ShoalError
from agent.formats.model import digest_of
from agent.images.convert.command import Request, convert
from agent.images.convert.converting import Report
from agent.images.convert.writers import WRITERS
from tests.registry_servers import RealRegistry, open_real_registry
from tests.tree_facts import Facts, differences, facts_of

SETTINGS = Settings(registry_hosts_dir=None)
FORMS = sorted(WRITERS)
TAR_FORMS = [form for form in FORMS if form != "nydus"]


@attrs.frozen
class Layout:
    """An OCI layout to look into."""

    folder: Path

    def blob(self, digest: str) -> Path:
        return self.folder / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def json(self, digest: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.blob(digest).read_bytes())
        return found

    def put(self, value: dict[str, Any] | bytes, media_type: str, **more: Any) -> dict[str, Any]:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.blob("x").parent.mkdir(parents=True, exist_ok=True)
        self.blob(digest_of(raw)).write_bytes(raw)
        return {"mediaType": media_type, "digest": digest_of(raw), "size": len(raw), **more}

    def name(self, entry: dict[str, Any], tag: str = "latest") -> str:
        (self.folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        named = entry | {"annotations": {"org.opencontainers.image.ref.name": tag}}
        (self.folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
        return f"oci:{self.folder}:{tag}"

    def problems(self, digest: str) -> list[str]:
        """What below a document does not fit: digests, sizes, missing blobs, diff IDs of gzip and zstd layers."""
        document, wrong = self.json(digest), []
        if "manifests" in document:
            return [text for entry in document["manifests"] for text in self.problems(entry["digest"])]
        for part in (document["config"], *document["layers"]):
            data = self.blob(part["digest"]).read_bytes()
            if digest_of(data) != part["digest"] or len(data) != part["size"]:
                wrong.append(part["digest"])
        for part, diff_id in zip(document["layers"], self.json(document["config"]["digest"])["rootfs"]["diff_ids"], strict=True):
            if digest_of(self.plain(part)) != diff_id:
                wrong.append(f"diff ID {diff_id}")
        return wrong

    def plain(self, layer: dict[str, Any]) -> bytes:
        """A layer as its runtime's decompressor gives it."""
        path = self.blob(layer["digest"])
        if layer["mediaType"].endswith("gzip"):
            return gzip.decompress(path.read_bytes())
        if layer["mediaType"].endswith("zstd"):
            return subprocess.run(["zstd", "-dc", path], check=True, capture_output=True).stdout
        return path.read_bytes()


def run(source: str, target: str, form: str, folder: Path, **more: Any) -> Report:
    """Convert, and see that no temporary file is left."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    try:
        return convert(SETTINGS, Request(source, target, form, scratch=scratch, **more), lambda _event: None)
    finally:
        assert list(scratch.iterdir()) == []


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[RealRegistry]:
    with open_real_registry(tmp_path / "registry") as real:
        yield real


@pytest.fixture
def oci(shared_fixtures: Path) -> str:
    """The fixture image that plain tools made."""
    return f"oci:{shared_fixtures}/images:oci"


@pytest.mark.parametrize("form", FORMS)
def test_the_same_image_gives_the_same_digests(form: str, oci: str, tmp_path: Path) -> None:
    if form == "nydus":
        oci += "-nydus"
    first = run(oci, f"oci:{tmp_path}/a:x", form, tmp_path)
    again = run(oci, f"oci:{tmp_path}/b:x", form, tmp_path)
    assert first.root == again.root
    assert first.images == ("linux/amd64",)
    assert (first.converted, first.kept) == (2, 0)
    made = Layout(tmp_path / "a")
    assert made.problems(first.root.digest) == []
    assert (made.folder / "index.json").read_bytes() == (tmp_path / "b" / "index.json").read_bytes()
    assert not any(path.name.startswith(".") for path in made.blob("x").parent.iterdir())


@pytest.mark.parametrize("form", FORMS)
def test_to_a_registry_and_on_from_there(form: str, oci: str, registry: RealRegistry, tmp_path: Path) -> None:
    if form == "nydus":
        oci += "-nydus"
    image = f"{registry.host}/fixture"
    direct = run(oci, f"oci:{tmp_path}/direct:x", form, tmp_path)
    run(oci, f"oci:{tmp_path}/plain", "estargz", tmp_path)
    pushed = run(oci, f"{image}:{form}", form, tmp_path)
    assert pushed.root == direct.root
    back = run(f"{image}:{form}", f"oci:{tmp_path}/back:x", form, tmp_path)
    assert back.root == direct.root
    assert back.converted == 0
    assert Layout(tmp_path / "back").problems(back.root.digest) == []


def test_from_registry_to_registry_nothing_is_sent_twice(oci: str, registry: RealRegistry, tmp_path: Path) -> None:
    image = f"{registry.host}/fixture"
    run(oci, f"{image}:one", "estargz", tmp_path)
    before = sum('"PUT /v2/' in line for line in registry.requests())
    again = run(f"{image}:one", f"{image}:two", "estargz", tmp_path, is_forced=True)
    assert again.converted == 2
    puts = [line for line in registry.requests() if '"PUT /v2/' in line][before:]
    digests = {line.split()[6] for line in puts if "/blobs/" in line}
    kept = run(f"{image}:two", f"{image}:three", "estargz", tmp_path)
    assert (kept.converted, kept.kept) == (0, 2)
    assert kept.root == again.root
    assert len(digests) <= 3  # two layers and a config, if writing eStargz from eStargz gives other bytes at all
    last = [line for line in registry.requests() if '"PUT /v2/' in line][before + len(puts) :]
    assert [line for line in last if "/blobs/" in line] == []


def extracted(layout: Layout, manifest: str, folder: Path) -> list[Facts]:
    """Each layer as GNU tar unpacks it, whiteouts as the files that they are in a tar."""
    own = {"/stargz.index.json", "/.no.prefetch.landmark", "/.prefetch.landmark"}
    found = []
    for at, part in enumerate(layout.json(manifest)["layers"]):
        target = folder / str(at)
        target.mkdir(parents=True)
        command = [
            "tar",
            "-x",
            "-C",
            target,
            "--numeric-owner",
            "--xattrs",
            "--xattrs-include=*",
            "-p",
            "--delay-directory-restore",
        ]
        done = subprocess.run(command, input=layout.plain(part), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        found.append({path: facts for path, facts in facts_of(target).items() if path not in own})
    return found


@pytest.mark.parametrize("form", TAR_FORMS)
def test_plain_tools_unpack_what_the_source_has(form: str, oci: str, shared_fixtures: Path, tmp_path: Path) -> None:
    made = run(oci, f"oci:{tmp_path}/made:x", form, tmp_path)
    index = json.loads((shared_fixtures / "images" / "index.json").read_bytes())["manifests"]
    source = next(entry for entry in index if entry["annotations"]["org.opencontainers.image.ref.name"] == "oci")
    truth = extracted(Layout(shared_fixtures / "images"), source["digest"], tmp_path / "truth")
    assert len(truth[0]) > 2600
    found = extracted(Layout(tmp_path / "made"), made.root.digest, tmp_path / "found")
    assert [differences(here, there) for here, there in zip(found, truth, strict=True)] == [[], []]


# --- images made here ---------------------------------------------------------------------------------------------------------

DOCKER = "application/vnd.docker"
OCI = "application/vnd.oci.image"


def tar_of(**files: bytes) -> bytes:
    """A tar of files in the order given."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def image(
    layout: Layout, layers: list[tuple[dict[str, Any], str]], *, docker: bool = False, arch: str = "amd64"
) -> dict[str, Any]:
    """Put an image of these layers (descriptors with diff IDs) into the layout; gives the descriptor of its manifest."""
    kinds = (f"{DOCKER}.container.image.v1+json", f"{DOCKER}.distribution.manifest.v2+json")
    config_type, manifest_type = kinds if docker else (f"{OCI}.config.v1+json", f"{OCI}.manifest.v1+json")
    steps = [{"created": "2020-01-01T00:00:00Z", "created_by": f"step {at}"} for at in range(len(layers))]
    config = {
        "architecture": arch,
        "os": "linux",
        "created": "2020-01-01T00:00:00Z",
        "x-unknown": {"kept": [1, 2.5, "ä"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
        "history": [*steps[:1], {"created_by": "ENV A=B", "empty_layer": True}, *steps[1:]],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": layout.put(config, config_type),
        "layers": [layer for layer, _ in layers],
        "annotations": {"org.example": "kept", "com.amazon.soci.index-digest": "sha256:" + "0" * 64},
    }
    return layout.put(manifest, manifest_type, platform={"os": "linux", "architecture": arch})


def layer(layout: Layout, media_type: str, tar: bytes, **more: Any) -> tuple[dict[str, Any], str]:
    blob = gzip.compress(tar, mtime=0) if media_type.endswith("gzip") else tar
    return layout.put(blob, media_type, **more), digest_of(tar)


@attrs.frozen
class Many:
    """An index of two images that share a layer, with what else lies in such indexes."""

    name: str
    layout: Layout
    foreign: dict[str, Any]
    artifact: dict[str, Any]


@pytest.fixture
def many(tmp_path: Path) -> Many:
    layout = Layout(tmp_path / "many")
    gz = f"{OCI}.layer.v1.tar+gzip"
    shared = layer(layout, gz, tar_of(shared=b"both\n" * 1000), annotations={"org.example.layer": "kept"})
    foreign = {
        "mediaType": f"{OCI}.layer.nondistributable.v1.tar+gzip",
        "digest": digest_of(b"elsewhere"),
        "size": 9,
        "urls": ["https://example.org/layer"],
    }
    amd64 = image(layout, [shared, layer(layout, f"{OCI}.layer.v1.tar", tar_of(a=b"amd64"))])
    arm64 = image(layout, [shared, (foreign, digest_of(b"plain")), layer(layout, gz, tar_of(a=b"arm64"))], arch="arm64")
    empty = layout.put(b"{}", "application/vnd.oci.empty.v1+json")
    statement = {"schemaVersion": 2, "mediaType": f"{OCI}.manifest.v1+json", "config": empty, "layers": []}
    attestation = layout.put(
        statement,
        f"{OCI}.manifest.v1+json",
        annotations={"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": amd64["digest"]},
        platform={"os": "unknown", "architecture": "unknown"},
    )
    chart = layout.put(b"chart", "application/x-chart")
    artifact = layout.put(
        statement | {"layers": [chart], "artifactType": "application/x-chart"},
        f"{OCI}.manifest.v1+json",
        artifactType="application/x-chart",
    )
    index = {"schemaVersion": 2, "mediaType": f"{OCI}.index.v1+json", "manifests": [amd64, arm64, attestation, artifact]}
    return Many(layout.name(layout.put(index, f"{OCI}.index.v1+json")), layout, foreign, artifact)


@pytest.mark.parametrize("form", TAR_FORMS)
def test_an_index_stays_one(form: str, many: Many, tmp_path: Path) -> None:
    report = run(many.name, f"oci:{tmp_path}/made:x", form, tmp_path)
    assert report.images == ("linux/amd64", "linux/arm64")
    assert report.converted == 3
    assert len(report.notes) == 3, report.notes
    for at, text in enumerate(("attestation", "it stays at https://example.org/layer", "no container image")):
        assert sum(text in note for note in report.notes) == 1, at
    made = Layout(tmp_path / "made")
    entries = made.json(report.root.digest)["manifests"]
    assert [entry["platform"]["architecture"] for entry in entries[:2]] == ["amd64", "arm64"]
    assert entries[2:] == [many.artifact]
    assert made.blob(digest_of(b"chart")).read_bytes() == b"chart"
    amd64, arm64 = (made.json(entry["digest"]) for entry in entries[:2])
    assert amd64["layers"][0] == arm64["layers"][0]
    assert amd64["layers"][0]["annotations"]["org.example.layer"] == "kept"
    assert arm64["layers"][1] == many.foreign
    assert amd64["annotations"] == {"org.example": "kept"}
    config = made.json(arm64["config"]["digest"])
    old = many.layout.json(many.layout.json(many.layout.json(report_root(many))["manifests"][1]["digest"])["config"]["digest"])
    assert config["rootfs"]["diff_ids"][1] == digest_of(b"plain")
    assert {key: value for key, value in config.items() if key != "rootfs"} == {
        key: value for key, value in old.items() if key != "rootfs"
    }
    assert made.problems(entries[0]["digest"]) == []
    again = run(many.name, f"oci:{tmp_path}/again:x", form, tmp_path)
    assert again.root == report.root


def report_root(many: Many) -> str:
    index: dict[str, Any] = json.loads((many.layout.folder / "index.json").read_bytes())
    return str(index["manifests"][0]["digest"])


def test_only_the_platforms_asked_for(many: Many, tmp_path: Path) -> None:
    report = run(many.name, f"oci:{tmp_path}/made:x", "estargz", tmp_path, platforms=("linux/arm64",))
    assert report.images == ("linux/arm64",)
    made = Layout(tmp_path / "made")
    assert [entry["platform"]["architecture"] for entry in made.json(report.root.digest)["manifests"][:1]] == ["arm64"]
    with pytest.raises(ShoalError, match="no image to convert for linux/s390x"):
        run(many.name, f"oci:{tmp_path}/none:x", "estargz", tmp_path, platforms=("linux/s390x",))
    assert not (tmp_path / "none" / "index.json").exists()


@pytest.mark.parametrize("form", FORMS)
def test_docker_types_stay_or_become_oci(form: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "docker")
    name = layout.name(image(layout, [layer(layout, f"{DOCKER}.image.rootfs.diff.tar.gzip", tar_of(a=b"x"))], docker=True))
    report = run(name, f"oci:{tmp_path}/made:x", form, tmp_path)
    made = Layout(tmp_path / "made")
    manifest = made.json(report.root.digest)
    family = DOCKER if form == "estargz" else OCI
    for kind in (
        report.root.media_type,
        manifest["mediaType"],
        manifest["config"]["mediaType"],
        manifest["layers"][0]["mediaType"],
    ):
        assert kind.startswith(family), kind
    assert made.problems(report.root.digest) == []


def test_nydus_has_a_step_more_and_no_blob_for_a_layer_without_data(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "source")
    gz = f"{OCI}.layer.v1.tar+gzip"
    layers = [
        layer(layout, gz, tar_of(a=b"one")),
        layer(layout, gz, tar_of(b=b"")),
        layer(layout, gz, tar_of(c=b"one", d=b"two")),
    ]
    report = run(layout.name(image(layout, layers)), f"oci:{tmp_path}/made:x", "nydus", tmp_path)
    made = Layout(tmp_path / "made")
    manifest = made.json(report.root.digest)
    assert [one["mediaType"].rpartition(".")[2] for one in manifest["layers"]] == ["v1", "v1", "tar+gzip"]
    assert manifest["annotations"]["containerd.io/snapshot/nydus-fs-version"] == "6"
    config = made.json(manifest["config"]["digest"])
    assert len(config["rootfs"]["diff_ids"]) == 3
    assert [bool(step.get("empty_layer")) for step in config["history"]] == [False, True, True, False, False]
    assert config["history"][-1]["created_by"] == "shoal convert --to nydus"
    assert made.problems(report.root.digest) == []


@pytest.mark.parametrize("form", FORMS)
def test_prefetched_files_come_first(form: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "source")
    files = {f"file{number}": os.urandom(2000) for number in range(9)}
    name = layout.name(image(layout, [layer(layout, f"{OCI}.layer.v1.tar+gzip", tar_of(**files))]))
    report = run(name, f"oci:{tmp_path}/made:x", form, tmp_path, prioritized=("/file7", "./file3", "/nowhere"))
    assert report.notes == ("1 of 3 prefetch paths are in no layer: /nowhere",)
    blob = Layout(tmp_path / "made").json(report.root.digest)["layers"][0]
    data = Layout(tmp_path / "made").plain(blob)
    at = [data.index(files[f"file{number}"]) for number in (7, 3, 0, 8)]
    assert at == sorted(at)
    # What is in the format already would keep its order; a list is a reason to write it again.
    if form != "nydus":
        other = run(f"oci:{tmp_path}/made:x", f"oci:{tmp_path}/made:y", form, tmp_path, prioritized=("file8",))
        assert (other.converted, other.kept) == (1, 0)
        assert other.root != report.root


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("state", ["unpacking", "converting", "pushing"])
def test_an_interrupt_leaves_nothing(state: str, number: signal.Signals, oci: str, tmp_path: Path) -> None:
    seen: list[str] = []

    def interrupt(event: dict[str, Any]) -> None:
        if event["state"] == state and not seen:
            seen.append(state)
            os.kill(os.getpid(), number)

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert(SETTINGS, Request(oci, f"oci:{tmp_path}/made:x", "estargz", scratch=scratch), interrupt)
    assert seen == [state]
    assert list(scratch.iterdir()) == []
    left = [path.name for path in (tmp_path / "made").rglob("*") if path.is_file()] if (tmp_path / "made").exists() else []
    assert [name for name in left if len(name) != 64] == []


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        ("flip", "sha256:"),
        ("cut", "its descriptor says"),
        ("missing", "cannot read blob"),
        ("diff_id", "and the config promises"),
        ("no_tar", "layer sha256:"),
        ("odd_type", "no layer that can be converted"),
        ("config", "image config is not JSON"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_broken_source_is_a_clear_error(form: str, harm: str, complaint: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "source")
    tar = b"no tar" * 1000 if harm == "no_tar" else tar_of(a=b"x" * 10000)
    media_type = "application/x-odd+gzip" if harm == "odd_type" else f"{OCI}.layer.v1.tar+gzip"
    entry, diff_id = layer(layout, media_type, tar)
    blob = layout.blob(entry["digest"])
    if harm == "flip":
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 1
        blob.write_bytes(data)
    elif harm == "cut":
        blob.write_bytes(blob.read_bytes()[:-1])
    elif harm == "missing":
        blob.unlink()
    elif harm == "diff_id":
        diff_id = digest_of(b"another")
    root = image(layout, [(entry, diff_id)])
    if harm == "config":
        manifest = layout.json(root["digest"])
        manifest["config"] = layout.put(b"{", f"{OCI}.config.v1+json")
        root = layout.put(manifest, f"{OCI}.manifest.v1+json")
    with pytest.raises(ShoalError, match=complaint):
        run(layout.name(root), f"oci:{tmp_path}/made:x", form, tmp_path)
    assert not (tmp_path / "made" / "index.json").exists()


def test_a_full_or_missing_work_directory_is_a_clear_error(oci: str, tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=r"cannot convert: .*nowhere.*: No such file or directory"):
        convert(SETTINGS, Request(oci, f"oci:{tmp_path}/made:x", "estargz", scratch=tmp_path / "nowhere"), lambda _event: None)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ShoalError, match="exists and is no OCI image layout"):
        run(oci, f"oci:{tmp_path}/other:x", "estargz", tmp_path)


def test_a_layout_keeps_its_other_images(oci: str, tmp_path: Path) -> None:
    for tag in ("a", "b", "a"):
        run(oci, f"oci:{tmp_path}/made:{tag}", "estargz", tmp_path)
    index = json.loads((tmp_path / "made" / "index.json").read_bytes())["manifests"]
    assert sorted(entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index) == ["a", "b"]
    with pytest.raises(ShoalError, match=r"has no c; name one as oci:DIRECTORY:TAG \(there are: a, b\)"):
        run(f"oci:{tmp_path}/made:c", f"oci:{tmp_path}/x", "estargz", tmp_path)
    by_digest = run(f"oci:{tmp_path}/made@{index[0]['digest']}", f"oci:{tmp_path}/x", "estargz", tmp_path)
    assert by_digest.root.digest == index[0]["digest"]


def gzip_members(tar: bytes) -> bytes:
    return gzip.compress(tar[:1000], mtime=0) + gzip.compress(b"", mtime=0) + gzip.compress(tar[1000:], mtime=0) + bytes(512)


def zstd_frames(tar: bytes) -> bytes:
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0skip"
    pack = zstandard.ZstdCompressor().compress
    return skipped + pack(tar[:1000]) + skipped + pack(tar[1000:]) + skipped


@pytest.mark.parametrize("pack", [gzip_members, zstd_frames, bytes], ids=["gzip", "zstd", "tar"])
@pytest.mark.parametrize("media_type", [f"{OCI}.layer.v1.tar+gzip", f"{OCI}.layer.v1.tar+zstd", f"{OCI}.layer.v1.tar"])
def test_the_bytes_say_how_a_layer_is_compressed(pack: Callable[[bytes], bytes], media_type: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "source")
    tar = tar_of(a=b"x" * 3000)
    name = layout.name(image(layout, [(layout.put(pack(tar), media_type), digest_of(tar))]))
    report = run(name, f"oci:{tmp_path}/made:x", "zstd-chunked", tmp_path)
    made = Layout(tmp_path / "made")
    # The tar is kept bit for bit.
    assert made.plain(made.json(report.root.digest)["layers"][0]) == tar


def test_indexes_within_indexes(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "source")
    inner = image(layout, [layer(layout, f"{OCI}.layer.v1.tar+gzip", tar_of(a=b"x"))])
    for depth in range(5):
        inner = layout.put({"schemaVersion": 2, "manifests": [inner]}, f"{OCI}.index.v1+json")
        name = layout.name(inner)
        if depth < 3:
            assert run(name, f"oci:{tmp_path}/made:x", "estargz", tmp_path).images == ("linux/amd64",)
        else:
            with pytest.raises(ShoalError, match="image indexes within one another"):
                run(name, f"oci:{tmp_path}/made:x", "estargz", tmp_path)


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ({"config": {}, "layers": []}, "descriptor has no valid size"),
        ({"manifests": [], "layers": []}, "image and an index at once"),
        ({"manifests": []}, "no image to convert"),
        ({"schemaVersion": 1}, "schema 1 is not supported"),
        (
            {"manifests": [{"mediaType": f"{OCI}.manifest.v1+json", "digest": "sha256:" + "a" * 64, "size": 5}]},
            "does not have the image",
        ),
        (
            {"manifests": [{"mediaType": f"{OCI}.manifest.v1+json", "digest": "sha256:" + "a" * 64, "size": 1 << 40}]},
            "the limit is",
        ),
        ({"manifests": [{"mediaType": "x", "digest": "../../../etc/passwd", "size": 5}]}, "not a sha256 digest"),
    ],
)
def test_documents_that_are_none(document: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "source")
    with pytest.raises(ShoalError, match=complaint):
        run(layout.name(layout.put(document, f"{OCI}.manifest.v1+json")), f"oci:{tmp_path}/made:x", "estargz", tmp_path)
    assert not (tmp_path / "made" / "index.json").exists()
