import tomllib
from pathlib import Path

import pytest

from agent.errors import SettingsError
from agent.runtimes.containerd.client import chain_ids
from agent.runtimes.containerd.configuration import config_snippet
from agent.runtimes.containerd.labels import IMAGE_LAYERS, MAX_LABEL_BYTES, layer_labels, wanted_layer
from agent.runtimes.containerd.mounts import Mount, check_root, mounts_of

A, B, C = ("sha256:" + letter * 64 for letter in "abc")
REF = {"containerd.io/snapshot.ref": "sha256:chain"}


def test_labels_of_cri_and_of_stargz_clients_are_read() -> None:
    cri = {
        "containerd.io/snapshot/cri.image-ref": "docker.io/library/x:1",
        "containerd.io/snapshot/cri.layer-digest": A,
        "containerd.io/snapshot/cri.image-layers": f"{A},{B},nonsense,{C},{B}",
    }
    stargz = {
        "containerd.io/snapshot/remote/stargz.reference": "docker.io/library/x:1",
        "containerd.io/snapshot/remote/stargz.digest": A,
        "containerd.io/snapshot/remote/stargz.layers": f"{A},{B},{C}",
    }
    for labels in (cri, stargz):
        wanted = wanted_layer(REF | labels)
        assert wanted is not None
        assert (wanted.digest, wanted.image_ref, wanted.neighbours) == (A, "docker.io/library/x:1", (B, C))


@pytest.mark.parametrize(
    "labels",
    [{}, REF, {"containerd.io/snapshot/cri.layer-digest": A}, REF | {"containerd.io/snapshot/cri.layer-digest": "sha256:12"}],
)
def test_other_prepares_want_no_layer(labels: dict[str, str]) -> None:
    assert wanted_layer(labels) is None


def test_our_own_labels_name_the_layer_and_those_above_within_the_limit() -> None:
    layers = ["sha256:" + f"{number:064x}" for number in range(100)]
    annotations = {
        "containerd.io/snapshot/stargz/toc.digest": B,
        "containerd.io/snapshot/uidmapping": "0:1000:1",
        "org.example/other": "x",
        "containerd.io/snapshot/long": "x" * 5000,
    }
    labels = layer_labels("r/x:1", C, layers, 3, annotations)
    wanted = wanted_layer(REF | labels)
    assert wanted is not None
    assert wanted.digest == layers[3]
    assert wanted.neighbours == tuple(layers[4 : 4 + len(wanted.neighbours)])
    assert 50 < len(wanted.neighbours) < 60
    assert len(IMAGE_LAYERS) + len(labels[IMAGE_LAYERS]) <= MAX_LABEL_BYTES
    assert set(annotations) & set(labels) == {"containerd.io/snapshot/stargz/toc.digest"}


def test_chain_ids_follow_the_image_spec() -> None:
    # The example of containerd's identity package.
    assert chain_ids([]) == []
    assert chain_ids([A]) == [A]
    import hashlib

    second = "sha256:" + hashlib.sha256(f"{A} {B}".encode()).hexdigest()
    assert chain_ids([A, B]) == [A, second]


def test_mounts_follow_the_rules() -> None:
    root = Path("/s")
    assert mounts_of(root, 1, [], is_view=False) == [Mount("bind", "/s/1/fs", ("rw", "rbind"))]
    assert mounts_of(root, 1, [], is_view=True) == [Mount("bind", "/s/1/fs", ("ro", "rbind"))]
    assert mounts_of(root, 2, [1], is_view=True) == [Mount("bind", "/s/1/fs", ("ro", "rbind"))]
    assert mounts_of(root, 2, [1], is_view=False, extra=("userxattr",)) == [
        Mount("overlay", "overlay", ("workdir=/s/2/work", "upperdir=/s/2/fs", "lowerdir=/s/1/fs", "userxattr"))
    ]
    assert mounts_of(root, 3, [2, 1], is_view=True) == [Mount("overlay", "overlay", ("lowerdir=/s/2/fs:/s/1/fs",))]


@pytest.mark.parametrize("path", ["/a:b", "/a,b", "/a\\b"])
def test_paths_that_overlay_cannot_take_are_refused(path: str) -> None:
    with pytest.raises(SettingsError, match="--state-dir"):
        check_root(Path(path))


@pytest.mark.parametrize("major", [1, 2])
def test_config_is_toml_and_names_us_everywhere(major: int) -> None:
    config = tomllib.loads(config_snippet(major, Path("/run/shoal/containerd.sock"), Path("/var/lib/shoal")))
    plugin = config["proxy_plugins"]["shoal"]
    assert (plugin["type"], plugin["address"]) == ("snapshot", "/run/shoal/containerd.sock")
    assert plugin["exports"]["root"] == "/var/lib/shoal/snapshots"
    assert config["version"] == major + 1
    cri = (
        config["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]
        if major == 1
        else config["plugins"]["io.containerd.cri.v1.images"]
    )
    assert cri == {"snapshotter": "shoal", "disable_snapshot_annotations": False}
