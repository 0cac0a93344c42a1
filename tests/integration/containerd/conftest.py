"""Fixtures of the containerd tests: private folders, the pinned containerd, running containerds."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containerd_image import SampleImage, make_image
from tests.containerd_process import ContainerdBinaries, system_containerd
from tests.containerd_service import REPOSITORY, DirectoryLayers


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path outside pytest's own: it goes into socket names and overlay options."""
    path = Path(tempfile.mkdtemp(prefix="shoal-", dir="/var/tmp"))
    yield path
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in reversed([m for m in mounts if m.startswith(f"{path}/")]):
        subprocess.run(["umount", "-l", mount], check=False)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def layers(folder: Path) -> Iterator[DirectoryLayers]:
    run_dir = folder / "layers"
    run_dir.mkdir()
    found = DirectoryLayers(run_dir)
    yield found
    found.unmount_all()


@pytest.fixture(scope="session")
def containerd_tools() -> Path:
    """The folder with containerd 2.x and the suite, built by `make setup-test`."""
    with contextlib.suppress(FileNotFoundError):
        built = subprocess.run([REPOSITORY / "tests/conformance/build.sh"], check=True, capture_output=True, text=True)
        return Path(built.stdout.strip()) / "bin"
    pytest.skip("no Go tools: run `make setup-test`")


@pytest.fixture(scope="session")
def sample_image(tmp_path_factory: pytest.TempPathFactory) -> SampleImage:
    """Three layers and a program that reads a file of each of the upper two."""
    return make_image(tmp_path_factory.mktemp("image"))


@pytest.fixture(params=["containerd-1", "containerd-2"])
def binaries(request: pytest.FixtureRequest) -> ContainerdBinaries:
    """Every test with it runs on Debian's containerd 1.x and on the pinned 2.x."""
    if request.param == "containerd-2":
        return ContainerdBinaries(2, request.getfixturevalue("containerd_tools"))
    found = system_containerd()
    if found is None:
        pytest.skip("no containerd 1.x on this machine: apt-get install containerd runc")
    return found
