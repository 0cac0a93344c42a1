from itertools import pairwise

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsmount.errors import LinkError
from fsmount.framing import MAX_FRAME, Unpacker, number, pack, text, texts
from fsmount.table import LayerRecord, RootRecord, Table, TableError, VolumeRecord

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)
messages = st.dictionaries(st.text(max_size=10), values, max_size=6)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(at, len(data)) for at in cuts), len(data)]
    return [data[start:stop] for start, stop in pairwise(edges)]


@given(st.lists(messages, max_size=5), st.lists(st.integers(0, 2000), max_size=10))
def test_any_cut_gives_the_same_messages(sent: list[dict[str, object]], cuts: list[int]) -> None:
    unpacker = Unpacker()
    received = [m for part in cut(b"".join(map(pack, sent)), cuts) for m in unpacker.feed(part)]
    assert received == sent


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_garbage_is_a_link_error_or_maps(data: bytes, cuts: list[int]) -> None:
    unpacker = Unpacker()
    try:
        for part in cut(data, cuts):
            for message in unpacker.feed(part):
                assert isinstance(message, dict)
    except LinkError:
        return


@given(messages, st.text(max_size=10))
def test_fields_are_what_they_say_or_an_error(message: dict[str, object], key: str) -> None:
    for take, check in (
        (text, lambda v: isinstance(v, str)),
        (number, lambda v: isinstance(v, int) and 0 <= v < 2**63),
        (texts, lambda v: all(isinstance(item, str) for item in v)),
    ):
        try:
            assert check(take(message, key))
        except LinkError:
            continue


def test_a_length_beyond_the_limit_is_refused_before_its_bytes_come() -> None:
    with pytest.raises(LinkError, match="exceeds"):
        Unpacker().feed((MAX_FRAME + 1).to_bytes(4, "little"))
    with pytest.raises(LinkError, match="exceeds"):
        pack({"text": "x" * MAX_FRAME})


def test_a_bomb_of_nested_lists_is_a_link_error() -> None:
    body = b"\x91" * 100_000
    with pytest.raises(LinkError):
        Unpacker().feed(len(body).to_bytes(4, "little") + body)


names = st.text(min_size=1, max_size=20)
tables = st.builds(
    Table,
    boot_id=names,
    mount=names,
    next_id=st.integers(1, 2**31),
    presentations=st.none() | st.lists(names, max_size=3),
    volumes=st.lists(
        st.builds(VolumeRecord, names, st.integers(1, 99), names, names, st.integers(0, 2**50), st.booleans()), max_size=4
    ),
    layers=st.lists(
        st.builds(
            LayerRecord,
            names,
            st.integers(1, 99),
            names,
            st.lists(names, max_size=3),
            st.lists(st.integers(1, 99), max_size=3),
            names,
        ),
        max_size=4,
    ),
    roots=st.lists(st.builds(RootRecord, names, st.lists(names, max_size=3)), max_size=3),
)


@given(tables)
def test_tables_survive_the_file(table: Table) -> None:
    assert Table.from_bytes(table.to_bytes()) == table


@given(st.binary(max_size=200) | messages.map(msgpack.packb))
def test_a_file_of_something_else_is_a_table_error(data: bytes) -> None:
    with pytest.raises(TableError):
        Table.from_bytes(data)


def test_file_names_that_are_no_utf8_survive() -> None:
    name = b"/odd/\xff\xfe".decode(errors="surrogateescape")
    assert Unpacker().feed(pack({"path": name})) == [{"path": name}]
    table = Table("b", "m", volumes=[VolumeRecord("v", 1, name, name, 5)])
    assert Table.from_bytes(table.to_bytes()) == table


def test_fields_of_a_newer_program_are_ignored() -> None:
    data = msgpack.unpackb(Table("b", "m", volumes=[VolumeRecord("v", 1, "d", "m", 5)]).to_bytes())
    data["shape"] = "round"
    data["volumes"][0]["colour"] = "red"
    assert Table.from_bytes(msgpack.packb(data)).volumes == [VolumeRecord("v", 1, "d", "m", 5)]
