"""`antiphon keys`, and the commands that bring a key to a gateway."""

from __future__ import annotations

import json
import re
import secrets
import tomllib
from pathlib import Path

import pytest

from antiphon.scheduler.access_config import AccessConfig, KeyConfig
from antiphon.scheduler.api_keys import digest_of
from antiphon.scheduler.config import Config, load_config
from tests.gateway_helpers import FakeState
from tests.test_cli import gateway_in_a_thread, run


def keys(url: str, fleet: str, *arguments: str) -> tuple[int, str]:
    return run("keys", *arguments, "--ledger", url, "--fleet", fleet)


def test_keys_are_added_listed_and_removed(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is shown by `add` and by nothing else; a name is given once."""
    monkeypatch.setenv("ANTIPHON_REDIS_URL", "redis://127.0.0.1:1")  # --ledger wins
    fleet = secrets.token_hex(6)
    code, shown = keys(
        valkey_url, fleet, "add", "ci", "--tenant", "red", "--tokens-per-minute", "500", "--admin"
    )
    (secret,) = re.findall(r"^(ak-[\w-]{43})$", shown, re.MULTILINE)
    assert code == 0 and "ledger_keys = true" in shown
    code, shown = keys(valkey_url, fleet, "add", "ci")
    assert code == 2 and "there is a key 'ci' already" in shown
    code, listed = keys(valkey_url, fleet, "list")
    assert code == 0 and "keys: 1" in listed
    assert re.search(r"ci  tenant red  admin  \d{4}-\d\d-\d\d  tokens_per_minute 500", listed)
    code, as_json = keys(valkey_url, fleet, "list", "--json")
    (record,) = json.loads(as_json)
    assert record["name"] == "ci" and record["limits"] == {"tokens_per_minute": 500}
    for text in (listed, as_json):
        assert secret not in text and digest_of(secret).hex() not in text
    assert keys(valkey_url, secrets.token_hex(6), "list")[1] == "keys: 0\n", "another fleet has its own"
    assert keys(valkey_url, fleet, "remove", "ci") == (0, "removed key 'ci'\n")
    code, shown = keys(valkey_url, fleet, "remove", "ci")
    assert code == 2 and "there is no key 'ci'" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("a b",), "visible ASCII"),
        (("a", "--tenant", ""), "tenant is 1 to 255"),
        (("a", "--sessions", "-1"), "sessions must be 0 or more"),
    ],
)
def test_a_wrong_key_is_not_made(valkey_url: str, arguments: tuple[str, ...], expected: str) -> None:
    fleet = secrets.token_hex(6)
    code, shown = keys(valkey_url, fleet, "add", *arguments)
    assert code == 2 and expected in shown and "ak-" not in shown
    assert keys(valkey_url, fleet, "list")[1] == "keys: 0\n"


def test_without_a_redis_they_are_in_the_embedded_one(tmp_path: Path) -> None:
    """The state directory's server, which the next `serve` uses too."""
    state = ("--state-dir", str(tmp_path / "state"))
    config = tmp_path / "antiphon.toml"
    config.write_text("[access]\nledger_keys = true\n")
    code, shown = run("keys", "add", "ci", *state, "--config", str(config))
    assert code == 0 and "ledger_keys" not in shown, "the gateway asks for them already"
    assert "keys: 1" in run("keys", "list", *state)[1]


def test_a_ledger_that_is_away_is_said(tmp_path: Path) -> None:
    code, shown = run("keys", "list", "--ledger", "redis://127.0.0.1:1")
    assert code == 2 and "--ledger: the ledger at redis://127.0.0.1:1 is away" in shown


def test_a_key_for_the_configuration_file(tmp_path: Path) -> None:
    """`keys new` prints an entry that loads, and the key that belongs to it."""
    code, shown = run("keys", "new", 'we"ird\\', "--tenant", "red", "--admin")
    assert code == 0
    (secret,) = re.findall(r"shown this once: (ak-[\w-]{43})", shown)
    file = tmp_path / "antiphon.toml"
    file.write_text(shown)
    expected = KeyConfig('we"ird\\', "red", digest_of(secret).hex(), admin=True)
    assert load_config(file, env={}).keys == (expected,)
    assert tomllib.loads(shown)["keys"][0]["tenant"] == "red"


def test_commands_bring_the_key_of_the_environment(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ANTIPHON_API_KEY, for a gateway that asks for one."""
    secret = "ak-of-the-operator-0123456789"
    key = KeyConfig("root", key_sha256=digest_of(secret).hex(), admin=True)
    config = Config(keys=(key,), access=AccessConfig())
    with gateway_in_a_thread(tiny_model_dir, FakeState(), config) as url:
        code, shown = run("engines", "--url", url)
        assert code == 2 and "asks for an API key" in shown
        monkeypatch.setenv("ANTIPHON_API_KEY", secret)
        code, shown = run("engines", "--url", url)
        assert code == 0 and "e0" in shown
