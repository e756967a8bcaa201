"""The documentation against the code: files that it names, phases, configuration, make targets, links."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from antiphon.policies.registry import ORDERINGS, POLICIES
from antiphon.scheduler.access_config import KeyConfig
from antiphon.scheduler.config import Config, EngineConfig, ServedModelConfig, load_config
from antiphon.scheduler.states import ACCEPTS, SUCCESSORS, Phase

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def text(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_page_names_exist(name: str) -> None:
    """Every `folder/file` in backquotes, and every relative link, is there."""
    page = text(name)
    quoted = re.findall(
        r"`((?:scheduler|engines|policies|traces|eval|tests|docs)/[\w./-]*\w\.(?:py|json|md|jsonl))`", page
    )
    missing = [path for path in quoted if not (ROOT / path).exists()]
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page) if "://" not in link]
    missing += [link for link in links if not ((ROOT / name).parent / link).exists()]
    assert not missing


def test_the_table_of_phases_is_that_of_the_code() -> None:
    """docs/architecture.md shows scheduler/states.py, phase by phase."""
    rows = re.findall(
        r"^\| (\w+) \| ([\w, ]*?) ?\| ([\w, ]*?) ?\|$", text("docs/architecture.md"), re.MULTILINE
    )
    phases = {phase.value for phase in Phase}
    shown = {name: (events, after) for name, events, after in rows if name in phases}
    assert shown == {
        phase.value: (
            ", ".join(sorted(event.__name__ for event in ACCEPTS[phase])),
            ", ".join(sorted(after.value for after in SUCCESSORS[phase])),
        )
        for phase in Phase
    }


def test_the_configuration_reference_is_complete(tmp_path: Path) -> None:
    """The file in docs/operations.md loads, names every key, and shows the defaults."""
    shown, lists = re.findall(r"```toml\n(.*?)```", text("docs/operations.md"), re.DOTALL)
    path = tmp_path / "antiphon.toml"
    path.write_text(shown)
    loaded = load_config(path, env={})
    assert dataclasses.replace(loaded, engines=(), policy=Config().policy) == Config()
    table = tomllib.loads(re.sub(r"^# (?=\w+ = )", "", shown, flags=re.MULTILINE))
    for section in dataclasses.fields(Config):
        if not isinstance(getattr(Config(), section.name), tuple | Mapping):
            known = {field.name for field in dataclasses.fields(getattr(Config(), section.name))}
            assert set(table[section.name]) == known, section.name
    path.write_text(lists)
    load_config(path, env={})
    entries = tomllib.loads(lists) | {"engines": table["engines"]}
    assert set(entries["models"][0]) == {field.name for field in dataclasses.fields(ServedModelConfig)}
    assert set(entries["engines"][0]) == {field.name for field in dataclasses.fields(EngineConfig)}
    named = {field.name for field in dataclasses.fields(KeyConfig) if field.name in lists}
    assert named == {field.name for field in dataclasses.fields(KeyConfig)}
    for name, parameters in loaded.policy.items():
        entry = POLICIES[name]
        assert dict(parameters) == dataclasses.asdict(entry.parameters())


def test_every_policy_has_its_section() -> None:
    """docs/policies.md has a heading for each policy and names each ordering, with every parameter."""
    page = text("docs/policies.md")
    for name, entry in POLICIES.items():
        section = re.search(rf"^## {name}\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL)
        assert section, f"no section on {name}"
        for said in ("Parameters", "Ties", "Example", "When it is bad"):
            assert said in section.group(1) or (said == "Ties" and "ties" in section.group(1)), (name, said)
        for field in dataclasses.fields(entry.parameters):
            assert f"`{field.name}`" in section.group(1), (name, field.name)
    assert all(f"`{name}`" in page for name in ORDERINGS)


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_that_a_page_names_exist(name: str) -> None:
    """`make x` in a page is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)\b", text(name), re.MULTILINE))
    assert named <= targets
    if name == "README.md":
        assert {"demo", "serve", "test"} <= named


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_plain(name: str) -> None:
    """No phrases that say nothing."""
    empty = r"\b(robust|seamless|powerful|blazing|effortless|cutting-edge|state-of-the-art|leverag\w+)\b"
    assert not re.findall(empty, text(name), re.IGNORECASE)
