"""Which pieces are fetched next, case by case. Layers are "a" and "b" with 20 pieces; what is in `held` is not wanted."""

import attrs

from agent.resolve.queue import BACKGROUND_RUN, BULK_S, MAX_WINDOW, PREFETCH_RUN, QUIET_S, PieceQueue, Priority, Run

DEMAND, PREFETCH, BACKGROUND = Priority
PIECES = 20
LATER = QUIET_S + 0.01


@attrs.define
class World:
    """A queue and what the node holds."""

    limits: tuple[int, int, int] = (6, 3, 1)
    held: set[tuple[str, int]] = attrs.field(factory=set)
    queue: PieceQueue[str] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.queue = PieceQueue(lambda key, piece: (key, piece) not in self.held, lambda _key: PIECES, self.limits)

    def want(self, pieces: str | int | range, priority: Priority, now: float = 0.0, key: str = "a") -> None:
        for piece in [pieces] if isinstance(pieces, int) else pieces:
            assert isinstance(piece, int)
            self.queue.want(key, piece, priority, now)

    def take(self, now: float = 0.0) -> list[Run[str]]:
        return list(self.queue.take(now))

    def bring(self, run: Run[str], now: float = 0.0) -> None:
        self.held |= {(run.key, piece) for piece in range(run.first, run.stop)}
        self.queue.finished(run, now)


def extents(runs: list[Run[str]]) -> list[tuple[str, int, int]]:
    return [(run.key, run.first, run.stop) for run in runs]


def test_nothing_wanted_gives_nothing() -> None:
    world = World()
    assert world.take() == []
    assert len(world.queue) == 0
    assert world.queue.runs() == set()


def test_a_single_demand_takes_its_piece_alone() -> None:
    world = World()
    world.want(7, DEMAND)
    assert world.queue.queued(DEMAND) == 1
    (run,) = world.take()
    assert (run.first, run.stop, run.priority) == (7, 8, DEMAND)
    assert len(world.queue) == 0
    assert world.queue.runs() == {run}
    assert world.take() == []


def test_the_window_grows_while_a_reader_goes_in_order_and_is_reset_by_a_jump() -> None:
    world = World()
    sizes, piece = [], 0
    while piece < PIECES:
        world.want(piece, DEMAND)
        (run,) = world.take()
        sizes.append(run.stop - run.first)
        piece = run.stop
        world.bring(run)
    assert sizes == [1, 2, 4, MAX_WINDOW, 5]
    world = World()
    world.want(0, DEMAND)
    world.bring(world.take()[0])
    world.want(10, DEMAND)
    (run,) = world.take()
    assert (run.first, run.stop) == (10, 11)


def test_the_window_ends_before_what_is_held_or_in_flight() -> None:
    world = World(held={("a", 5)})
    for piece in (0, 1):
        world.want(piece, DEMAND)
        (run,) = world.take()
        assert run.stop == (1 if piece == 0 else 3)
        world.bring(run)
    world.want(4, DEMAND)
    (before,) = world.take()
    assert (before.first, before.stop) == (4, 5)
    world = World()
    world.want(range(3, 5), PREFETCH)
    (ahead,) = world.take()
    world.want(1, DEMAND)
    world.want(2, DEMAND)
    assert extents(world.take()) == [("a", 1, 2), ("a", 2, 3)]
    assert (ahead.first, ahead.stop) == (3, 5)


def test_prefetch_and_background_run_over_neighbours_that_are_queued() -> None:
    world = World()
    world.want(range(6), PREFETCH)
    world.want(10, PREFETCH)
    assert extents(world.take()) == [("a", 0, PREFETCH_RUN), ("a", PREFETCH_RUN, 6), ("a", 10, 11)]
    world = World()
    world.want(range(PIECES), BACKGROUND)
    assert extents(world.take(LATER)) == [("a", 0, BACKGROUND_RUN)]


