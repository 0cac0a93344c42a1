"""Whatever agent and index process say to each other arrives as it was said."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from agent.formats.model import BlobPart, ChunkTable, Digest, Inode, InodeKind, LayerIndex, MemberTable, PieceTable
from agent.formats.opening import AttachedBlob, BlobRange, LayerFacts, ManifestBytes, ReferrersOf, Want
from agent.indexing import messages

texts = st.text(max_size=20)
digests = st.binary(min_size=32, max_size=32).map(lambda raw: Digest(f"sha256:{raw.hex()}"))
offsets = st.integers(0, 1 << 60)
annotations = st.dictionaries(texts, texts, max_size=4)

wants = st.one_of(
    st.builds(BlobRange, offsets, offsets, digests, offsets, st.booleans()),
    st.builds(ManifestBytes, digests),
    st.builds(AttachedBlob, texts, texts, texts),
    st.builds(ReferrersOf, texts, digests),
)
layers = st.builds(LayerFacts, digests, offsets, texts, annotations, st.just(()), annotations, texts)
facts = st.builds(LayerFacts, digests, offsets, texts, annotations, st.lists(layers, max_size=3).map(tuple), annotations, texts)


def over_the_wire(head: messages.Head, body: bytes = b"") -> tuple[messages.Head, bytes]:
    frame = messages.pack_head(head, len(body)) + body
    head_size, body_size = messages.lengths(frame[: messages.HEAD.size])
    packed = frame[messages.HEAD.size :]
    assert len(packed) == head_size + body_size
    return messages.unpack_head(packed[:head_size]), packed[head_size:]


@given(wants)
def test_wants(want: Want) -> None:
    assert messages.want_of(over_the_wire(messages.want_head(want))[0]) == want


@given(facts)
def test_facts(known: LayerFacts) -> None:
    assert messages.facts_of(over_the_wire(messages.facts_head(known))[0]) == known


@st.composite
def indexes(draw: st.DrawFn) -> LayerIndex:
    chunks = ChunkTable(draw(st.sampled_from(["sha256", "blake3"])))
    for _ in range(draw(st.integers(0, 5))):
        chunks.append(
            draw(offsets),
            draw(st.integers(0, 1 << 31)),
            0,
            draw(st.integers(0, 1 << 31)),
            draw(st.binary(min_size=32, max_size=32)),
        )
    members = None
    if draw(st.booleans()):
        members = MemberTable()
        for number in range(draw(st.integers(0, 3))):
            members.append(number * 100, draw(offsets), draw(st.integers(0, 7)), 0, draw(st.binary(max_size=40)))
    pieces = PieceTable(
        array("Q", [0, 10, 25]),
        array("I", [0, 0, len(chunks)]),
        draw(st.integers(-1, 1)),
        draw(st.sampled_from([b"", bytes(range(64))])),
    )
    return LayerIndex(
        draw(texts),
        draw(texts),
        Inode(InodeKind.DIRECTORY),
        chunks,
        pieces,
        draw(offsets),
        draw(offsets),
        draw(st.integers(-1, 1 << 40)),
        tuple(draw(st.lists(texts, max_size=3))),
        members,
        tuple(draw(st.lists(st.integers(0, 1), max_size=2))),
        tuple(draw(st.lists(st.builds(BlobPart, digests, offsets, offsets, offsets), max_size=2))),
    )


@given(indexes(), st.binary(max_size=100))
def test_indexes(index: LayerIndex, meta: bytes) -> None:
    head, parts = messages.index_frame(index, meta)
    head, body = over_the_wire(head, b"".join(parts))
    found, image = messages.index_of(head, bytearray(body))
    assert image == meta
    tables = ("chunks", "pieces", "members")
    for name in tables:
        ours, theirs = getattr(index, name), getattr(found, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.to_bytes() == theirs.to_bytes()
    plain = ("format", "codec", "volume_size", "entry_count", "prefetch_stop", "warnings", "prefetch_pieces", "parts")
    assert [getattr(found, name) for name in plain] == [getattr(index, name) for name in plain]
