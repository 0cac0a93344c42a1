"""What the fault tests share."""

import pytest

from tests import sample_layers
from tests.sample_layers import Layer


@pytest.fixture(scope="session")
def small_image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layer, ...]:
    return sample_layers.small_image(tmp_path_factory.mktemp("small-image"))
