"""`shoal inspect` against a real registry: before a layer is here, with a peer that has it, and with --verify."""

import json
from collections.abc import Sequence
from pathlib import Path

import attrs
import trio

from tests.agent_harness import open_fleet, push_fixtures, push_layers
from tests.sample_layers import Layer


async def test_inspect_tells_formats_and_whereabouts(shared_fixtures: Path) -> None:
    with trio.fail_after(110):
        async with open_fleet() as fleet:
            layers = await push_fixtures(fleet, shared_fixtures, ["esgz", "oci"])
            node = await fleet.node("--no-background-fetch")
            lazy = json.loads((await node.shoal("inspect", node.image("fixtures:esgz"), "--json")).stdout)
            assert [layer["digest"] for layer in lazy["layers"]] == layers["esgz"]
            assert all(layer["format"] == "estargz" and layer["is_lazy"] and not layer["reason"] for layer in lazy["layers"])
            assert all(layer["chunks"] > 0 and layer["pieces"] > 0 and layer["pieces_here"] == 0 for layer in lazy["layers"])
            assert (await node.status())["layers"] == []  # looking is not pulling
            plain = json.loads((await node.shoal("inspect", node.image("fixtures:oci"), "--json")).stdout)
            assert all(not layer["is_lazy"] and "no index" in layer["reason"] for layer in plain["layers"])

            await node.mount("fixtures:esgz")
            verified = json.loads((await node.shoal("inspect", node.image("fixtures:esgz"), "--verify", "--json")).stdout)
            assert all(layer["verified"]["ok"] for layer in verified["layers"]), verified
            assert all(layer["pieces_here"] for layer in verified["layers"])

            other = await fleet.node("--no-background-fetch")
            seen = json.loads((await other.shoal("inspect", node.image("fixtures:esgz"), "--json")).stdout)
            assert all(layer["peers"] == 1 and layer["pieces_in_fleet"] == layer["pieces"] for layer in seen["layers"]), seen
            text = (await other.shoal("inspect", node.image("fixtures:oci"))).stdout.decode()
            assert "not lazy: the image has no index" in text


async def test_an_image_that_unpacks_to_something_else_is_told(small_image: Sequence[Layer]) -> None:
    wrong = [attrs.evolve(layer, diff_id="sha256:" + "0" * 64) for layer in small_image]
    with trio.fail_after(60):
        async with open_fleet() as fleet:
            await push_layers(fleet, "wrong:1", wrong)
            node = await fleet.node("--no-background-fetch")
            result = await node.shoal("inspect", node.image("wrong:1"), "--verify", check=False)
            assert result.status == 1
            assert "WRONG: the tar in the blob is " + small_image[0].diff_id in result.stdout.decode()
