"""The command line: help worth reading, and exit codes that scripts can rely on. No agent runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent.cli import main

COMMANDS = ("agent", "fsmount", "pull", "convert", "mount", "unmount", "status", "peers", "scrub", "doctor", "demo")
CLIENTS = (["pull", "x"], ["mount", "x", "/nonexistent"], ["unmount", "/nonexistent"], ["status"], ["peers"], ["scrub"])


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("SHOAL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "120")


def run(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 1


def test_help_names_every_command_and_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^    {command} +\w", text, re.MULTILINE), command
    for part in ("examples:", "shoal mount registry.example/app:1 /mnt/app", "exit codes:"):
        assert part in text


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "demo"])
def test_help_of_a_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: shoal {command}")
    assert ("--run-dir DIR" in text) == (command != "convert")  # which needs no agent
    assert len(text.split("\n\n")[1]) > 60  # says more than its name does


def test_help_of_the_agent_has_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    run("agent", "--help")
    text = capsys.readouterr().out
    for flag in ("state-dir", "run-dir", "fleet-secret-file", "bootstrap-peers", "listen", "data-listen", "no-background-fetch"):
        assert f"--{flag}" in text
    for default in ("/ip4/0.0.0.0/tcp/4405", "0.0.0.0:4406", "50GiB", "30s", "/var/lib/shoal", "/run/shoal"):
        assert f"(default: {default})" in text


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["shoal", "--version"])
    assert run("--version") == 0
    assert re.match(r"shoal \d+\.\d+", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["swim"],
        ["mount"],
        ["mount", "image"],
        ["status", "extra"],
        ["status", "--colour"],
        ["fsmount", "--stop", "--upgrade"],
    ],
)
def test_a_wrong_command_line_is_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(*arguments) == 2
    assert "usage: shoal" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["status"], ["agent"], ["fsmount"]])
def test_a_wrong_setting_is_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(*arguments, "--config", "/nonexistent/shoal.toml") == 2
    assert capsys.readouterr().err == "shoal: cannot read settings from /nonexistent/shoal.toml: No such file or directory\n"


def test_a_wrong_variable_is_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE_QUOTA", "lots")
    assert run("status") == 2
    assert "SHOAL_CACHE_QUOTA: 'lots' is not a size" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", CLIENTS, ids=lambda words: words[0])
def test_without_an_agent_a_client_is_1_and_says_how_to_start_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    assert run(*arguments, "--run-dir", str(tmp_path)) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"shoal: no agent answers at {tmp_path}/agent.sock")
    assert f"shoal agent --run-dir {tmp_path}" in said.err


def test_clients_are_light() -> None:
    """What a client command imports: no network library, no event loop, no logging library."""
    code = "import sys, agent.cli, agent.admin.client; print('\\n'.join(sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert loaded & {"libp2p", "httpx", "grpc", "trio", "structlog", "rich", "cryptography"} == set()
