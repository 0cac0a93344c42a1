"""What happens in the demo, in order, and what is counted."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from agent.demo.view import Row, View
from agent.errors import ShoalError
from agent.lab.fleet import Lab, open_lab
from agent.lab.node import Node
from agent.lab.publish import BuiltImage, build_image, push_image

NAMES: Final = ("node1", "node2", "node3", "node4")
TAG: Final = "sample:esgz"
POLL_S: Final = 0.2
"""Between two looks at the nodes; slow enough to cost the measured starts nothing visible (status takes 2 ms)."""


@attrs.frozen
class Options:
    """How to run it. `round_trip_s` and `rate_bps` (bits a second) describe the registry's link."""

    json_path: Path | None
    cache: Path
    logs: Path | None
    size: int
    round_trip_s: float
    rate_bps: float


@attrs.define
class Story:
    """One run: the lab, the rows of its nodes, the view that shows them."""

    lab: Lab
    view: View
    image: BuiltImage
    rows: dict[str, Row]

    async def watch(self) -> None:
        """Keep the rows true while the story goes on."""
        while True:
            await self.refresh()
            await trio.sleep(POLL_S)

    async def refresh(self) -> None:
        """Look at every running node once."""
        logged = self.logged()
        for name, row in self.rows.items():
            row.registry_log = logged[name]
            node = self.lab.nodes.get(name)
            if node is not None and node.agent is not None and node.agent.is_running():
                with suppress(ShoalError):  # starting or stopping
                    _take(row, await node.status())
        self.view.show(list(self.rows.values()), self.image.size)

    def logged(self) -> dict[str, int]:
        """Bytes of blobs that the registry says it sent, by node."""
        return self.lab.registry_log_bytes()

    async def start(self, name: str) -> Node:
        """Bring up a node and a container on it."""
        row = self.rows[name]
        row.state = "starting node"
        node = await self.lab.start_node(name)
        row.state = "starting container"
        timed = await node.pull_and_run(self.lab.image(TAG))
        status = await node.status()
        _take(row, status)
        row.first_bytes = status["bytes"]["registry"] + status["bytes"]["peers"]
        row.pull_s, row.first_output_s = timed.pull_s, timed.first_output_s
        row.output_ok = timed.output == self.image.expected_output
        row.state = "correct" if row.output_ok else "WRONG"
        self.view.say(
            f"{name}: pulled after {row.pull_s:.2f} s, first output after {row.first_output_s:.2f} s: {timed.output}"
            + ("" if row.output_ok else f" (expected: {self.image.expected_output})")
        )
        self.view.say(f"{name}: until then {_from(status['bytes'])} of {self.image.size / 1e6:.1f} MB")
        return node

    async def complete(self, node: Node) -> None:
        """Wait for the rest of the image, which the node fetches in the background."""
        took = await node.wait_complete(len(self.image.layers))
        status = await node.status()
        self.view.say(f"{node.name}: holds the whole image {took:.1f} s later; in all {_from(status['bytes'])}")


def _from(counted: dict[str, int]) -> str:
    return f"{counted['registry'] / 1e6:.1f} MB from the registry, {counted['peers'] / 1e6:.1f} MB from peers"


def _take(row: Row, status: dict[str, Any]) -> None:
    counted = status["bytes"]
    row.registry, row.peers, row.cache = counted["registry"], counted["peers"], counted["cache"]
    row.abandoned = status["abandoned_bytes"]
    row.chunks_verified = status["chunks_verified"]
    pieces = sum(layer["pieces"] for layer in status["layers"])
    row.held = sum(layer["pieces_held"] for layer in status["layers"]) / max(1, pieces)


async def tell(options: Options, view: View) -> tuple[list[Row], int]:
    """Run the demo; gives the final rows and the image's compressed size."""
    image = await build_image(options.cache, "esgz", size=options.size, progress=view.say)
    async with open_lab(NAMES, round_trip_s=options.round_trip_s, rate_bps=options.rate_bps) as lab:
        try:
            return await _tell(options, view, lab, image), image.size
        finally:
            if options.logs is not None:
                _keep_logs(lab.folder, options.logs)


async def _tell(options: Options, view: View, lab: Lab, image: BuiltImage) -> list[Row]:
    story = Story(lab, view, image, {name: Row(name) for name in NAMES})
    await push_image(image, lab.pushed(TAG))
    view.say(
        f"the registry holds the sample image: {len(image.layers)} layers, {image.size / 1e6:.1f} MB as eStargz, behind a link of "
        f"{options.round_trip_s * 1000:.0f} ms and {options.rate_bps / 1e6:.0f} Mbit/s"
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(story.watch)
        view.say("node1 starts a container; nobody else has the image")
        await story.complete(await story.start("node1"))
        for name in ("node2", "node3"):
            view.say(f"{name} joins the fleet and starts the same container")
            await story.complete(await story.start(name))
        logged = story.logged()
        await lab.registry.stop()
        view.say("the registry is stopped")
        view.say("node4 joins the fleet and starts the same container")
        await story.complete(await story.start("node4"))
        await story.refresh()
        nursery.cancel_scope.cancel()
    rows = list(story.rows.values())
    if options.json_path is not None:
        options.json_path.write_text(json.dumps(as_json(rows, logged, image.size), indent=2) + "\n")
    return rows


def as_json(rows: list[Row], logged: dict[str, int], image_size: int) -> dict[str, Any]:
    """The result as scripts read it."""
    return {
        "image_bytes": image_size,
        "nodes": [
            {
                "name": row.name,
                "pull_s": round(row.pull_s, 4),
                "first_output_s": round(row.first_output_s, 4),
                "bytes": {"registry": row.registry, "peers": row.peers, "cache": row.cache},
                "bytes_abandoned": row.abandoned,
                "bytes_until_output": row.first_bytes,
                "chunks_verified": row.chunks_verified,
                "output_ok": row.output_ok is True,
            }
            for row in rows
        ],
        "registry_log_bytes": logged,
    }


def _keep_logs(lab: Path, target: Path) -> None:
    for log in lab.rglob("*.log"):
        if log.is_file() and "containerd-state" not in log.parts:
            place = target / log.relative_to(lab)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(log, place)
