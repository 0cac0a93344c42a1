"""The choice of sources: every piece once, never of one who does not hold it, and the preferences that design.md names."""

import random

from hypothesis import given
from hypothesis import strategies as st

from agent.formats.model import Digest
from agent.swarm import Holder, Possession, choose, rank
from agent.swarm.policy import GIVE_UP_FAILURES, MAX_RUN

BLOB = Digest("sha256:" + "ab" * 32)
PIECES = 40


def _holder(peer_id: str, held: int, load: float = 0, failures: float = 0, zone: str = "", rtt_ms: float | None = None) -> Holder:
    possession = Possession(BLOB, PIECES << 20, PIECES, held.to_bytes((PIECES + 7) // 8, "little"))
    return Holder(peer_id, f"{peer_id}:1", possession, load, failures, zone, rtt_ms)


EVERYTHING = (1 << PIECES) - 1
holder_lists = st.lists(
    st.builds(
        _holder,
        st.sampled_from([f"p{number}" for number in range(8)]),
        st.integers(0, EVERYTHING),
        st.floats(0, 1),
        st.floats(0, 6),
        st.sampled_from(["", "a", "b"]),
        st.none() | st.floats(0, 200),
    ),
    max_size=8,
    unique_by=lambda holder: holder.peer_id,
)
piece_lists = st.sets(st.integers(0, PIECES - 1)).map(sorted)


@given(
    piece_lists,
    holder_lists,
    st.sampled_from(["", "a"]),
    st.sets(st.sampled_from(["p0", "p1"])),
    st.integers(1, 10),
    st.randoms(),
)
def test_every_piece_once_and_of_somebody_who_holds_it(
    pieces: list[int], holders: list[Holder], zone: str, excluded: set[str], max_run: int, rand: random.Random
) -> None:
    chosen = choose(pieces, holders, zone=zone, excluded=excluded, jitter=rand.random, max_run=max_run)
    assert [piece for assignment in chosen for piece in assignment.pieces] == pieces
    usable = {h.peer_id: h for h in holders if h.peer_id not in excluded and h.failures <= GIVE_UP_FAILURES}
    for assignment in chosen:
        first, last = assignment.pieces[0], assignment.pieces[-1]
        assert list(assignment.pieces) == list(range(first, last + 1))
        assert len(assignment.pieces) <= max_run
        if assignment.source:
            assert all(usable[assignment.source].possession.has_piece(piece) for piece in assignment.pieces)
        else:
            assert not any(h.possession.has_piece(piece) for h in usable.values() for piece in assignment.pieces)


@given(holder_lists, st.randoms())
def test_rank_keeps_only_who_may_be_asked(holders: list[Holder], rand: random.Random) -> None:
    ranked = rank(holders, excluded={"p0"}, jitter=rand.random)
    assert len({holder.peer_id for holder in ranked}) == len(ranked)
    assert all(h in holders and h.peer_id != "p0" and h.failures <= GIVE_UP_FAILURES for h in ranked)


def _order(*holders: Holder, zone: str = "") -> list[str]:
    return [holder.peer_id for holder in rank(holders, zone=zone)]


def test_preferences() -> None:
    assert _order(_holder("busy", 1, load=1), _holder("idle", 1)) == ["idle", "busy"]
    assert _order(_holder("far", 1, zone="b"), _holder("near", 1, zone="a"), zone="a") == ["near", "far"]
    assert _order(_holder("failed", 1, failures=1), _holder("far", 1, load=1, zone="b"), zone="a") == ["far", "failed"]
    assert _order(_holder("slow", 1, rtt_ms=80), _holder("fast", 1, rtt_ms=1)) == ["fast", "slow"]
    assert _order(_holder("broken", 1, failures=GIVE_UP_FAILURES + 1)) == []


def test_a_long_want_is_spread_over_equal_holders() -> None:
    chosen = choose(range(PIECES), [_holder(name, EVERYTHING) for name in "abc"])
    counts = {name: sum(len(a.pieces) for a in chosen if a.source == name) for name in "abc"}
    assert sum(counts.values()) == PIECES
    assert min(counts.values()) >= MAX_RUN


def test_partial_holders_are_used_for_what_they_have_and_the_registry_for_the_rest() -> None:
    chosen = choose(range(10), [_holder("low", 0b0000011111), _holder("high", 0b1100000000)])
    assert [(a.source, a.pieces) for a in chosen] == [("low", (0, 1, 2, 3, 4)), ("", (5, 6, 7)), ("high", (8, 9))]
