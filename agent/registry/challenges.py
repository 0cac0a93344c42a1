"""WWW-Authenticate challenges (RFC 9110 section 11.6.1), as registries write them."""

import re
from collections.abc import Iterable, Mapping
from typing import Final

import attrs

_MAX_HEADER: Final = 16 << 10
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TOKEN68 = re.compile(r"[A-Za-z0-9\-._~+/]+=*[ \t]*(?=,|\Z)")
_EQUALS = re.compile(r"[ \t]*=[ \t]*")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_SEPARATORS = re.compile(r"[ \t,]*")


@attrs.frozen
class Challenge:
    """One way to authenticate: scheme and parameter names in lower case."""

    scheme: str
    params: Mapping[str, str] = attrs.field(factory=dict, hash=False)


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """All challenges of the given header lines, in order. What cannot be read is passed over."""
    found: list[Challenge] = []
    for header in headers:
        found += _parse_line(header[:_MAX_HEADER])
    return found


def _parse_line(text: str) -> list[Challenge]:
    found: list[Challenge] = []
    params: dict[str, str] = {}
    at = 0
    while True:
        separators = _SEPARATORS.match(text, at)
        at = separators.end() if separators else at
        token = _TOKEN.match(text, at)
        if token is None:
            skip = text.find(",", at)
            if skip < 0:
                return found
            at = skip + 1
            continue
        equals = _EQUALS.match(text, token.end())
        if equals and found:
            quoted = _QUOTED.match(text, equals.end())
            plain = None if quoted else _TOKEN.match(text, equals.end())
            if quoted:
                params.setdefault(token[0].lower(), re.sub(r"\\(.)", r"\1", quoted[1], flags=re.DOTALL))
            elif plain:
                params.setdefault(token[0].lower(), plain[0])
            end = quoted or plain
            at = end.end() if end else equals.end()
            continue
        params = {}
        found.append(Challenge(token[0].lower(), params))
        at = token.end()
        if at < len(text) and text[at] == " ":
            opaque = _TOKEN68.match(text, at + 1)
            if opaque:
                at = opaque.end()
