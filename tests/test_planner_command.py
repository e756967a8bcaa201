"""`antiphon plan` as a user has it: its answer, its files' schema, its exit statuses."""

from __future__ import annotations

import re
from importlib import resources
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from antiphon.eval.cluster_toml import toml_line
from antiphon.eval.planner.ask import Found, PlanError, Rated, choose
from antiphon.eval.planner.effort import Effort
from antiphon.eval.planner.plan import MOST_LIVE, PlanOptions, check_live, make_plan
from antiphon.eval.planner.plan_document import SCHEMA, Document
from antiphon.eval.planner.plan_table import lines
from antiphon.eval.planner.planned import Planned, headline
from antiphon.eval.planner.plans import EngineType, Group, Plan
from antiphon.eval.planner.read_sessions import read_sessions
from antiphon.eval.planner.score import Score
from antiphon.eval.planner.workload import Workload
from antiphon.policies.latency import load_latency_model
from antiphon.scheduler.cli import app, main
from antiphon.scheduler.config import load_config

QUICK = Effort(
    rungs=((6, 120), (4, 200)), last=(4, 300, 1), quick_rounds=100, refinement_rounds=0, long_rounds=600
)
ARGUMENTS = [
    "plan", "swe-agent", "--gpus", "h100:4", "--model", "qwen3-32b",
    "--slo-ttft", "1", "--slo-itl", "0.05", "--session-rate", "0.5",
]  # fmt: skip


# ---------------------------------------------------------------- the answer


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Planned, Path]:
    folder = tmp_path_factory.mktemp("plan")
    options = PlanOptions(
        "swe-agent", "h100:8", "qwen3-32b", 1.0, 0.05, 0.5, tensor_parallel="4", max_sessions=40, jobs=1,
        explain=True, json_path=folder / "plan.json", out=folder / "out", effort=QUICK,
    )  # fmt: skip
    return make_plan(options, lambda line: None), folder


def test_the_first_line_is_the_plan_and_its_numbers(planned: tuple[Planned, Path]) -> None:
    answer, _ = planned
    first, *others = lines(answer)
    best = answer.found.best
    assert isinstance(first, str) and best.plan.describe() in first
    assert best.long is not None and best.score.attainment > 0.9
    in_a_row = f"{best.long.attainment:.1%} of {best.long.rounds:,} rounds in a row"
    cost = f"USD {best.plan.price_per_hour:.2f} per hour"
    assert f": {best.score.attainment:.1%} attained ({in_a_row}) at {cost}" in first
    assert first.startswith("do not disaggregate: ") == best.plan.colocated
    console = Console(width=130, file=StringIO())
    for line in others:
        console.print(line, markup=False)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "equal split" in shown and "Eq. 5 alone (AMPD)" in shown and "Eq. 5 completed" in shown


def test_the_plan_is_the_choice_of_what_was_rated(planned: tuple[Planned, Path]) -> None:
    answer, _ = planned
    found = answer.found
    assert found.best == choose(found.rated, answer.ask.tolerance)
    assert found.colocated is not None and found.colocated.plan.colocated
    assert found.disaggregated is not None and not found.disaggregated.plan.colocated
    assert all(rated.plan.fits(answer.ask.budget) for rated in (*found.rated, *answer.cheaper))


def test_the_json_says_the_same_and_is_read_back(planned: tuple[Planned, Path]) -> None:
    answer, folder = planned
    document = msgspec.json.decode((folder / "plan.json").read_bytes(), type=Document)
    assert document.schema == SCHEMA and document.headline == answer.headline and document.ask == answer.ask
    first, best = document.plans[0], answer.found.best
    assert "plan" in first.names and first.attainment == best.score.attainment
    assert first.usd_per_hour == pytest.approx(sum(group.usd_per_hour for group in first.groups))
    assert first.usd_per_1k_rounds == pytest.approx(first.usd_per_hour / 3.6 / document.rounds_per_s)
    assert [(g.pool, g.gpu, g.tensor_parallel, g.engines) for g in first.groups] == [
        (g.pool, g.type.gpu, g.type.tp, g.count) for g in best.plan.groups
    ]
    names = [name for plan in document.plans for name in plan.names]
    assert sorted(names) == sorted(name for name, _ in answer.named())


