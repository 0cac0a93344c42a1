"""The doctor's judgements, from facts to sentences; and the settings that it can judge without a machine."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from agent.config import Settings
from agent.observe import machine, surroundings
from agent.observe.findings import Finding, Level, error, note, ok, warning


def only(findings: Sequence[Finding], level: Level) -> Finding:
    assert [finding.level for finding in findings] == [level], findings
    return findings[0]


def test_a_finding_reads_as_one_sentence_and_its_remedy_below() -> None:
    finding = error("port", "it is taken", "end that\nor choose another")
    assert finding.as_text() == "error    port: it is taken\n         -> end that\n            or choose another"
    assert json.loads(json.dumps(finding.as_dict())) == {
        "level": "error",
        "subject": "port",
        "text": "it is taken",
        "remedy": "end that\nor choose another",
    }
    assert ok("root", "yes").as_text() == "ok       root: yes"


def test_whatever_is_wrong_has_a_remedy() -> None:
    for finding in (warning("a", "b", "c"), error("a", "b", "c")):
        assert finding.remedy
    assert note("a", "b").remedy == ""


@pytest.mark.parametrize(
    ("presentations", "wanted", "level", "words"),
    [
        (["erofs-file", "erofs-loop", "fuse-tree"], "auto", "ok", "erofs-file"),
        (["erofs-loop", "fuse-tree"], "auto", "note", "6.12"),
        (["fuse-tree"], "auto", "warning", "slower"),
        ([], "auto", "error", "no way"),
        (["fuse-tree"], "erofs-file", "error", "--presentation is erofs-file"),
        (["erofs-file", "fuse-tree"], "fuse-tree", "ok", "fuse-tree"),
    ],
)
def test_presentations(presentations: list[str], wanted: str, level: Level, words: str) -> None:
    finding = machine.judge_presentations(presentations, {"erofs-file": "Invalid argument"}, wanted, "tried just now")
    assert only([finding], level)
    assert words in finding.text
    assert bool(finding.remedy) == (level in {"warning", "error"})


def test_attempts_that_failed_say_what_it_means() -> None:
    failed = {"fuse": "", "resend": "Invalid argument", "overlay": "Invalid argument"}
    found = list(machine.judge_attempts(failed, Path("/data")))
    assert [(finding.level, finding.subject) for finding in found] == [("warning", "fsmount takeover"), ("error", "state_dir")]
    assert "Linux 6.9" in found[0].remedy
    assert "/data" in found[1].text
    assert only(list(machine.judge_attempts({"fuse": "Operation not permitted"}, Path("/data"))), "error").subject == "mounting"
    assert [finding.level for finding in machine.judge_attempts({"fuse": "", "resend": "", "overlay": ""}, Path("/"))] == [
        "ok",
        "ok",
    ]


def test_a_running_agents_own_troubles_are_told() -> None:
    calm = {
        "pids": {"agent": 7},
        "version": "1.0",
        "layers": [{}],
        "problems": [],
        "degraded": {},
        "failed_reads": 0,
        "bad_chunks": 0,
    }
    assert "process 7" in only(list(machine.judge_status(calm, "1.0")), "ok").text
    troubled = {
        **calm,
        "problems": ["fsmount does not answer"],
        "degraded": {"ab": "registry away"},
        "failed_reads": 3,
        "bad_chunks": 1,
    }
    levels = [finding.level for finding in machine.judge_status(troubled, "1.1")]
    assert levels == ["ok", "note", "error", "warning", "warning", "warning"]


def test_a_run_directory_whose_sockets_cannot_be_addressed(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60) / ("y" * 60)
    finding = only(machine.check_run_dir(Settings(run_dir=long)), "error")
    assert "shorter --run-dir" in finding.remedy
    assert not long.exists()


def test_a_quota_above_the_disk(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "state", cache_quota=1 << 60)
    found = {finding.subject: finding for finding in machine.check_state_dir(settings, lambda *_: True)}
    assert found["cache_quota"].level == "warning"
    assert "--cache-quota" in found["cache_quota"].remedy
    assert not settings.state_dir.exists()


def test_a_file_system_that_punches_no_holes(tmp_path: Path) -> None:
    found = machine.check_state_dir(Settings(state_dir=tmp_path, cache_quota=1 << 20), lambda *_: False)
    assert any(finding.level == "warning" and "parts of a file" in finding.text for finding in found)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mode", "content", "remedy"), [(0o644, b"x" * 32, "chmod 600"), (0o600, b"short", "/dev/urandom")])
def test_secrets_that_the_agent_would_refuse(tmp_path: Path, mode: int, content: bytes, remedy: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(content)
    secret.chmod(mode)
    finding = only(surroundings.check_secret(Settings(fleet_secret_file=secret)), "error")
    assert remedy in finding.remedy
    assert "xxxx" not in finding.as_text()


def test_secrets_missing_and_right(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    assert "No such file" in only(surroundings.check_secret(Settings(fleet_secret_file=secret)), "error").text
    secret.touch(mode=0o600)
    secret.write_bytes(b"x" * 32)
    only(surroundings.check_secret(Settings(fleet_secret_file=secret)), "ok")
    only(surroundings.check_secret(Settings()), "note")
    only(surroundings.check_secret(Settings(bootstrap_peers=("/ip4/10.0.0.1/tcp/4405",))), "error")


async def test_bootstrap_peers_that_are_no_addresses(tmp_path: Path) -> None:
    settings = Settings(fleet_secret_file=tmp_path / "secret", bootstrap_peers=("10.0.0.7:4405",))
    with trio.fail_after(5):
        found = await surroundings.check_bootstrap(settings, None)
    assert "/ip4/" in only(found, "error").remedy


@pytest.mark.parametrize(("listen", "data"), [("0.0.0.0:4405", "127.0.0.1:0"), ("/ip4/127.0.0.1/udp/1", "127.0.0.1:x")])
def test_addresses_of_the_wrong_form(tmp_path: Path, listen: str, data: str) -> None:
    found = surroundings.check_ports(Settings(fleet_secret_file=tmp_path, listen=listen, data_listen=data), None)
    assert found[0].level == "error"
    assert "/ip4/ADDRESS/tcp/PORT" in found[0].text
    assert found[1].level == ("ok" if data.endswith(":0") else "error")


def test_hosts_files(tmp_path: Path) -> None:
    good, bad = tmp_path / "docker.io", tmp_path / "localhost_5000_"
    for folder in (good, bad):
        folder.mkdir()
    (good / "hosts.toml").write_text('server = "https://registry-1.docker.io"\n[host."https://mirror.example"]\n')
    settings = Settings(registry_hosts_dir=tmp_path)
    assert "1 usable" in only(surroundings.check_hosts_dir(settings), "ok").text
    (bad / "hosts.toml").write_text('[host."https://mirror.example"]\ncapabilities = ["fly"]\n')
    assert str(bad) in only(surroundings.check_hosts_dir(settings), "warning").text
    only(surroundings.check_hosts_dir(Settings(registry_hosts_dir=tmp_path / "none")), "error")


def test_docker_configurations(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    settings = Settings(docker_config=path)
    only(surroundings.check_docker_config(settings), "error")
    path.write_text(json.dumps({"auths": {"r.example": {"auth": "dTpwdw=="}}, "credsStore": "no-such-helper-here"}))
    path.chmod(0o644)
    mode, helper = surroundings.check_docker_config(settings)
    assert mode.level == helper.level == "warning"
    assert f"chmod 600 {path}" in mode.remedy
    assert "docker-credential-no-such-helper-here" in helper.text
    assert "dTpwdw" not in mode.as_text()
    path.write_text("[]")
    only(surroundings.check_docker_config(settings), "error")
