"""Errors of the agent's shells; `fsmount.errors` draws the whole tree."""

from fsmount.errors import LinkError, MountError, ShoalError

__all__ = [
    "LinkError",
    "MountError",
    "SettingsError",
    "ShoalError",
    "SourceError",
    "SourceLied",
    "SourceRefused",
    "SourceUnavailable",
    "StoreError",
]


class SourceError(ShoalError):
    """A peer, mirror or registry could not give what was asked; another source may."""

    def __init__(self, message: str, *, source: str = "") -> None:
        super().__init__(message)
        self.source = source


class SourceUnavailable(SourceError):
    """No answer, a broken connection, 429 or 5xx; `retry_after_s` if the source named a time."""

    def __init__(self, message: str, *, source: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message, source=source)
        self.retry_after_s = retry_after_s


class SourceRefused(SourceError):
    """A final no: not found, not authorised, range not held. `status` is the HTTP status, 0 if none."""

    def __init__(self, message: str, *, source: str = "", status: int = 0) -> None:
        super().__init__(message, source=source)
        self.status = status


class SourceLied(SourceError):
    """Bytes came and do not match their digest."""


class StoreError(ShoalError):
    """The local store cannot take or give bytes; `errno` is the system's reason (ENOSPC, EIO)."""

    def __init__(self, message: str, *, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class SettingsError(ShoalError):
    """A setting is missing, unknown or out of range; the text says how to mend it."""
