"""README, docs/agents.md, docs/langchain.md: every block of Python in them is run, on a live gateway.

Those for frameworks that are not installed here are only parsed.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.live_stack import Line, LiveStack, live_stack, tool_call

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ("agents.md", "langchain.md", "../README.md")
RUN_DEADLINE_S = 120.0
ALWAYS_RUN = {"antiphon", "openai", "anthropic", "langchain", "langchain_core", "langchain_openai", "asyncio"}

BLOCKS = [
    pytest.param(code, id=f"{Path(page).name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))
]
CONFIG = '[model]\nnames = ["model"]\n'
SCRIPT: list[Line] = [
    {
        "session_id": "run-51",
        "tool_calls": [tool_call("research", topic="tea"), tool_call("research", topic="coffee")],
    },
    {"session_id": "run-51", "text": "Both are drinks."},
    {"session_id": "run-51/*", "tool_calls": [tool_call("look_up", word="it")]},
    {"session_id": "run-51/*", "text": "It is a drink."},
]


@pytest.fixture(scope="module")
def stack(
    tiny_model_dir: Path, valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveStack]:
    with live_stack(tmp_path_factory.mktemp("docs"), valkey_url, tiny_model_dir, SCRIPT, config=CONFIG) as up:
        yield up


def imported(code: str) -> set[str]:
    """Top-level packages."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("code", BLOCKS)
def test_python_in_the_docs_runs(stack: LiveStack, tmp_path: Path, code: str) -> None:
    """As a program of its own, with the address of the gateway that runs here."""
    missing = [name for name in imported(code) if importlib.util.find_spec(name) is None]
    assert not ALWAYS_RUN & set(missing)
    if missing:
        pytest.skip(f"parsed only: {', '.join(missing)} is not installed")
    program = tmp_path / "program.py"
    program.write_text(code.replace("http://127.0.0.1:8000", stack.url))
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", program],
        capture_output=True,
        text=True,
        timeout=RUN_DEADLINE_S,
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_agents_of_the_docs_are_three_sessions(stack: LiveStack) -> None:
    """After the program above: one session per agent, linked as the page says."""
    if not stack.receipts("run-51"):
        pytest.skip("the program that makes them was not run")
    listed = stack.http.get("/v1/sessions", params={"parent_id": "run-51"}).json()["data"]
    assert len(listed) == 2 and all(item["id"].startswith("run-51/") for item in listed)


def test_the_append_of_the_docs_works(stack: LiveStack) -> None:
    """The curl line, after the session's first round."""
    (line,) = re.findall(r"^curl .*/rounds -d '(.*)'$", (DOCS / "agents.md").read_text(), re.MULTILINE)
    first = {"model": "model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    began = stack.http.post("/v1/chat/completions", json=first, headers={"X-Session-ID": "append"})
    began.raise_for_status()
    answer = stack.http.post("/v1/sessions/append/rounds", content=line)
    answer.raise_for_status()
    assert answer.json()["session"]["round"] == 2
    assert answer.json()["usage"]["prompt_tokens"] > began.json()["usage"]["total_tokens"]


def test_the_trace_of_the_docs_is_one() -> None:
    page = (DOCS / "agents.md").read_text()
    turns = [msgspec.json.decode(line) for line in re.findall(r'^\{"session_id".*\}$', page, re.MULTILINE)]
    assert len(turns) == 2 and all(turn["session_id"] == "run-1" for turn in turns)
