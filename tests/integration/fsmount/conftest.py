import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from fsmount.link import start_fsmount, stop_fsmount


@pytest.fixture
async def run_dir(tmp_path: Path) -> AsyncIterator[Path]:
    """A directory whose fsmount, if the test starts one, is ended afterwards."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("mounting needs root and /dev/fuse: modprobe fuse")
    path = tmp_path / "run"
    path.mkdir()
    try:
        yield path
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(70):
            await stop_fsmount(path)


@pytest.fixture
async def fsmount(run_dir: Path) -> Path:
    """The run_dir of an fsmount that runs, with a read deadline of ten seconds."""
    await start_fsmount(run_dir, read_deadline_s=10)
    return run_dir
