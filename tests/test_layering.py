"""Imports go one way, files stay short, each folder's map is true. Read from the source: nothing is run."""

from __future__ import annotations

import ast
import gc
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("scheduler", "engines", "policies", "traces", "eval")
OWN_NAMES = {"scheduler.client": "client", "scheduler.langchain": "langchain"}
"""Folders of scheduler/ that install under a name of their own."""
FOLDERS = (*PACKAGES, "scheduler/gateway", "scheduler/client", "scheduler/langchain", "eval/planner")
"""Each has a map."""

FILE_LINES = 400
FUNCTION_LINES = 60

LEAVES = {
    "policies.latency": set(),
    "policies.base": {"policies.latency"},
    "scheduler.outcomes": {"policies.base"},
    "scheduler.messages": {"policies.base", "policies.latency", "scheduler.outcomes"},
    "traces.schema": set(),
    "engines.wire": set(),
    "engines.page_hash": set(),
    "engines.base": {"engines.wire"},
}
"""Leaf -> all of Antiphon that it may import."""

PURE = {
    "__future__", "bisect", "collections", "collections.abc", "dataclasses", "enum", "functools", "hashlib",
    "heapq", "itertools", "math", "msgspec", "msgspec.structs", "operator", "types", "typing",
}  # fmt: skip
"""What code without clock, I/O and chance may import."""

DOORS = ("gateway", "serve", "cli")
"""Modules of scheduler/ that speak to clients: nothing below them may import them."""


class Import(NamedTuple):
    name: str
    """Dotted module, or module.name for `from module import name`."""
    line: int
    typing_only: bool
    deferred: bool
    """Inside a function: not run when the module is loaded."""


class Module(NamedTuple):
    name: str
    """scheduler.core for scheduler/core.py; scheduler for its __init__.py."""
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


def parse(source: str, name: str = "<text>") -> ast.Module:
    """`ast.parse`, undisturbed: CPython 3.11 ends it by a SystemError if garbage that is collected meanwhile
    formats a traceback, which parses too."""
    gc.disable()
    try:
        return ast.parse(source, name)
    finally:
        gc.enable()


def read_imports(tree: ast.Module) -> Iterator[Import]:
    typing_only: set[int] = set()
    deferred: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing_only |= _inside(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            deferred |= _inside(node)
    for node in ast.walk(tree):
        flags = id(node) in typing_only, id(node) in deferred
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, *flags)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, *flags)


def _inside(node: ast.AST) -> set[int]:
    return {id(child) for child in ast.walk(node)}


def read_module(path: Path) -> Module:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    for folder, own in OWN_NAMES.items():
        if name == folder or name.startswith(f"{folder}."):
            name = own + name.removeprefix(folder)
    tree = parse(path.read_text(), str(path))
    return Module(name, path, tree, tuple(read_imports(tree)))


MODULES = {
    module.name: module
    for package in PACKAGES
    for module in map(read_module, sorted((ROOT / package).glob("**/*.py")))
}


def ours(module: Module, *, at_load: bool = False) -> dict[str, int]:
    """Modules of Antiphon that this one imports -> line; `from antiphon.x import y` is x.y if that is one.

    `at_load`: only what loading this module loads, not what its functions or the type checker import.
    """
    found = {}
    for name, line, typing_only, deferred in module.imports:
        if name.startswith("antiphon.") and not (at_load and (typing_only or deferred)):
            inner = name.removeprefix("antiphon.")
            found[inner if inner in MODULES else inner.rpartition(".")[0]] = line
    return found


def foreign(module: Module) -> dict[str, int]:
    """Other names that it imports -> line."""
    return {item.name: item.line for item in module.imports if not item.name.startswith("antiphon.")}


def closure(name: str) -> set[str]:
    """The module and all of Antiphon that loading it loads."""
    seen: set[str] = set()
    left = [name]
    while left:
        current = left.pop()
        if current not in seen and current in MODULES:
            seen.add(current)
            left += ours(MODULES[current], at_load=True)
    return seen


