import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from agent.formats.model import Inode, InodeKind
from fsmount.errors import LinkError, MountError
from fsmount.link import Link, Need, open_link, start_fsmount
from tests.fsmount_samples import LayerOnDisk, big_file_layer, file_node, in_thread, make_layer, open_agent, register


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[LayerOnDisk]:
    with big_file_layer(tmp_path / "layer", "big", (8 << 20) + 5) as made:
        yield made


async def until_parked(link: Link, is_enough: Callable[[int], bool]) -> None:
    """fsmount tells nobody when it parks a read, so ask it."""
    while not is_enough((await link.status())["parked_reads"]):  # noqa: ASYNC110  there is no event for it
        await trio.sleep(0.005)


def read_at(path: Path, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


async def test_misses_are_fetched_once_each_and_present_data_ask_nobody(fsmount: Path, layer: LayerOnDisk) -> None:
    async with open_agent(fsmount, layer) as link:
        path = await register(link, layer) / "big"
        assert await in_thread(path.read_bytes) == layer.source
        asked = len(layer.served)
        assert asked >= 8
        await in_thread(drop_pages, path)
        assert await in_thread(path.read_bytes) == layer.source
        assert len(layer.served) == asked


def drop_pages(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


async def test_a_miss_nobody_answers_ends_in_eio_and_a_log_line(run_dir: Path, layer: LayerOnDisk) -> None:
    await start_fsmount(run_dir, read_deadline_s=0.5)
    layer.fill(0, 1 << 20)

    async def hang(_need: Need) -> None:
        await trio.sleep_forever()

    async with open_link(run_dir, hang) as link:
        path = await register(link, layer) / "big"
        began = trio.current_time()
        with pytest.raises(OSError) as raised:
            await in_thread(read_at, path, 4 << 20, 10)
        assert raised.value.errno == errno.EIO
        assert trio.current_time() - began < 1
        assert await in_thread(read_at, path, 0, 1000) == layer.source[:1000]
    words = (run_dir / "fsmount.log").read_text()
    assert words.count("read_failed volume=big") == 1
    assert "the agent" in words


async def test_what_one_agent_could_not_give_the_next_is_asked_for_at_once(run_dir: Path, layer: LayerOnDisk) -> None:
    await start_fsmount(run_dir, read_deadline_s=0.5)

    async def hang(_need: Need) -> None:
        await trio.sleep_forever()

    async with open_link(run_dir, hang) as link:
        path = await register(link, layer) / "big"
        with pytest.raises(OSError):
            await in_thread(read_at, path, 4 << 20, 10)
    async with open_agent(run_dir, layer):
        # Within the second in which the kernel's own second try would be answered from memory.
        assert await in_thread(read_at, path, 4 << 20, 10) == layer.source[4 << 20 :][:10]


async def test_without_agent_a_read_waits_for_one(fsmount: Path, layer: LayerOnDisk) -> None:
    async with open_link(fsmount) as link:
        path = await register(link, layer) / "big"
        async with trio.open_nursery() as nursery:
            found: list[bytes] = []

            async def read() -> None:
                found.append(await in_thread(read_at, path, 5 << 20, 4096))

            nursery.start_soon(read)
            await until_parked(link, lambda count: count > 0)
            async with open_agent(fsmount, layer):
                await until_parked(link, lambda count: count == 0)
    assert found == [layer.source[5 << 20 : (5 << 20) + 4096]]


async def test_the_newest_agent_is_asked_and_an_older_one_takes_over_again(fsmount: Path, layer: LayerOnDisk) -> None:
    asked: list[str] = []

    async def first(need: Need) -> None:
        asked.append("first")
        layer.fill(need.offset, need.offset + need.length)

    async def second(need: Need) -> None:
        asked.append("second")
        if len(asked) > 1:
            await trio.sleep_forever()
        layer.fill(need.offset, need.offset + need.length)

    async with open_link(fsmount, first) as link:
        path = await register(link, layer) / "big"
        async with open_link(fsmount, second) as other:
            assert await in_thread(read_at, path, 0, 10) == layer.source[:10]
            assert asked == ["second"]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(in_thread, read_at, path, 4 << 20, 10)
                await until_parked(link, lambda count: count > 0)
                await other._stream.aclose()
        assert asked[2:] == ["first"] * len(asked[2:]) != []


async def test_the_agents_errno_reaches_the_reader(fsmount: Path, layer: LayerOnDisk) -> None:
    async def refuse(_need: Need) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    async with open_link(fsmount, refuse) as link:
        await register(link, layer, "fuse-tree")
        with pytest.raises(OSError) as raised:
            await in_thread(read_at, fsmount / "fs" / "volumes" / "big", 0, 10)
        assert raised.value.errno == errno.ENOSPC


async def test_present_data_are_served_while_many_reads_are_parked(fsmount: Path, tmp_path: Path) -> None:
    """More parked read-ahead than the kernel's usual limit of 12 must not stop anybody else."""

    async def hang(_need: Need) -> None:
        await trio.sleep_forever()

    with big_file_layer(tmp_path / "many", "many", 64 << 20) as layer:
        layer.fill(0, 1 << 20)
        async with open_link(fsmount, hang) as link:
            path = await register(link, layer) / "big"
            async with trio.open_nursery() as nursery:
                for number in range(1, 60):
                    nursery.start_soon(in_thread, read_at, path, number << 20, 1 << 16)
                await until_parked(link, lambda count: count >= 50)
                with trio.fail_after(5):
                    assert await in_thread(read_at, path, 0, 1 << 19) == layer.source[: 1 << 19]
                nursery.cancel_scope.cancel()
            for start in range(0, 64 << 20, 1 << 20):
                layer.fill(start, start + (1 << 20))
        async with open_agent(fsmount, layer):  # lets the readers go, whose threads would outlive the test
            async with open_link(fsmount) as link:
                await until_parked(link, lambda count: count == 0)


async def test_read_ahead_into_missing_data_does_not_hold_up_a_cached_file(fsmount: Path, tmp_path: Path) -> None:
    """Small files lie side by side in the volume, and the kernel's read-ahead crosses from one into the next."""
    volume = bytearray()
    children = {b"%02d" % number: file_node(volume, os.urandom(20_000)) for number in range(40)}
    layer = make_layer(tmp_path / "small", "small", Inode(InodeKind.DIRECTORY, children=children), bytes(volume))
    layer.chunk = 4096
    cached = [children[b"%02d" % number] for number in range(0, 40, 2)]
    for node in cached:
        layer.fill(node.volume_offset, node.volume_offset + node.size)

    async def hang(_need: Need) -> None:
        await trio.sleep_forever()

    for presentation in ("erofs-file", "erofs-loop", "fuse-tree"):
        async with open_link(fsmount, hang) as link:
            path = await register(link, layer, presentation)
            with trio.fail_after(8):
                for number, node in zip(range(0, 8, 2), cached, strict=False):
                    content = await in_thread((path / f"{number:02}").read_bytes)
                    assert content == layer.source[node.volume_offset : node.volume_offset + node.size]
            await link.unmount_layer("small")
            await link.remove_volume("small")
    layer.blocks.close()


async def test_removed_layers_go_on_for_who_has_them_open(fsmount: Path, layer: LayerOnDisk) -> None:
    for presentation in ("erofs-file", "erofs-loop", "fuse-tree"):
        async with open_agent(fsmount, layer) as link:
            path = await register(link, layer, presentation) / "big"
            with await in_thread(open, path, "rb") as file:
                with pytest.raises(MountError):
                    await link.remove_volume("big")
                await link.unmount_layer("big")
                await link.remove_volume("big")
                assert (await link.list()) == {"volumes": [], "layers": [], "roots": []}
                assert not path.exists()
                assert await in_thread(file.read) == layer.source
            layer.take_away()


async def test_everything_removed_is_forgotten(fsmount: Path, layer: LayerOnDisk) -> None:
    pid = 0
    for _ in range(3):
        for presentation in ("erofs-file", "erofs-loop", "fuse-tree"):
            async with open_agent(fsmount, layer) as link:
                pid = link.info.pid
                path = await register(link, layer, presentation) / "big"
                assert await in_thread(read_at, path, 0, 100) == layer.source[:100]
                await link.unmount_layer("big")
                await link.remove_volume("big")
    with trio.fail_after(10):
        while str(layer.folder) in " ".join(await in_thread(open_files, pid)):  # noqa: ASYNC110
            await trio.sleep(0.02)  # the kernel forgets inodes in its own time


def open_files(pid: int) -> list[str]:
    """What the open descriptors of a process are of; one may go while we look."""
    found: list[str] = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


async def test_calls_are_idempotent_and_checked(fsmount: Path, layer: LayerOnDisk, tmp_path: Path) -> None:
    async with open_agent(fsmount, layer) as link:
        first = await register(link, layer)
        assert await register(link, layer) == first
        assert len((await link.list())["layers"]) == 1
        with pytest.raises(MountError, match="other files"):
            await link.add_volume("big", layer.data_path, layer.blocks_path, 4096)
        with pytest.raises(MountError, match="block map"):
            await link.add_volume("other", layer.data_path, layer.blocks_path, 4096)
        with pytest.raises(MountError, match="cannot name"):
            await link.add_volume("../up", layer.data_path, layer.blocks_path, 4096)
        with pytest.raises(MountError, match="not registered"):
            await link.mount_layer("l", layer.image_path, ["unknown"])
        with pytest.raises(MountError, match="no presentation"):
            await link.mount_layer("l", layer.image_path, ["big"], "magic")
        with pytest.raises(MountError, match="not mounted"):
            await link.mount_root(tmp_path, ["unknown"])
        garbage = tmp_path / "garbage"
        garbage.write_bytes(os.urandom(8192))
        with pytest.raises(MountError, match="cannot be mounted"):
            await link.mount_layer("garbage", garbage, ["big"])
        assert [record["name"] for record in (await link.list())["layers"]] == ["big"]
        await link.unmount_layer("big")
        await link.unmount_layer("big")
        await link.remove_volume("big")
        await link.remove_volume("big")


async def test_no_fsmount_is_a_link_error(run_dir: Path) -> None:
    with pytest.raises(LinkError, match="no fsmount answers"):
        async with open_link(run_dir):
            pass


async def test_nonsense_on_the_socket_hurts_only_its_sender(fsmount: Path, layer: LayerOnDisk) -> None:
    async with open_agent(fsmount, layer) as link:
        path = await register(link, layer) / "big"
        for nonsense in (b"\xff" * 100, b"\x04\0\0\0\xc1\xc1\xc1\xc1", b"\x01\0\0\0\x93", b"\x00" * 4096, os.urandom(5000)):
            async with await trio.open_unix_socket(str(fsmount / "fsmount.sock")) as stream:
                await stream.send_all(nonsense)
                await stream.send_eof()
                with trio.fail_after(5):
                    while await stream.receive_some(4096):
                        continue
        assert await in_thread(path.read_bytes) == layer.source


async def test_memory(fsmount: Path, layer: LayerOnDisk) -> None:
    async with open_agent(fsmount, layer) as link:
        path = await register(link, layer) / "big"
        assert await in_thread(path.read_bytes) == layer.source
        sizes = {name: resident_kib(pid) for name, pid in (("worker", link.info.pid), ("holder", link.info.holder_pid))}
    assert sizes["worker"] < 37 << 10
    assert sizes["holder"] < 14 << 10


def resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError(f"process {pid} has no memory")
