"""`make plan-eval`: is the planner's plan any good? Three traces, three budgets; docs/planner_results.md.

Each case is planned (MILP and search) and, where the budget is small, every plan is simulated (`brute.py`).
Then all that came out is simulated again on windows that nobody chose by, at the load that was planned for
and at 20 % more. Loads come from one rule (`standard_ask.py`), the tables from the result file alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from antiphon.eval.known_models import read_models
from antiphon.eval.planner.ask import Ask, Found, Infeasible, PlanError, Solved, cost_per_1k_rounds
from antiphon.eval.planner.brute import brute_force
from antiphon.eval.planner.candidates import candidates
from antiphon.eval.planner.plans import EngineType, Plan
from antiphon.eval.planner.pool import PoolError, ScorePool, View
from antiphon.eval.planner.search import search
from antiphon.eval.planner.solve import solve
from antiphon.eval.planner.standard_ask import MODEL, OTHER_SEEDS, Question, question
from antiphon.eval.planner.standard_page import Case, Results, Row, Timed, page
from antiphon.eval.planner.workload import Workload
from antiphon.eval.standard_traces import Source, read_source, sources_of
from antiphon.traces.provenance import commit
from antiphon.traces.schema import TraceError

PROFILES = "claude-code", "swe-agent", "hotpotqa"
BUDGETS: tuple[dict[str, int], ...] = ({"h200": 8}, {"h100": 8, "a100": 8}, {"h100": 16, "a100": 16})
BRUTE_GPUS = 16
"""Budgets up to here are planned by brute force too."""
LARGE: dict[str, int] = {"h100": 64, "a100": 64}
"""Planned once, for the time that it takes."""
MAX_GAP_S = 60.0
DEFAULT_OUT = Path("build/plan-eval")
DEFAULT_PAGE = Path("docs/planner_results.md")
RESULTS = Path("results/planner.json")
"""Beside the page."""


class Scale(msgspec.Struct, frozen=True):
    """How much is simulated."""

    budgets: tuple[dict[str, int], ...] = BUDGETS
    large: dict[str, int] | None = None
    rounds: int = 1500
    """Of each window by which results are compared; those of the search's last ones where they are more."""
    windows: int = 3
    long_rounds: int = 30_000
    jobs: int = 2


# ---------------------------------------------------------------- one case


def run_case(name: str, asked: Question, scale: Scale, console: Console) -> Case:
    """Planned, and compared on other windows."""
    ask, types, workload = asked.ask, asked.types, asked.workload

    def told(message: str) -> None:
        console.print(f"  {message}", highlight=False)

    with ScorePool(workload, ask.slo, ask.window_tokens, scale.jobs) as pool:
        began_s = time.perf_counter()
        solved, found = planned(ask, types, workload, pool, told)
        plan_s = time.perf_counter() - began_s
        simulated = pool.simulated_rounds
        told(f"planned in {plan_s:.1f} s: {found.best.plan.describe()}")
        plans, long = named_plans(found), found.rungs[-1].rounds
        brute = None
        if sum(ask.budget.values()) <= BRUTE_GPUS:
            brute = brute_force(ask, types, pool, long, told)
            plans = {**plans, "brute force": brute.plan}
        rows = compared(plans, asked, pool, max(scale.rounds, long), scale.windows)
        (lasting,) = pool.score((found.best.plan,), (View(OTHER_SEEDS + 50, scale.long_rounds),))
    return Case(
        trace=name,
        budget=ask.budget,
        slo=ask.slo,
        tolerance=ask.tolerance,
        rate_per_s=ask.session_rate_per_s,
        rounds_per_s=workload.rounds_per_s,
        live_sessions=workload.live_sessions,
        share=asked.share,
        plans=len(candidates(ask, types)),
        brute_plans=brute.plans if brute else 0,
        rows=rows,
        timed=Timed(sum(ask.budget.values()), plan_s, solved.curves_s, solved.solve_s, simulated),
        long=lasting,
    )


def planned(
    ask: Ask, types: Sequence[EngineType], workload: Workload, pool: ScorePool, told: Callable[[str], None]
) -> tuple[Solved, Found]:
    """As `antiphon plan` does."""
    solved = solve(ask, types, workload, executor=pool.executor)
    return solved, search(ask, types, workload, (), told, solved=solved, pool=pool)