def is_door(name: str) -> bool:
    package, _, rest = name.partition(".")
    stem = rest.partition(".")[0]
    return package == "scheduler" and (stem in DOORS or stem.startswith("cli_"))


def is_cli(name: str) -> bool:
    return name == "scheduler.cli" or name.startswith("scheduler.cli_")


def must_exist(*names: str) -> None:
    missing = [name for name in names if name not in MODULES]
    assert not missing, f"the layering test names modules that are gone: {missing}"


def core_modules() -> set[str]:
    """The core is whatever scheduler.core loads from scheduler/."""
    return {name for name in closure("scheduler.core") if name.startswith("scheduler.")}


# ---------------------------------------------------------------- directions


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_import_only_leaves(leaf: str) -> None:
    """A leaf imports nothing of Antiphon but the leaves below it."""
    assert set(ours(MODULES[leaf])) <= LEAVES[leaf]


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("policies", {"policies"}),
        # traces parse streamed answers with the same parser as the scheduler's engine adapter
        ("traces", {"traces", "engines.sse"}),
        # engines share the latency formulas with the policies, and know no scheduler
        ("engines", {"engines", "policies.latency"}),
        # the simulation runs sessions, and a recording writes them: the schema is a leaf
        ("scheduler", {"scheduler", "engines", "policies", "traces.schema"}),
        # a program that talks to a gateway loads nothing of it
        ("client", {"client"}),
        ("langchain", {"langchain", "client"}),
    ],
)
def test_packages_import_downwards(package: str, allowed: set[str]) -> None:
    """policies stand alone; engines use their latency formulas; the scheduler uses both; eval is on top."""
    wrong = [
        f"{module.name}:{line} imports {name}"
        for module in MODULES.values()
        if module.package == package and not is_cli(module.name)
        for name, line in ours(module).items()
        if name.partition(".")[0] not in allowed and name not in allowed
    ]
    assert not wrong


def test_only_the_cli_imports_eval_and_traces() -> None:
    """Replay and evaluation are loaded by the command that needs them, never by a server."""
    must_exist("scheduler.cli", "traces.replay")
    for module in MODULES.values():
        if module.package == "eval" or is_cli(module.name):
            continue
        assert not [name for name in ours(module) if name.partition(".")[0] == "eval"], module.name
    at_load = closure("scheduler.cli")
    assert not [name for name in at_load if name.partition(".")[0] in ("eval", "traces")]


def test_the_core_is_sans_io() -> None:
    """No clock, I/O, log or chance in what scheduler.core loads; no engine, no policy by name."""
    core = core_modules()
    assert core >= {f"scheduler.{name}" for name in ("core", "messages", "states", "residency", "fleet")}
    allowed = core | {"policies.base", "policies.latency", "engines.page_hash"}
    for name in sorted(core):
        module = MODULES[name]
        assert set(ours(module)) <= allowed, f"{name}: {sorted(set(ours(module)) - allowed)}"
        impure = [
            f"line {line}: {imported}"
            for imported, line in foreign(module).items()
            if imported not in PURE and imported.rpartition(".")[0] not in PURE
        ]
        assert not impure, f"{name} imports {impure}"


def test_policies_are_pure() -> None:
    """A policy imports data modules; chance only as a seeded random.Random. Data files: latency alone."""
    for module in MODULES.values():
        if module.package != "policies" or module.name in ("policies.latency", "policies.registry"):
            continue
        impure = [
            f"line {line}: {imported}"
            for imported, line in foreign(module).items()
            if imported not in PURE
            and imported.rpartition(".")[0] not in PURE
            and imported != "random.Random"
        ]
        assert not impure, f"{module.name} imports {impure}"


def test_nothing_below_the_doors_imports_them() -> None:
    """Driver and ledger know no HTTP: neither the doors nor an ASGI library is loaded with them."""
    must_exist("scheduler.runtime", "scheduler.ledger", "scheduler.gateway.app")
    for start in ("scheduler.runtime", "scheduler.ledger", "scheduler.rounds"):
        loaded = closure(start)
        assert not sorted(filter(is_door, loaded)), f"{start} loads doors"
        for name in sorted(loaded):
            servers = [n for n in foreign(MODULES[name]) if n.partition(".")[0] in ("starlette", "uvicorn")]
            assert not servers, f"{name} imports {servers}"
    assert not sorted(filter(is_cli, closure("scheduler.gateway.app")))


