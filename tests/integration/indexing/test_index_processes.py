"""Index processes: what they give, and what becomes of them when something goes wrong."""

import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
import trio

from agent.errors import ShoalError, SourceUnavailable
from agent.formats import estargz, soci
from agent.formats.catalogue import find_format
from agent.formats.model import Digest, FormatError, LayerIndex, NoIndex
from agent.formats.opening import BlobRange, LayerFacts, Want
from agent.indexing import processes as module
from agent.indexing.processes import IndexProcesses, open_index_processes
from fsmount.erofs import write_image
from tests.sample_layers import make_estargz, noise_tar


@attrs.frozen
class Sample:
    """An eStargz layer in memory."""

    facts: LayerFacts
    blob: bytes

    async def answer(self, want: Want) -> bytes:
        assert isinstance(want, BlobRange)
        await trio.lowlevel.checkpoint()
        return self.blob[want.start : want.stop]

    async def read(self, processes: IndexProcesses, answer: Callable[[Want], Awaitable[bytes]] | None = None) -> LayerIndex:
        found = find_format(self.facts)
        assert found is not None
        index, _ = await processes.read(found, self.facts, answer or self.answer)
        return index


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Forty files of 50 kB."""
    folder = tmp_path_factory.mktemp("layer")
    noise_tar(folder / "tar", files=40, size=50_000, seed=1)
    with (folder / "tar").open("rb") as stream:
        layer = make_estargz(stream, folder / "blob", prioritized=["noise/00003"], chunk_size=16 << 10)
    return Sample(LayerFacts(layer.digest, layer.size, annotations=layer.annotations), layer.path.read_bytes())


def children() -> set[int]:
    """Index processes that this one has started."""
    return _below("self")


def workers() -> set[int]:
    """Those that they have forked."""
    return {pid for child in children() for pid in _below(str(child))}


def _below(parent: str) -> set[int]:
    found: set[int] = set()
    with suppress(OSError):
        for task in Path(f"/proc/{parent}/task").iterdir():
            for pid in (task / "children").read_text().split():
                with suppress(OSError):
                    if b"agent.indexing.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        found.add(int(pid))
    return found


async def until_none(which: Callable[[], set[int]] = children) -> None:
    with trio.fail_after(20):
        while which():  # noqa: ASYNC110 - of a process's end there is no other news
            await trio.sleep(0.01)


async def until_zombie(pid: int) -> None:
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":  # noqa: ASYNC110
        await trio.sleep(0.01)


async def test_what_a_process_gives_is_what_the_parser_gives(sample: Sample) -> None:
    with trio.fail_after(60):
        async with open_index_processes() as processes:
            found = find_format(sample.facts)
            assert found is not None
            index, meta = await processes.read(found, sample.facts, sample.answer)
    footer = estargz.parse_footer(sample.blob[-51:], len(sample.blob))
    assert footer is not None
    toc = estargz.unpack_toc(sample.blob[footer.toc_offset : -51])
    expected = estargz.parse_toc(toc, blob_size=len(sample.blob), toc_offset=footer.toc_offset, toc_digest=None)
    assert index.chunks.to_bytes() == expected.chunks.to_bytes()
    assert index.pieces.to_bytes() == expected.pieces.to_bytes()
    assert meta == write_image(expected.root, volume_size=expected.volume_size, user_markers=False)
    same = ("format", "codec", "volume_size", "entry_count", "prefetch_stop", "warnings", "prefetch_pieces", "parts", "members")
    assert [getattr(index, name) for name in same] == [getattr(expected, name) for name in same]
    assert index.prefetch_stop > 0
    await until_none()


async def test_one_forks_for_many_and_more_than_there_may_be_wait(sample: Sample) -> None:
    most = 0

    async def slow(want: Want) -> bytes:
        nonlocal most
        most = max(most, len(workers()))
        await trio.sleep(0.05)
        return await sample.answer(want)

    with trio.fail_after(60):
        async with open_index_processes() as processes:
            await sample.read(processes)
            (pid,) = children()
            await sample.read(processes)
            assert children() == {pid}
            async with trio.open_nursery() as nursery:
                for _ in range(6):
                    nursery.start_soon(sample.read, processes, slow)
            assert children() == {pid}
            assert most == module.MOST
            await until_none(workers)
    await until_none()


async def test_one_is_ready_when_it_is_expected(sample: Sample) -> None:
    with trio.fail_after(60):
        async with open_index_processes() as processes:
            processes.expect()
            processes.expect()
            while not processes.is_ready:  # noqa: ASYNC110 - nor of its beginning
                await trio.sleep(0.01)
            before = children()
            assert len(before) == 1
            await sample.read(processes)
            assert children() == before


async def test_idle_ones_end(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.1)
    with trio.fail_after(60):
        async with open_index_processes() as processes:
            await sample.read(processes)
            await until_none()
            await sample.read(processes)


async def test_wrong_bytes_are_told_and_the_process_goes_on(sample: Sample) -> None:
    async def spoilt(want: Want) -> bytes:
        data = bytearray(await sample.answer(want))
        data[-200] ^= 1  # in the TOC
        return bytes(data)

    with trio.fail_after(60):
        async with open_index_processes() as processes:
            with pytest.raises(FormatError):
                await sample.read(processes, spoilt)
            before = children()
            await sample.read(processes)
            assert children() == before != set()


async def test_that_there_is_no_index_is_told_as_such() -> None:
    facts = LayerFacts(Digest("sha256:" + "1" * 64), 1000, "application/vnd.oci.image.layer.v1.tar+gzip")

    async def nothing(_want: Want) -> bytes:
        await trio.lowlevel.checkpoint()
        return b""

    with trio.fail_after(60):
        async with open_index_processes() as processes:
            with pytest.raises(NoIndex):
                await processes.read(soci.FORMAT_V1, facts, nothing)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_process_that_dies_makes_the_layer_unreadable_and_no_more(sample: Sample, number: signal.Signals) -> None:
    async def deadly(want: Want) -> bytes:
        (pid,) = workers()
        os.kill(pid, number)
        return await sample.answer(want)

    with trio.fail_after(60):
        async with open_index_processes() as processes:
            with pytest.raises(FormatError, match="has died"):
                await sample.read(processes, deadly)
            before = children()
            await sample.read(processes)
            assert children() == before != set()


async def test_one_that_died_while_it_was_idle_is_replaced(sample: Sample) -> None:
    with trio.fail_after(60):
        async with open_index_processes() as processes:
            await sample.read(processes)
            (pid,) = children()
            os.kill(pid, signal.SIGKILL)
            await until_zombie(pid)
            await sample.read(processes)
            assert pid not in children()


async def test_a_source_that_fails_is_heard_and_the_process_ends(sample: Sample) -> None:
    async def nobody(_want: Want) -> bytes:
        await trio.lowlevel.checkpoint()
        raise SourceUnavailable("nobody has it")

    with trio.fail_after(60):
        async with open_index_processes() as processes:
            with pytest.raises(SourceUnavailable):
                await sample.read(processes, nobody)
            await until_none(workers)


async def test_who_gives_up_leaves_no_process_behind(sample: Sample) -> None:
    async def never(_want: Want) -> bytes:
        scope.cancel()
        await trio.sleep_forever()
        raise AssertionError

    with trio.fail_after(60):
        async with open_index_processes() as processes:
            with trio.CancelScope() as scope:
                await sample.read(processes, never)
            assert scope.cancelled_caught
            await until_none(workers)
            await sample.read(processes)


async def test_a_defect_is_an_error_of_that_layer_alone(sample: Sample) -> None:
    broken = attrs.evolve(sample.facts, annotations={})  # nobody asks a format for a layer that is not its own
    with trio.fail_after(60):
        async with open_index_processes() as processes:
            with pytest.raises(ShoalError, match="KeyError") as raised:
                await processes.read(estargz.FORMAT, broken, sample.answer)
            assert not isinstance(raised.value, FormatError)
            await sample.read(processes)
