"""The snapshot records against a model of containerd's rules, by random sequences of requests."""

from pathlib import Path

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agent.runtimes.containerd.filters import parse_filters
from agent.runtimes.containerd.snapshots import (
    Kind,
    SnapshotExists,
    SnapshotInvalid,
    SnapshotNotFound,
    SnapshotRecords,
    SnapshotRefused,
)

NAMES = st.sampled_from(["a", "b", "c", "d", ""])
LABELS = st.dictionaries(st.sampled_from(["x", "y", "containerd.io/snapshot.ref"]), st.sampled_from(["", "1", "2"]))
LAYERS = st.sampled_from(["l1", "l2"])


@attrs.define
class Known:
    parent: str
    kind: Kind
    labels: dict[str, str]
    layer: str | None = None


class Records(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.records = SnapshotRecords(Path(":memory:"))
        self.known: dict[str, Known] = {}
        self.unused: set[str] = set()
        self.ids: set[int] = set()

    def teardown(self) -> None:
        self.records.close()

    def parent_error(self, parent: str) -> type[Exception] | None:
        if parent and parent not in self.known:
            return SnapshotNotFound
        return SnapshotInvalid if parent and self.known[parent].kind is not Kind.COMMITTED else None

    @rule(name=NAMES, parent=NAMES, labels=LABELS, kind=st.sampled_from(Kind), layer=LAYERS)
    def create(self, name: str, parent: str, labels: dict[str, str], kind: Kind, layer: str) -> None:
        served = layer if kind is Kind.COMMITTED else None
        error = SnapshotInvalid if not name else self.parent_error(parent) or (SnapshotExists if name in self.known else None)
        if error is not None:
            with pytest.raises(error):
                self.records.create(name, parent, kind, labels, layer=served)
            return
        found = self.records.create(name, parent, kind, labels, layer=served)
        assert found.id not in self.ids
        self.ids.add(found.id)
        self.known[name] = Known(parent, kind, {key: value for key, value in labels.items() if value}, served)
        if served:
            self.unused.discard(served)

    @rule(name=NAMES, key=NAMES, parent=NAMES, labels=LABELS)
    def commit(self, name: str, key: str, parent: str, labels: dict[str, str]) -> None:
        try:
            found = self.records.commit(name, key, labels, size=5, inodes=2, parent=parent)
        except SnapshotInvalid:
            assert not name or (parent and (self.known[key].parent not in ("", parent) or self.parent_error(parent)))
            return
        except SnapshotExists:
            assert name in self.known
            return
        except SnapshotNotFound:
            assert key not in self.known or parent not in self.known
            return
        except SnapshotRefused:
            assert self.known[key].kind is not Kind.ACTIVE
            return
        old = self.known.pop(key)
        assert old.kind is Kind.ACTIVE
        assert name not in self.known
        assert (found.size, found.inodes) == (5, 2)
        self.known[name] = Known(old.parent or parent, Kind.COMMITTED, {k: v for k, v in labels.items() if v})

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        try:
            self.records.remove(name)
        except SnapshotNotFound:
            assert name not in self.known
            return
        except SnapshotRefused:
            assert any(other.parent == name for other in self.known.values())
            return
        gone = self.known.pop(name)
        assert all(other.parent != name for other in self.known.values())
        if gone.layer and all(other.layer != gone.layer for other in self.known.values()):
            self.unused.add(gone.layer)

    @rule(name=NAMES, labels=LABELS, paths=st.lists(st.sampled_from(["labels", "labels.x", "labels.y", "parent"]), max_size=2))
    def update(self, name: str, labels: dict[str, str], paths: list[str]) -> None:
        try:
            self.records.update(name, labels, paths)
        except SnapshotNotFound:
            assert name not in self.known
            return
        except SnapshotInvalid:
            assert "parent" in paths
            return
        now = dict(self.known[name].labels)
        for path in paths or ["labels"]:
            now = dict(labels) if path == "labels" else now | {path[7:]: labels.get(path[7:], "")}
        self.known[name].labels = {key: value for key, value in now.items() if value}

    @rule(layer=LAYERS)
    def release(self, layer: str) -> None:
        assert self.records.is_unused(layer) == (layer in self.unused)
        self.records.released(layer)
        self.unused.discard(layer)

    @invariant()
    def agrees(self) -> None:
        found = {s.name: Known(s.parent, s.kind, dict(s.labels), s.layer) for s in self.records.select(parse_filters([]))}
        assert found == self.known
        assert set(self.records.unused_layers()) == self.unused
        for ref in ("1", "2"):
            by_ref = self.records.select(parse_filters([f'labels."containerd.io/snapshot.ref"=={ref},kind==committed']))
            wanted = {
                n for n, k in self.known.items() if k.labels.get("containerd.io/snapshot.ref") == ref and k.kind is Kind.COMMITTED
            }
            assert {s.name for s in by_ref} == wanted
        for name, known in self.known.items():
            chain = [s.name for s in self.records.chain(name)]
            assert chain[0] == name
            assert chain[1:2] == ([known.parent] if known.parent else [])


TestRecords = Records.TestCase
TestRecords.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
