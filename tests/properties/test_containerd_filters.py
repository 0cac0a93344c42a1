"""Filters of containerd: any text is a filter or a FilterError, and what Go quotes is read back."""

from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from agent.runtimes.containerd.filters import FilterError, parse_filters, snapshot_fields

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PIECES = st.lists(st.sampled_from([*'=!~,./|"\\ax01 ', "name", "labels", "==", "~=", "kind"]), max_size=30).map("".join)


def quoted(text: str) -> str:
    """As Go's %q: printable ASCII as it is, the rest escaped."""
    escaped = "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{escaped}"'


@given(TEXT | PIECES)
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(FilterError):
        parse_filters([text]).matches(snapshot_fields("name", "", "active", {}))


@given(TEXT.filter(bool), TEXT)
def test_quoted_labels_and_values_match_themselves(key: str, value: str) -> None:
    found = parse_filters([f"labels.{quoted(key)}=={quoted(value)}"])
    assert found.matches(snapshot_fields("name", "", "active", {key: value}))
    assert not found.matches(snapshot_fields("name", "", "active", {key: value + "x"}))
