"""Settings: where a value comes from, what it may be, and what is said when it may not."""

import argparse
from pathlib import Path

import pytest

from agent import config
from agent.config import UNLIMITED, Settings, load_settings, parse_duration, parse_list, parse_size, parse_switch
from agent.errors import SettingsError

NOWHERE = Path("/nonexistent/shoal.toml")


def load(flags: dict[str, object] | None = None, environ: dict[str, str] | None = None, file: Path = NOWHERE) -> Settings:
    return load_settings(flags or {}, environ or {}, default_file=file)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "shoal.toml"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("1k", 1000),
        ("1KiB", 1024),
        ("512MiB", 512 << 20),
        ("2GB", 2_000_000_000),
        ("1.5 GiB", 3 << 29),
        ("1tib", 1 << 40),
        (" 7B ", 7),
        ("unlimited", UNLIMITED),
        (" Unlimited ", UNLIMITED),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "0.1", "-1", "1PB", "MiB", "1 2", "1e9", "none"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("20s", 20.0), ("250ms", 0.25), ("5m", 300.0), ("1.5h", 5400.0), ("3", 3.0), (" 2 s ", 2.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-1s", "1d", "s", "1 2s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


def test_switches_and_lists() -> None:
    assert [parse_switch(word) for word in ("true", "YES", " on ", "1")] == [True] * 4
    assert [parse_switch(word) for word in ("false", "No", "off", "0")] == [False] * 4
    with pytest.raises(ValueError, match="maybe"):
        parse_switch("maybe")
    assert parse_list(" a, b ,,c") == ("a", "b", "c")
    assert parse_list("") == ()


def test_defaults() -> None:
    assert load() == Settings()
    assert load().state_dir == Path("/var/lib/shoal")
    assert load().cache_quota == 50 << 30


def test_a_flag_wins_over_the_variable_over_the_file_over_the_default(toml: Path) -> None:
    toml.write_text('read_deadline = "1s"\nzone = "file"\nlog_level = "error"\n')
    found = load({"read_deadline": "3s", "zone": None}, {"SHOAL_READ_DEADLINE": "2s", "SHOAL_ZONE": "variable"}, toml)
    assert (found.read_deadline, found.zone, found.log_level, found.log_format) == (3.0, "variable", "error", "auto")


def test_the_file_is_named_by_the_flag_then_by_the_variable(toml: Path, tmp_path: Path) -> None:
    toml.write_text('zone = "default"\n')
    named = tmp_path / "named.toml"
    named.write_text('zone = "named"\n')
    other = tmp_path / "other.toml"
    other.write_text('zone = "other"\n')
    assert load(file=toml).zone == "default"
    assert load({}, {"SHOAL_CONFIG": str(named)}, toml).zone == "named"
    assert load({"config": str(other)}, {"SHOAL_CONFIG": str(named)}, toml).zone == "other"


def test_every_form_of_value_in_a_file(toml: Path) -> None:
    toml.write_text(
        'cache_quota = "1GiB"\nread_deadline = 2.5\nprefetch = false\nbootstrap_peers = ["/ip4/10.0.0.1/tcp/4405", "/dns4/x/tcp/1"]\n'
        'insecure_registries = "a:5000, b:5000"\nfleet_secret_file = ""\nstate_dir = "/srv/shoal"\n'
    )
    found = load(file=toml)
    assert found.cache_quota == 1 << 30
    assert found.read_deadline == 2.5
    assert found.prefetch is False
    assert found.bootstrap_peers == ("/ip4/10.0.0.1/tcp/4405", "/dns4/x/tcp/1")
    assert found.insecure_registries == ("a:5000", "b:5000")
    assert found.fleet_secret_file is None
    assert found.state_dir == Path("/srv/shoal")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("zone = [1]", "zone in .* must be a string"),
        ("zone = {}", "zone in .* must be a string"),
        ("colour = 1", "unknown setting 'colour' in .*; known are background_fetch, "),
        ("zone = ", "not valid TOML"),
        ('cache_quota = "lots"', "cache_quota in .*shoal.toml: 'lots' is not a size"),
        ('presentation = "nfs"', "'nfs' is none of auto, erofs-file, erofs-loop, fuse-tree"),
        ('state_dir = ""', "state_dir in .*: an empty path"),
    ],
)
def test_what_a_file_may_not_say(toml: Path, text: str, said: str) -> None:
    toml.write_text(text)
    with pytest.raises(SettingsError, match=said):
        load(file=toml)


def test_files_that_cannot_be_read(toml: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot read settings from /nonexistent/shoal.toml: No such file"):
        load({"config": str(NOWHERE)})
    toml.write_bytes(b"zone = '\xff'")
    with pytest.raises(SettingsError, match="not valid TOML"):
        load(file=toml)


def test_variables_are_checked() -> None:
    assert load({}, {"PATH": "/bin", "SHOALS": "1"}) == Settings()
    with pytest.raises(SettingsError, match="unknown setting in the environment: SHOAL_COLOUR"):
        load({}, {"SHOAL_COLOUR": "blue"})
    with pytest.raises(SettingsError, match="SHOAL_READ_DEADLINE: 'soon' is not a duration"):
        load({}, {"SHOAL_READ_DEADLINE": "soon"})
    with pytest.raises(SettingsError, match="--read-deadline: '0' is not a duration above zero"):
        load({"read_deadline": "0"})


def parsed(*arguments: str, names: tuple[str, ...] | None = None) -> Settings:
    parser = argparse.ArgumentParser()
    config.add_flags(parser, names)
    return load(vars(parser.parse_args(arguments)))


def test_flags() -> None:
    assert parsed() == Settings()
    found = parsed(
        "--no-background-fetch", "--prefetch", "--cache-quota=2GB", "--bootstrap-peers", "/ip4/1.2.3.4/tcp/1,/dns4/a/tcp/2"
    )
    assert (found.background_fetch, found.prefetch, found.cache_quota) == (False, True, 2_000_000_000)
    assert found.bootstrap_peers == ("/ip4/1.2.3.4/tcp/1", "/dns4/a/tcp/2")
    assert parsed("--fleet-secret-file", "").fleet_secret_file is None


def test_a_command_has_only_the_flags_it_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("--run-dir=/tmp/x", names=("run_dir",)).run_dir == Path("/tmp/x")
    with pytest.raises(SystemExit):
        parsed("--state-dir=/tmp/x", names=("run_dir",))
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_shown_value_parses_to_itself() -> None:
    for name, value in Settings()._asdict().items():
        text = config.show_value(value)
        if value not in (None, (), ""):
            assert getattr(load({name: text}), name) == value


def test_the_reference_page_has_every_setting() -> None:
    page = config.reference_page()
    for name in Settings._fields:
        assert f"| `--{name.replace('_', '-')}` | `SHOAL_{name.upper()}` | `{name}` |" in page
    assert "50GiB" in page
    assert "`30s`" in page
