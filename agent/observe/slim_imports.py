"""Keeps terminal decoration out of the daemon's memory.

structlog and httpx import rich, pygments and click if they are installed: for pretty tracebacks and a command line that the
agent never shows. Together they are 11 MB resident (78 down to 67 MB measured with Python 3.11), a tenth of the agent.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_UNUSED: Final = ("rich", "pygments", "click")


@contextmanager
def without_decoration() -> Iterator[None]:
    """Within the block those libraries cannot be imported, unless they are loaded already."""
    hidden = [name for name in _UNUSED if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # what the import system takes for "not there"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
