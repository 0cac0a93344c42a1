"""containerd's filter syntax, as List of the snapshots service takes it (containerd pkg/filters).

A filter is a comma separated list of selectors that must all match; of several filters one must. A selector is a field path
alone (the field is present) or with an operator and a value: `==`, `!=`, `~=` (regular expression, unanchored). Fields and
values may be quoted as in Go with `"`, and for patterns with `/` or `|`. Fields of a snapshot: `name`, `parent`, `kind`
(`active`, `view`, `committed`) and `labels."any.label"`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs

from fsmount.errors import ShoalError

MAX_FILTER_CHARS: Final = 64 << 10
"""A filter names at most one label (4,096 bytes) and one parent; anything longer is a mistake."""

Fields = Callable[[tuple[str, ...]], str | None]
"""Gives the value at a field path, None if there is none."""

_ESCAPES: Final = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}
_FIELD: Final = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR: Final = re.compile(r"[=!~]+")
_VALUE: Final = re.compile(r"[^,\s]+")
_SPACE: Final = re.compile(r"\s*")
_HEX_ESCAPE: Final = {"x": 2, "u": 4, "U": 8}


class FilterError(ShoalError):
    """A filter does not follow the syntax."""


@attrs.frozen
class Selector:
    """One condition. `operator` is "" (present), "==", "!=" or "~=" (then `pattern` is set)."""

    path: tuple[str, ...]
    operator: str = ""
    value: str = ""
    pattern: re.Pattern[str] | None = None

    def matches(self, fields: Fields) -> bool:
        """As containerd: an absent field is unequal to everything and is an empty string to a pattern."""
        found = fields(self.path)
        if self.operator == "":
            return found is not None
        if self.operator == "==":
            return found == self.value
        if self.operator == "!=":
            return (found or "") != self.value
        assert self.pattern is not None
        return self.pattern.search(found or "") is not None


@attrs.frozen
class Filter:
    """Any of these groups, each of which must match whole. No groups match everything."""

    groups: tuple[tuple[Selector, ...], ...] = ()

    def matches(self, fields: Fields) -> bool:
        """Whether an object with these fields passes."""
        return not self.groups or any(all(selector.matches(fields) for selector in group) for group in self.groups)


def parse_filters(texts: Sequence[str]) -> Filter:
    """Read the filters of a request; none, or an empty one, lets everything pass.

    Raises:
        FilterError: the text at fault and the place in it.
    """
    if any(not text for text in texts):
        return Filter()
    return Filter(tuple(_Parser(text).selectors() for text in texts))


def snapshot_fields(name: str, parent: str, kind: str, labels: Mapping[str, str]) -> Fields:
    """The fields of one snapshot, for `Filter.matches`."""

    def field(path: tuple[str, ...]) -> str | None:
        if path == ("name",):
            return name
        if path == ("parent",):
            return parent
        if path == ("kind",):
            return kind
        return labels.get(".".join(path[1:])) if path[0] == "labels" else None

    return field


class _Parser:
    def __init__(self, text: str) -> None:
        if len(text) > MAX_FILTER_CHARS:
            raise FilterError(f"filter of {len(text)} characters; at most {MAX_FILTER_CHARS} are read")
        self._text = text
        self._at = 0

    def selectors(self) -> tuple[Selector, ...]:
        found = [self._selector()]
        while self._peek() == ",":
            self._at += 1
            found.append(self._selector())
        if self._at < len(self._text):
            raise self._error("a comma or the end")
        return tuple(found)

    def _selector(self) -> Selector:
        path = [self._field()]
        while self._peek() == ".":
            self._at += 1
            path.append(self._field())
        if self._peek() in ("", ","):
            return Selector(tuple(path))
        operator = self._match(_OPERATOR, "an operator (==, != or ~=)")
        if operator not in ("==", "!=", "~="):
            raise self._error("an operator (==, != or ~=)")
        value = self._value(is_pattern=operator == "~=")
        if operator != "~=":
            return Selector(tuple(path), operator, value)
        try:
            return Selector(tuple(path), operator, value, re.compile(value))
        except re.error as exc:
            raise FilterError(f"not a regular expression in filter {self._text!r}: {exc}") from exc

    def _field(self) -> str:
        return self._quoted() if self._peek() == '"' else self._match(_FIELD, "a field")

    def _value(self, *, is_pattern: bool) -> str:
        quote = self._peek()
        if quote == '"' or (is_pattern and quote in ("/", "|")):
            return self._quoted()
        if quote in ("/", "|", ""):
            raise self._error("a value")
        return self._match(_VALUE, "a value")

    def _peek(self) -> str:
        space = _SPACE.match(self._text, self._at)
        assert space is not None
        self._at = space.end()
        return self._text[self._at : self._at + 1]

    def _match(self, pattern: re.Pattern[str], wanted: str) -> str:
        self._peek()
        found = pattern.match(self._text, self._at)
        if found is None:
            raise self._error(wanted)
        self._at = found.end()
        return found.group()

    def _quoted(self) -> str:
        quote, at, text = self._text[self._at], self._at + 1, self._text
        parts: list[str] = []
        while True:
            char = text[at : at + 1]
            if char in ("", "\n"):
                raise self._error("a closing quote")
            if char == quote:
                self._at = at + 1
                return "".join(parts)
            if char != "\\":
                parts.append(char)
                at += 1
                continue
            value, at = self._escape(at + 1, quote)
            parts.append(value)

    def _escape(self, at: int, quote: str) -> tuple[str, int]:
        text = self._text
        char = text[at : at + 1]
        if char == quote:
            return quote, at + 1
        if char in _ESCAPES:
            return _ESCAPES[char], at + 1
        if char in _HEX_ESCAPE:
            digits, base = text[at + 1 : at + 1 + _HEX_ESCAPE[char]], 16
            wanted, at = _HEX_ESCAPE[char], at + 1
        else:
            digits, base, wanted = text[at : at + 3], 8, 3
        allowed = "0123456789abcdefABCDEF" if base == 16 else "01234567"
        if len(digits) != wanted or any(digit not in allowed for digit in digits):
            raise self._error("an escape sequence of Go")
        number = int(digits, base)
        if number > 0x10FFFF or (base == 8 and number > 255):
            raise self._error("an escape sequence of Go")
        return chr(number), at + wanted

    def _error(self, wanted: str) -> FilterError:
        return FilterError(f"filter {self._text[:200]!r}: expected {wanted} at character {self._at}")
