"""An image of the usual size: it can be looked at at once, and it is what its tar is."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.lab.processes import run_command
from tests.agent_harness import in_thread, open_fleet, push_layers
from tests.tree_facts import differences, facts_of


@pytest.mark.slow
async def test_ls_needs_less_than_three_percent(large_image: Any) -> None:
    with trio.fail_after(60):
        async with open_fleet() as fleet:
            await push_layers(fleet, "large:1", large_image.layers)
            assert large_image.size > 80e6
            node = await fleet.node("--no-background-fetch", "--no-prefetch", in_fleet=False)
            root = await node.mount("large:1")
            listed = await run_command(["ls", "-R", root])
            assert len(listed.stdout.splitlines()) > large_image.entries
            fetched = (await node.status())["bytes"]
            assert fetched["registry"] < 0.03 * large_image.size
            assert fleet.registry_bytes(node) < 0.03 * large_image.size
            assert fetched["registry"] == fleet.registry_bytes(node)
            assert (await node.status())["demand_waits"] == 0


@pytest.mark.slow
async def test_a_debian_root_equals_its_unpacked_tar(large_image: Any, tmp_path: Path) -> None:
    with trio.fail_after(110):
        unpacked = tmp_path / "unpacked"
        unpacked.mkdir()
        unpack = [
            "tar",
            "--extract",
            "--same-owner",
            "--same-permissions",
            f"--file={large_image.tar}",
            f"--directory={unpacked}",
        ]
        await in_thread(lambda: subprocess.run(unpack, check=True, timeout=60))
        truth = await in_thread(facts_of, unpacked)
        assert len(truth) == large_image.entries >= 10_000
        async with open_fleet() as fleet:
            await push_layers(fleet, "debian:1", large_image.layers[1:])
            node = await fleet.node(in_fleet=False)
            root = await node.mount("debian:1")
            assert differences(await in_thread(facts_of, root), truth) == []
            assert (await node.status())["failed_reads"] == 0
