"""containerd's own suite for snapshotters (core/snapshots/testsuite, Go) through its proxy client, against our socket."""

import subprocess
from pathlib import Path

import pytest
import trio

from tests.containerd_service import DirectoryLayers, clean_environment, served

SUITE_S = 100


async def test_containerds_snapshotter_suite_passes(containerd_tools: Path, folder: Path, layers: DirectoryLayers) -> None:
    scratch = folder / "tmp"
    scratch.mkdir()
    async with served(folder, layers) as service:
        environment = {**clean_environment(), "SHOAL_SNAPSHOTTER_SOCKET": str(service.socket), "TMPDIR": str(scratch)}
        with trio.move_on_after(SUITE_S):
            suite = await trio.run_process(
                [containerd_tools / "snapshotter.test", "-test.v", "-test.root", "-test.failfast=false"],
                env=environment,
                check=False,
                capture_stdout=True,
                stderr=subprocess.STDOUT,
            )
    output = suite.stdout.decode()
    failed = [line for line in output.splitlines() if "--- FAIL" in line]
    assert suite.returncode == 0, "\n".join([*failed, output[-20000:]])
    assert output.count("    --- PASS: ") >= 20
    if "--- SKIP" in output:
        pytest.fail("the suite skipped something:\n" + output)
