"""AMPD's Eq. 5 as a mixed-integer linear program: what the paper writes, and the form that it lacks.

The paper (arXiv:2602.14516, section 5): x, y replicas per parallel degree; minimise Z; Z >= tau_pre(n) where
x(n) >= 1, Z >= tau_dec(n) where y(n) >= 1; GPUs within N. Its conditions have no binaries, all replicas 0
satisfies them, and tau depends on how the load is shared out. Completed (ours):

    z(phase, type, r, s) in {0, 1}     r replicas of this type take s eighths of the phase's load
    u(phase, type) = sum of its z      in {0, 1}: it is in use, at one size
    sum of s * z = 8 * (1 - m)         of prefill, and of decode; = 8 * m of co-located: m = no prefill pool
    sum of r * tp * z <= budget        per kind of GPU
    u(phase, type) <= w(tp), sum of w = 1        equal degrees, unless they may be mixed
    Z >= sum of tau(type, rate * s / 8 / r, r) * z  per phase and type

z is there only where the KV of its share of the live sessions fits its r replicas. tau is `curves.py`'s: P95
as a share of its target. `eq5`: least Z, never co-located, of equals the cheapest. `completed`: the cheapest
with Z within the targets, of equals the least Z; the least Z where none is. Prices are USD per hour.

Raises `Infeasible` where the KV fits in no way, `PlanError` as `solver.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from antiphon.eval.planner.ask import Ask
from antiphon.eval.planner.plans import EngineType, Group, Plan, PoolName, group
from antiphon.eval.planner.solver import Program, total
from antiphon.eval.planner.tau import ROLES, Curves, Role

EIGHTHS = 8
SLACK = 1e-6
"""Z and prices that differ by less are equal."""
TIME_LIMIT_S = 20.0
"""Of one solution."""


class Column(NamedTuple):
    """One z."""

    role: Role
    type: EngineType
    replicas: int
    eighths: int
    tau: float

    @property
    def gpus(self) -> int:
        return self.replicas * self.type.tp

    @property
    def price(self) -> float:
        return self.replicas * self.type.price_per_hour


class Choice(NamedTuple):
    """The columns that are 1, prefill first, in the order of the types."""

    columns: tuple[Column, ...]
    gap: float = 0.0

    @property
    def z(self) -> float:
        return max(column.tau for column in self.columns)

    @property
    def price(self) -> float:
        return sum(column.price for column in self.columns)


class Form(NamedTuple):
    """One program: its columns and what holds for them."""

    columns: tuple[Column, ...]
    budget: Mapping[str, int]
    """GPU -> most of them."""
    mixed: bool = False
    """Degrees may differ."""
    colocation: bool = True
    time_limit_s: float = TIME_LIMIT_S


def columns_of(
    types: Iterable[EngineType],
    curves: Curves,
    rate_per_s: float,
    budget: Mapping[str, int],
    *,
    kv_factor: float = 1.0,
    looser: float = 1.0,
    roles: Sequence[Role] = ROLES,
) -> tuple[Column, ...]:
    """All z that can be 1, but those that a smaller one of the same share is as good as.

    `kv_factor`: times as much memory for KV; `looser`: times the targets.
    """
    columns: list[Column] = []
    for role in roles:
        for each in types:
            curve = curves[role, each.name]
            for eighths in range(1, EIGHTHS + 1):
                share_per_s = rate_per_s * eighths / EIGHTHS
                best = float("inf")
                for replicas in range(1, budget.get(each.gpu, 0) // each.tp + 1):
                    tau = curve.tau(share_per_s / replicas, replicas, kv_factor) / looser
                    if tau < best:
                        best = tau
                        columns.append(Column(role, each, replicas, eighths, tau))
    return tuple(columns)


def least_z(form: Form) -> Choice | None:
    """Eq. 5's objective; None if nothing satisfies the form. Of equals any: see `cheapest`."""
    return _solve(form, form.columns, by_price=False)


