"""Whatever is wanted, in whatever order: each piece is fetched once, limits hold, and demand goes first."""

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.resolve.queue import PieceQueue, Priority, Run

KEYS = ("a", "b")
PIECES = 12

keys, numbers, priorities = st.sampled_from(KEYS), st.integers(0, PIECES - 1), st.sampled_from(Priority)


class Node(RuleBasedStateMachine):
    """A resolver without I/O: it wants pieces, takes runs, brings their pieces in order, and ends them."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = (2, 2, 1)
        self.queue: PieceQueue[str] = PieceQueue(lambda key, piece: (key, piece) not in self.held, lambda _: PIECES, self.limits)
        self.held: set[tuple[str, int]] = set()
        self.wanted: set[tuple[str, int]] = set()
        self.fetched: Counter[tuple[str, int]] = Counter()
        self.runs: list[Run[str]] = []
        self.now = 0.0

    @rule(key=keys, piece=numbers, priority=priorities)
    def want(self, key: str, piece: int, priority: Priority) -> None:
        if (key, piece) not in self.held:  # as the resolver does
            self.wanted.add((key, piece))
            self.queue.want(key, piece, priority, self.now)

    @rule(seconds=st.sampled_from([0.01, 0.3, 5.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def take(self) -> None:
        taken = list(self.queue.take(self.now))
        assert [run.started_as for run in taken] == sorted(run.started_as for run in taken)
        self.runs += taken
        # Nothing less urgent was begun while something more urgent waited for no limit.
        for priority in Priority:
            if self.queue.queued(priority) and (priority is not Priority.BACKGROUND or self.queue.may_background(self.now)):
                assert self.active(priority) == self.limits[priority]

    def active(self, priority: Priority) -> int:
        return sum(run.started_as is priority for run in self.runs)

    def bring(self, run: Run[str]) -> None:
        place = (run.key, run.first)
        self.fetched[place] += 1
        self.held.add(place)
        self.queue.advance(run, run.first + 1)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), most=st.integers(1, PIECES))
    def progress(self, data: st.DataObject, most: int) -> None:
        """The link brings the next pieces of a run; one that has all of them ends."""
        run = data.draw(st.sampled_from(self.runs))
        for _ in range(most):
            if run.first < run.stop:
                self.bring(run)
        if run.first >= run.stop:
            self.runs.remove(run)
            self.queue.finished(run, self.now)

    @invariant()
    def each_piece_comes_once(self) -> None:
        assert all(count == 1 for count in self.fetched.values())
        places = [(run.key, piece) for run in self.runs for piece in range(run.first, run.stop)]
        assert len(places) == len(set(places))
        assert not self.held & set(places)

    @invariant()
    def limits_hold(self) -> None:
        for priority in Priority:
            assert self.active(priority) <= self.limits[priority]
        assert self.queue.runs() <= set(self.runs)

    def teardown(self) -> None:
        """When nothing more is wanted, everything wanted comes."""
        for _ in range(4 * PIECES * len(KEYS)):
            self.now += 10.0
            self.take()
            for run in list(self.runs):
                while run.first < run.stop:
                    self.bring(run)
                self.runs.remove(run)
                self.queue.finished(run, self.now)
        assert self.wanted <= self.held
        assert len(self.queue) == 0
        self.each_piece_comes_once()


TestPieceQueue = Node.TestCase
