"""Configuration: one file, flags and environment into one frozen value; what is wrong is named."""

from __future__ import annotations

import dataclasses
import os
import stat
import tomllib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.scheduler.config import Config, EngineConfig, LedgerConfig, load_config, to_toml
from antiphon.scheduler.errors import UserError
from antiphon.scheduler.fleet_key import load_or_create_fleet_key

FULL = """
[gateway]
port = 9000

[scheduler]
policy = "local"
profiles = { p0 = "big.json", decode = "small.json" }
slo_ttft_s = 1

[ledger]
url = "redis://:secret@127.0.0.1:6379/0"
fleet = "blue"

[model]
names = ["agent", "tiny"]

[policy.ampd]
alpha = 0.5
tiers = [1, 2]

[[engines]]
engine_id = "p0"
url = "http://127.0.0.1:30000"
pool = "prefill"
kv_addresses = ["127.0.0.1:31000"]

[[engines]]
engine_id = "d0"
url = "http://127.0.0.1:30001"
"""


def load(
    tmp_path: Path,
    text: str,
    overrides: Mapping[str, object] | None = None,
    env: Mapping[str, str] | None = None,
) -> Config:
    path = tmp_path / "antiphon.toml"
    path.write_text(text)
    return load_config(path, overrides, env or {})


def test_a_whole_file(tmp_path: Path) -> None:
    """Every section is read, what is left out has its default."""
    config = load(tmp_path, FULL)
    assert config.gateway.port == 9000 and config.gateway.host == "127.0.0.1"
    assert config.scheduler.policy == "local" and config.scheduler.slo_ttft_s == 1.0
    assert config.engines[0] == EngineConfig("p0", "http://127.0.0.1:30000", "prefill", ("127.0.0.1:31000",))
    assert config.engines[1].pool == "decode"
    assert config.model.names == ("agent", "tiny")
    assert config.policy_parameters() == {}
    assert config.scheduler.profiles == {"p0": "big.json", "decode": "small.json"}
    assert config.policy["ampd"] == {"alpha": 0.5, "tiers": [1, 2]}


def test_no_file_gives_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file there is a whole configuration; ./antiphon.toml is read if it is there."""
    monkeypatch.chdir(tmp_path)
    assert load_config(env={}) == Config()
    (tmp_path / "antiphon.toml").write_text("[gateway]\nport = 1\n")
    assert load_config(env={}).gateway.port == 1


def test_precedence(tmp_path: Path) -> None:
    """Command line over environment over file over default; None on the command line is nothing."""
    env = {"ANTIPHON_REDIS_URL": "redis://env"}
    file = '[ledger]\nurl = "redis://file"\n'
    assert load(tmp_path, file).ledger.url == "redis://file"
    assert load(tmp_path, file, env=env).ledger.url == "redis://env"
    assert (
        load(tmp_path, file, {"ledger.url": "redis://flag", "gateway.port": None}, env).ledger.url
        == "redis://flag"
    )
    assert load(tmp_path, "", {"gateway.port": 5}).gateway.port == 5


WRONG = {
    "unknown key": ("[gateway]\nprot = 1", r"gateway\.prot.*'port'"),
    "unknown section": ("[gatway]\nport = 1", r"'gatway'.*'gateway'"),
    "unknown, nothing near": ("[gateway]\nzzz = 1", r"gateway\.zzz.*known here: host, port"),
    "unknown in engine": (
        '[[engines]]\nengine_id = "a"\nurl = "http://x"\npol = "x"',
        r"engines\[0\]\.pol.*'pool'",
    ),
    "wrong type": ('[gateway]\nport = "80"', r"Expected `int`.*gateway\.port"),
    "bool for int": ("[gateway]\nport = true", r"gateway\.port"),
    "missing": ('[[engines]]\nengine_id = "a"', r"`url`.*engines"),
    "no table": ("gateway = 5", r"gateway: expected a table"),
    "port": ("[gateway]\nport = 70000", "port must be 0 to 65535"),
    "limit": ("[gateway]\nbody_limit_bytes = 0", "body_limit_bytes must be above 0"),
    "nan": ("[scheduler]\nslo_ttft_s = nan", "slo_ttft_s must be above 0"),
    "tries": ("[scheduler]\nmax_tries = 0", "max_tries"),
    "pool": ('[[engines]]\nengine_id = "a"\nurl = "http://x"\npool = "both"', "pool must be one of"),
    "engine url": ('[[engines]]\nengine_id = "a"\nurl = "x:1"', "http://"),
    "twice": ('[[engines]]\nengine_id = "a"\nurl = "http://x"\n' * 2, "'a' is there twice"),
    "ledger url": ('[ledger]\nurl = "http://x"', "redis://"),
    "fleet": ('[ledger]\nfleet = "a{b}"', "letters, digits and dashes"),
    "log level": ('[gateway]\nlog_level = "loud"', "log_level must be one of"),
    "no TOML": ("[gateway", "not valid TOML"),
    "engines no list": ("[engines]\na = 1", "engines"),
    "policy no table": ("[policy]\nampd = 5", r"policy"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, name: str) -> None:
    """The error has the file, the key's path, and what to write instead."""
    text, expected = WRONG[name]
    with pytest.raises(UserError, match=expected) as caught:
        load(tmp_path, text)
    assert "antiphon.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A named file must exist; it is never silently left out."""
    with pytest.raises(UserError, match=r"absent\.toml.*cannot be read"):
        load_config(tmp_path / "absent.toml", env={})


