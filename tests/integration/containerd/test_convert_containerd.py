"""`shoal convert` from and to a real containerd, and what plain containerd makes of the results."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from agent.images.convert.writers import WRITERS
from agent.registry import ImageReference, open_registry_client
from tests.conftest import ROOT
from tests.containerd_image import OUTPUT, SampleImage, open_registry
from tests.containerd_process import ContainerdBinaries, RunningContainerd, run_containerd
from tests.tree_facts import Facts, differences, facts_of

TIMEOUT_S = 100
OWN_FILES = {"/stargz.index.json", "/.no.prefetch.landmark", "/.prefetch.landmark"}
TAR_FORMS = [form for form in sorted(WRITERS) if form != "nydus"]


async def shoal_convert(
    containerd: RunningContainerd, folder: Path, *words: str, check: bool = True
) -> subprocess.CompletedProcess[bytes]:
    """The command, and that it leaves nothing: no file, no lease."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "agent.cli", "convert", *words, "--work-dir", str(scratch)]
    environment = os.environ | {"SHOAL_CONTAINERD_ADDRESS": containerd.address, "SHOAL_REGISTRY_HOSTS_DIR": str(folder / "none")}
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False, env=environment, cwd=ROOT)
    assert list(scratch.iterdir()) == []
    assert (await containerd.ctr("leases", "ls", "-q")).split() == []
    assert not check or done.returncode == 0, done.stderr.decode()
    return done


@asynccontextmanager
async def alone(binaries: ContainerdBinaries, folder: Path) -> AsyncIterator[RunningContainerd]:
    """A containerd whose snapshotter `shoal` nobody serves."""
    with trio.fail_after(TIMEOUT_S):
        async with run_containerd(binaries, folder / "c", folder / "nobody.sock", folder / "state") as containerd:
            yield containerd


async def unpacked(containerd: RunningContainerd, folder: Path, image: str) -> Facts:
    """The image's files as plain containerd pulls and unpacks them; nothing of the image stays."""
    target = folder / f"mounted-{image.rpartition(':')[2]}"  # 2.x remembers a target for a while
    target.mkdir()
    await containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", image)
    await containerd.ctr("images", "mount", "--snapshotter", "overlayfs", image, str(target))
    try:
        found = await trio.to_thread.run_sync(facts_of, target)
    finally:
        await containerd.ctr("images", "unmount", "--rm", "--snapshotter", "overlayfs", str(target))
    target.rmdir()
    # zstd:chunked can keep the tars and so their diff IDs: what is unpacked already would not be unpacked again.
    await containerd.ctr("images", "rm", "--sync", image)
    assert (await containerd.ctr("snapshots", "--snapshotter", "overlayfs", "ls")).splitlines()[1:] == []
    found["/"]["mtime_ns"] = 0  # containerd's own: the time of unpacking, for the source as well
    return {path: facts for path, facts in found.items() if path not in OWN_FILES}


async def push_plain(fixtures: Path, tag: str, image: str) -> None:
    """A fixture image as it is."""
    images = fixtures / "images"
    named = {
        entry["annotations"]["org.opencontainers.image.ref.name"]: entry
        for entry in json.loads((images / "index.json").read_bytes())["manifests"]
    }
    raw = (images / "blobs" / named[tag]["digest"].replace(":", "/")).read_bytes()
    manifest, ref = json.loads(raw), ImageReference.parse(image)
    async with open_registry_client() as client:
        for part in (manifest["config"], *manifest["layers"]):
            await client.push_blob(ref, images / "blobs" / part["digest"].replace(":", "/"), part["digest"])
        await client.push_manifest(ref, raw, manifest["mediaType"])


# All formats in one containerd and one registry: to start them takes longer than to convert.


async def test_plain_containerd_unpacks_what_the_source_has(
    binaries: ContainerdBinaries, folder: Path, shared_fixtures: Path
) -> None:
    async with alone(binaries, folder) as containerd, open_registry(folder / "registry") as registry:
        image = f"{registry.host}/fixture"
        await push_plain(shared_fixtures, "oci", f"{image}:plain")
        truth = await unpacked(containerd, folder, f"{image}:plain")
        assert len(truth) > 2600
        for form in TAR_FORMS:
            await shoal_convert(containerd, folder, f"{image}:plain", f"{image}:{form}", "--to", form)
            found = await unpacked(containerd, folder, f"{image}:{form}")
            # Headers are written anew, and nothing of them is lost, not even nanoseconds.
            assert differences(found, truth) == []


async def test_a_converted_image_runs_in_plain_containerd(
    binaries: ContainerdBinaries, folder: Path, sample_image: SampleImage
) -> None:
    async with alone(binaries, folder) as containerd, open_registry(folder / "registry") as registry:
        ref = str(await registry.push(sample_image, "sample"))
        for form in TAR_FORMS:
            # From the registry into containerd, which so has it without any pull.
            said = await shoal_convert(containerd, folder, ref, f"containerd:sample:{form}", "--to", form)
            name = f"docker.io/library/sample:{form}"
            assert name in await containerd.ctr("images", "ls", "-q")
            digest = said.stdout.decode().split()[-1]
            lease = (await containerd.ctr("leases", "create")).split()[-1]
            await containerd.ctr("leases", "rm", "--sync", lease)  # collects garbage
            assert digest in await containerd.ctr("content", "ls", "-q")
            run = ("run", "--rm", "--snapshotter", "overlayfs", "--net-host")
            assert await containerd.ctr(*run, name, form) == OUTPUT
            # And on from containerd: to another name, where nothing is to be done, and back into a registry.
            again = await shoal_convert(containerd, folder, f"containerd:sample:{form}", "containerd:sample:again", "--to", form)
            assert again.stdout.decode().split()[-1] == digest
            pushed = await shoal_convert(containerd, folder, f"containerd:{name}", f"{registry.host}/back:{form}", "--to", form)
            assert pushed.stdout.decode().split()[-1] == digest


async def test_what_containerd_does_not_have(binaries: ContainerdBinaries, folder: Path, sample_image: SampleImage) -> None:
    async with alone(binaries, folder) as containerd, open_registry(folder / "registry") as registry:
        ref = str(await registry.push(sample_image, "sample"))
        done = await shoal_convert(containerd, folder, "containerd:nobody", f"oci:{folder}/x", "--to", "estargz", check=False)
        assert (done.returncode, done.stderr.decode().count("\n")) == (1, 1)
        assert "containerd has no image 'nobody' in namespace 'default'" in done.stderr.decode()
        await containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", ref)
        await containerd.ctr("content", "rm", sample_image.layers[1].digest)
        done = await shoal_convert(containerd, folder, f"containerd:{ref}", "containerd:half", "--to", "estargz", check=False)
        assert done.returncode == 1
        assert f"containerd does not have {sample_image.layers[1].digest}" in done.stderr.decode()
        assert "half" not in await containerd.ctr("images", "ls", "-q")
        assert (await containerd.ctr("content", "active")).splitlines()[1:] == []
