"""The record of every snapshot: what exists, on what it stands, and which layer serves it.

The rules are those of containerd's own metadata store (core/snapshots/storage): names are unique over all kinds, a parent must
be committed, a snapshot with children stays, a commit renames an active snapshot and replaces its labels. Kept in one sqlite
file with a full sync at each change, as containerd does with its own: after a power cut both remember the same snapshots.

Ids are never used twice, so a directory named by one can wait for its deletion while its key is used again. A layer that no
snapshot stands on any more is remembered as unused until it was released.

All methods block and belong in one thread at a time (`check_same_thread` is off because that thread may be any of a pool's).
"""

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Final, Self

import attrs

from agent.errors import ShoalError, StoreError
from agent.runtimes.containerd.filters import Filter, snapshot_fields
from agent.runtimes.containerd.labels import SNAPSHOT_REF

SCHEMA_VERSION: Final = 1

_SCHEMA: Final = """
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    parent INTEGER REFERENCES snapshots (id),
    kind INTEGER NOT NULL,
    created_ns INTEGER NOT NULL,
    updated_ns INTEGER NOT NULL,
    size INTEGER NOT NULL DEFAULT 0,
    inodes INTEGER NOT NULL DEFAULT 0,
    layer TEXT,
    ref TEXT,
    labels TEXT NOT NULL
) STRICT;
CREATE INDEX snapshots_parent ON snapshots (parent);
CREATE INDEX snapshots_ref ON snapshots (ref) WHERE ref IS NOT NULL;
CREATE INDEX snapshots_layer ON snapshots (layer) WHERE layer IS NOT NULL;
CREATE TABLE unused_layers (layer TEXT PRIMARY KEY) STRICT;
"""

_COLUMNS: Final = (
    "s.id, s.name, coalesce(p.name, ''), s.kind, s.created_ns, s.updated_ns, s.size, s.inodes, s.layer, s.labels"
    " FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent"
)

_CHAIN: Final = (
    "WITH RECURSIVE chain (id, depth) AS ("  # noqa: S608 made of constants
    " SELECT id, 0 FROM snapshots WHERE name = ?"
    " UNION ALL SELECT snapshots.parent, depth + 1 FROM chain JOIN snapshots ON snapshots.id = chain.id"
    " WHERE snapshots.parent IS NOT NULL)"
    f" SELECT {_COLUMNS} JOIN chain ON chain.id = s.id ORDER BY depth"
)

_Row = tuple[int, str, str, int, int, int, int, int, str | None, str]


class SnapshotError(ShoalError):
    """A request on snapshots that cannot be done; its class says which gRPC status it becomes."""


class SnapshotNotFound(SnapshotError):
    """No snapshot or parent of that name."""


class SnapshotExists(SnapshotError):
    """The name is taken, or (with the ref label) the layer is already there."""


class SnapshotRefused(SnapshotError):
    """The snapshot is in the wrong state for it: it has children, or is not active."""


class SnapshotInvalid(SnapshotError):
    """The request makes no sense in any state."""


class SnapshotUnavailable(SnapshotError):
    """A layer beneath is not served at the moment; others are."""


