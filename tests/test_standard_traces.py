"""What the standard evaluation sends: which files are traces, how many sessions, under which targets."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from antiphon.eval.load import Workbench, with_cached
from antiphon.eval.standard_grid import ABLATION, H200, OURS, SCALES, Scale, scenarios_of, workbench
from antiphon.eval.standard_traces import (
    GENERATED_SESSIONS,
    Amount,
    Source,
    read_source,
    sample_of,
    sources_of,
    targets_of,
)
from antiphon.eval.sweep_spec import read_spec
from antiphon.policies.registry import make_policy
from antiphon.traces.schema import RoundTrace, SessionTrace, TraceError
from tests.simulation_helpers import agent_sessions, cluster_file

MANY = 10**9


def session(name: str, rounds: int = 2, *, parent: str | None = None, gap_s: float = 10.0) -> SessionTrace:
    """Each round keeps all before it and adds 100 tokens."""
    turns = [
        RoundTrace(100 * (n + 1) + 10 * n, 10, kept_tokens=110 * n, gap_s=gap_s if n else 0.0)
        for n in range(rounds)
    ]
    return SessionTrace(name, tuple(turns), parent=parent, after_round=1 if parent else 0)


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return workbench(str(cluster_file(tmp_path)))


def write(path: Path, sessions: list[SessionTrace]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.Encoder().encode_lines(sessions))


# ---------------------------------------------------------------- sources


def test_a_trace_is_a_file_or_a_folder_with_one(tmp_path: Path) -> None:
    """Of several files in a folder the one counts whose name says sessions or rounds."""
    for name in (
        "alone.jsonl",
        "one/dataset.jsonl",
        "two/x_trace.jsonl",
        "two/x_sessions.jsonl",
        "three/notes.md",
    ):
        write(tmp_path / name, [session("a")])
    found = sources_of(tmp_path, ("tau",))
    assert [(s.name, s.path.name if s.path else "") for s in found] == [
        ("alone", "alone.jsonl"),
        ("one", "dataset.jsonl"),
        ("two", "x_sessions.jsonl"),
    ]
    assert all(str(tmp_path) not in source.describe() for source in found)


def test_a_folder_that_leaves_a_choice_is_an_error(tmp_path: Path) -> None:
    """It names the folder and the files."""
    for name in ("two/a_rounds.jsonl", "two/b_rounds.jsonl"):
        write(tmp_path / name, [session("a")])
    with pytest.raises(TraceError, match=r"two: which of a_rounds\.jsonl, b_rounds\.jsonl"):
        sources_of(tmp_path, ())
    with pytest.raises(TraceError, match="no folder of traces"):
        sources_of(tmp_path / "nowhere", ())


def test_generated_traces_are_whole_and_always_the_same() -> None:
    """So many sessions that arrive, each with all its sub-agents; equal every time."""
    (source,) = sources_of(None, ("claude-code",))
    sessions = read_source(source, 60.0)
    tops = [one for one in sessions if one.parent is None]
    assert len(tops) == GENERATED_SESSIONS and len(sessions) > len(tops)
    assert {one.parent for one in sessions if one.parent} <= {top.session_id for top in tops}
    assert sessions == read_source(source, 60.0)
    assert max(turn.gap_s for one in sessions for turn in one.rounds) == 60.0


# ---------------------------------------------------------------- amounts


def test_a_trace_with_few_sessions_is_repeated_under_new_ids(bench: Workbench) -> None:
    """Two of three sessions have a sub-agent, which goes with its parent; copies share no id."""
    trace = [session("a"), session("a.1", parent="a"), session("b"), session("c"), session("c.1", parent="c")]
    sample = sample_of(trace, bench, 1.0, Amount(7, 0.0, 0, MANY))
    sent = list(sample.sessions())
    assert sample.sent == 7 and len({one.session_id for one in sent}) == len(sent)
    tops = [one.session_id for one in sent if one.parent is None]
    assert sorted(tops[:3]) == ["a", "b", "c"] and tops[3:6] == [f"{name}~1" for name in tops[:3]]
    assert tops[6] == f"{tops[0]}~2"
    for before, one in pairwise(sent):
        assert one.parent in (None, before.session_id), "a sub-agent is a child of this very copy"
    assert len(sent) > len(tops)
    assert sample.rounds == 2 * len(sent)
    assert list(sample_of(trace, bench, 1.0, Amount(7, 0.0, 0, MANY)).sessions()) == sent


@pytest.mark.parametrize(
    ("amount", "sent"),
    [
        (Amount(4, 0.0, 0, MANY), 4),
        (Amount(1, 0.0, 21, MANY), 11),
        (Amount(1, 0.0, 0, MANY, whole=True), 10),
        (Amount(40, 0.0, 0, 30), 15),
        (Amount(40, 0.0, 0, 1), 1),
    ],
)
def test_enough_for_every_demand_and_no_more_than_the_last(
    bench: Workbench, amount: Amount, sent: int
) -> None:
    """Ten sessions of two rounds: by sessions, by rounds, the whole trace, and at most so many rounds."""
    assert sample_of([session(str(n)) for n in range(10)], bench, 1.0, amount).sent == sent


def test_sessions_that_live_at_once_are_littles_law(bench: Workbench) -> None:
    """Arrivals per second times the seconds that a session lives; twice the load, twice as many."""
    trace = [session(str(n), gap_s=30.0) for n in range(4)]
    once = sample_of(trace, bench, 0.5, Amount(1, 0.0, 0, MANY))
    rate = bench.session_rate(0.5, trace, once.slo_itl_s)
    assert once.live == pytest.approx(rate * 30.0, rel=0.02), "but for a gap of 30 s rounds take little"
    assert sample_of(trace, bench, 1.0, Amount(1, 0.0, 0, MANY)).live == pytest.approx(2 * once.live)
    asked = sample_of(trace, bench, 1.0, Amount(1, 3.0, 0, MANY))
    assert asked.sent - 1 < 3 * asked.live <= asked.sent


def test_targets_are_multiples_of_an_idle_fleets_times(bench: Workbench) -> None:
    """Three times the 90th percentile of TTFT, five times the median step; nine of ten can attain."""
    sessions = agent_sessions(12, 3)
    ttft_s, itl_s = targets_of(sessions, bench)
    idle = sorted(bench.unloaded_ttft_s(*turn) for one in sessions for turn in with_cached(one))
    assert ttft_s == pytest.approx(3 * idle[int(0.9 * (len(idle) - 1))], rel=0.1)
    assert itl_s == pytest.approx(5 * 0.0087, rel=0.1), "8 ms + 0.5 ms of one request + its context"
    assert bench.attainable(sessions, [ttft_s] * len(sessions)) >= 0.9
    assert (ttft_s, itl_s) == (float(f"{ttft_s:.2g}"), float(f"{itl_s:.2g}"))


def test_rounds_beyond_the_window_are_left_out_and_counted(bench: Workbench) -> None:
    """A refusal that every policy shares would only dilute the figures."""
    long = SessionTrace("long", (RoundTrace(100, 10), RoundTrace(40_000, 10, kept_tokens=110)))
    sample = sample_of([session("a"), long], bench, 1.0, Amount(2, 0.0, 0, MANY))
    assert sample.dropped_rounds == 1 and sample.rounds == 3
    alone = [SessionTrace("over", (RoundTrace(40_000, 10),))]
    with pytest.raises(TraceError, match="no session fits"):
        sample_of(alone, bench, 1.0, Amount(1, 0.0, 0, MANY))


# ---------------------------------------------------------------- specs


def test_a_spec_that_is_written_is_the_one_that_is_read(tmp_path: Path) -> None:
    """Variants and their parameters too; its trace is where it says."""
    write(tmp_path / "t.jsonl", agent_sessions(3, 1))
    scale = Scale("small", (str(cluster_file(tmp_path)),), (0, 1), Amount(3, 0.0, 0, 50), (0.5,))
    (scenario,) = scenarios_of(scale, [Source("t", tmp_path / "t.jsonl")], tmp_path / "out")
    assert read_spec(scenario.spec_path) == scenario.spec
    assert set(scenario.spec.variants) == set(ABLATION)
    (trace,) = scenario.spec.traces
    lines = (scenario.spec_path.parent / trace).read_bytes().splitlines()
    assert len(lines) == len(list(scenario.sample.sessions())) == 3


def test_the_ablation_is_of_a_policy_that_takes_its_parameters() -> None:
    """Each variant leaves out what it says: another value than the default."""
    default = make_policy(OURS)
    for name, variant in ABLATION.items():
        changed = make_policy(variant.policy, variant.parameters)
        assert name == "without-corrections" or repr(vars_of(changed)) != repr(vars_of(default)), name
        assert variant.corrections == (name != "without-corrections")
    assert SCALES["standard"].clusters[0] == H200


def vars_of(policy: object) -> object:
    """Its parameters, wherever it keeps them."""
    return getattr(policy, "parameters", None) or getattr(policy, "__dict__", None) or policy
