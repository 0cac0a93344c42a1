"""The space set aside: kept from those who write data, lent to one note at a time, taken back."""

import os
import threading
from pathlib import Path

from agent.store import open_store
from agent.store.reserve import RESERVE_BYTES, Reserve


def set_aside(store: Path) -> int:
    return (store / "reserve").stat().st_blocks * 512


def test_is_lent_while_nobody_writes_and_taken_back(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path)
    assert not reserve.give_up()
    assert reserve.take()
    assert reserve.take()
    assert set_aside(tmp_path) >= RESERVE_BYTES
    wrote = threading.Event()

    def write() -> None:
        with reserve.gate.shared():
            wrote.set()

    with reserve.lent():
        assert set_aside(tmp_path) == 0
        writer = threading.Thread(target=write)
        writer.start()
        assert not wrote.is_set()
    assert wrote.wait(10)
    writer.join(10)
    assert set_aside(tmp_path) >= RESERVE_BYTES
    os.truncate(tmp_path / "reserve", 4096)  # as much as there was room for
    assert reserve.take()
    assert set_aside(tmp_path) >= RESERVE_BYTES


async def test_is_there_whenever_the_store_is_open_or_closed(tmp_path: Path) -> None:
    async with open_store(tmp_path, quota_bytes=None) as store:
        assert set_aside(tmp_path) >= RESERVE_BYTES
        await store.put_document("kind", "key", bytes(3 << 20))
        # Mapped by SQLite with pages that have no block behind them (SIGBUS on a full disk), if it did not own the file alone.
        assert not (tmp_path / "catalogue.sqlite-shm").exists()
        await store.put_document("kind", "key", b"small")
        await store.put_document("kind", "key", b"small")
        assert (tmp_path / "catalogue.sqlite-wal").stat().st_size <= 256 << 10
    assert set_aside(tmp_path) >= RESERVE_BYTES
