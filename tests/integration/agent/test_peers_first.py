"""The second node gets nothing from the registry that the first one has; the registry itself says so."""

from collections.abc import Sequence

import trio

from tests.agent_harness import in_thread, open_fleet, push_layers
from tests.sample_layers import Layer
from tests.tree_facts import facts_of


async def test_second_node_takes_no_blob_bytes_from_the_registry(small_image: Sequence[Layer]) -> None:
    size = sum(layer.size for layer in small_image)
    with trio.fail_after(90):
        async with open_fleet() as fleet:
            await push_layers(fleet, "small:1", small_image)
            first = await fleet.node()
            truth = await in_thread(facts_of, await first.mount("small:1"))
            await first.wait_complete()
            fetched = (await first.status())["bytes"]
            assert fetched["peers"] == 0
            assert fetched["registry"] == await fleet.check_registry_bytes(first)
            assert size <= fetched["registry"] < 1.1 * size

            second = await fleet.node()
            assert await in_thread(facts_of, await second.mount("small:1")) == truth
            await second.wait_complete()
            assert fleet.registry_bytes(second) == 0
            status = await second.status()
            fetched = status["bytes"]
            assert fetched["registry"] == 0
            assert size <= fetched["peers"] < 1.1 * size
            served = (await first.status())["served_bytes"]
            assert fetched["peers"] <= served <= fetched["peers"] + status["abandoned_bytes"]

            listed = await second.shoal("peers")
            assert (await first.status())["peer_id"] in listed.stdout.decode()


async def test_pieces_are_served_while_the_blob_is_partial(small_image: Sequence[Layer]) -> None:
    with trio.fail_after(90):
        async with open_fleet() as fleet:
            await push_layers(fleet, "small:1", small_image)
            first = await fleet.node("--no-background-fetch", "--no-prefetch")
            root = await first.mount("small:1")
            names = sorted((root / "part1").iterdir())[:10]
            contents = [await in_thread(name.read_bytes) for name in names]
            assert not all(layer["complete"] for layer in (await first.status())["layers"])

            second = await fleet.node("--no-background-fetch", "--no-prefetch")
            other = await second.mount("small:1")
            for name, content in zip(names, contents, strict=True):
                assert await in_thread((other / "part1" / name.name).read_bytes) == content
            assert fleet.registry_bytes(second) == 0
            # What the first node lacks comes from the registry.
            last = max((other / "part1").iterdir())
            assert await in_thread(last.read_bytes) == await in_thread((root / "part1" / last.name).read_bytes)
            assert await fleet.check_registry_bytes(second) > 0
