import hypothesis.strategies as st
from hypothesis import given

from agent.formats.model import Digest
from agent.store.eviction import LayerFacts, plan_eviction

LAYERS = st.lists(
    st.builds(
        LayerFacts,
        digest=st.integers(0, 1000).map(lambda number: Digest(str(number))),
        last_used_s=st.sampled_from([0.0, 1.0, 2.0, 3.0]),
        is_pinned=st.booleans(),
        is_complete=st.booleans(),
        blob_bytes=st.integers(0, 100),
        data_bytes=st.integers(0, 100),
    ),
    unique_by=lambda layer: layer.digest,
    max_size=12,
)


@given(LAYERS, st.integers(-10, 1500))
def test_a_plan_is_sufficient_minimal_and_in_order(layers: list[LayerFacts], to_free: int) -> None:
    by_digest = {layer.digest: layer for layer in layers}
    plan = plan_eviction(layers, to_free=to_free)
    freed = sum(item.frees for item in plan)
    available = sum(layer.blob_bytes + layer.data_bytes for layer in layers if not layer.is_pinned)
    assert not any(by_digest[item.digest].is_pinned for item in plan)
    assert all(item.frees == getattr(by_digest[item.digest], f"{item.part}_bytes") > 0 for item in plan)
    assert len({(item.digest, item.part) for item in plan}) == len(plan)
    assert freed == available if freed < to_free else True
    if plan:
        assert freed - plan[-1].frees < to_free
    cheap = [item.part == "blob" and by_digest[item.digest].is_complete for item in plan]
    assert cheap == sorted(cheap, reverse=True)
    for is_cheap in (True, False):
        used = [by_digest[item.digest].last_used_s for item, kind in zip(plan, cheap, strict=True) if kind == is_cheap]
        assert used == sorted(used)
    if not all(cheap):
        taken = {item.digest for item in plan if item.part == "blob"}
        assert taken >= {layer.digest for layer in layers if layer.is_complete and not layer.is_pinned and layer.blob_bytes}


@given(LAYERS, st.integers(0, 1500), st.randoms())
def test_the_order_of_the_facts_does_not_matter(layers: list[LayerFacts], to_free: int, random: "object") -> None:
    shuffled = sorted(layers, key=lambda layer: hash((layer.digest, id(random))))
    assert plan_eviction(layers, to_free=to_free) == plan_eviction(shuffled, to_free=to_free)
