"""The wheel holds what the folders hold, and imports from a fresh environment that has only its dependencies.

An undeclared folder works in an editable install and is silently absent from the wheel; a bare `import
scheduler` works from the repository and nowhere else. These tests build the wheel and use it elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("scheduler", "engines", "policies", "traces", "eval")
OWN_NAMES = {"scheduler/client/": "client/", "scheduler/langchain/": "langchain/"}
"""Folders of the scheduler that install under names of their own (pyproject.toml)."""

INSIDE_AN_ENGINE = {"engines.linker", "engines.device_copy", "engines.device_pool"}
"""Modules that only ever load beside SGLang, and may need torch. Simulated engines need none of them."""

IMPORT_ALL = """
import importlib, importlib.abc, json, sys

class Block(importlib.abc.MetaPathFinder):
    def __init__(self, names):
        self.names = names
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is not in a light install", name=name)
        return None

modules, blocked = json.load(sys.stdin)
sys.meta_path.insert(0, Block(set(blocked)))
failed = {}
for module in modules:
    try:
        importlib.import_module(f"antiphon.{module}")
    except ModuleNotFoundError as error:
        failed[module] = str(error)
origin = importlib.import_module("antiphon.scheduler").__file__
print(json.dumps({"failed": failed, "origin": origin}))
"""

FIND_BARE = """
import importlib.util, json, sys
print(json.dumps([name for name in json.load(sys.stdin) if importlib.util.find_spec(name)]))
"""


def packaged_files() -> set[str]:
    """Everything in the five folders that must be in the wheel, by its name there."""
    files = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files.add(f"antiphon/{installed_as(path.relative_to(ROOT).as_posix())}")
    return files


def installed_as(path: str) -> str:
    for folder, name in OWN_NAMES.items():
        if path.startswith(folder):
            return name + path.removeprefix(folder)
    return path


def run(python: Path, code: str, given: Any, cwd: Path) -> Any:
    """Run `code` with `given` on stdin, as JSON both ways, outside the repository and without its paths."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), "-c", code], input=json.dumps(given), capture_output=True, text=True, cwd=cwd,
        env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def light_distributions() -> set[str]:
    """What `pip install .` brings: the dependencies in pyproject.toml and theirs, normalised names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    left = list(project["dependencies"])
    while left:
        requirement = left.pop()
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert match, requirement
        name = normalised(match.group())
        if name in found or "extra ==" in requirement:
            continue
        try:
            left += importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        found.add(name)
    return found


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the source so that nothing is written into it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist")],
        cwd=source, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with the wheel; its dependencies come from this environment."""
    home = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True, timeout=120)
    python = home / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index",
         "--disable-pip-version-check", str(wheel)],
        check=True, timeout=120,
    )  # fmt: skip
    (site,) = (home / "lib").glob("python*/site-packages")
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n")
    return python


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    """Every module, typed marker and data file of the five folders, and nothing from outside them."""
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {name for name in names if ".dist-info/" not in name}
    assert packaged_files() - ours == set(), "missing from the wheel"
    assert ours - packaged_files() == set(), "in the wheel, not in the source"
    assert all(f"antiphon/{package}/py.typed" in names for package in (*PACKAGES, "client", "langchain"))
    assert {"antiphon/eval/clusters/tiny-cpu.toml", "antiphon/policies/data/tiny-cpu.json"} <= names
    assert "antiphon/__init__.py" not in names


def test_a_light_install_imports_without_torch(fresh: Path, tmp_path: Path) -> None:
    """With only what `pip install .` brings, every module loads but those that live inside an engine."""
    modules = sorted(
        name.removeprefix("antiphon/").removesuffix(".py").replace("/", ".")
        for name in packaged_files()
        if name.endswith(".py") and not name.endswith("__init__.py")
    )
    light = light_distributions()
    assert {"aiohttp", "redis", "msgspec"} <= light and "torch" not in light
    blocked = [
        top
        for top, distributions in importlib.metadata.packages_distributions().items()
        if top != "antiphon" and not {normalised(name) for name in distributions} & light
    ]
    assert "pytest" in blocked
    answer = run(fresh, IMPORT_ALL, [modules, [*blocked, "torch", "sglang", "numpy", "nixl"]], tmp_path)
    assert not str(answer["origin"]).startswith(str(ROOT))
    wrong = {name: why for name, why in answer["failed"].items() if name not in INSIDE_AN_ENGINE}
    assert not {name for name in wrong if not name.startswith("langchain.")}, wrong  # an extra of its own


def test_bare_names_are_not_importable(fresh: Path, tmp_path: Path) -> None:
    """Neither the wheel nor the editable install puts `scheduler`, `engines`, ... on the path."""
    assert run(fresh, FIND_BARE, PACKAGES, tmp_path) == []
    assert run(Path(sys.executable), FIND_BARE, PACKAGES, tmp_path) == []


def test_the_command_is_installed(fresh: Path, tmp_path: Path) -> None:
    """`antiphon --help` answers from the wheel."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(fresh.parent / "antiphon"), "--help"], cwd=tmp_path, capture_output=True, text=True,
        env=environment, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout and "replay" in done.stdout
