"""What every level of tests shares: strictness in continuous integration, hypothesis profiles, the fixture images.

Locally a test may skip because a tool is missing, and says which command installs it. With CI=true the same absence fails: a run
that proves nothing must not be green.
"""

import os
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
IS_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}

if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    # Tests start `shoal` hundreds of times: compiling everything anew would be most of what they do. Still nothing beside the sources.
    os.environ["PYTHONPYCACHEPREFIX"] = str(ROOT / ".pytest_cache" / "bytecode")

hypothesis.settings.register_profile("local", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
# The same examples in every run: a red build is the change's fault, never the dice's.
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("local"), derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if IS_CI else "local")

_LEVEL_MARKS = {"integration": "integration", "faults": "integration", "fleet": "fleet"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the folder they are in, so that `-m "not integration"` needs no care from their authors."""
    for item in items:
        try:
            level = item.path.relative_to(ROOT / "tests").parts[0]
        except ValueError:
            continue
        if level in _LEVEL_MARKS:
            item.add_marker(_LEVEL_MARKS[level])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where CI=true."""
    report = yield
    if IS_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped where CI=true ({reason}); install what is missing with `make setup-test`"
    return report


@pytest.fixture(scope="session")
def shared_fixtures() -> Path:
    """The folder of images made by the formats' own tools, beside this repository."""
    folder = ROOT.parent / "shared" / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"no fixture images at {folder}")
    return folder
