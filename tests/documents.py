"""The documents as tests see them: which there are, their code, the commands in it."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
INLINE = re.compile(r"`([^`\n]+)`")
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """Everything but fenced blocks."""
    return _FENCE.sub("", text)


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return [body for name, body in _FENCE.findall(text) if name == language]


def commands(document: Path, *, only_blocks: bool = False) -> Iterator[list[str]]:
    """Every simple command of shell blocks, and inline code that begins with `shoal ` or `make `."""
    text = document.read_text()
    lines = [line for body in blocks(text, "sh") for line in body.splitlines()]
    if not only_blocks:
        lines += [code for code in INLINE.findall(prose(text)) if code.startswith(("shoal ", "make "))]
    for line in lines:
        for part in re.split(r"&&|\|\||;|\|", line):
            words = shlex.split(part.strip(), comments=True)
            if words:
                yield words
