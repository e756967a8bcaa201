"""A plan as one HTML page that stands alone, in the style of `antiphon report`."""

from __future__ import annotations

from collections.abc import Iterator

from antiphon.eval.planner.around import front
from antiphon.eval.planner.ask import Rated
from antiphon.eval.planner.plan_plots import front_plot, rated_plans
from antiphon.eval.planner.plan_table import cells, of_case
from antiphon.eval.planner.planned import Planned, same_windows, under_way, windows_of
from antiphon.eval.report_page import Picture, Section, Strong, Table, render

COLUMNS = ("", "plan", "attained", "TTFT p95", "ITL p95", "USD/h", "USD/1k rounds", "C, K")
SHARES = "p95 as a share of the target."


def page(planned: Planned) -> str:
    """The page."""
    sections = [_plan(planned), _front(planned), _load(planned), *_explanation(planned)]
    if planned.cases:
        sections.append(_cases(planned))
    sections.append(_work(planned))
    return render(f"A plan for {planned.ask.model}", [planned.headline], sections)


def _plan(planned: Planned) -> Section:
    plan, rate = planned.found.best.plan, planned.rounds_per_s
    engines = Table(
        f"The engines, under policy {plan.policy}",
        (
            "pool",
            "engines",
            "GPUs each",
            "C, tokens",
            "K, steps",
            "KV tokens, device",
            "KV tokens, store",
            "USD/h",
        ),
        [
            (
                "all" if plan.colocated else group.pool,
                str(group.count),
                f"{group.type.tp} x {group.type.gpu}",
                f"{group.chunk_tokens:,}",
                str(group.decode_interval),
                f"{group.type.device_tokens:,}",
                f"{group.type.store_tokens:,}",
                f"{group.count * group.type.price_per_hour:.2f}",
            )
            for group in plan.groups
        ],
    )
    named = Table(
        "Beside it",
        COLUMNS,
        [
            (Strong(name) if not number else name, *_cells(rated, rate))
            for number, (name, rated) in enumerate(planned.named())
        ],
        note=f"{SHARES} All were simulated on {same_windows(planned.found.best)}. By these, and by"
        " whether it lasts in a long one, the plan was chosen, and the best of each form: they look a little"
        " better than they would on others.",
        left=2,
    )
    return Section("The plan", "plan", items=[engines, named])


def _cells(rated: Rated, rounds_per_s: float) -> Iterator[str]:
    yield from cells(rated, rounds_per_s)
    yield "; ".join(f"{group.chunk_tokens}, {group.decode_interval}" for group in rated.plan.groups)


def _front(planned: Planned) -> Section:
    every = rated_plans(planned)
    on_it = front(every)
    rows = [
        (
            Strong("front") if each in on_it else "",
            *_cells(each, planned.rounds_per_s),
            str(windows_of(each)) + ("" if planned.comparable(each) else " *"),
        )
        for each in sorted(every, key=lambda r: (r.plan.price_per_hour, -r.score.attainment))
    ]
    note = SHARES
    if not all(map(planned.comparable, every)):
        note += (
            f" The others were simulated on {same_windows(planned.found.best)}; those with * on the first of"
            " them only, which is not the same, or they were given up as far behind, and no figure is exact,"
            " or they drown in a longer one."
        )
    columns = (*COLUMNS, "windows")
    table = Table(f"All {len(every)} plans of the picture", columns, rows, note=note, left=2, folded=True)
    return Section("Attainment against cost", "front", items=[Picture(front_plot(planned)), table])


def _load(planned: Planned) -> Section:
    ask = planned.ask
    rows = [
        ("trace", planned.trace),
        ("its SHA-256", planned.trace_sha256 or "none: generated from statistics"),
        ("sessions, rounds", f"{planned.sessions:,}, {planned.rounds:,}"),
        ("sessions that arrive", f"{ask.session_rate_per_s:g} per second"),
        ("rounds", f"{planned.rounds_per_s:.3g} per second"),
        ("at any time, if nothing waits", under_way(planned.live_sessions, planned.live_tokens)),
        ("targets of every round", f"TTFT {ask.slo.ttft_s:g} s, ITL {ask.slo.itl_s * 1000:g} ms"),
        ("within both without any load", f"{planned.unloaded.share:.1%} of the rounds"),
        ("GPUs at most", ", ".join(f"{count} x {gpu}" for gpu, count in ask.budget.items())),
        ("tensor-parallel degrees", ", ".join(map(str, ask.tensor_parallel))),
        ("degrees may differ", "yes: no such fleet can be run yet" if ask.mixed_tensor_parallel else "no"),
        ("policies", ", ".join(dict.fromkeys((*ask.policies, *ask.colocated_policies)))),
        ("attainments count as equal within", f"{ask.tolerance:.1%}"),
        ("seed", str(ask.seed)),
        ("source", planned.commit or "no checkout"),
    ]
    left_out = Table(
        "Engines that no plan could have",
        ("engine", "why"),
        [(each.name, each.reason) for each in planned.left_out],
        left=2,
        folded=True,
    )
    items: list[Table | Picture] = [Table("", (), rows, left=2)]
    return Section("Load and conditions", "load", items=[*items, left_out] if planned.left_out else items)


def _explanation(planned: Planned) -> Iterator[Section]:
    if planned.explanation:
        yield Section(
            "Why not better or cheaper", "why",
            items=[Table("", (), [(line,) for line in planned.explanation], left=1)],
        )  # fmt: skip


def _cases(planned: Planned) -> Section:
    rows = []
    for case in planned.cases:
        shown = map(of_case, (case.colocated, case.disaggregated))
        rows.append((case.name, case.what, Strong(case.winner), case.margin, *shown))
    table = Table(
        "",
        ("case", "differs by", "wins here", "by", "best co-located", "best disaggregated"),
        rows,
        note="A small search for each form. A difference within two standard errors is none; then the cheaper"
        " wins, by a tenth or more.",
        left=6,
    )
    return Section("Where co-location is said to win", "cases", items=[table])


def _work(planned: Planned) -> Section:
    found, solved = planned.found, planned.solved
    rows = [
        (
            f"rung of {rung.plans} plans",
            f"{rung.windows} windows of {rung.rounds:,} rounds",
            f"{rung.took_s:.1f} s",
        )
        for rung in found.rungs
    ]
    rows += [
        ("MILP: tables of tau", "simulations of single engines", f"{solved.curves_s:.1f} s"),
        ("MILP: solved", f"Z {solved.plan_z:.2f}; Eq. 5 alone {solved.eq5_z:.2f}", f"{solved.solve_s:.1f} s"),
        ("search", "with its refinement", f"{found.took_s:.1f} s"),
        ("in all", "", f"{planned.took_s:.1f} s"),
    ]
    return Section("What it took", "work", items=[Table("", (), rows, left=2)])
