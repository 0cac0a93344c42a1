from agent.formats.model import Digest
from agent.store.eviction import Eviction, LayerFacts, bytes_to_free, plan_eviction


def facts(name: str, used: float, *, pinned: bool = False, complete: bool = True, blob: int = 10, data: int = 30) -> LayerFacts:
    return LayerFacts(Digest(name), used, pinned, complete, blob, data)


def test_blobs_of_complete_volumes_go_first_oldest_first() -> None:
    plan = plan_eviction([facts("new", 2), facts("old", 1)], to_free=15)
    assert plan == [Eviction(Digest("old"), "blob", 10), Eviction(Digest("new"), "blob", 10)]


def test_volumes_go_when_blobs_do_not_suffice() -> None:
    plan = plan_eviction([facts("new", 2), facts("old", 1), facts("partial", 0, complete=False)], to_free=61)
    assert [(str(item.digest), item.part) for item in plan] == [
        ("old", "blob"),
        ("new", "blob"),
        ("partial", "blob"),
        ("partial", "data"),
        ("old", "data"),
    ]


def test_the_pinned_stay() -> None:
    assert plan_eviction([facts("kept", 1, pinned=True)], to_free=100) == []


def test_nothing_to_do_below_the_quota() -> None:
    assert bytes_to_free(100, None) == 0
    assert bytes_to_free(100, 100) == 0
    assert bytes_to_free(101, 100) == 11
    assert plan_eviction([facts("any", 1)], to_free=0) == []
