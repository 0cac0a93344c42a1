"""When to ask a registry again: back-off with jitter, and what Retry-After says. Pure."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

MAX_WAIT_S: Final = 10.0
"""A longer Retry-After is reported to the caller, who may have another source, instead of waited for."""

_FIRST_WAIT_S: Final = 0.1
_MAX_BACKOFF_S: Final = 4.0

RETRIED_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


def backoff_s(attempt: int, luck: float) -> float:
    """Seconds to wait before attempt number `attempt` + 1 (from 0); `luck` in [0, 1) spreads clients apart."""
    return min(_MAX_BACKOFF_S, _FIRST_WAIT_S * 2.0 ** min(attempt, 10)) * (0.5 + luck / 2)


def parse_retry_after(text: str | None, now: datetime) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date), None if there is none that can be read."""
    if not text:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
    except (TypeError, ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - now).total_seconds())