def test_limits_are_by_priority() -> None:
    world = World((2, 1, 1))
    for piece in (0, 4, 8):
        world.want(piece, DEMAND)
    world.want(range(10, 20), PREFETCH)
    first = world.take()
    assert extents(first) == [("a", 0, 1), ("a", 4, 5), ("a", 10, 14)]
    assert world.take() == []
    world.bring(first[0])
    assert extents(world.take()) == [("a", 8, 9)]
    world.bring(first[2])
    assert extents(world.take()) == [("a", 14, 18)]


def test_what_came_meanwhile_is_not_fetched() -> None:
    world = World()
    world.want(range(4), PREFETCH)
    world.held |= {("a", 0), ("a", 2)}
    assert extents(world.take()) == [("a", 1, 2), ("a", 3, 4)]


def test_a_more_urgent_want_moves_a_piece_and_a_less_urgent_one_does_not() -> None:
    world = World()
    world.want(3, BACKGROUND)
    world.want(3, DEMAND)
    world.want(3, PREFETCH)
    world.want(3, DEMAND)
    assert [world.queue.queued(priority) for priority in Priority] == [1, 0, 0]


def test_a_want_of_what_is_in_flight_raises_the_run() -> None:
    world = World()
    world.want(range(4), BACKGROUND)
    (run,) = world.take(LATER)
    world.want(2, PREFETCH, LATER)
    assert (run.priority, run.started_as, run.stop) == (PREFETCH, BACKGROUND, 4)
    world.want(0, DEMAND, LATER)
    world.want(1, DEMAND, LATER)  # the next one is as near as a new request would be
    assert (run.priority, run.stop) == (DEMAND, 4)
    world.want(2, BACKGROUND, LATER)
    assert run.priority == DEMAND
    assert len(world.queue) == 0


def test_a_demand_further_back_cuts_the_run() -> None:
    world = World()
    world.want(range(8), BACKGROUND)
    (run,) = world.take(LATER)
    world.want(4, DEMAND, LATER)
    assert (run.first, run.stop, run.priority) == (0, 4, BACKGROUND)
    assert [world.queue.queued(priority) for priority in Priority] == [1, 0, 3]
    (cut,) = world.take(LATER)
    assert (cut.first, cut.stop, cut.priority) == (4, 5, DEMAND)
    # What is left of a demanded run goes on as prefetch: its reader was not waiting for all of it.
    world = World()
    for piece in (0, 1, 3):
        world.want(piece, DEMAND)
        (run,) = world.take()
        if piece < 3:
            world.bring(run)
    assert (run.first, run.stop) == (3, 7)
    world.want(5, DEMAND)
    assert [world.queue.queued(priority) for priority in Priority] == [1, 1, 0]
    assert extents(world.take()) == [("a", 5, 6), ("a", 6, 7)]


def test_a_run_moves_up_and_ends() -> None:
    world = World()
    world.want(range(4), PREFETCH)
    (run,) = world.take()
    world.queue.advance(run, 2)
    assert run.first == 2
    world.want(0, DEMAND)  # brought, but lost again
    world.want(3, DEMAND)  # the next one
    assert [world.queue.queued(priority) for priority in Priority] == [1, 0, 0]
    assert run.priority == DEMAND
    world.queue.finished(run, 0.0)
    assert world.queue.runs() == set()
    world.want(3, DEMAND)
    assert extents(world.take())[-1] == ("a", 3, 4)


def test_a_run_that_went_past_its_cut_leaves_the_new_one_alone() -> None:
    world = World()
    world.want(range(8), BACKGROUND)
    (run,) = world.take(LATER)
    world.want(4, DEMAND, LATER)
    (other,) = world.take(LATER)
    world.queue.advance(run, 5)
    world.queue.finished(run, LATER)
    assert world.queue.runs() == {other}


def test_background_waits_for_quiet() -> None:
    world = World()
    world.want(0, DEMAND, 10.0)
    world.want(range(10, 12), BACKGROUND, 10.0)
    (run,) = world.take(10.0)
    assert run.key == "a"
    assert not world.queue.may_background(10.0 + LATER)  # the demand is still in flight
    world.bring(run, 11.0)
    assert world.take(11.0 + QUIET_S / 2) == []
    assert extents(world.take(11.0 + LATER)) == [("a", 10, 12)]


