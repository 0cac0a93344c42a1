"""What users write for `shoal convert`, and documents rewritten."""

import json
from pathlib import Path

import pytest

from agent.errors import SettingsError
from agent.formats.model import FormatError
from agent.images.convert import documents
from agent.images.convert.command import parse_platform
from agent.images.convert.documents import Kind, LayerKind
from agent.images.convert.places import ContainerdName, LayoutName, parse_place
from agent.images.convert.prefetch_list import MAX_PATHS, parse_prefetch, read_prefetch
from agent.registry import ImageReference, Platform
from agent.registry.manifests import Manifest, parse_manifest

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("oci:/a/b", LayoutName(Path("/a/b"))),
        ("oci:b:tag", LayoutName(Path("b"), "tag")),
        ("oci:/a:b/c", LayoutName(Path("/a:b/c"))),
        (f"oci:/a/b@{DIGEST}", LayoutName(Path("/a/b"), digest=DIGEST)),
        ("oci:/a@b:1.0", LayoutName(Path("/a@b"), "1.0")),
        ("containerd:app", ContainerdName("app")),
        ("busybox", ImageReference("docker.io", "library/busybox", "latest")),
        ("docker://r.example/app:1", ImageReference("r.example", "app", "1")),
        (f"r.example:5000/app@{DIGEST}", ImageReference("r.example:5000", "app", None, DIGEST)),
        ("r.example/oci:1", ImageReference("r.example", "oci", "1")),
    ],
)
def test_places(text: str, place: object) -> None:
    assert parse_place(text, is_target=False) == place


def test_an_image_of_containerd_is_written_under_its_full_name() -> None:
    assert parse_place("containerd:app:1", is_target=True) == ContainerdName("docker.io/library/app:1")


