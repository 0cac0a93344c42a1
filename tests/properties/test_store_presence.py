"""The presence maps against a model made of sets, over arbitrary layouts and orders of events, with restarts in between."""

import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent.formats.model import BLOCK_SIZE, ChunkTable
from agent.store.presence import Presence, blocks_of
from fsmount.bitmap import Bitmap

SIZES = st.sampled_from([1, 5, 100, 2048, 4095, 4096, 4097, 8192, 9000, 20_000])
FILES = st.lists(
    st.tuples(st.lists(st.tuples(SIZES, st.sampled_from([0, 0, 0, 10, 4096, 9000])), min_size=1, max_size=6), st.integers(0, 3)),
    max_size=6,
)


class PresenceMachine(RuleBasedStateMachine):
    """Chunk numbers are drawn as any integer and taken modulo the count."""

    @initialize(files=FILES)
    def lay_out(self, files: list[tuple[list[tuple[int, int]], int]]) -> None:
        table, top = ChunkTable(), 0
        for sizes, copies in files:
            first, at = len(table), top
            for size, hole in sizes:
                number = table.append(0, 0, 0, size, len(table).to_bytes(32, "big"))
                table.volume_offset[number] = at
                at += size + hole
            for original in range(first, len(table)) if copies == 1 else ():
                number = table.append(0, 0, 0, table.size[original], table.digest(original))
                table.volume_offset[number] = table.volume_offset[original]
            top = -(-at // BLOCK_SIZE) * BLOCK_SIZE
        self.table, self.volume_size = table, top
        self.firsts: dict[int, int] = {}
        for number, offset in enumerate(table.volume_offset):
            self.firsts.setdefault(offset, number)
        self.present: set[int] = set()
        self.doubtful: set[int] = set()
        self.folder = tempfile.TemporaryDirectory(prefix="shoal-presence-")
        for name, bits in (("chunks", len(table)), ("doubt", len(table)), ("blocks", blocks_of(top))):
            Bitmap.create(Path(self.folder.name) / name, bits, 1).close()
        self.open()

    def open(self) -> None:
        maps = [Bitmap.open(Path(self.folder.name) / name) for name in ("chunks", "doubt", "blocks")]
        self.presence = Presence(self.table, self.volume_size, chunk_map=maps[0], doubt_map=maps[1], block_map=maps[2])
        self.presence.rebuild_blocks()

    def pick(self, number: int) -> tuple[int, int] | None:
        """A chunk, and the chunk that stands for its place."""
        if not len(self.table):
            return None
        number %= len(self.table)
        return number, self.firsts[self.table.volume_offset[number]]

    @rule(numbers=st.lists(st.integers(0, 100), min_size=1, max_size=8))
    def add(self, numbers: list[int]) -> None:
        for chosen in filter(None, map(self.pick, numbers)):
            self.presence.add(chosen[0])
            self.present.add(chosen[1])
            self.doubtful.discard(chosen[1])

    @rule(number=st.integers(0, 100))
    def drop(self, number: int) -> None:
        if chosen := self.pick(number):
            generation = self.presence.blocks.generation
            self.presence.drop(chosen[0])
            assert self.presence.blocks.generation > generation
            self.present.discard(chosen[1])
            self.doubtful.discard(chosen[1])

    @rule()
    def evict(self) -> None:
        self.presence.drop_all()
        self.present.clear()
        self.doubtful.clear()

    @rule()
    def doubt(self) -> None:
        self.presence.doubt_all(self.presence.snapshot())
        self.doubtful |= self.present
        self.present.clear()

    @rule()
    def reopen(self) -> None:
        self.presence.close()
        self.open()

    @rule()
    def die_between_bits(self) -> None:
        """Killed after chunk bits and before block bits: the block map lacks bits, or has those of chunks just dropped."""
        self.presence.close()
        blocks = Bitmap.open(Path(self.folder.name) / "blocks")
        blocks.clear(0, blocks.bits // 2)
        blocks.set(blocks.bits // 2, blocks.bits)
        blocks.close()
        self.open()

    @invariant()
    def maps_agree_with_the_model(self) -> None:
        table, presence = self.table, self.presence
        for number, offset in enumerate(table.volume_offset):
            assert presence.has(number) == (self.firsts[offset] in self.present)
            assert presence.is_doubtful(number) == (self.firsts[offset] in self.doubtful)
        missing = [number for number in sorted(self.firsts.values()) if number not in self.present]
        assert presence.missing(0, self.volume_size) == missing
        assert presence.present() == sorted(self.present)
        assert presence.doubtful() == sorted(self.doubtful)
        assert presence.is_complete == (not missing)
        absent: set[int] = set()
        for number in missing:
            start, size = table.volume_offset[number], table.size[number]
            absent.update(range(start // BLOCK_SIZE, blocks_of(start + size)))
        assert [presence.blocks.test(block) for block in range(presence.blocks.bits)] == [
            block not in absent for block in range(presence.blocks.bits)
        ]

    def teardown(self) -> None:
        if hasattr(self, "presence"):
            self.presence.close()
            self.folder.cleanup()


PresenceMachine.TestCase.settings = hypothesis.settings(max_examples=60, stateful_step_count=25, deadline=None)
TestPresence = PresenceMachine.TestCase
