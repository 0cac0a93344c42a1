"""`shoal convert` between layouts and a real registry: same bytes for plain tools, same digests, nothing left behind."""

import gzip
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from agent.config import Settings
from agent.formats.model import digest_of
from agent.images.convert.command import Request, convert
from agent.images.convert.converting import Report
from agent.images.convert.writers import WRITERS
from tests.registry_servers import RealRegistry, open_real_registry

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
