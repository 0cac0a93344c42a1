"""Holes in the files of the store, on a real file system."""

from pathlib import Path

import pytest

from agent.store.sparse import allocated_bytes, write_content


@pytest.mark.parametrize(("offset", "size"), [(0, 1 << 20), (100, 1 << 20), (4096, 4096), (5000, 8191), (5000, 100), (0, 0)])
def test_zeros_take_no_space_and_replace_what_was_there(tmp_path: Path, offset: int, size: int) -> None:
    old = b"\xaa" * (2 << 20)
    path = tmp_path / "file"
    path.write_bytes(old)
    with path.open("r+b") as file:
        before = allocated_bytes(file.fileno())
        write_content(file.fileno(), bytes(size), offset)
        assert path.read_bytes() == old[:offset] + bytes(size) + old[offset + size :]
        blocks = max(0, (offset + size) // 4096 - -(-offset // 4096))
        assert allocated_bytes(file.fileno()) == before - 4096 * blocks


@pytest.mark.parametrize("content", [bytes(8192) + b"\1", bytes(5000) + b"x" * 5000, b"x" + bytes(9000), b"abc" * 5000])
def test_content_is_written_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xaa" * 65536)
    with path.open("r+b") as file:
        write_content(file.fileno(), memoryview(content), 4096)
    assert path.read_bytes() == b"\xaa" * 4096 + content + b"\xaa" * (65536 - 4096 - len(content))