def named_plans(found: Found) -> dict[str, Plan]:
    """What is compared, by what it is called in the table."""
    rated = {
        "the plan": found.best,
        "equal split": found.equal_split,
        "Eq. 5 alone": found.eq5,
        "Eq. 5 completed": found.solved,
        "best co-located": found.colocated,
        "best disaggregated": found.disaggregated,
        "best of one kind": found.single_tier,
    }
    return {name: each.plan for name, each in rated.items() if each is not None}


def compared(
    plans: dict[str, Plan], asked: Question, pool: ScorePool, rounds: int, windows: int
) -> tuple[Row, ...]:
    """Each plan on the same windows, which nobody has seen, at the load asked for and at 20 % more."""
    seeds = range(OTHER_SEEDS, OTHER_SEEDS + windows)
    distinct = tuple(dict.fromkeys(plans.values()))
    scores = {}
    for factor in (1.0, 1.2):
        views = [View(seed, rounds, factor) for seed in seeds]
        scores[factor] = dict(zip(distinct, pool.score(distinct, views), strict=True))
    return tuple(
        Row(
            name=name,
            plan=plan.describe(),
            settings=tuple((group.chunk_tokens, group.decode_interval) for group in plan.groups),
            gpus=plan.gpus,
            price_per_hour=plan.price_per_hour,
            per_1k_rounds=cost_per_1k_rounds(plan, asked.workload.rounds_per_s),
            asked=scores[1.0][plan],
            more=scores[1.2][plan],
        )
        for name, plan in plans.items()
    )


# ---------------------------------------------------------------- all of them


def run(
    sources: Sequence[Source], scale: Scale, out: Path, console: Console, resume: bool
) -> Iterator[Results]:
    """Small budgets first, each case in a file of its own; what is known after each of them.

    Raises `TraceError`, `PlanError`, `Infeasible`, `PoolError`.
    """
    began_s = time.perf_counter()
    model = read_models()[MODEL]
    out.mkdir(parents=True, exist_ok=True)
    cases: list[Case] = []
    wanted = [(source, budget) for budget in scale.budgets for source in sources]
    if scale.large:
        wanted.append((sources[0], scale.large))
    for source, budget in wanted:
        sessions = read_source(source, MAX_GAP_S)
        gpus = "-".join(f"{gpu}x{count}" for gpu, count in budget.items())
        file = out / f"{source.name}-{gpus}.json"
        if resume and file.is_file():
            case = read_case(file.read_bytes())
        else:
            console.print(f"{source.name} on {gpus}", highlight=False)
            case = run_case(source.name, question(sessions, budget, model, scale.jobs), scale, console)
            file.write_bytes(msgspec.json.format(msgspec.json.encode(case)))
        cases.append(case)
        yield Results(
            model=MODEL,
            commit=commit(),
            traces={source.name: source.describe() for source in sources},
            rounds=scale.rounds,
            windows=scale.windows,
            tolerance=case.tolerance,
            cases=tuple(cases),
            wanted=len(wanted),
            took_s=time.perf_counter() - began_s,
        )


def read_case(written: bytes) -> Case:
    """As it was written: JSON has no infinity, so that a percentile that is infinite stands there as null."""
    plain = msgspec.json.decode(written)
    scores = [score for row in plain["rows"] for score in (row["asked"], row["more"])]
    for score in (*scores, plain["long"]):
        score |= {name: float("inf") for name in ("ttft_p95", "itl_p95") if score[name] is None}
    return msgspec.convert(plain, Case)


def write(results: Results, target: Path) -> None:
    """The results and the page that is made of them."""
    data = target.parent / RESULTS
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    target.write_text(page(results))


def main(arguments: list[str] | None = None) -> int:
    """0 = done, 2 = it could not be done (said on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m antiphon.eval.planner.standard", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--traces", type=Path, help="a folder of traces; without, they are generated")
    parser.add_argument("--only", help="names of traces, with commas")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="a file for each case")
    parser.add_argument("--page", type=Path, default=DEFAULT_PAGE)
    parser.add_argument("--resume", action="store_true", help="cases whose file is there are not run again")
    parser.add_argument("--large", action="store_true", help="plan for 128 GPUs too: minutes")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        sources = sources_of(given.traces, PROFILES)
        if given.only:
            sources = [source for source in sources if source.name in given.only.split(",")]
        scale = Scale(large=LARGE if given.large else None, jobs=given.jobs)
        for results in run(sources, scale, given.out, console, given.resume):
            write(results, given.page)
            words = f"{given.page}: {len(results.cases)} cases, {results.took_s / 60:.1f} minutes"
            console.print(words, highlight=False)
    except (TraceError, PlanError, Infeasible, PoolError, OSError, ValueError) as error:
        print(f"evaluation failed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
