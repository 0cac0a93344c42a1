"""fsmount's processes are killed and changed under load: readers wait, none fails, no byte is wrong."""

import functools
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fsmount.control import holder_status
from fsmount.errors import LinkError
from fsmount.link import open_link, start_fsmount, stop_fsmount, upgrade_fsmount
from tests.fsmount_samples import LayerOnDisk, big_file_layer, in_thread, keep_agent, open_agent, register

SIZE = 8 << 20

# Reads random ranges of a mounted file, through its page cache and past it, and compares them with the source. Ends at SIGTERM
# with the number of reads; at a wrong byte or an error with a traceback.
READER = """
import os, random, signal, sys
mounted, volume, source, seed = sys.argv[1:]
random.seed(int(seed))
truth = open(source, 'rb').read()
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
os.write(1, b'reading\\n')
count = 0
while not stopped:
    fd = os.open(mounted if count % 3 else volume, os.O_RDONLY)
    offset, length = random.randrange(len(truth)), random.choice((1, 4096, 100_000, 1 << 20, 3 << 20))
    found = os.pread(fd, length, offset)
    assert found == truth[offset : offset + len(found)], (offset, length)
    assert len(found) == min(length, len(truth) - offset), (offset, length, len(found))
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    fd = os.open(volume, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    os.stat(os.path.dirname(mounted))
    count += 1
os.write(1, str(count).encode())
"""


@pytest.fixture
async def run_dir(tmp_path: Path) -> AsyncIterator[Path]:
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("mounting needs root and /dev/fuse: modprobe fuse")
    path = tmp_path / "run"
    try:
        await start_fsmount(path, read_deadline_s=30)
        yield path
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(70):
            await stop_fsmount(path)


@asynccontextmanager
async def readers(layer: LayerOnDisk, mounted: Path, run_dir: Path, count: int = 3) -> AsyncIterator[None]:
    """Processes that read all the time; at the end each must have read much and seen nothing wrong."""
    source = layer.folder / "source"
    source.write_bytes(layer.source)
    command = [sys.executable, "-c", READER, str(mounted / "big"), str(run_dir / "fs/volumes" / layer.name), str(source)]
    async with trio.open_nursery() as nursery:
        start = functools.partial(trio.run_process, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
        processes = [await nursery.start(start, [*command, str(seed)]) for seed in range(count)]
        try:
            for process in processes:
                assert await process.stdout.receive_some(100) == b"reading\n"
            yield
            reads = []
            for process in processes:
                process.send_signal(signal.SIGTERM)
                with trio.fail_after(60):
                    reads.append(int(await process.stdout.receive_some(100)))
            assert min(reads) > 5, reads
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()


async def evict_again_and_again(layer: LayerOnDisk) -> None:
    """Data come and go, so that at every moment some reads are parked, some under way and some present."""
    while True:
        await trio.sleep(0.05)
        layer.take_away()


async def load(run_dir: Path, layer: LayerOnDisk, harm: Callable[[], Awaitable[None]], presentation: str = "auto") -> None:
    """Readers and an agent at work while `harm` is done."""
    async with open_agent(run_dir, layer) as link:
        mounted = await register(link, layer, presentation)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_agent, run_dir, layer)
        nursery.start_soon(evict_again_and_again, layer)
        async with readers(layer, mounted, run_dir):
            await harm()
        nursery.cancel_scope.cancel()


async def ready_worker(run_dir: Path) -> int:
    async with open_link(run_dir) as link:
        return link.info.pid


@pytest.mark.slow
@pytest.mark.parametrize("presentation", ["erofs-file", "erofs-loop", "fuse-tree"])
async def test_killed_again_and_again(run_dir: Path, tmp_path: Path, presentation: str) -> None:
    dice = random.Random(presentation)
    times = 20 if presentation == "erofs-file" else 6
    killed: set[int] = set()

    async def harm() -> None:
        for _ in range(times):
            pid = await ready_worker(run_dir)
            await trio.sleep(dice.uniform(0, 0.4))  # a random moment is what this test is about
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
            # The old one may still be dying when the next connection is made; it is gone when the holder has counted it.
            while (await holder_status(run_dir))["pid"] == pid:  # noqa: ASYNC110
                await trio.sleep(0.01)

    with big_file_layer(tmp_path / "layer", "big", SIZE) as layer:
        await load(run_dir, layer, harm, presentation)
    assert len(killed) == times
    assert (await holder_status(run_dir))["restarts"] == times
    assert "read_failed" not in (run_dir / "fsmount.log").read_text()


@pytest.mark.slow
async def test_upgraded_under_load(run_dir: Path, tmp_path: Path) -> None:
    async def harm() -> None:
        for _ in range(3):
            before = await holder_status(run_dir)
            result = await upgrade_fsmount(run_dir)
            after = await holder_status(run_dir)
            assert result["old_pid"] == before["pid"] != result["new_pid"] == after["pid"]
            assert before["holder_pid"] == after["holder_pid"]
            await trio.sleep(0.3)

    with big_file_layer(tmp_path / "layer", "big", SIZE) as layer:
        await load(run_dir, layer, harm)
    assert "read_failed" not in (run_dir / "fsmount.log").read_text()


