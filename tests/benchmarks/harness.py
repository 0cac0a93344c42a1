"""Measurements of a benchmark run: interleaved, kept raw, told as ratios."""

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs


@attrs.define
class Row:
    """One figure of several contestants, measured in turns; `limit` is the largest allowed ratio to `baseline`, if there is one."""

    name: str
    unit: str
    baseline: str
    limits: dict[str, float] = attrs.field(factory=dict)
    values: dict[str, list[float]] = attrs.field(factory=dict)

    def add(self, contestant: str, value: float) -> None:
        """One more measurement."""
        self.values.setdefault(contestant, []).append(value)

    def ratios(self, contestant: str) -> list[float]:
        """To the baseline, of the same turn."""
        base = self.values.get(self.baseline, [])
        return [value / other for value, other in zip(self.values[contestant], base, strict=False) if other]

    def met(self, contestant: str) -> bool | None:
        """Whether the limit is met; None where there is none or nothing to compare with."""
        limit = self.limits.get(contestant)
        if limit is None:
            return None
        if not self.baseline:
            return statistics.median(self.values[contestant]) <= limit
        ratios = self.ratios(contestant)
        return statistics.median(ratios) <= limit if ratios else None

    def lines(self) -> list[str]:
        """As text: median, spread, ratio, limit."""
        out = [f"{self.name} [{self.unit}]"]
        for contestant, values in self.values.items():
            text = (
                f"  {contestant:<22} {statistics.median(values):9.3f}  ({min(values):.3f} to {max(values):.3f}, n={len(values)})"
            )
            if self.baseline and contestant != self.baseline and (ratios := self.ratios(contestant)):
                text += f"  = {statistics.median(ratios):.3f} x {self.baseline} ({min(ratios):.3f} to {max(ratios):.3f})"
            if (met := self.met(contestant)) is not None:
                text += f"  limit {self.limits[contestant]:g}: {'met' if met else 'MISSED'}"
            out.append(text)
        return out

    def as_json(self) -> dict[str, Any]:
        """Raw values and what follows from them."""
        return {
            "name": self.name,
            "unit": self.unit,
            "baseline": self.baseline,
            "values": self.values,
            "median": {name: statistics.median(values) for name, values in self.values.items()},
            "ratio": {
                name: statistics.median(ratios)
                for name in self.values
                if self.baseline and name != self.baseline and (ratios := self.ratios(name))
            },
            "limits": self.limits,
            "met": {name: met for name in self.values if (met := self.met(name)) is not None},
        }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    memory = next(
        (line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")), "0"
    )
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?"
    )
    return {
        "kernel": platform.release(),
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_mib": int(memory) // 1024,
        "python": platform.python_version(),
    }


def version_of(*argv: str) -> str:
    """First line of a program's `--version`."""
    done = subprocess.run([*argv, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip().splitlines()[0]


def drop_caches() -> None:
    """Forget clean pages, dentries and inodes of the whole machine: before anything that is called cold."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def fill_caches(folder: Path) -> None:
    """Read every file below a folder, so that it is in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as stream:
                while stream.read(1 << 20):
                    continue


def resident_bytes(pids: list[int]) -> tuple[int, int]:
    """Resident and proportional memory of some processes together."""
    rss = pss = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                rss += int(line.split()[1])
            elif line.startswith("Pss:"):
                pss += int(line.split()[1])
    return rss << 10, pss << 10


def write_report(path: Path | None, rows: list[Row], facts: dict[str, Any]) -> None:
    """Print the rows; write everything as JSON if asked."""
    for row in rows:
        print("\n".join(row.lines()))
    if path is not None:
        report = {"command": " ".join(sys.orig_argv), "machine": machine(), **facts, "rows": [row.as_json() for row in rows]}
        path.write_text(json.dumps(report, indent=2) + "\n")
