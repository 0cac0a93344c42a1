"""The command line of `shoal convert`."""

import os
from pathlib import Path

import pytest

from agent.cli import main

HELP = (
    "usage: shoal convert",
    "--to {estargz,zstd-chunked,nydus}",
    "oci:DIRECTORY[:TAG]",
    "containerd:NAME",
    "--platform OS/ARCH",
    "--prefetch FILE",
    "--force",
    "--namespace",
    "--work-dir DIR",
    "--quiet",
    "--registry-hosts-dir DIR",
    "--docker-config FILE",
    "--insecure-registries HOSTS",
    "--containerd-address SOCKET",
    "Works without an agent.",
)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SHOAL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "120")


def run(*arguments: str) -> int:
    try:
        return main(["convert", *arguments])
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in HELP:
        assert part in text, part


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["a", "b"], "the following arguments are required: --to"),
        (["a", "--to", "estargz"], "the following arguments are required: TARGET"),
        (["a", "b", "--to", "squashfs"], "invalid choice: 'squashfs'"),
        (["UPPER", "b", "--to", "estargz"], "shoal: 'UPPER': not an image reference"),
        (["a", "oci:", "--to", "estargz"], "shoal: 'oci:' says no directory"),
        (["a", "b", "--to", "estargz", "--platform", "arm64"], "shoal: 'arm64' is no platform"),
        (["a", "b", "--to", "estargz", "--prefetch", "/nonexistent"], "shoal: cannot read the prefetch list /nonexistent"),
    ],
)
def test_a_wrong_command_line_is_2(capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str) -> None:
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert said.out == ""


def test_what_fails_is_1_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(f"oci:{tmp_path}", f"oci:{tmp_path}/target", "--to", "estargz") == 1
    assert capsys.readouterr().err == f"shoal: {tmp_path} is no OCI image layout: it has no file oci-layout\n"
    assert list(tmp_path.iterdir()) == []
    address = f"--containerd-address={tmp_path}/none.sock"
    assert run("containerd:a", f"oci:{tmp_path}/target", "--to", "estargz", address) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"shoal: containerd at {tmp_path}/none.sock does not answer")
    assert said.count("\n") == 1
