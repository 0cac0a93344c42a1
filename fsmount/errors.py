"""The root of every error that Shoal raises on purpose.

The tree is shallow and ordered by what a caller can do::

    ShoalError
    ├── FormatError        bytes of an image are not what their format says: refuse lazy use, pull whole (agent.formats)
    │   └── NoIndex             nothing is wrong with them, but there is no index: pull whole
    ├── SourceError        a peer or registry failed: try another source (agent.errors)
    │   ├── SourceUnavailable   it did not answer, or said "later"
    │   ├── SourceRefused       it answered that it will not (authentication, not found)
    │   └── SourceLied          its bytes do not match their digest
    ├── StoreError         the local disk failed or is full: fall back to streaming, tell the operator (agent.errors)
    ├── MountError         the kernel refused a mount: try another presentation (fsmount)
    ├── LinkError          the other process of this node is away (fsmount)
    └── SettingsError      the operator must change something; the message says what (agent.errors)
"""


class ShoalError(Exception):
    """Base of all errors below; its text is a sentence for an operator."""


class MountError(ShoalError):
    """The kernel or a mount helper refused a mount; `errno` says why."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class LinkError(ShoalError):
    """The other end of the agent-fsmount link is gone or broke the protocol."""
