"""Images of the end-to-end tests, made once."""

from pathlib import Path

import attrs
import pytest

from tests import sample_layers
from tests.sample_layers import Layer, debian_tar, make_estargz, noise_tar


@attrs.frozen
class LargeImage:
    """About 100 MB compressed: a Debian root file system, and below it files that do not compress."""

    tar: Path
    entries: int
    layers: tuple[Layer, ...]

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers)


@pytest.fixture(scope="session")
def large_image(tmp_path_factory: pytest.TempPathFactory) -> LargeImage:
    folder = tmp_path_factory.mktemp("large-image")
    tar, noise = folder / "debian.tar", folder / "noise.tar"
    entries = debian_tar(tar)
    noise_tar(noise, files=400, size=160_000, seed=1)
    layers = []
    for path in (noise, tar):
        with path.open("rb") as stream:
            layers.append(make_estargz(stream, path.with_suffix(".esgz")))
    noise.unlink()
    return LargeImage(tar, entries, tuple(layers))


@pytest.fixture(scope="session")
def small_image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layer, ...]:
    return sample_layers.small_image(tmp_path_factory.mktemp("small-image"))
