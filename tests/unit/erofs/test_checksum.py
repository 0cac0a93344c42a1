"""CRC-32C, against a library and the published value."""

import random

import crc32c as oracle
import pytest

from fsmount.erofs.checksum import crc32c


def test_the_published_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0


@pytest.mark.parametrize("size", [1, 7, 256, 3072])
def test_as_the_library_says(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert crc32c(data) == oracle.crc32c(data)