def test_imports_have_no_cycle() -> None:
    """Loading a module never comes back to it."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join((*path, name))}"
        if name not in done and name in MODULES:
            for other in ours(MODULES[name], at_load=True):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(MODULES):
        visit(name, ())


def test_no_bare_imports() -> None:
    """`import scheduler` would make a second copy of every class: always antiphon.scheduler."""
    tests = map(read_module, sorted((ROOT / "tests").glob("**/*.py")))
    for module in (*MODULES.values(), *tests):
        bare = [n for n in foreign(module) if n.partition(".")[0] in PACKAGES]
        assert not bare, f"{module.path}: {bare}"
        assert "antiphon.eval" not in {i.name for i in module.imports if i.name.endswith(".eval")}, (
            f"{module.path}: `from antiphon import eval` rebinds a builtin"
        )


def test_what_is_imported_exists() -> None:
    """Every antiphon.x.y that is imported anywhere is a module here."""
    for module in MODULES.values():
        unknown = {name: line for name, line in ours(module).items() if name not in MODULES}
        assert not unknown, f"{module.name}: {unknown}"


# ---------------------------------------------------------------- sizes and maps


@pytest.mark.parametrize("folder", [*PACKAGES, "tests"])
def test_files_and_functions_are_short(folder: str) -> None:
    """400 lines to a module, 60 to a function: what a reader can hold. Tests have no limit to the file."""
    long = []
    for path in sorted((ROOT / folder).glob("**/*.py")):
        source = path.read_text()
        lines = source.count("\n")
        if lines > FILE_LINES and folder != "tests":
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert not long


@pytest.mark.parametrize("package", FOLDERS)
def test_the_map_of_each_folder_is_true(package: str) -> None:
    """The folder's __init__.py is a docstring that names every module in it and no other.

    Those of the clients also say what a program imports.
    """
    tree = read_module(ROOT / package / "__init__.py").tree
    names = "from", "import", "__all__"
    rest = [node for node in tree.body[1:] if not ast.unparse(node).startswith(names)]
    assert not rest, f"{package}/__init__.py holds more than its docstring"
    assert len(tree.body) == 1 or package.endswith(("client", "langchain")), package
    named = set(re.findall(r"\b([a-z_0-9]+)\.py\b", ast.get_docstring(tree) or ""))
    there = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    assert named == there, f"not named: {sorted(there - named)}; not there: {sorted(named - there)}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_says_what_it_is(name: str) -> None:
    """The first line of a module's docstring is one sentence."""
    docstring = ast.get_docstring(MODULES[name].tree)
    assert docstring, f"{name} has no docstring"
    assert docstring.partition("\n")[0].rstrip().endswith((".", ":", "?")), name


def test_the_reader_of_imports_sees_what_it_must() -> None:
    """The checks above rest on this reader: names, lines, and what is for the type checker only."""
    source = (
        "from typing import TYPE_CHECKING\n"
        "import os.path\n"
        "from antiphon.engines import wire\n"
        "if TYPE_CHECKING:\n"
        "    from antiphon.scheduler.core import Scheduler\n"
        "def f():\n"
        "    import asyncio\n"
        "    from antiphon.policies import arms\n"
    )
    module = Module("x.y", Path("x/y.py"), parse(source), tuple(read_imports(parse(source))))
    assert foreign(module) == {"typing.TYPE_CHECKING": 1, "os.path": 2, "asyncio": 7}
    assert ours(module) == {"engines.wire": 3, "scheduler.core": 5, "policies.arms": 8}
    assert ours(module, at_load=True) == {"engines.wire": 3}
    assert "asyncio" not in PURE and "asyncio" in sys.stdlib_module_names