def test_all_files_are_written(planned: tuple[Planned, Path]) -> None:
    _, folder = planned
    written = {path.name for path in (folder / "out").iterdir()}
    assert {"cluster.toml", "antiphon.toml", "engines.sh", "front.png", "report.html"} <= written
    assert (folder / "out" / "front.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- the headline, by hand

H100 = EngineType("h100", 4, load_latency_model("qwen3-32b-h100-tp4"), 800_000, 1_000_000, 50e9, 2.5)
COLOCATED = Plan((Group("decode", H100, 2, 2048, 4),), "local")
SPLIT = Plan((Group("prefill", H100, 1, 8192, 4), Group("decode", H100, 1, 2048, 4)))
LARGER = SPLIT.with_counts((1, 2))


def rated(plan: Plan, attained: int) -> Rated:
    return Rated(plan, Score(1000, attained, 1000 - attained, 0, 0, 0.5, 0.5, 1000))


CO = "co-located 2 x 4xh100, local"
PD = "prefill 1 x 4xh100, decode {} x 4xh100, adaptive"
DOES = "{}: {} attained at USD {}.00 per hour"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            rated(COLOCATED, 950),
            rated(SPLIT, 900),
            f"do not disaggregate: {DOES.format(CO, '95.0%', 20)}; the best disaggregated plan"
            f" ({DOES.format(PD.format(1) + ')', '90.0%', 20)} (+5.0 ± 2.3 points)",
        ),
        (
            rated(SPLIT, 950),
            rated(COLOCATED, 949),
            f"{DOES.format(PD.format(1), '95.0%', 20)}; the best co-located plan"
            f" ({DOES.format(CO + ')', '94.9%', 20)} (within ± 2.0 points, which is noise, at"
            " the same price)",
        ),
        (
            rated(COLOCATED, 950),
            rated(LARGER, 951),
            f"do not disaggregate: {DOES.format(CO, '95.0%', 20)}; the best disaggregated plan"
            f" ({DOES.format(PD.format(2) + ')', '95.1%', 30)} (as good for USD 10.00 less per hour)",
        ),
        (
            rated(LARGER, 956),
            rated(COLOCATED, 950),
            f"{DOES.format(PD.format(2), '95.6%', 30)}; the best co-located plan"
            f" ({DOES.format(CO + ')', '95.0%', 20)} (within ± 1.9 points, which is noise, for USD 10.00 more"
            " per hour)",
        ),
    ],
)
def test_who_wins_and_by_how_much(first: Rated, second: Rated, expected: str) -> None:
    together, apart = sorted((first, second), key=lambda each: not each.plan.colocated)
    found = Found(first, together, apart, None, None, None, None, (first, second), (), 0.0)
    assert headline(found, 0.005) == expected


@pytest.mark.parametrize("attained", [0, 310, 799, 800, 1000])
def test_overload_is_said_first_of_all(attained: int) -> None:
    best = rated(COLOCATED, attained)
    said = headline(Found(best, best, None, None, None, None, None, (best,), (), 0.0), 0.005)
    rest = f"do not disaggregate: {CO}: {attained / 10}% attained at USD 20.00 per hour"
    if attained >= 800:
        assert said == rest
    else:
        assert said == (
            "no plan of this budget does this load within these targets, the best attains"
            f" {attained / 10}%: ask for fewer sessions, more GPUs or looser targets; {rest}"
        )


# ---------------------------------------------------------------- what goes wrong


