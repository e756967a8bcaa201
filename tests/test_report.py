"""`antiphon report`: what is compared with what, what the page says, that it stands alone and is safe."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from antiphon.eval import report_data
from antiphon.eval.report import run_report, slug
from antiphon.eval.report_data import (
    Run,
    arm_shares,
    bundled_fidelity,
    per_round,
    quantile,
    read_folder,
    rounds_attained,
    rounds_beside,
    scenarios_of,
)
from antiphon.eval.report_plots import attainment_plot, byte_bars, distribution_plot
from antiphon.eval.report_style import seconds, series_look, short
from antiphon.eval.report_tables import attainment_table, finding, work_table
from antiphon.eval.report_time import choose_session, session_plot
from antiphon.eval.sweep import run_cell
from antiphon.eval.sweep_spec import SweepSpec, cells_of
from antiphon.scheduler.cli import app
from antiphon.traces.results import (
    ClusterInfo,
    Conditions,
    Load,
    ResultError,
    RoundRecord,
    RunResult,
    TraceInfo,
    read_result,
    summarise,
    write_result,
    write_rounds,
)
from tests.simulation_helpers import agent_sessions, cluster_file

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"
PNG = b"\x89PNG\r\n\x1a\n"
ARMS = ("local", "remote_pull", "remote_recompute")


def rounds(session: str, ttfts_s: Sequence[float], *, slo_s: float | None = 1.0) -> list[RoundRecord]:
    """A session with these times to first token, one round after the other."""
    return [
        RoundRecord(
            session=session, round=n + 1, prompt_tokens=1000, kept_tokens=0, status="completed", tries=1,
            arm=ARMS[n % 3], sent_s=20.0 * n, ttft_s=ttft_s, itl_s=0.01, e2e_s=ttft_s + 1.0, output_tokens=99,
            cached_tokens=250, slo_ttft_s=slo_s, unloaded_ttft_s=0.1, receipt=True, queue_s=ttft_s / 2,
            prefill_s=ttft_s / 4, bytes_prefill_to_decode=2_000_000,
        )
        for n, ttft_s in enumerate(ttfts_s)
    ]  # fmt: skip


def result(
    policy: str = "ampd",
    load: float | None = 0.5,
    seed: int = 0,
    ttfts_s: Sequence[float] = (0.5, 0.5, 2.0),
    *,
    trace: TraceInfo | None = None,
    session: str = "s",
    **more: Any,
) -> RunResult:
    """A run of one session."""
    slo_s = more.pop("slo_s", 1.0)
    given: dict[str, Any] = {
        "kind": "simulation",
        "cluster": ClusterInfo("small", "small.toml", "", [{"pool": "decode", "count": 2}]),
        "ordering": "fcfs",
        "load": Load("rho", load, load) if load is not None else Load("as_recorded"),
        "simulated_s": 60.0,
    }
    return summarise(
        trace=trace or TraceInfo("/home/someone/traces/t.jsonl", "ab" * 32, 1, len(ttfts_s)),
        conditions=Conditions(arrivals="", max_gap_s=60.0, commit="c" * 40, machine={"cpus": 2}),
        policy=policy,
        seed=seed,
        slo={"ttft_s": slo_s, "itl_s": None},
        session_rounds={session: len(ttfts_s)},
        records=rounds(session, ttfts_s, slo_s=slo_s),
        wall_s=0.5,
        **{**given, **more},
    )


def runs_of(*results: RunResult) -> list[Run]:
    return [Run(Path(f"{number}.json"), item, None) for number, item in enumerate(results)]


def put(folder: Path, name: str, item: RunResult, *, with_rounds: bool = True) -> None:
    write_result(item, folder / f"{name}.json")
    if with_rounds:
        write_rounds(item.rounds, folder / f"{name}.rounds.jsonl.gz")


def page_of(folder: Path, out: Path | None = None) -> str:
    """The page that a report of the folder makes."""
    assert run_report(folder, out, Console(file=io.StringIO())) == 0
    return (out or folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags and words of a page, as a browser would take them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def images(self) -> list[bytes]:
        found = []
        for tag, attributes in self.tags:
            if tag == "img":
                source = attributes["src"] or ""
                assert source.startswith("data:image/png;base64,")
                found.append(base64.b64decode(source.partition(",")[2]))
        return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a small sweep: two policies, two loads, two seeds."""
    folder = tmp_path_factory.mktemp("swept")
    cluster_file(folder)
    (folder / "trace.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(agent_sessions(12, 1)))
    spec = SweepSpec(
        ("trace.jsonl",), ("cluster.toml",), ("ampd", "local"), session_rates=(1.0, 4.0), seeds=(0, 1)
    )
    out = folder / "results"
    for cell in cells_of(spec, folder):
        run_cell(cell, spec, out)
    return out


@pytest.fixture(scope="module")
def swept_page(swept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their report, made by the command."""
    out = tmp_path_factory.mktemp("page") / "page.html"
    done = CliRunner().invoke(app, ["report", str(swept), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


# ---------------------------------------------------------------- the page


def test_the_page_stands_alone(swept_page: Path) -> None:
    """From the command: every picture is inside, nothing is loaded, no script; the PNGs are files too."""
    page = Page(swept_page.read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"} == set()
    references = [
        value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")
    ]
    assert all((value or "").startswith(("data:image/png;base64,", "#")) for value in references)
    files = sorted((swept_page.parent / "page-plots").glob("*.png"))
    assert sorted(page.images()) == sorted(path.read_bytes() for path in files)
    assert all(image.startswith(PNG) for image in page.images())
    kinds = {path.stem.rpartition("toml-on-test-")[2] or path.stem for path in files}
    for name in ("attainment", "latency", "distributions", "arms", "arms-over-time", "session"):
        assert any(kind.endswith(name) for kind in kinds), name


def test_the_page_says_what_was_run_and_how_to_read_it(swept: Path, swept_page: Path) -> None:
    """Conditions, a sentence under every picture, tables with every policy, the words, the fidelity."""
    text = swept_page.read_text(encoding="utf-8")
    page = Page(text)
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    assert figures and all(re.search(r"<figcaption>[^<]{40,}</figcaption>", figure) for figure in figures)
    first = read_result(min(swept.glob("*.json")))
    assert first.trace.sha256[:12] in page.text and str(first.conditions.commit) in page.text
    for words in ("ampd", "local", "1 sessions/s", "4 sessions/s", "0, 1", "the lowest seed to the highest"):
        assert words in page.text, words
    shipped = bundled_fidelity()
    assert shipped is not None and shipped.rows, "the package brings what was measured when it was made"
    assert "Fidelity" in page.text and f"{shipped.rows[0].error:+.1%}".replace("%", " %") in page.text
    assert str(swept.parent) not in text, "a page does not say where somebody keeps files"


def test_without_any_fidelity_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None beside the results, none in the package."""
    monkeypatch.setattr(report_data, "bundled_fidelity", lambda: None)
    put(tmp_path, "a", result())
    assert "No fidelity was measured" in Page(page_of(tmp_path)).text


def test_equal_results_make_equal_plots(swept: Path) -> None:
    """A plot depends on nothing but the results."""
    (scenario,) = read_folder(swept).scenarios
    assert attainment_plot(scenario) == attainment_plot(scenario)
    assert session_plot(scenario, []) == session_plot(scenario, [])


def test_texts_from_files_cannot_become_html(tmp_path: Path) -> None:
    """Names of policies, traces, clusters, sessions, engines and errors are shown as they are, no more."""
    evil = TraceInfo(f"a/{EVIL}", EVIL, 1, 3)
    cluster = ClusterInfo(EVIL, EVIL, EVIL, [{"pool": EVIL, "gpu": EVIL}])
    put(tmp_path, "one", result(EVIL, trace=evil, cluster=cluster, session=EVIL, ordering=EVIL))
    put(tmp_path, "two", result("b", 1.0, trace=evil, cluster=cluster, ordering="fcfs"))
    (tmp_path / "x.failed.txt").write_text(EVIL)
    (tmp_path / "fidelity.json").write_text(
        json.dumps({"schema": "antiphon.fidelity/1", "conditions": {EVIL: EVIL}, "rows": []})
    )
    page = Page(page_of(tmp_path))
    assert EVIL in " ".join(page.words)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert all((attributes["src"] or "").startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert not [attributes for _, attributes in page.tags if any(key.startswith("on") for key in attributes)]
    assert all(re.fullmatch(r"[\w-]+\.png", path.name) for path in (tmp_path / "report-plots").iterdir())


def test_dollar_signs_are_no_formulas(tmp_path: Path) -> None:
    """matplotlib would set what stands between two of them as mathematics, or fail."""
    for number, name in enumerate(("$\\frac{$", "$x_1$", "plain")):
        put(tmp_path, str(number), result(name))
    assert len(Page(page_of(tmp_path)).images()) >= 4


def test_failed_cells_and_unreadable_files_are_named(tmp_path: Path) -> None:
    """The page says what it leaves out: cells of the sweep that failed, broken results, broken rounds."""
    put(tmp_path, "good", result())
    put(tmp_path, "cut", result(seed=1))
    cut = tmp_path / "cut.rounds.jsonl.gz"
    cut.write_bytes(cut.read_bytes()[:-9])
    (tmp_path / "half.json").write_text('{"schema": "antiphon.result/1", "tra')
    (tmp_path / "other.json").write_text("[1, 2]")
    (tmp_path / "weka-s3.failed.txt").write_text("Traceback\n  File ...\nValueError: no luck\n")
    text = Page(page_of(tmp_path)).text
    for words in ("What is missing", "half.json", "cut.rounds.jsonl.gz", "weka-s3", "ValueError: no luck"):
        assert words in text, words
    assert "other.json" not in text, "a file of somebody else is not missing"


def test_a_folder_without_results_is_an_error(tmp_path: Path) -> None:
    """And one that is not there, and a lack of matplotlib: each says what to do, with status 2."""
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code != 0 and "no result file" in str(done.exception)
    with pytest.raises(ResultError, match="not a folder"):
        run_report(tmp_path / "nowhere")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ResultError, match=r"pip install 'antiphon\[eval\]'"):
        run_report(tmp_path)


@pytest.mark.parametrize(("with_rounds", "pictures"), [(True, 5), (False, 3)])
def test_without_rounds_the_percentiles_stand_for_the_curves(
    tmp_path: Path, with_rounds: bool, pictures: int
) -> None:
    """Only what needs single rounds is left out: arms over time and the session."""
    put(tmp_path, "a", result(), with_rounds=with_rounds)
    page = Page(page_of(tmp_path))
    assert len(page.images()) == pictures
    assert ("percentile stand for the curve" in page.text) != with_rounds


def test_a_replay_needs_no_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report of live results only has the section and says why there is nothing to compare; no targets, no
    attainment."""
    monkeypatch.setattr(report_data, "bundled_fidelity", lambda: None)
    put(tmp_path, "live", result(kind="replay", cluster=None, simulated_s=None, slo_s=None, load=None))
    text = Page(page_of(tmp_path)).text
    assert "all of its results come from live engines" in text
    assert "no targets were set" in text and "a live fleet" in text


def test_fidelity_is_shown_with_its_conditions(tmp_path: Path) -> None:
    """Each row with its error, and whether it is within the goal."""
    put(tmp_path, "a", result())
    rows = [
        {"metric": "ttft_s", "quantile": "p50", "live": 0.1, "simulated": 0.105, "error": 0.05},
        {"metric": "itl_s", "quantile": "p90", "live": 0.01, "simulated": 0.0088, "error": -0.12},
    ]
    fidelity = {"schema": "antiphon.fidelity/1", "conditions": {"trace": "demo", "cpus": 2}, "rows": rows}
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "fidelity.json").write_text(json.dumps({**fidelity, "details": {"x": 1}}))
    text = Page(page_of(tmp_path)).text
    assert "TTFT p50 100 ms 105 ms +5.0 % yes" in text
    assert "ITL p90 10 ms 8.8 ms -12.0 % no" in text
    assert "trace: demo; cpus: 2" in text


# ---------------------------------------------------------------- what is compared with what


def test_only_like_is_compared_with_like() -> None:
    """Another trace, target, cluster, gap cap or kind of load makes another scenario."""
    base = result()
    other_gap = msgspec.structs.replace(base.conditions, max_gap_s=1.0)
    others = [
        result(trace=TraceInfo("t.jsonl", "cd" * 32, 1, 3)),
        result(trace=TraceInfo("t.jsonl", "ab" * 32, 1, 2)),
        result(slo_s=2.0),
        result(cluster=ClusterInfo("small", "small.toml", "", [{"pool": "decode", "count": 3}])),
        result(load=None),
        msgspec.structs.replace(base, conditions=other_gap),
    ]
    same = [base, result("local"), result(load=0.9), result(seed=3)]
    scenarios = scenarios_of(runs_of(*same, *others))
    assert [len(scenario.runs) for scenario in scenarios] == [4, *(1 for _ in others)]
    assert scenarios[0].series == ("ampd", "local") and scenarios[0].loads == (0.5, 0.9)


def test_a_cell_is_its_seeds() -> None:
    """Mean, lowest and highest seed, worked by hand: 1, 2 and 3 of 3 rounds within the target."""
    times = [(0.5, 2.0, 2.0), (0.5, 0.5, 2.0), (0.5, 0.5, 0.5)]
    (scenario,) = scenarios_of(
        runs_of(*(result(seed=n, ttfts_s=t) for n, t in reversed(list(enumerate(times)))))
    )
    cell = scenario.cells["ampd", 0.5]
    assert [run.result.seed for run in cell.runs] == [0, 1, 2]
    span = cell.span(rounds_attained)
    assert span is not None
    assert (span.mean, span.low, span.high, span.count) == pytest.approx((2 / 3, 1 / 3, 1.0, 3))
    assert cell.span(quantile("token_gap_s", "p99")) is None
    moved = cell.span(per_round("bytes_moved"))
    assert moved is not None and moved.mean == 2_000_000
    assert arm_shares(cell) == {arm: pytest.approx(1 / 3) for arm in ARMS}


def test_orderings_are_told_apart_when_there_are_several() -> None:
    """Else a policy's name is enough."""
    (scenario,) = scenarios_of(runs_of(result(), result(ordering="edf")))
    assert scenario.series == ("ampd, edf", "ampd, fcfs")


def test_details_are_shown_where_the_policies_differ_most() -> None:
    """At load 0.5 both attain 2 of 3, at 0.9 one attains all and the other none, at 1.5 both none."""
    bad, good, half = (2.0, 2.0, 2.0), (0.5, 0.5, 0.5), (0.5, 0.5, 2.0)
    loads = {0.5: (half, half), 0.9: (good, bad), 1.5: (bad, bad)}
    made = [
        result(name, load, ttfts_s=times)
        for load, both in loads.items()
        for name, times in zip(("ampd", "local"), both, strict=True)
    ]
    (scenario,) = scenarios_of(runs_of(*made))
    assert scenario.focus == 0.9
    table = attainment_table(scenario)
    assert table is not None
    assert [list(row) for row in table.rows] == [
        ["ampd", "66.7 %", "100.0 %", "0.0 %"],
        ["local", "66.7 %", "0.0 %", "0.0 %"],
    ]
    strong = [[type(cell).__name__ == "Strong" for cell in row[1:]] for row in table.rows]
    assert strong == [[True, True, True], [True, False, True]], "ties are all bold"


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([(0.5, 0.5), (0.5, 0.5)], [(0.5, 2.0), (2.0, 2.0)], "Every seed of the first is above"),
        ([(0.5, 0.5), (0.5, 2.0)], [(0.5, 2.0), (0.5, 2.0)], "Their seeds overlap"),
        ([(0.5, 0.5)], [(0.5, 2.0)], "One seed each"),
        ([(0.5, 2.0)], [(0.5, 2.0)], "no difference can be seen"),
    ],
)
def test_a_finding_says_how_sure_it_is(first: list[Any], second: list[Any], said: str) -> None:
    """Seeds that overlap, or a single one, are called what they are."""
    made = [result("a", seed=n, ttfts_s=t) for n, t in enumerate(first)]
    made += [result("b", seed=n, ttfts_s=t) for n, t in enumerate(second)]
    (scenario,) = scenarios_of(runs_of(*made))
    assert said in finding(scenario)
    assert finding(scenario).startswith("traces/t.jsonl on small, at rho 0.5: ")


