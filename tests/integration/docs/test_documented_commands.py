"""The client commands of README and operations, run as they stand, with an image and a directory that exist."""

import json
import sys
from pathlib import Path

import pytest

from agent.lab.processes import run_command
from tests.agent_harness import open_fleet, push_fixtures
from tests.documents import DOCUMENTS, commands

DOCUMENTED_IMAGE = "registry.example/app:esgz"
DOCUMENTED_DIRECTORY = "/mnt/app"
DOCUMENTED_SOURCE = "registry.example/app:1"
CLIENTS = {"convert", "inspect", "mount", "unmount", "status", "peers", "scrub", "doctor", "ls"}


@pytest.mark.timeout(120)
async def test_client_commands(shared_fixtures: Path) -> None:
    done: set[str] = set()
    async with open_fleet() as fleet:
        await push_fixtures(fleet, shared_fixtures, ["oci"])
        node = await fleet.node()
        place = str(node.folder / "app")
        for document in DOCUMENTS:
            if document.name not in {"README.md", "operations.md"} or document.parent.name == "decisions":
                continue
            for words in commands(document, only_blocks=True):
                name = words[1] if Path(words[0]).name == "shoal" else words[0]
                if name not in CLIENTS or (name == "convert" and DOCUMENTED_IMAGE not in words):
                    continue  # the other conversions are of tests/integration/test_convert.py
                images = {DOCUMENTED_IMAGE: node.image("fixtures:esgz"), DOCUMENTED_SOURCE: node.image("fixtures:oci")}
                real = [images.get(word, word) for word in words]
                real = [place if word == DOCUMENTED_DIRECTORY else word for word in real]
                if name == "ls":
                    assert (await run_command(real)).stdout
                elif name == "convert":
                    # Straight to the registry: what counts a node's downloads stands between, and takes no uploads.
                    plain = [word.replace(node.image(""), f"{fleet.registry.address}/") for word in real[1:]]
                    await run_command([sys.executable, "-m", "agent.cli", *plain, "--quiet"])
                else:
                    extra = ["--state-dir", str(node.folder / "state"), "--no-snapshotter"] if name == "doctor" else []
                    finished = await node.shoal(*real[1:], *extra, check=False)
                    assert finished.status == 0, (real, finished.stderr.decode(), finished.stdout.decode())
                    if "--json" in real:
                        json.loads(finished.stdout)
                done.add(name)
    assert done == CLIENTS