def run(*change: str) -> tuple[int, str]:
    """Exit status and output of the command with some of its options changed."""
    arguments = dict(zip(ARGUMENTS[2::2], ARGUMENTS[3::2], strict=True))
    arguments |= dict(zip(change[::2], change[1::2], strict=True))
    trace = arguments.pop("trace", ARGUMENTS[1])
    flat = [part for pair in arguments.items() for part in pair]
    result = CliRunner().invoke(app, ["plan", trace, *flat])
    said = result.output + (str(result.exception) if result.exception is not None else "")
    return result.exit_code, said


@pytest.mark.parametrize(
    ("change", "reason", "nearest"),
    [
        (
            ("--model", "llama-3.1-70b", "--tp", "2"),
            "no engine of this ask can run",
            "h100:4 with tensor parallel 4",
        ),
        (
            ("--slo-ttft", "0.001"),
            "no round can have a first token in 0.001 s",
            "half of the rounds could have",
        ),
        (("--slo-itl", "0.0001"), "a gap of 0.0001 s between tokens", "95 % TTFT"),
        (("--gpus", "h100:1"), "the budget has 1 x h100", "h100:2"),
    ],
)
def test_what_no_fleet_can_do_gets_the_nearest_ask(
    change: tuple[str, ...], reason: str, nearest: str
) -> None:
    status, said = run(*change)
    assert status == 3, said
    assert "no plan: " in said and reason in said and "nearest: " in said and nearest in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--gpus", "h100"), "--gpus"),
        (("--gpus", "tpu:4"), "tpu"),
        (("--model", "gpt-5"), "--model: no model 'gpt-5'"),
        (("--session-rate", "0"), "--session-rate must be above 0"),
        (("--session-rate", "1000"), "sessions under way at any time, more than 20000: plan a part"),
        (("--gpus", "h100:100000"), "plans, more than 200000: name fewer GPUs"),
        (("trace", "no-such-trace.jsonl"), "neither a trace"),
        (("--prices", "no-such-file.toml"), "cannot be read"),
        (("--json", "/dev/null/plan.json"), "/dev/null"),
    ],
)
def test_bad_input_is_one_line(change: tuple[str, ...], message: str) -> None:
    status, said = run(*change)
    assert status == 1 and message in said
    assert "Traceback" not in said


def test_the_rate_that_is_named_can_be_asked_for() -> None:
    """It was rounded up before: 139 of 138.9 was refused again."""
    sessions = read_sessions(PlanOptions("claude-code", "h100:8", "qwen3-32b", 1, 1, 1), 131_072).sessions
    idle = load_latency_model("qwen3-32b-h100-tp4")
    for rate in (1_000.0, 1_234.5, 77_777.0):
        with pytest.raises(PlanError) as told:
            check_live(Workload.of(sessions, rate, idle))
        named = re.search(r"at most (\S+) sessions per second", str(told.value))
        assert named is not None
        workload = Workload.of(sessions, float(named[1]), idle)
        check_live(workload)
        assert 0.99 * MOST_LIVE < workload.live_sessions <= MOST_LIVE


FULL = {"price_per_gpu_hour": 1.5, "gpus_per_node": 8, "nic_bytes_per_s": 5e10, "store_bytes_per_gpu": 10**10}