def cheapest(form: Form, most_z: float) -> Choice | None:
    """The cheapest with Z within `most_z`, of equals that with the least Z; None if there is none."""
    within = [column for column in form.columns if column.tau <= most_z * (1 + SLACK)]
    first = _solve(form, within, by_price=True)
    if first is None:
        return None
    best = _solve(form, within, by_price=False, most_price=first.price * (1 + SLACK)) or first
    return best._replace(gap=max(first.gap, best.gap))


def eq5(form: Form) -> Choice | None:
    """AMPD's form alone: the least Z of all disaggregated plans, of equals the cheapest."""
    alone = form._replace(colocation=False)
    least = least_z(alone)
    if least is None:
        return None
    best = cheapest(alone, least.z) or least
    return best._replace(gap=max(least.gap, best.gap))


def completed(form: Form, within_z: float = 1.0) -> Choice | None:
    """The cheapest within the targets; where none is, the cheapest of the least Z."""
    best = cheapest(form, within_z)
    if best is not None:
        return best
    least = least_z(form)
    return None if least is None else (cheapest(form, least.z) or least)


def plan_of(choice: Choice, ask: Ask) -> Plan:
    """With the C, K and policy that come before any search."""
    groups: list[Group] = []
    for column in choice.columns:
        pool: PoolName = "prefill" if column.role == "prefill" else "decode"
        groups.append(group(pool, column.type, column.replicas))
    colocated = any(column.role == "colocated" for column in choice.columns)
    return Plan(tuple(groups), (ask.colocated_policies if colocated else ask.policies)[0])


def _solve(
    form: Form, columns: Sequence[Column], *, by_price: bool, most_price: float | None = None
) -> Choice | None:
    program = Program(form.time_limit_s)
    numbers = {
        program.binary(): column for column in columns if form.colocation or column.role != "colocated"
    }
    _share_out(program, numbers)
    for gpu, count in form.budget.items():
        used = {number: c.gpus for number, c in numbers.items() if c.type.gpu == gpu}
        if used:
            program.row(used, most=count)
    prices = {number: column.price for number, column in numbers.items()}
    if most_price is not None:
        program.row(prices, most=most_price)
    worst = _activate(program, form, numbers, with_z=not by_price)
    answer = program.minimise(prices if by_price else {worst: 1.0})
    if answer is None:
        return None
    return Choice(tuple(c for number, c in numbers.items() if answer.values[number]), answer.gap)


def _share_out(program: Program, numbers: Mapping[int, Column]) -> None:
    """All of each phase's load is taken: of prefill and decode, or of neither and of the co-located.

    Without columns of co-location the mode is 0.
    """
    mode = program.binary()
    for role in ROLES:
        taken: dict[int, float] = {n: column.eighths for n, column in numbers.items() if column.role == role}
        if role == "colocated":
            program.row({**taken, mode: -EIGHTHS}, least=0, most=0)
        else:
            program.row({**taken, mode: EIGHTHS}, least=EIGHTHS, most=EIGHTHS)


def _activate(program: Program, form: Form, numbers: Mapping[int, Column], *, with_z: bool) -> int:
    """The binaries of use, and Z over what is in use; returns Z's column."""
    worst = program.positive()
    uses: dict[tuple[Role, str], list[int]] = {}
    for number, column in numbers.items():
        uses.setdefault((column.role, column.type.name), []).append(number)
    degrees: dict[int, int] = {}
    if not form.mixed:
        degrees = {tp: program.binary() for tp in sorted({c.type.tp for c in numbers.values()})}
        program.row(total(degrees.values()), most=1)
    for used in uses.values():
        active = program.binary()
        program.row({**total(used), active: -1.0}, least=0, most=0)
        if degrees:
            program.row({active: 1.0, degrees[numbers[used[0]].type.tp]: -1.0}, most=0)
        if with_z:
            program.row({worst: 1.0, **{number: -numbers[number].tau for number in used}}, least=0)
    return worst
