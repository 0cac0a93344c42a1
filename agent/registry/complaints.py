"""What a registry's error body says (distribution spec "Error Codes"), made fit for a message."""

import json
from typing import Final

_MAX_TEXT: Final = 200


def complaint(body: bytes) -> str:
    """` (CODE: message)` of the first error in an OCI error body, empty if there is none. Never more than a line."""
    try:
        error = json.loads(body[: 64 << 10])["errors"][0]
        words = [str(error.get(key) or "") for key in ("code", "message")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    text = ": ".join(word for word in words if word)
    return f" ({''.join(c if c.isprintable() else ' ' for c in text[:_MAX_TEXT])})" if text else ""