def toml(tables: dict[str, object]) -> str:
    lines: list[str] = []
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += [f'["{name}"]', *(toml_line(key, value) for key, value in table.items())]
        else:
            lines.insert(0, toml_line(name, table))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"h100": FULL | {"price_per_gpu_hour": -1.0}}, "[h100]: Expected `float` > 0.0"),
        ({"h100": FULL | {"price_per_gpu_hour": 0.0}}, "[h100]: Expected `float` > 0.0"),
        ({"h100": FULL | {"colour": 1}}, "[h100]: Object contains unknown field `colour`"),
        ({"h100": {"price_per_gpu_hour": 1.5}}, "[h100]: Object missing required field `gpus_per_node`"),
        ({"h100": 3}, "[h100]: Expected `object`, got `int`"),
        ({"b900": FULL}, "no GPU 'b900'"),
        ({"h100": FULL, "H100_SXM": FULL}, "h100 is there twice, once as 'H100_SXM'"),
        ({"a100": FULL}, "no price for h100; the file of prices has a100"),
        ({}, "no price for h100; the file of prices has none"),
    ],
)
def test_prices_that_cannot_be_used(tables: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(toml(tables))
    status, said = run("--prices", str(path))
    assert status == 1 and message in said and "Traceback" not in said


OWN_MODEL: dict[str, object] = {
    "model": "x/Tiny", "layers": 64, "kv_heads": 8, "head_dim": 128, "parameters": 32 * 10**9,
    "active_parameters": 32 * 10**9, "window_tokens": 131_072, "source": "by hand",
}  # fmt: skip


def own_model(folder: Path, **changes: object) -> str:
    path = folder / "models.toml"
    path.write_text(toml({"my model": OWN_MODEL | changes}))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({}, 3, "there is no latency profile"),
        ({"profiles": ["gone.json"]}, 1, "gone.json"),
        ({"layers": 0}, 1, "[my model]: Expected `int` >= 1"),
        ({"colour": 1}, 1, "[my model]: Object contains unknown field `colour`"),
    ],
)
def test_a_model_of_ones_own_that_cannot_be_used(
    changes: dict[str, object], status: int, message: str, tmp_path: Path
) -> None:
    got, said = run("--models", own_model(tmp_path, **changes), "--model", "my model")
    assert got == status and message in said and "Traceback" not in said


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    """With a profile beside its file, which goes into the folder that is written, for it does not ship."""
    ours = msgspec.structs.replace(load_latency_model("qwen3-32b-h100-tp4"), name="my model here")
    (tmp_path / "own.json").write_bytes(msgspec.json.encode(ours))
    models = Path(own_model(tmp_path, profiles=["own.json"]))
    options = PlanOptions(
        "swe-agent", "h100:4", "my model", 1.0, 0.05, 0.5, tensor_parallel="4", max_sessions=20, jobs=1,
        models_path=models, out=tmp_path / "out", effort=QUICK,
    )  # fmt: skip
    answer = make_plan(options, lambda line: None)
    assert {group.type.latency.name for group in answer.found.best.plan.groups} == {"my model here"}
    written = load_config(tmp_path / "out" / "antiphon.toml", env={}).scheduler
    assert load_latency_model(written.profile) == answer.found.best.plan.groups[0].type.on_its_link
    assert written.profile.startswith(str(tmp_path / "out"))


def test_statistics_of_ones_own(tmp_path: Path) -> None:
    """A profile as a TOML file, as `antiphon trace generate --profile` takes it, with other menus."""
    shipped = (resources.files("antiphon.traces") / "data" / "profiles.toml").read_text()
    ours = shipped.partition("[swe-agent]")[2]
    next_profile = re.search(r"^\[(?!swe-agent\.)", ours, re.MULTILINE)
    path = tmp_path / "mine.toml"
    path.write_text(ours[: next_profile and next_profile.start()].replace("[swe-agent.", "["))
    options = PlanOptions(
        str(path), "h100:4", "qwen3-32b", 1.0, 0.05, 0.5, tensor_parallel="1,2", max_sessions=20, jobs=1,
        mixed_tensor_parallel=True, policies="threshold", tolerance=0.99, divide=8, effort=QUICK,
    )  # fmt: skip
    found = make_plan(options, lambda line: None).found
    cheapest = min(rated.plan.price_per_hour for rated in found.rated)
    assert found.best.plan.price_per_hour == cheapest
    assert found.disaggregated is not None and found.disaggregated.plan.policy == "threshold"


def test_main_shows_it_as_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["antiphon", *ARGUMENTS[:3], "h100", *ARGUMENTS[4:]])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert "is not KIND:NUMBER" in shown.err and "Traceback" not in shown.err