def test_what_is_printed_is_read_back(tmp_path: Path) -> None:
    """`serve --check` prints a file that gives the same configuration, but for a masked password."""
    config = load(tmp_path, FULL)
    assert "secret" not in to_toml(config)
    plain = dataclasses.replace(config, ledger=LedgerConfig(url="redis://127.0.0.1:6379"))
    assert load(tmp_path, to_toml(plain)) == plain
    assert load(tmp_path, to_toml(Config())) == Config()


VALUES = st.recursive(
    st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(parameters=st.dictionaries(st.text(max_size=6), VALUES, max_size=4), name=st.text(max_size=6))
def test_any_policy_parameters_are_printed_as_toml(parameters: dict[str, Any], name: str) -> None:
    """Whatever a policy's table holds, the printed form is TOML and says the same."""
    printed = tomllib.loads(to_toml(Config(policy={name: parameters})))
    assert printed["policy"][name] == parameters


def test_configuration_is_frozen() -> None:
    """Nobody changes a configuration after it was built."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().gateway.port = 5  # type: ignore[misc]


def test_the_state_directory() -> None:
    """The configured one, else the XDG one, else the home's."""
    assert Config(ledger=LedgerConfig(state_dir="/a")).state_dir({}) == Path("/a")
    assert Config().state_dir({"XDG_STATE_HOME": "/x"}) == Path("/x/antiphon")
    assert Config().state_dir({}) == Path.home() / ".local/state/antiphon"


# ---------------------------------------------------------------- fleet key


def test_the_fleet_key_is_made_once(tmp_path: Path) -> None:
    """The first use makes a private file; later uses, and racing ones, get the same key."""
    directory = tmp_path / "state"
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: load_or_create_fleet_key(directory, env={}), range(16)))
    assert len(set(keys)) == 1 and len(keys[0]) == 64
    path = directory / "fleet.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in directory.iterdir()] == ["fleet.key"]
    assert load_or_create_fleet_key(directory, env={}) == keys[0]


def test_the_fleet_key_of_the_environment_wins(tmp_path: Path) -> None:
    """With the variable set, no file is looked at or made."""
    env = {"ANTIPHON_FLEET_KEY": "k" * 20}
    assert load_or_create_fleet_key(tmp_path, env=env) == b"k" * 20
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="at least 16"):
        load_or_create_fleet_key(tmp_path, env={"ANTIPHON_FLEET_KEY": "short"})


def test_a_fleet_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """A leaked secret is worse than a stop: the message says how to mend it."""
    path = tmp_path / "my.key"
    path.write_text("k" * 40)
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        load_or_create_fleet_key(tmp_path, path, env={})
    path.chmod(0o600)
    assert load_or_create_fleet_key(tmp_path, path, env={}) == b"k" * 40
    path.write_text("short")
    with pytest.raises(UserError, match=r"my\.key.*at least 16"):
        load_or_create_fleet_key(tmp_path, path, env={})


def test_a_state_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """The path is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"fleet\.key"):
        load_or_create_fleet_key(tmp_path / "file", env=dict(os.environ) | {"ANTIPHON_FLEET_KEY": ""})
