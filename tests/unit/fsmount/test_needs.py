import errno

import pytest
import trio
import trio.testing

from fsmount.needs import Need, Needs


class Agent:
    def __init__(self) -> None:
        self.told: list[tuple[int, Need]] = []

    def tell(self, number: int, need: Need) -> None:
        self.told.append((number, need))


async def park(needs: Needs, found: list[int], **options: float | bool) -> None:
    found.append(await needs.wait("v", 0, 4096, trio.current_time(), **options))  # type: ignore[arg-type]


async def test_met_and_failed(autojump_clock: trio.testing.MockClock) -> None:
    needs, agent, found = Needs(30), Agent(), []
    needs.attach(agent.tell)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(park, needs, found)
        await trio.testing.wait_all_tasks_blocked()
        [(number, need)] = agent.told
        assert need == Need("v", 0, 4096, 30)
        needs.answer(number, 0, "")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(park, needs, found)
        await trio.testing.wait_all_tasks_blocked()
        needs.answer(agent.told[1][0], errno.ENOSPC, "full")
    assert found == [0, errno.ENOSPC]
    assert len(needs) == 0
    needs.answer(99, 0, "")


async def test_the_deadline_is_an_error_and_one_line(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    needs, found = Needs(30), []
    await park(needs, found)
    assert found == [errno.EIO]
    assert trio.current_time() == pytest.approx(autojump_clock.current_time())
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "no agent is connected" in caplog.text
    await park(needs, found, patience_s=1.0)
    await park(needs, found, is_told=True)
    assert found == [errno.EIO, errno.EAGAIN, errno.EIO]
    assert len(caplog.records) == 1


async def test_each_new_agent_is_told_what_is_parked(autojump_clock: trio.testing.MockClock) -> None:
    needs, found = Needs(30), []
    first, second = Agent(), Agent()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(park, needs, found)
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(10)
        needs.attach(first.tell)
        assert first.told[0][1].deadline_s == pytest.approx(20)
        needs.attach(second.tell)
        assert len(second.told) == 1
        needs.detach(first.tell)
        assert len(second.told) == 1
        needs.attach(first.tell)
        needs.detach(first.tell)
        assert len(second.told) == 2
        needs.answer(second.told[0][0], 0, "")
        await trio.testing.wait_all_tasks_blocked()
    assert found == [0]
