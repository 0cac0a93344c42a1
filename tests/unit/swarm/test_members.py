import pytest

from agent.formats.model import Digest
from agent.swarm.members import (
    FAILURE_HALF_LIFE_S,
    MAX_BLOBS_A_PEER,
    STRIKE_S,
    Members,
    PeerState,
    Possession,
    blob_key,
    join_address,
)
from agent.swarm.possession import Delta, Have, Hello, Load, PossessionError

BLOB = Digest("sha256:" + "ab" * 32)
KEY = blob_key(BLOB)


@pytest.fixture
def members() -> Members:
    return Members()


def _join(members: Members, peer_id: str = "p", data_address: str = "0.0.0.0:4406") -> PeerState:
    return members.join(peer_id, Hello(1, "0.1", data_address, "z", ()), "192.0.2.7", ())


def test_possession_counts_bits() -> None:
    possession = Possession(BLOB, 100, 10, b"\x01\x02")
    assert [piece for piece in range(-2, 20) if possession.has_piece(piece)] == [0, 9]
    assert not possession.is_complete
    assert not possession.is_empty
    assert Possession(BLOB, 100, 10, b"\xff\x03").is_complete
    assert Possession(BLOB, 100, 10, b"\0\0").is_empty


def test_holdings_follow_messages(members: Members) -> None:
    peer = _join(members)
    assert members.holders(BLOB, 0) == []
    members.has(peer, Have(KEY, 1000, 10, b"\x01\x00", 5))
    members.changed(peer, Delta(KEY, (3, 9), (0,)))
    (holder,) = members.holders(BLOB, 0)
    assert holder.possession == Possession(BLOB, 1000, 10, b"\x08\x02", 5)
    assert holder.data_address == "192.0.2.7:4406"
    assert members.infos()[0].blobs == 1
    members.withdraw(peer, (KEY,))
    assert members.holders(BLOB, 0) == []


def test_a_peer_that_holds_nothing_or_has_no_address_is_no_holder(members: Members) -> None:
    members.has(_join(members, "a"), Have(KEY, 1000, 10, b"\0\0", -1))
    members.has(_join(members, "b", "nonsense"), Have(KEY, 1000, 10, b"\1\0", -1))
    assert members.holders(BLOB, 0) == []


def test_gone_peers_hold_nothing(members: Members) -> None:
    peer = _join(members)
    members.has(peer, Have(KEY, 1000, 10, b"\x01\x00", 5))
    members.leave("p")
    assert members.holders(BLOB, 0) == []
    assert "p" not in members


def test_deltas_beyond_the_blob_and_of_unknown_blobs(members: Members) -> None:
    peer = _join(members)
    members.changed(peer, Delta(KEY, (99,)))  # nothing is known of the blob: it crossed an Unwant
    members.has(peer, Have(KEY, 1000, 10, b"\x01\x00", 5))
    with pytest.raises(PossessionError):
        members.changed(peer, Delta(KEY, (10,)))


def test_memory_for_one_peer_is_bounded(members: Members) -> None:
    peer = _join(members)
    for number in range(MAX_BLOBS_A_PEER):
        members.has(peer, Have(number.to_bytes(32, "big"), 1, 1, b"\1", -1))
    members.has(peer, Have((0).to_bytes(32, "big"), 1, 1, b"\0", -1))
    with pytest.raises(PossessionError):
        members.has(peer, Have(b"\xff" * 32, 1, 1, b"\1", -1))


def test_strikes_end_and_failures_decay(members: Members) -> None:
    peer = _join(members)
    members.has(peer, Have(KEY, 1000, 10, b"\x01\x00", 5))
    members.strike("p", 100.0)
    assert members.holders(BLOB, 100.0 + STRIKE_S - 1) == []
    assert len(members.holders(BLOB, 100.0 + STRIKE_S)) == 1
    members.fail("p", 0.0)
    members.fail("p", 0.0)
    assert members.failures("p", 0.0) == 2
    assert members.failures("p", FAILURE_HALF_LIFE_S) == pytest.approx(1)
    assert members.failures("p", 20 * FAILURE_HALF_LIFE_S) == 0


def test_load_is_a_share(members: Members) -> None:
    peer = _join(members)
    for active, slots, expected in ((0, 8, 0), (4, 8, 0.5), (20, 8, 1), (0, 0, 1)):
        members.loaded(peer, Load(active, slots))
        assert peer.load == expected


@pytest.mark.parametrize(
    ("said", "seen", "expected"),
    [
        (":4406", "10.0.0.1", "10.0.0.1:4406"),
        ("0.0.0.0:1", "fd00::1", "[fd00::1]:1"),
        ("[::]:1", "10.0.0.1", "10.0.0.1:1"),
        ("host:1", "10.0.0.1", "host:1"),
        ("host:0", "10.0.0.1", ""),
        ("host", "10.0.0.1", ""),
        ("host:99999", "10.0.0.1", ""),
        ("", "10.0.0.1", ""),
    ],
)
def test_data_address(said: str, seen: str, expected: str) -> None:
    assert join_address(said, seen) == expected