class Kind(IntEnum):
    """What a snapshot is; the numbers are those of the API."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@attrs.frozen
class Snapshot:
    """One record. `layer` is the name of the layer that serves it, None for one with files of its own. Times are Unix
    nanoseconds; size and inodes are those at commit."""

    id: int
    name: str
    parent: str
    kind: Kind
    created_ns: int
    updated_ns: int
    size: int
    inodes: int
    layer: str | None
    labels: Mapping[str, str]


class SnapshotRecords:
    """The file of records."""

    def __init__(self, path: Path) -> None:
        """Open or create.

        Raises:
            StoreError: it cannot be opened, or a newer version wrote it.
        """
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        except sqlite3.Error as exc:
            raise StoreError(f"cannot open the snapshot records {path}: {exc}") from exc
        if version > SCHEMA_VERSION:
            self._db.close()
            raise StoreError(f"{path} was written by a newer version of Shoal (records version {version})")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def get(self, name: str) -> Snapshot:
        """The snapshot of that name.

        Raises:
            SnapshotNotFound: there is none.
        """
        row: _Row | None = self._db.execute(f"SELECT {_COLUMNS} WHERE s.name = ?", (name,)).fetchone()
        if row is None:
            raise SnapshotNotFound(f"snapshot {name} does not exist")
        return _snapshot(row)

    def chain(self, name: str) -> list[Snapshot]:
        """The snapshot and everything beneath it, nearest first.

        Raises:
            SnapshotNotFound: there is none of that name.
        """
        rows: list[_Row] = self._db.execute(_CHAIN, (name,)).fetchall()
        if not rows:
            raise SnapshotNotFound(f"snapshot {name} does not exist")
        return [_snapshot(row) for row in rows]

    def select(self, wanted: Filter) -> list[Snapshot]:
        """Every snapshot that passes the filter, oldest first."""
        rows: Iterable[_Row]
        # containerd asks for one ref after each skipped layer: that question must not read every row.
        refs = [
            next((s.value for s in group if s.operator == "==" and ".".join(s.path) == f"labels.{SNAPSHOT_REF}"), None)
            for group in wanted.groups
        ]
        if refs and all(ref is not None for ref in refs):
            marks = ",".join("?" * len(refs))
            rows = self._db.execute(f"SELECT {_COLUMNS} WHERE s.ref IN ({marks}) ORDER BY s.id", refs)
        else:
            rows = self._db.execute(f"SELECT {_COLUMNS} ORDER BY s.id")
        found = (_snapshot(row) for row in rows)
        return [s for s in found if wanted.matches(snapshot_fields(s.name, s.parent, s.kind.name.lower(), s.labels))]

    def create(self, name: str, parent: str, kind: Kind, labels: Mapping[str, str], *, layer: str | None = None) -> Snapshot:
        """Add a snapshot; a committed one only with the layer that serves it.

        Raises:
            SnapshotInvalid: no name, or the parent is not committed.
            SnapshotNotFound: no such parent.
            SnapshotExists: the name is taken.
        """
        if not name:
            raise SnapshotInvalid("a snapshot needs a key")
        with self._change():
            parent_id = self._committed_parent(parent)
            if self._db.execute("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone():
                raise SnapshotExists(f"snapshot {name} already exists")
            now = time.time_ns()
            kept = {key: value for key, value in labels.items() if value}
            self._db.execute(
                "INSERT INTO snapshots (name, parent, kind, created_ns, updated_ns, layer, ref, labels) VALUES (?,?,?,?,?,?,?,?)",
                (name, parent_id, kind, now, now, layer, kept.get(SNAPSHOT_REF), json.dumps(kept)),
            )
            if layer is not None:
                self._db.execute("DELETE FROM unused_layers WHERE layer = ?", (layer,))
            return self.get(name)

    def commit(self, name: str, key: str, labels: Mapping[str, str], *, size: int, inodes: int, parent: str = "") -> Snapshot:
        """Turn active `key` into committed `name` with new labels; one without a parent may get one here.

        Raises:
            SnapshotInvalid: no name, or another parent than it has.
            SnapshotExists: the name is taken.
            SnapshotNotFound: no such key or parent.
            SnapshotRefused: `key` is not active.
        """
        if not name:
            raise SnapshotInvalid("a committed snapshot needs a name")
        with self._change():
            if self._db.execute("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone():
                raise SnapshotExists(f"committed snapshot {name} already exists")
            active = self.get(key)
            if active.kind is not Kind.ACTIVE:
                raise SnapshotRefused(f"snapshot {key} is not active")
            if parent and active.parent not in ("", parent):
                raise SnapshotInvalid(f"cannot change the parent of snapshot {key} on commit")
            now = time.time_ns()
            kept = {label: value for label, value in labels.items() if value}
            self._db.execute(
                "UPDATE snapshots SET name = ?, parent = ?, kind = ?, created_ns = ?, updated_ns = ?, size = ?, inodes = ?,"
                " ref = ?, labels = ? WHERE id = ?",
                (
                    name,
                    self._committed_parent(active.parent or parent),
                    Kind.COMMITTED,
                    now,
                    now,
                    size,
                    inodes,
                    kept.get(SNAPSHOT_REF),
                    json.dumps(kept),
                    active.id,
                ),
            )
            return self.get(name)

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Change labels: all of them, or those that `paths` names (`labels`, `labels.<key>`); an empty value deletes one.

        Raises:
            SnapshotNotFound: there is none of that name.
            SnapshotInvalid: a path names something that cannot change.
        """
        with self._change():
            changed = dict(self.get(name).labels)
            for path in paths or ("labels",):
                if path == "labels":
                    changed = dict(labels)
                elif path.startswith("labels."):
                    key = path.removeprefix("labels.")
                    changed[key] = labels.get(key, "")
                else:
                    raise SnapshotInvalid(f"cannot update {path!r} of snapshot {name}: only labels change")
            changed = {key: value for key, value in changed.items() if value}
            self._db.execute(
                "UPDATE snapshots SET updated_ns = ?, ref = ?, labels = ? WHERE name = ?",
                (time.time_ns(), changed.get(SNAPSHOT_REF), json.dumps(changed), name),
            )
            return self.get(name)

    def remove(self, name: str) -> Snapshot:
        """Forget a snapshot; gives what it was. Its directory and layer wait for `unused_layers` and `ids`.

        Raises:
            SnapshotNotFound: there is none of that name.
            SnapshotRefused: others stand on it.
        """
        with self._change():
            found = self.get(name)
            if self._db.execute("SELECT 1 FROM snapshots WHERE parent = ?", (found.id,)).fetchone():
                raise SnapshotRefused(f"cannot remove snapshot {name}: it has children")
            self._db.execute("DELETE FROM snapshots WHERE id = ?", (found.id,))
            if found.layer and not self._db.execute("SELECT 1 FROM snapshots WHERE layer = ?", (found.layer,)).fetchone():
                self._db.execute("INSERT OR IGNORE INTO unused_layers VALUES (?)", (found.layer,))
            return found

    def find_remote(self, namespace: str, ref: str, parent: str) -> Snapshot | None:
        """A committed snapshot that a layer serves, of this namespace, with this ref label and parent."""
        rows: list[_Row] = self._db.execute(
            f"SELECT {_COLUMNS} WHERE s.ref = ? AND s.kind = ? AND s.layer IS NOT NULL ORDER BY s.id", (ref, Kind.COMMITTED)
        ).fetchall()
        found = (_snapshot(row) for row in rows)
        return next((s for s in found if s.parent == parent and s.name.startswith(f"{namespace}/")), None)

    def ids(self) -> set[int]:
        """Ids in use: directories of others can go."""
        return {identity for (identity,) in self._db.execute("SELECT id FROM snapshots")}

    def layers(self) -> dict[str, list[int]]:
        """Every layer that snapshots stand on, with the ids of those snapshots."""
        found: dict[str, list[int]] = {}
        for layer, identity in self._db.execute("SELECT layer, id FROM snapshots WHERE layer IS NOT NULL ORDER BY id"):
            found.setdefault(layer, []).append(identity)
        return found

    def labels_of_layer(self, layer: str) -> Mapping[str, str]:
        """The labels of the newest snapshot that stands on the layer, none if none does."""
        row = self._db.execute("SELECT labels FROM snapshots WHERE layer = ? ORDER BY id DESC LIMIT 1", (layer,)).fetchone()
        labels: dict[str, str] = json.loads(row[0]) if row else {}
        return labels

    def unused_layers(self) -> list[str]:
        """Layers that no snapshot stands on and that were not released yet."""
        return [layer for (layer,) in self._db.execute("SELECT layer FROM unused_layers")]

    def is_unused(self, layer: str) -> bool:
        """Whether that layer is still waiting for its release."""
        return self._db.execute("SELECT 1 FROM unused_layers WHERE layer = ?", (layer,)).fetchone() is not None

    def released(self, layer: str) -> None:
        """The layer was given back."""
        with self._change():
            self._db.execute("DELETE FROM unused_layers WHERE layer = ?", (layer,))

    def _committed_parent(self, parent: str) -> int | None:
        if not parent:
            return None
        found: tuple[int, int] | None = self._db.execute("SELECT id, kind FROM snapshots WHERE name = ?", (parent,)).fetchone()
        if found is None:
            raise SnapshotNotFound(f"parent {parent} does not exist")
        if found[1] != Kind.COMMITTED:
            raise SnapshotInvalid(f"parent {parent} is not committed")
        return found[0]

    def _change(self) -> "_Transaction":
        return _Transaction(self._db)


class _Transaction:
    __slots__ = ("_db",)

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


def _snapshot(row: _Row) -> Snapshot:
    identity, name, parent, kind, created_ns, updated_ns, size, inodes, layer, labels = row
    return Snapshot(identity, name, parent, Kind(kind), created_ns, updated_ns, size, inodes, layer, json.loads(labels))
