"""What the doctor has found out, one sentence each."""

from typing import Final, Literal

import attrs

Level = Literal["ok", "note", "warning", "error"]
"""ok: works. note: worth knowing. warning: works, but worse than it could. error: the agent does not do its work like this."""

_INDENT: Final = " " * 9


@attrs.frozen
class Finding:
    """One thing that was looked at. `remedy` says how to mend it; it may have several lines."""

    level: Level
    subject: str
    text: str
    remedy: str = ""

    def as_text(self) -> str:
        """For a terminal."""
        lines = [f"{self.level:<8} {self.subject}: {self.text}"]
        if self.remedy:
            first, *rest = self.remedy.rstrip("\n").split("\n")
            lines.append(f"{_INDENT}-> {first}")
            lines += [f"{_INDENT}   {line}".rstrip() for line in rest]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str]:
        """For scripts."""
        return {"level": self.level, "subject": self.subject, "text": self.text, "remedy": self.remedy}


def ok(subject: str, text: str) -> Finding:
    """It works."""
    return Finding("ok", subject, text)


def note(subject: str, text: str, remedy: str = "") -> Finding:
    """Worth knowing."""
    return Finding("note", subject, text, remedy)


def warning(subject: str, text: str, remedy: str) -> Finding:
    """It works, but worse than it could."""
    return Finding("warning", subject, text, remedy)


def error(subject: str, text: str, remedy: str) -> Finding:
    """The agent does not do its work like this."""
    return Finding("error", subject, text, remedy)