@pytest.mark.parametrize(
    ("text", "is_target", "complaint"),
    [
        ("oci:", False, "says no directory; write oci:NAME"),
        ("containerd:", False, "says no image; write containerd:NAME"),
        ("oci:/a:b c", False, "'b c' is no tag"),
        ("oci:/a@sha256:1", False, "not a sha256 digest"),
        ("UPPER", False, "bad repository name"),
        ("containerd:UPPER", True, "bad repository name"),
        (f"oci:/a@{DIGEST}", True, "a target needs a tag"),
        (f"r.example/app@{DIGEST}", True, "a target needs a tag"),
        (f"containerd:app@{DIGEST}", True, "a target needs a tag"),
    ],
)
def test_what_is_no_place(text: str, is_target: bool, complaint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_place(text, is_target=is_target)
    assert complaint in str(caught.value)


def test_platforms() -> None:
    assert parse_platform("linux/arm/v7") == Platform("linux", "arm", "v7")
    for text in ("linux", "linux/", "a/b/c/d", "linux/arm 64"):
        with pytest.raises(SettingsError, match="is no platform"):
            parse_platform(text)
    arm64 = Platform("linux", "arm64")
    assert documents.is_wanted(Platform("linux", "arm64", "v8"), [arm64])
    assert documents.is_wanted(arm64, [])
    assert not documents.is_wanted(Platform("linux", "arm", "v6"), [Platform("linux", "arm", "v7")])


@pytest.mark.parametrize(
    ("raw", "paths"),
    [
        (b"", ()),
        (b"/bin/sh\n\n  \netc/passwd\r\n/bin/sh\n", ("/bin/sh", "etc/passwd")),
        (b" leading\n#name\n", (" leading", "#name")),
        (b"\xff\n", ("\udcff",)),
        (b'{"paths": ["/a", "b\\nc", "/a"], "more": 1}', ("/a", "b\nc")),
    ],
)
def test_prefetch_lists(raw: bytes, paths: tuple[str, ...], tmp_path: Path) -> None:
    assert parse_prefetch(raw) == paths
    (tmp_path / "list").write_bytes(raw)
    assert read_prefetch(tmp_path / "list") == paths


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"{", "begins like JSON"),
        (b"{" + b'"a":{' * 100_000, "begins like JSON"),
        (b"{}", "a profile has its paths"),
        (b'{"paths": [1]}', "a profile has its paths"),
        (b"\n".join(b"%d" % number for number in range(MAX_PATHS + 1)), "at most 100000"),
    ],
    ids=["json", "deep", "empty", "numbers", "long"],
)
def test_what_is_no_prefetch_list(raw: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(raw)
    with pytest.raises(SettingsError, match=f"prefetch list .*list is not usable: .*{complaint}"):
        read_prefetch(tmp_path / "list")
    with pytest.raises(SettingsError, match=r"cannot read the prefetch list .*: No such file"):
        read_prefetch(tmp_path / "none")


@pytest.mark.parametrize(
    ("docker", "oci"),
    [
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", "application/vnd.oci.image.layer.v1.tar+gzip"),
        ("application/vnd.docker.image.rootfs.diff.tar.zstd", "application/vnd.oci.image.layer.v1.tar+zstd"),
        ("application/vnd.docker.image.rootfs.diff.tar", "application/vnd.oci.image.layer.v1.tar"),
        (
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        ),
        ("application/vnd.docker.distribution.manifest.v2+json", "application/vnd.oci.image.manifest.v1+json"),
        ("application/vnd.docker.distribution.manifest.list.v2+json", "application/vnd.oci.image.index.v1+json"),
        ("application/vnd.docker.container.image.v1+json", "application/vnd.oci.image.config.v1+json"),
    ],
)
def test_docker_types_in_oci_words(docker: str, oci: str) -> None:
    assert documents.to_oci(docker) == oci
    assert documents.to_oci(oci) == oci


def test_layer_kinds() -> None:
    kinds = {
        "application/vnd.oci.image.layer.v1.tar+zstd": LayerKind.TAR,
        "application/vnd.docker.image.rootfs.diff.tar.gzip": LayerKind.TAR,
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": LayerKind.FOREIGN,
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": LayerKind.FOREIGN,
        "application/vnd.oci.image.layer.nydus.blob.v1": LayerKind.NYDUS,
        "application/vnd.oci.image.layer.v1.tar+gzip+encrypted": LayerKind.UNKNOWN,
        "application/vnd.in-toto+json": LayerKind.UNKNOWN,
        "": LayerKind.UNKNOWN,
    }
    assert {media_type: documents.layer_kind(media_type) for media_type in kinds} == kinds


def manifest(config_type: str = documents.OCI_CONFIG, **more: object) -> tuple[Manifest, documents.Json]:
    document = {"schemaVersion": 2, "config": {"mediaType": config_type, "digest": DIGEST, "size": 1}, "layers": []} | more
    parsed = parse_manifest(json.dumps(document).encode())
    assert isinstance(parsed, Manifest)
    return parsed, document


def test_kinds_of_manifests() -> None:
    bootstrap = {"mediaType": "x", "digest": DIGEST, "size": 1, "annotations": {documents.NYDUS_BOOTSTRAP: "true"}}
    assert documents.kind_of(*manifest(), None) is Kind.IMAGE
    assert documents.kind_of(*manifest(documents.DOCKER_CONFIG), None) is Kind.IMAGE
    assert documents.kind_of(*manifest(layers=[bootstrap]), None) is Kind.NYDUS
    assert documents.kind_of(*manifest("application/vnd.cncf.helm.config.v1+json"), None) is Kind.ARTIFACT
    assert documents.kind_of(*manifest(artifactType="x"), None) is Kind.ARTIFACT
    assert documents.kind_of(*manifest("application/vnd.amazon.soci.index.v2+json"), None) is Kind.SOCI
    assert documents.kind_of(*manifest(), {"platform": {"os": "unknown", "architecture": "unknown"}}) is Kind.ATTESTATION


def test_a_config_keeps_what_it_says() -> None:
    config = {
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": ["a", "b"]},
        "history": [{"created_by": "1"}, {"created_by": "env", "empty_layer": True}, {"created_by": "2"}],
        "x": 1e300,
    }
    assert json.loads(documents.rewrite_config(config, ["c", "d"])) == config | {
        "rootfs": {"type": "layers", "diff_ids": ["c", "d"]}
    }
    changed = json.loads(documents.rewrite_config(config, ["d"], {0}, {"created_by": "3"}))
    assert [step.get("empty_layer", False) for step in changed["history"]] == [True, True, False, False]
    assert "history" not in json.loads(documents.rewrite_config({"rootfs": {}}, [], (), {"created_by": "3"}))


def test_a_config_must_have_a_diff_id_for_each_layer() -> None:
    for config in ({}, {"rootfs": []}, {"rootfs": {"diff_ids": [DIGEST]}}, {"rootfs": {"diff_ids": [1, 2]}}):
        with pytest.raises(FormatError):
            documents.diff_ids_of(config, 2)


def test_annotations_of_other_formats_go() -> None:
    old = {
        "mediaType": "x",
        "digest": DIGEST,
        "size": 1,
        "data": "aGk=",
        "annotations": {
            "containerd.io/snapshot/stargz/toc.digest": "x",
            "io.github.containers.zstd-chunked.manifest-checksum": "x",
            "org.example": "kept",
        },
        "x": "kept",
    }
    new = documents.converted_descriptor(old, "y", DIGEST, 2, {"new": "1"})  # type: ignore[arg-type]
    assert new == {"mediaType": "y", "digest": DIGEST, "size": 2, "annotations": {"org.example": "kept", "new": "1"}, "x": "kept"}
