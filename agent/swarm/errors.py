"""Errors of dialling a peer."""

from agent.errors import SourceUnavailable


class DialError(SourceUnavailable):
    """A peer could not be reached, is not of this fleet, or is another than expected."""


class SelfDialError(DialError):
    """The address is this node's own."""
