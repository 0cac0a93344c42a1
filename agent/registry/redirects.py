"""Redirects of a registry to the store that has the bytes: which are followed, and how long a signed URL can be used again."""

from datetime import UTC, datetime
from typing import Final
from urllib.parse import parse_qs, urljoin, urlsplit

import attrs

MAX_REDIRECTS: Final = 5
_DEFAULT_LIFE_S: Final = 300.0
"""A URL that does not say when it ends is asked for again after this; the shortest life seen in the field is ten minutes."""
_MARGIN_S: Final = 5.0
_MAX_LIFE_S: Final = 3600.0


class BadRedirect(Exception):
    """A Location that must not be followed."""


@attrs.frozen
class SignedUrl:
    """Where a blob's bytes are. The query is a credential: it is never shown."""

    url: str = attrs.field(repr=False)
    host: str
    expires_at: float
    """Wall clock, seconds since the epoch."""

    @classmethod
    def of(cls, url: str, now: float) -> "SignedUrl":
        """Read how long a URL is valid."""
        return cls(url, urlsplit(url).netloc, min(url_expiry(url, now), now + _MAX_LIFE_S) - _MARGIN_S)


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: credentials stay within one of these."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80)


def next_hop(current: str, location: str | None) -> str:
    """The absolute URL that a redirect leads to.

    Raises:
        BadRedirect: no or a bad Location, another scheme than HTTP(S), credentials in it, or from HTTPS to HTTP.
    """
    if not location or len(location) > 16384 or not location.isprintable() or not location.isascii():
        raise BadRedirect("a redirect without a usable Location")
    try:
        url = urljoin(current, location)
        parts = urlsplit(url)
        scheme, host, _ = origin_of(url)
    except ValueError as exc:
        raise BadRedirect("a redirect with a malformed Location") from exc
    if scheme not in {"http", "https"} or not host:
        raise BadRedirect(f"a redirect to a {scheme or 'strange'} URL")
    if parts.username is not None or parts.password is not None:
        raise BadRedirect(f"a redirect to {host} with credentials in its URL")
    if scheme == "http" and current.startswith("https:"):
        raise BadRedirect(f"a redirect from HTTPS to plain HTTP at {host}")
    return url.partition("#")[0]


def url_expiry(url: str, now: float) -> float:
    """When a signed URL ends (wall clock): S3, Google, CloudFront, Azure and Alibaba forms, else five minutes from now."""
    query = {name.lower(): values[-1] for name, values in parse_qs(urlsplit(url).query).items()}
    for prefix in ("x-amz", "x-goog"):
        date, life = query.get(f"{prefix}-date"), query.get(f"{prefix}-expires")
        if date and life and life.isdigit() and len(life) < 10:
            try:
                signed = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
            except ValueError:
                continue
            return signed.timestamp() + int(life)
    expires = query.get("expires", "")
    if expires.isdigit() and len(expires) < 13:
        return float(expires)
    if "se" in query and "sig" in query:
        try:
            ends = datetime.fromisoformat(query["se"])
        except ValueError:
            return now + _DEFAULT_LIFE_S
        return (ends if ends.tzinfo else ends.replace(tzinfo=UTC)).timestamp()
    return now + _DEFAULT_LIFE_S
