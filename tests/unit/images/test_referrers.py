"""What refers to an image is asked once for all of its layers, whatever becomes of those who ask."""

import attrs
import trio
import trio.testing

from agent.errors import SourceUnavailable
from agent.formats.model import Digest, digest_of
from agent.images.referrers import ANSWER_S, KEPT_S, MAX_KEPT, KnownReferrers
from agent.registry import ImageReference

IMAGE = ImageReference.parse("r.example/team/app:1")
SUBJECT = digest_of(b"an image")


@attrs.define
class Lister:
    """A registry that answers when it may, or fails."""

    asked: list[tuple[str, Digest, str]] = attrs.field(factory=list)
    may: trio.Event = attrs.field(factory=trio.Event)
    failure: Exception | None = None

    async def referrers(self, ref: ImageReference, subject: Digest, artifact_type: str) -> bytes:
        self.asked.append((ref.name, subject, artifact_type))
        await self.may.wait()
        if self.failure is not None:
            raise self.failure
        return b"answer %d" % len(self.asked)


async def test_many_layers_ask_once(autojump_clock: trio.testing.MockClock) -> None:
    lister = Lister()
    known = KnownReferrers(lister)
    found: list[bytes] = []

    async def one(image: ImageReference) -> None:
        found.append(await known.find(image, SUBJECT, "a/b"))

    async with trio.open_nursery() as nursery:
        for tag in ("1", "2", "3"):
            nursery.start_soon(one, attrs.evolve(IMAGE, tag=tag))
        await trio.testing.wait_all_tasks_blocked()
        lister.may.set()
    await one(IMAGE)
    assert found == [b"answer 1"] * 4
    assert lister.asked == [("r.example/team/app", SUBJECT, "a/b")]
    await one(attrs.evolve(IMAGE, repository="other"))
    await trio.sleep(KEPT_S + 1)
    await one(IMAGE)
    assert found[-2:] == [b"answer 2", b"answer 3"]


async def test_who_goes_away_does_not_take_the_answer_along() -> None:
    lister = Lister()
    known = KnownReferrers(lister)
    found: list[bytes] = []

    async def one() -> None:
        found.append(await known.find(IMAGE, SUBJECT, "a/b"))

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(one)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(one)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        lister.may.set()
    assert found == [b"answer 2"]


async def test_no_answer_is_one_too(autojump_clock: trio.testing.MockClock) -> None:
    lister = Lister()
    known = KnownReferrers(lister)
    began = trio.current_time()
    assert await known.find(IMAGE, SUBJECT, "a/b") == b""
    assert trio.current_time() - began == ANSWER_S
    assert await known.find(IMAGE, SUBJECT, "a/b") == b""
    lister.may.set()
    lister.failure = SourceUnavailable("it is away")
    assert await known.find(IMAGE, digest_of(b"another"), "a/b") == b""
    assert len(lister.asked) == 2
    lister.failure = None
    await trio.sleep(KEPT_S + 1)
    assert await known.find(IMAGE, SUBJECT, "a/b") == b"answer 3"


async def test_memory_is_bounded() -> None:
    lister = Lister()
    lister.may.set()
    known = KnownReferrers(lister)
    for number in range(MAX_KEPT + 1):
        await known.find(IMAGE, digest_of(b"%d" % number), "a/b")
        await known.find(IMAGE, digest_of(b"0"), "a/b")
    assert len(lister.asked) == MAX_KEPT + 1  # what is in use stays
    await known.find(IMAGE, digest_of(b"1"), "a/b")
    assert len(lister.asked) == MAX_KEPT + 2
