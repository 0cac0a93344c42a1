"""The store's one SQLite database: documents, pins, times of use, and where a chunk's content is.

Whether a layer exists is decided by its directory alone; the catalogue is brought in line with the directories at every start
and could be lost without losing a byte of a layer. One connection, used by one thread at a time (the store's `db` limiter).

The connection locks the file for itself. SQLite then keeps the index of its write-ahead log in memory; otherwise it maps a file
for it of which it allocates only one byte in each page, and a block that the disk cannot give behind such a page is SIGBUS. The
log is kept short, so that it and what it brings into the database never need more than the store's `reserve`.

Chunks are found by the first eight bytes of their digest: a key of a third of the size, half the time to fill, and the full
digest is compared in the layer's own table. One row a digest and layer. 13,000 rows: about 30 ms, in its own thread.
"""

import errno
import sqlite3
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import structlog

from agent.errors import StoreError
from agent.formats.model import ChunkTable, Digest

log = structlog.get_logger()

_VERSION: Final = 1
_AT_ONCE: Final = 500
"""Parameters of one statement; SQLite's own limit was 999 until 3.32."""

_UNKNOWN_KEY: Final = 0
"""Of chunks without a digest (`ChunkTable.is_known`): nobody is to find them."""

_LOG_PAGES: Final = 32
_LOG_BYTES: Final = 256 << 10

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS layers (number INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, last_used REAL NOT NULL, is_indexed INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS chunks (key INTEGER, layer INTEGER, chunk INTEGER, PRIMARY KEY (key, layer, chunk)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pins (digest TEXT, owner TEXT, PRIMARY KEY (digest, owner)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS documents (kind TEXT, key TEXT, raw BLOB NOT NULL, PRIMARY KEY (kind, key));
"""


def chunk_key(digest: bytes) -> int:
    """The part of a digest under which its chunk is filed."""
    key: int = struct.unpack_from("<q", digest)[0]
    return key


class Catalogue:
    """The open database; every method may block and is called by one thread at a time."""

    def __init__(self, path: Path, *, is_unclean: bool) -> None:
        try:
            self._db = _connect(path, is_unclean=is_unclean)
        except sqlite3.DatabaseError as exc:
            if isinstance(exc, sqlite3.OperationalError):
                raise StoreError(f"cannot open {path}: {exc}", errno=_errno_of(exc)) from exc
            log.warning(
                "catalogue_broken", path=str(path), reason=str(exc), consequence="pins and image records are lost, layers are not"
            )
            for suffix in ("", "-wal", "-shm"):
                broken = path.with_name(path.name + suffix)
                if broken.exists():
                    broken.replace(path.with_name(f"{path.name}.broken{suffix}"))
            self._db = _connect(path, is_unclean=False)

    def close(self) -> None:
        """Close it."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _mapped_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk makes SQLite roll back by itself
                    self._db.execute("ROLLBACK")
                raise

    def shrink_log(self) -> None:
        """Give back the disk space of the write-ahead log, if there is room for what it brings into the database.

        A transaction that the disk was too small for leaves its log as long as it had become.
        """
        try:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as exc:
            log.debug("catalogue_log_not_shrunk", reason=str(exc))

    # --- layers -----------------------------------------------------------------------------------------------------------

    def reconcile(self, present: Iterable[Digest]) -> tuple[dict[Digest, float], set[Digest]]:
        """Forget layers that are no more; gives times of last use, and the layers whose chunks are not filed yet."""
        wanted = set(present)
        with self._transaction() as db:
            rows = db.execute("SELECT number, digest, last_used, is_indexed FROM layers").fetchall()
            for number, digest, _used, _indexed in rows:
                if digest not in wanted:
                    _delete_layer(db, number)
        used = {Digest(digest): float(at) for _number, digest, at, _indexed in rows if digest in wanted}
        return used, wanted - {Digest(digest) for _number, digest, _used, indexed in rows if indexed}

    def index_layer(self, digest: Digest, chunks: ChunkTable) -> None:
        """File the chunks of a layer."""
        count, digests = len(chunks), chunks.digests
        keys = struct.unpack(f"<{4 * count}q", digests)[::4]
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO layers VALUES (NULL, ?, ?, 0)", (digest, time.time()))
            ((number,),) = db.execute("SELECT number FROM layers WHERE digest = ?", (digest,)).fetchall()
            db.execute("UPDATE layers SET is_indexed = 1 WHERE number = ?", (number,))
            firsts = {key: chunk for chunk, key in zip(range(count - 1, -1, -1), reversed(keys), strict=True)}
            firsts.pop(_UNKNOWN_KEY, None)
            # In the order of the key: the tree is filled from left to right, which takes half the time.
            rows = ((key, number, firsts[key]) for key in sorted(firsts))
            db.executemany("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?)", rows)

    def remove_layer(self, digest: Digest) -> None:
        """Forget a layer and its pins."""
        with self._transaction() as db:
            for (number,) in db.execute("SELECT number FROM layers WHERE digest = ?", (digest,)).fetchall():
                _delete_layer(db, number)
            db.execute("DELETE FROM pins WHERE digest = ?", (digest,))

    def note_used(self, times: Iterable[tuple[Digest, float]]) -> None:
        """Keep times of last use."""
        with self._transaction() as db:
            db.executemany("UPDATE layers SET last_used = ? WHERE digest = ?", [(at, digest) for digest, at in times])

    def find_chunks(self, digests: Sequence[bytes], *, apart_from: str = "") -> list[tuple[int, Digest, int]]:
        """Where the content may be, as (position in `digests`, layer, chunk); the caller compares the whole digest.

        Rows of layer `apart_from` are left out.
        """
        positions: dict[int, list[int]] = {}
        for at, digest in enumerate(digests):
            positions.setdefault(chunk_key(digest), []).append(at)
        keys = list(positions)
        found: list[tuple[int, Digest, int]] = []
        with _mapped_errors():
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                marks = ",".join("?" * len(some))
                query = f"SELECT c.key, l.digest, c.chunk FROM chunks c JOIN layers l ON l.number = c.layer WHERE c.key IN ({marks}) AND l.digest <> ?"  # noqa: S608
                for key, layer, chunk in self._db.execute(query, [*some, apart_from]):
                    found.extend((at, Digest(layer), chunk) for at in positions[key])
        return found

    # --- pins -------------------------------------------------------------------------------------------------------------

    def pins(self) -> dict[Digest, set[str]]:
        """All pins: owners by layer."""
        pins: dict[Digest, set[str]] = {}
        with _mapped_errors():
            for digest, owner in self._db.execute("SELECT digest, owner FROM pins"):
                pins.setdefault(Digest(digest), set()).add(owner)
        return pins

    def pin(self, digest: Digest, owner: str) -> None:
        """Add a pin."""
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO pins VALUES (?, ?)", (digest, owner))

    def unpin(self, digest: Digest, owner: str) -> None:
        """Remove a pin."""
        with self._transaction() as db:
            db.execute("DELETE FROM pins WHERE digest = ? AND owner = ?", (digest, owner))

    # --- documents --------------------------------------------------------------------------------------------------------

    def put_document(self, kind: str, key: str, raw: bytes) -> None:
        """Keep a document, in place of the one of that name."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO documents VALUES (?, ?, ?)", (kind, key, raw))

    def get_document(self, kind: str, key: str) -> bytes | None:
        """A document, None if there is none of that name."""
        with _mapped_errors():
            row = self._db.execute("SELECT raw FROM documents WHERE kind = ? AND key = ?", (kind, key)).fetchone()
        return bytes(row[0]) if row else None

    def list_documents(self, kind: str) -> list[str]:
        """The keys of a kind, sorted."""
        with _mapped_errors():
            return [key for (key,) in self._db.execute("SELECT key FROM documents WHERE kind = ? ORDER BY key", (kind,))]

    def delete_document(self, kind: str, key: str) -> None:
        """Delete a document if it is there."""
        with self._transaction() as db:
            db.execute("DELETE FROM documents WHERE kind = ? AND key = ?", (kind, key))


def _connect(path: Path, *, is_unclean: bool) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # before the log is touched: see the module's text
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
        db.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
        db.execute("PRAGMA synchronous = NORMAL")  # in WAL mode a power cut may lose the last transactions, never the database
        db.execute("PRAGMA cache_size = -1024")  # KiB; memory of the agent is scarce
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in {0, _VERSION}:
            raise StoreError(
                f"{path} has version {version}, this Shoal knows {_VERSION}; start the newer one, or remove the file"
            )
        if is_unclean:
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
        db.executescript(_SCHEMA)
        db.execute(f"PRAGMA user_version = {_VERSION}")
    except BaseException:
        db.close()
        raise
    return db


def _delete_layer(db: sqlite3.Connection, number: int) -> None:
    # There is no index by layer: it would double the time of every start of a new image to speed up a rare removal.
    db.execute("DELETE FROM chunks WHERE layer = ?", (number,))
    db.execute("DELETE FROM layers WHERE number = ?", (number,))


@contextmanager
def _mapped_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise StoreError(f"the catalogue failed: {exc}", errno=_errno_of(exc)) from exc


def _errno_of(exc: sqlite3.Error) -> int:
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    return {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_IOERR: errno.EIO}.get(code, 0)