async def test_upgrade_to_a_broken_program_changes_nothing(run_dir: Path, tmp_path: Path) -> None:
    package = tmp_path / "broken" / "fsmount"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('broken')\n")
    from fsmount.control import ask_holder

    before = await ready_worker(run_dir)
    with pytest.raises(LinkError, match="did not come up"):
        await ask_holder(run_dir, {"op": "upgrade", "python": sys.executable, "path": str(package.parent)})
    with pytest.raises(LinkError, match="cannot start"):
        await ask_holder(run_dir, {"op": "upgrade", "python": "/nonexistent", "path": str(package.parent)})
    assert await ready_worker(run_dir) == before


@pytest.mark.slow
async def test_agent_killed_under_load(run_dir: Path, tmp_path: Path) -> None:
    """The agent of this test loses its connection at random moments and stays away for a while."""
    dice = random.Random(1)
    with big_file_layer(tmp_path / "layer", "big", SIZE) as layer:
        async with open_agent(run_dir, layer) as link:
            mounted = await register(link, layer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(evict_again_and_again, layer)
            async with readers(layer, mounted, run_dir):
                for _ in range(20):
                    with trio.move_on_after(dice.uniform(0, 0.2)):
                        await keep_agent(run_dir, layer)
                    await trio.sleep(dice.uniform(0, 0.1))
                nursery.start_soon(keep_agent, run_dir, layer)
                await trio.sleep(0.5)
            nursery.cancel_scope.cancel()
    assert "read_failed" not in (run_dir / "fsmount.log").read_text()


@pytest.mark.slow
async def test_holder_killed_under_load(run_dir: Path, tmp_path: Path) -> None:
    """The worker makes itself a new holder, and that one again replaces workers."""

    async def harm() -> None:
        for _ in range(3):
            async with open_link(run_dir) as link:
                worker, holder = link.info.pid, link.info.holder_pid
            os.kill(holder, signal.SIGKILL)
            while True:
                try:
                    status = await holder_status(run_dir)
                except LinkError:
                    await trio.sleep(0.02)
                    continue
                if status["holder_pid"] != holder:
                    break
                await trio.sleep(0.02)
            assert status["pid"] == worker
            os.kill(worker, signal.SIGKILL)
            while (await holder_status(run_dir))["pid"] == worker:  # noqa: ASYNC110
                await trio.sleep(0.01)

    with big_file_layer(tmp_path / "layer", "big", SIZE) as layer:
        await load(run_dir, layer, harm)
    assert "read_failed" not in (run_dir / "fsmount.log").read_text()


async def test_both_killed_and_started_again(run_dir: Path, tmp_path: Path) -> None:
    """The mount is lost then; a new start clears what is left of it and everything can be mounted again."""
    target = tmp_path / "root"
    target.mkdir()
    with big_file_layer(tmp_path / "layer", "big", 1 << 20) as layer:
        async with open_agent(run_dir, layer) as link:
            await register(link, layer)
            await link.mount_root(target, ["big"])
            pids = link.info.holder_pid, link.info.pid
            os.kill(pids[0], signal.SIGSTOP)
            os.kill(pids[1], signal.SIGKILL)
            os.kill(pids[0], signal.SIGKILL)
            await link.wait_closed()
        await start_fsmount(run_dir)
        async with open_agent(run_dir, layer) as link:
            assert (await link.list()) == {"volumes": [], "layers": [], "roots": []}
            assert os.listdir(target) == []
            path = await register(link, layer)
            await link.mount_root(target, ["big"])
            assert await in_thread((path / "big").read_bytes) == layer.source
            assert await in_thread((target / "big").read_bytes) == layer.source


async def test_fsmount_does_not_belong_to_who_started_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    script = (
        "import trio, sys, os, signal; from pathlib import Path; from fsmount.link import start_fsmount\n"
        "trio.run(start_fsmount, Path(sys.argv[1])); os.killpg(0, signal.SIGKILL)\n"
    )
    try:
        process = await trio.run_process(
            [sys.executable, "-c", script, str(run_dir)], check=False, start_new_session=True, stdin=subprocess.DEVNULL
        )
        assert process.returncode == -signal.SIGKILL
        async with open_link(run_dir) as link:
            assert link.info.presentations
            session = os.getsid(link.info.holder_pid)
            assert session == os.getsid(link.info.pid) == link.info.holder_pid
    finally:
        await stop_fsmount(run_dir)
    assert not (run_dir / "fsmount.sock").exists()
    assert str(run_dir) not in Path("/proc/self/mountinfo").read_text()
