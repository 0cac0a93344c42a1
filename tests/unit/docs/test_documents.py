"""What the documents say exists: commands parse, settings and make targets are real, links lead somewhere, generated parts are fresh."""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from agent import config
from agent.cli import _parser
from agent.demo import main as demo_main
from agent.runtimes.containerd.configuration import config_snippet
from tests.documents import DOCUMENTS, INLINE, ROOT, blocks, commands, prose

UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
SETTINGS = config.Settings()
NEEDED = {"pull": ["x"], "inspect": ["x"], "mount": ["x", "x"], "unmount": ["x"], "convert": ["x", "x", "--to=nydus"]}
"""What a command cannot do without, where a text only names it."""
FOREIGN_FLAGS = {"--estargz", "--version", "--help"}


def options_of_shoal() -> set[str]:
    found = set(re.findall(r"--[a-z][a-z-]+", demo_help()))
    choices = next(action.choices for action in _parser()._actions if action.choices and "agent" in action.choices)
    assert isinstance(choices, dict)
    for command in choices.values():
        found |= {option for action in command._actions for option in action.option_strings}
    return found


def demo_help() -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        demo_main(["--help"])
    return output.getvalue()


def parse(words: list[str]) -> None:
    """What `shoal WORDS` would make of its command line, without running it."""
    if words[:1] == ["demo"]:
        assert set(re.findall(r"--[a-z][a-z-]+", " ".join(words))) <= set(re.findall(r"--[a-z][a-z-]+", demo_help()))
        return
    complaint = io.StringIO()
    args = None
    with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        args = _parser().parse_args(words)
    assert not complaint.getvalue(), f"shoal {shlex.join(words)}: {complaint.getvalue()}"
    if args is None:  # --help and --version end there
        return
    config.load_settings(vars(args), {}, default_file=Path("/nonexistent"))


def is_placeholder(words: list[str]) -> bool:
    """`shoal pull/mount/status` in a table of contents or a drawing is a mention, not a command."""
    return len(words) > 1 and ("/" in words[1] or words[1].isupper())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_parse(document: Path) -> None:
    for words in commands(document):
        if Path(words[0]).name == "shoal" and not is_placeholder(words):
            parse([*words[1:], *(NEEDED.get(words[1], []) if len(words) == 2 else [])])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {name for line in targets for name in line.split()}
    for words in commands(document):
        if words[0] == "make":
            assert words[1] in known, f"make {words[1]}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_and_variables_exist(document: Path) -> None:
    known = options_of_shoal() | FOREIGN_FLAGS
    keys = {f"{config.ENV_PREFIX}{name.upper()}" for name in SETTINGS.__class__.__annotations__} | {"SHOAL_CONFIG"}
    for code in INLINE.findall(prose(document.read_text())):
        if code.startswith("--"):
            assert code.split("=")[0].split()[0] in known, code
    for variable in re.findall(r"\bSHOAL_[A-Z_]+\b", document.read_text()):
        assert variable in keys, variable


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (document.parent / path) if path else document
        assert place.exists(), f"{target} in {document.name}"
        assert place.resolve().is_relative_to(ROOT)
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_the_repository_exist(document: Path) -> None:
    for code in INLINE.findall(prose(document.read_text())):
        if re.fullmatch(r"(?:agent|fsmount|tests|deploy|docs)/[\w./-]+", code):
            assert (ROOT / code).exists(), code


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_fit(document: Path) -> None:
    long = [line for line in prose(document.read_text()).splitlines() if len(line) > 130 and not line.startswith("|")]
    assert long == []


def test_settings_page_is_the_generated_one() -> None:
    page = ROOT / "docs" / "settings.md"
    command = "python -c 'from agent.config import reference_page; print(reference_page(), end=\"\")' >docs/settings.md"
    assert page.read_text() == config.reference_page(), f"run: {command}"


def test_settings_files_load(tmp_path: Path) -> None:
    examples = [body for body in blocks((ROOT / "docs" / "operations.md").read_text(), "toml") if "version =" not in body]
    assert examples
    for body in examples:
        file = tmp_path / "shoal.toml"
        file.write_text(body)
        config.load_settings({"config": str(file)}, {})


def test_containerd_sections_are_those_that_doctor_prints() -> None:
    shown = [body for body in blocks((ROOT / "docs" / "operations.md").read_text(), "toml") if "version =" in body]
    socket = SETTINGS.run_dir / "containerd.sock"
    assert shown == [config_snippet(major, socket, SETTINGS.state_dir) for major in (1, 2)]


def test_log_events_of_the_troubleshooting_table_exist() -> None:
    table = (ROOT / "docs" / "operations.md").read_text().partition("| event |")[2]
    events = {
        name for row in table.splitlines() if row.startswith("| `") for name in re.findall(r"`([a-z_]+)`", row.split("|")[1])
    }
    assert len(events) > 30
    source = "\n".join(path.read_text() for name in ("agent", "fsmount") for path in (ROOT / name).rglob("*.py"))
    missing = {event for event in events if not re.search(rf'"{event}[" ]', source)}
    assert missing == set()


def test_figures_are_one_table_between_markers() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- figures -->") == text.count("<!-- /figures -->") == 1
    table = text.partition("<!-- figures -->")[2].partition("<!-- /figures -->")[0].strip().splitlines()
    assert all(line.startswith("|") for line in table)


def test_every_decision_is_listed_and_has_its_parts() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    for record in folder.glob("[0-9]*.md"):
        assert f"({record.name})" in index
        text = record.read_text()
        assert all(f"**{part}.**" in text for part in ("Context", "Decision", "Consequence")), record.name


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_run_commands_that_exist(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text()
    lines = re.findall(r"^Exec\w+=(\S+) (.*)$", text, re.MULTILINE)
    assert lines
    for program, words in lines:
        assert program == "/opt/shoal/.venv/bin/shoal"
        parse(shlex.split(words))
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: apt-get install systemd")
    # The program is not installed here; everything else is judged as it is, and both units together.
    for each in UNITS:
        (tmp_path / each.name).write_text(each.read_text().replace("/opt/shoal/.venv/bin/shoal", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr
