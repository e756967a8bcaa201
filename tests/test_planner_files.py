"""A plan as files, read back by the simulator, the configuration, and the engines' own parser."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import click
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from typer.testing import CliRunner

from antiphon.engines.cluster import Slo, load_cluster, resolve_engines
from antiphon.engines.launch_options import EngineOptions
from antiphon.eval.known_models import read_models
from antiphon.eval.planner.ask import Ask, PlanError
from antiphon.eval.planner.engine_types import engine_types
from antiphon.eval.planner.plan import PlanOptions, make_plan
from antiphon.eval.planner.plan_files import FIRST_PORT, Engine, placed, write_files
from antiphon.eval.planner.plans import Group, Plan
from antiphon.eval.planner.prices import read_prices
from antiphon.policies.latency import load_latency_model
from antiphon.scheduler.cli import app
from antiphon.scheduler.config import load_config

ASK = Ask(
    model="qwen3-32b", budget={"h100": 32, "a100": 32}, slo=Slo(1.5, 0.04), session_rate_per_s=0.1,
    window_tokens=131_072,
)  # fmt: skip
TYPES = {each.name: each for each in engine_types(ASK, read_models()["qwen3-32b"], read_prices(), 4096).types}
NODES = {gpu: price.gpus_per_node for gpu, price in read_prices().items()}
PLAN = Plan(
    (
        Group("prefill", TYPES["4xh100"], 3, 8192, 4),
        Group("decode", TYPES["4xh100"], 1, 2048, 16),
        Group("decode", TYPES["4xa100"], 3, 1024, 1),
    ),
    "adaptive",
)
COLOCATED = Plan((Group("decode", TYPES["8xh100"], 2, 4096, 1),), "local")
TRACE = Path(__file__).parent.parent / "traces" / "data" / "demo.jsonl"


def start_lines(script: Path) -> dict[str, list[list[str]]]:
    """Node -> the words of each of its start lines."""
    found: dict[str, list[list[str]]] = {}
    node = ""
    for line in script.read_text().splitlines():
        if line.endswith(")") and not line.startswith(("#", "*", ":")):
            node = line[:-1]
        elif "antiphon engine" in line:
            assert line.endswith(" &")
            found.setdefault(node, []).append(shlex.split(line.removesuffix(" &")))
    return found


def parsed(words: list[str]) -> tuple[dict[str, Any], EngineOptions]:
    """By the command's own parser, and what it makes of SGLang's part."""
    at = words.index("antiphon")
    words = [word for word in words if "KEY_FILE" not in word]  # as where it is not set
    assert words[at : at + 2] == ["antiphon", "engine"]
    command = cast(click.Group, typer.main.get_command(app)).commands["engine"]
    context = command.make_context("engine", words[at + 2 :])
    options = context.params
    return options, EngineOptions(
        options["model"], options["port"], pool=options["pool"], engine_id=options["engine_id"],
        store_pages=options["store_pages"], sglang_flags=tuple(context.args),
    )  # fmt: skip


@pytest.mark.parametrize("plan", [PLAN, COLOCATED])
def test_the_simulator_takes_the_cluster_file(plan: Plan, tmp_path: Path) -> None:
    write_files(tmp_path, plan, ASK, NODES)
    cluster = load_cluster(tmp_path / "cluster.toml")
    assert cluster.slo == ASK.slo and cluster.window_tokens == ASK.window_tokens
    resolved = resolve_engines(cluster, tmp_path)
    assert [(s.latency, replace(s.group, profile="")) for s in resolved] == [
        (spec.latency, replace(spec.group, profile="")) for spec in plan.specs()
    ]
    arguments = ["simulate", str(TRACE), "--cluster", str(tmp_path / "cluster.toml"), "--load", "0.1"]
    ran = CliRunner().invoke(app, [*arguments, "--policy", plan.policy])
    assert ran.exit_code == 0, ran.output
    assert "rounds completed" in ran.output


@pytest.mark.parametrize("plan", [PLAN, COLOCATED])
def test_the_configuration_loads(plan: Plan, tmp_path: Path) -> None:
    write_files(tmp_path, plan, ASK, NODES)
    config = load_config(tmp_path / "antiphon.toml", env={}).scheduler
    assert (config.policy, config.slo_ttft_s, config.slo_itl_s) == (plan.policy, 1.5, 0.04)
    for engine in placed(plan, NODES):
        name = config.profiles.get(engine.engine_id) or config.profiles.get(engine.group.pool)
        assert load_latency_model(name or config.profile) == engine.group.type.on_its_link


def test_links_of_ones_own_are_in_the_profiles(tmp_path: Path) -> None:
    """The scheduler predicts by the network that is there, not by that of the profile that ships."""
    slow = replace(TYPES["4xh100"], link_bytes_per_s=1.25e9)
    plan = Plan((Group("prefill", slow, 1, 8192, 4), Group("decode", slow, 1, 2048, 4)), "adaptive")
    write_files(tmp_path, plan, ASK, NODES)
    config = load_config(tmp_path / "antiphon.toml", env={}).scheduler
    for name in (config.profile, *config.profiles.values()):
        assert load_latency_model(name).transfer.bytes_per_s == 1.25e9
    specs = resolve_engines(load_cluster(tmp_path / "cluster.toml"), tmp_path)
    assert {spec.latency for spec in specs} == {slow.on_its_link}


@pytest.mark.parametrize("plan", [PLAN, COLOCATED])
def test_start_lines_are_what_antiphon_engine_takes(plan: Plan, tmp_path: Path) -> None:
    write_files(tmp_path, plan, ASK, NODES)
    started = [
        (node, words, *parsed(words))
        for node, lines in start_lines(tmp_path / "engines.sh").items()
        for words in lines
    ]
    places = {engine.engine_id: engine for engine in placed(plan, NODES)}
    assert sorted(options["engine_id"] for _, _, options, _ in started) == sorted(places)
    for node, words, options, sglang in started:
        place = places[options["engine_id"]]
        each = place.group.type
        assert (node, options["port"], options["pool"]) == (place.node, place.port, place.group.pool)
        assert words[0] == f"CUDA_VISIBLE_DEVICES={','.join(map(str, place.gpus))}"
        assert options["store_pages"] * 64 == each.store_tokens
        assert sglang.ranks == each.tp == len(place.gpus)
        assert sglang.flag("--chunked-prefill-size") == str(place.group.chunk_tokens)
        assert sglang.flag("--prefill-decode-interval") == str(place.group.decode_interval)
        assert sglang.flag("--mem-fraction-static") == "0.88"
        assert sglang.flag("--context-length") == "131072"


def test_a_store_that_an_engine_would_refuse_is_not_asked_for(tmp_path: Path) -> None:
    small = replace(TYPES["4xh100"], store_tokens=TYPES["4xh100"].device_tokens)
    write_files(tmp_path, Plan((Group("decode", small, 1, 2048, 4),), "local"), ASK, NODES)
    assert "--store-pages" not in (tmp_path / "engines.sh").read_text()


def started(script: Path, node: str, env: dict[str, str], folder: Path) -> list[list[str]]:
    """What it starts on a node: the arguments of each engine, by an `antiphon` that writes them down."""
    command = folder / "bin" / "antiphon"
    command.parent.mkdir(exist_ok=True)
    command.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done > "$0.$$"\n')
    command.chmod(0o755)
    for old in command.parent.glob("antiphon.*"):
        old.unlink()
    given = {"PATH": f"{command.parent}:/usr/bin:/bin", "MODEL": "a model", "LEDGER": "l", "INTERFACE": "lo"}
    ran = subprocess.run(
        ["sh", str(script), node], env=given | env, capture_output=True, text=True, timeout=10
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return [path.read_text().splitlines() for path in command.parent.glob("antiphon.*")]


def test_the_fleet_key_is_given_to_every_engine(tmp_path: Path) -> None:
    """By a file whose name may have spaces; without one the engines look for it themselves."""
    write_files(tmp_path, COLOCATED, ASK, NODES)
    script, node = tmp_path / "engines.sh", "h100-1"
    for words in started(script, node, {"KEY_FILE": "my fleet.key"}, tmp_path):
        assert words[words.index("--key-file") + 1] == "my fleet.key"
        assert words[words.index("--model") + 1] == "a model"
    without = started(script, node, {}, tmp_path)
    assert len(without) == 1 and "--key-file" not in without[0] and "" not in without[0]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_engines_end_with_their_script(tmp_path: Path, sign: signal.Signals) -> None:
    """And it waits for them. What `sh` starts in the background does not hear Ctrl-C by itself."""
    write_files(tmp_path, PLAN, ASK, NODES)
    command = tmp_path / "antiphon"
    command.write_text(
        "#!/usr/bin/env python3\n"
        "import os, pathlib, signal\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "def end(*_):\n"
        "    (here / f'{os.getpid()}.ended').touch()\n"
        "    raise SystemExit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "(here / f'{os.getpid()}.up').touch()\n"
        "signal.alarm(30)\n"
        "while True:\n"
        "    signal.pause()\n"
    )
    command.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MODEL": "m", "LEDGER": "l", "INTERFACE": "lo"}
    with subprocess.Popen(["sh", str(tmp_path / "engines.sh"), "h100-1"], env=env) as script:
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("*.up"))) < 2:
            assert time.monotonic() < deadline and script.poll() is None
        script.send_signal(sign)
        script.wait(timeout=20)
        assert len(list(tmp_path.glob("*.ended"))) == 2


def test_a_fleet_that_cannot_be_run_yet_says_so(tmp_path: Path) -> None:
    mixed = Plan(
        (Group("prefill", TYPES["4xh100"], 1, 8192, 4), Group("decode", TYPES["8xh100"], 1, 2048, 4))
    )
    said = "no KV moves between such engines yet"
    for plan, says in ((mixed, True), (PLAN, False)):
        write_files(tmp_path, plan, ASK, NODES)
        assert (said in (tmp_path / "engines.sh").read_text()) is says


def test_a_models_name_stays_a_comment(tmp_path: Path) -> None:
    """Names come from a file of the user's, where a table may be called anything."""
    named = replace(ASK, model="x\necho injected\r#")
    write_files(tmp_path, COLOCATED, named, NODES)
    script = (tmp_path / "engines.sh").read_text()
    assert "x?echo injected?#" in script
    assert not any(line.startswith("echo injected") for line in script.splitlines())