def test_work_is_per_completed_round() -> None:
    """Three rounds of 1,000 tokens, 250 found, 2 MB moved: 750 computed, a quarter reused, thirds of arms."""
    (scenario,) = scenarios_of(runs_of(result()))
    table = work_table(scenario, scenario.at(0.5), "Work")
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["computed tokens/round"], row["reused"], row["moved/round"]) == ("750", "25.0 %", "2 MB")
    assert {row[arm] for arm in ARMS} == {"33.3 %"}
    assert "GPU time" not in row, "a column that no run has is left out"


# ---------------------------------------------------------------- plots and files


def test_the_bars_of_bytes_add_up_to_what_was_moved() -> None:
    """Three directions of 1, 2 and 4 MB a round are stacked to 7; without moves their bar has no name."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    given = result()
    three = given.rounds_completed * 1_000_000
    moving = msgspec.structs.replace(
        given, bytes_decode_to_prefill=three, bytes_prefill_to_decode=2 * three, bytes_home_to_home=4 * three
    )
    for run, names, end in ((moving, 3, 7.0), (given, 2, 2.0)):
        (scenario,) = scenarios_of(runs_of(run))
        axis = Figure().subplots()
        byte_bars(axis, scenario.at(0.5))
        assert len(axis.get_legend_handles_labels()[1]) == names
        ends = [bar.get_x() + bar.get_width() for bar in axis.patches if isinstance(bar, Rectangle)]
        assert max(ends) == pytest.approx(end)


def test_the_session_shown_is_the_one_with_most_arms(tmp_path: Path) -> None:
    """Of the policy that attains most among those that mix arms; its rounds in order."""
    plain = result("plain", ttfts_s=(0.1, 0.1))
    mixed = result("mixed", ttfts_s=(0.5, 2.0))
    plain.rounds[1].arm = "local"
    mixed.rounds.extend(reversed(rounds("long", [0.2] * 5)))
    mixed.rounds.extend(rounds("refused", [0.2] * 5))
    for record in mixed.rounds[-5:]:
        record.status = "refused"
    put(tmp_path, "plain", msgspec.structs.replace(plain, arms={"local": 2}))
    put(tmp_path, "mixed", mixed)
    (scenario,) = read_folder(tmp_path).scenarios
    session = choose_session(scenario, [])
    assert session is not None
    assert (session.policy, session.name) == ("mixed", "long")
    assert [record.round for record in session.rounds] == [1, 2, 3, 4, 5]


def test_plots_survive_odd_runs(tmp_path: Path) -> None:
    """Nothing completed, times of zero, one load, many policies: a plot or none, never an error."""
    empty = result("none")
    for record in empty.rounds:
        record.status = "refused"
    lost = summarise(
        trace=empty.trace, conditions=empty.conditions, policy="none", seed=0, slo=empty.slo,
        session_rounds={"s": 3}, records=empty.rounds, wall_s=0.0, kind="simulation", cluster=empty.cluster,
        ordering="fcfs", load=empty.load,
    )  # fmt: skip
    put(tmp_path, "lost", lost)
    (alone,) = read_folder(tmp_path).scenarios
    assert attainment_plot(alone) is not None and session_plot(alone, []) is None
    put(tmp_path, "zero", result("zero", ttfts_s=(0.0, 0.0, 0.0)))
    for number in range(12):
        put(tmp_path, f"p{number}", result(f"policy-{number}"), with_rounds=False)
    (scenario,) = read_folder(tmp_path).scenarios
    assert distribution_plot(scenario, []).png.startswith(PNG)
    assert len(Page(page_of(tmp_path)).images()) == 5
    looks = series_look(scenario.series)
    assert len({tuple(sorted((k, str(v)) for k, v in look.items())) for look in looks.values()}) == len(looks)


def test_rounds_are_found_beside_their_result(tmp_path: Path) -> None:
    """`--rounds` may have any of these names, gzipped or not; the sweep's own comes first."""
    path = tmp_path / "a.json"
    assert rounds_beside(path) is None
    for name in ("a.jsonl", "a.rounds.jsonl.gz"):
        (tmp_path / name).touch()
        found = rounds_beside(path)
        assert found is not None and found.name == name


def test_times_are_said_in_the_unit_that_fits() -> None:
    """Three digits."""
    assert [seconds(value) for value in (0.0000123, 0.0123, 1.0, 12.34, 1234.0)] == [
        "12.3 µs", "12.3 ms", "1 s", "12.3 s", "1,234 s",
    ]  # fmt: skip


def test_long_names_keep_their_end() -> None:
    """That is where they differ; and a file's name is short and plain."""
    assert short("a" * 40 + ", edf", 20).endswith(", edf") and len(short("a" * 99, 20)) == 20
    assert slug('Weka/Rounds <b>"x"') == "weka-rounds-b-x" and slug("///") == "scenario"