def test_background_waits_for_prefetch() -> None:
    world = World((6, 1, 1))
    world.want(range(PREFETCH_RUN + 1), PREFETCH)
    world.want(15, BACKGROUND)
    (run,) = world.take()
    assert world.take(100.0) == []
    world.bring(run, 100.0)
    assert not world.queue.may_background(200.0)  # one is queued
    (run,) = world.take(200.0)
    assert not world.queue.may_background(300.0)  # it is in flight
    world.bring(run, 300.0)
    assert extents(world.take(300.0 + LATER)) == [("a", 15, 16)]


def test_background_helps_who_reads_everything() -> None:
    world = World()
    world.want(15, BACKGROUND)
    now = 50.0
    while now < 50.0 + BULK_S:
        assert not world.queue.is_bulk(now)
        world.want(0, DEMAND, now)
        now += 0.1
    world.want(0, DEMAND, now)
    assert world.queue.is_bulk(now)
    assert extents(world.take(now)) == [("a", 0, 1), ("a", 15, 16)]
    assert not world.queue.is_bulk(now + LATER)
    world.want(1, DEMAND, now + LATER)  # a pause begins the count anew
    assert not world.queue.is_bulk(now + LATER)


def test_a_forgotten_layer_is_wanted_no_more() -> None:
    world = World()
    world.want(range(4), PREFETCH)
    world.want(9, DEMAND)
    world.want(3, DEMAND, key="b")
    world.queue.forget("a")
    assert extents(world.take()) == [("b", 3, 4)]


def test_layers_do_not_disturb_each_other() -> None:
    world = World()
    for key in ("a", "b"):
        world.want(0, DEMAND, key=key)
    for run in world.take():
        world.bring(run)
    world.want(1, DEMAND, key="b")
    assert extents(world.take()) == [("b", 1, 3)]


def test_what_a_run_covers_is_not_taken_again_from_another_queue() -> None:
    world = World()
    world.want(range(1, 3), PREFETCH)
    world.want(0, DEMAND)
    world.bring(world.take()[0])
    world = World((6, 0, 1))
    world.want(range(1, 3), PREFETCH)
    world.want(0, DEMAND)
    world.bring(world.take()[0])
    world.want(1, DEMAND)
    assert extents(world.take()) == [("a", 1, 3)]
    assert len(world.queue) == 0


def test_a_demand_waits_for_a_run_that_will_be_there_soon() -> None:
    world = World()
    world.want(range(4), PREFETCH)
    (run,) = world.take(0.0)
    world.queue.arrived(run, 1, 0.02)
    world.want(3, DEMAND, 0.03)  # two pieces on, at 20 ms each
    assert (run.first, run.stop, run.priority) == (1, 4, DEMAND)
    assert world.take(0.03) == []


def test_a_demand_does_not_wait_for_a_slow_run_nor_for_one_that_stalls() -> None:
    for piece_s, now in ((0.5, 0.6), (0.02, 2.0)):
        world = World()
        world.want(range(4), PREFETCH)
        (run,) = world.take(0.0)
        world.queue.arrived(run, 1, piece_s)
        world.want(3, DEMAND, now)
        assert (run.first, run.stop) == (1, 3)
        assert extents(world.take(now)) == [("a", 3, 4)]


def test_the_pace_is_that_of_all_runs_lately() -> None:
    world = World()
    world.want(range(4), PREFETCH)
    world.want(range(4), PREFETCH, key="b")
    slow, other = world.take(0.0)
    world.queue.arrived(slow, 1, 4.0)
    for piece in range(2, 5):
        world.queue.arrived(slow, piece, 4.0 + 0.01 * piece)
    world.queue.finished(slow, 4.05)
    world.queue.arrived(other, 1, 4.05)
    world.want(3, DEMAND, 4.06, key="b")  # its own first piece was as slow
    assert other.stop == 3