def test_the_folder_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written names nothing by where it was written."""
    slow = replace(TYPES["4xh100"], link_bytes_per_s=1.25e9)
    (tmp_path / "made").mkdir()
    write_files(tmp_path / "made", Plan((Group("decode", slow, 1, 2048, 4),), "local"), ASK, NODES)
    moved = (tmp_path / "made").rename(tmp_path / "moved")
    for folder in (tmp_path, moved):
        monkeypatch.chdir(folder)
        config = load_config(Path("moved" if folder == tmp_path else ".") / "antiphon.toml", env={})
        for name in (config.scheduler.profile, *config.scheduler.profiles.values()):
            assert load_latency_model(name) == slow.on_its_link


def test_the_script_says_how_it_is_used(tmp_path: Path) -> None:
    write_files(tmp_path, PLAN, ASK, NODES)
    env = {"MODEL": "m", "LEDGER": "redis://127.0.0.1:1", "INTERFACE": "lo", "PATH": "/usr/bin:/bin"}
    script = str(tmp_path / "engines.sh")
    for shell in ("sh", "bash"):
        checked = subprocess.run([shell, "-n", script], capture_output=True, text=True, timeout=10)
        assert (checked.returncode, checked.stderr) == (0, "")
    wrong = subprocess.run(["sh", script, "b300-1"], env=env, capture_output=True, text=True, timeout=10)
    assert wrong.returncode == 2
    assert wrong.stderr == "usage: sh engines.sh a100-1|a100-2|h100-1|h100-2\n"
    unset = subprocess.run(["sh", script, "h100-1"], env={}, capture_output=True, text=True, timeout=10)
    assert unset.returncode != 0 and "the model directory" in unset.stderr


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["prefill", "decode"]), st.sampled_from(sorted(TYPES)), st.integers(1, 9)),
        min_size=1,
        max_size=5,
    )
)
def test_engines_share_no_gpu_and_no_port(wanted: list[tuple[str, str, int]]) -> None:
    plan = Plan(tuple(Group(pool, TYPES[name], count, 2048, 4) for pool, name, count in wanted))  # type: ignore[arg-type]
    places = placed(plan, NODES)
    assert Counter(p.group.type for p in places) == Counter(
        s for g in plan.groups for s in [g.type] * g.count
    )
    assert len({place.engine_id for place in places}) == len(places)
    assert no_two([(place.node, gpu) for place in places for gpu in place.gpus])
    assert no_two([(place.node, place.port) for place in places])
    for place in places:
        assert place.node.startswith(f"{place.group.type.gpu}-") and max(place.gpus) < 8
        assert len(place.gpus) == place.group.type.tp and place.port >= FIRST_PORT
    for gpu, used in plan.gpus.items():  # degrees are powers of two: no GPU of a server is lost
        assert len({place.node for place in places if place.group.type.gpu == gpu}) == -(-used // 8)


def no_two(values: list[tuple[str, int]]) -> bool:
    return len(set(values)) == len(values)


def test_where_the_example_lies() -> None:
    by_id: dict[str, Engine] = {engine.engine_id: engine for engine in placed(PLAN, NODES)}
    assert [by_id[name].node for name in ("prefill-0", "prefill-2", "decode-0", "decode-3")] == [
        "h100-1", "h100-2", "h100-2", "a100-2",
    ]  # fmt: skip
    assert by_id["decode-0"].gpus == (4, 5, 6, 7) and by_id["decode-0"].port == 30_001


def test_without_matplotlib_nothing_is_simulated_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra is named before a search that would be lost."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said: list[str] = []
    options = PlanOptions("swe-agent", "h100:4", "qwen3-32b", 1.0, 0.05, 0.5, out=tmp_path / "out")
    with pytest.raises(PlanError, match=r"--out: .*pip install 'antiphon\[eval\]'"):
        make_plan(options, said.append)
    assert not said and not (tmp_path / "out").exists()
