"""A mixed-integer linear program for HiGHS: columns, rows, one objective at a time.

One thread, a fixed seed: equal programs have equal answers unless the time limit cuts one off. Raises
`PlanError` where highspy is not installed, or the time was up before there was any answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from antiphon.eval.planner.ask import PlanError

INFINITY = float("inf")
TOLERANCE = 1e-6
"""Absolute and relative: what is closer than this to the optimum is the optimum."""


class Answer(NamedTuple):
    values: list[float]
    """By column; those of integers are whole."""
    objective: float
    gap: float
    """(objective - bound) / objective; 0 = proven."""


class Program:
    """Minimise. Columns are numbered in the order in which they come."""

    def __init__(self, time_limit_s: float) -> None:
        self._highspy = _highspy()
        self._highs = _silent(self._highspy)
        for option, value in (
            ("threads", 1), ("random_seed", 0), ("time_limit", time_limit_s), ("mip_rel_gap", TOLERANCE),
            ("mip_abs_gap", TOLERANCE), ("presolve", "off"),  # it takes longer than it saves
        ):  # fmt: skip
            self._highs.setOptionValue(option, value)
        self._integers: list[int] = []
        self._columns = 0

    def binary(self) -> int:
        """A column of 0 or 1."""
        self._integers.append(self._columns)
        return self._column(1.0)

    def positive(self) -> int:
        """A column of 0 or more, any real."""
        return self._column(INFINITY)

    def _column(self, upper: float) -> int:
        self._highs.addVar(0.0, upper)
        self._columns += 1
        return self._columns - 1

    def row(self, terms: Mapping[int, float], least: float = -INFINITY, most: float = INFINITY) -> None:
        """`least` <= sum of factor * column <= `most`."""
        self._highs.addRow(least, most, len(terms), list(terms), list(terms.values()))

    def minimise(self, costs: Mapping[int, float]) -> Answer | None:
        """None if nothing satisfies the rows."""
        highs, statuses = self._highs, self._highspy.HighsModelStatus
        integer = self._highspy.HighsVarType.kInteger
        for column in self._integers:
            highs.changeColIntegrality(column, integer)
        for column, cost in costs.items():
            highs.changeColCost(column, cost)
        highs.run()
        status = highs.getModelStatus()
        if status in (statuses.kInfeasible, statuses.kUnboundedOrInfeasible):
            return None
        info = highs.getInfo()
        if status != statuses.kOptimal and info.primal_solution_status != 2:
            raise PlanError(
                f"the solver found no plan: {highs.modelStatusToString(status)}; allow it more time"
            )
        values = list(highs.getSolution().col_value)
        for column in self._integers:
            values[column] = float(round(values[column]))
        gap = 0.0 if status == statuses.kOptimal else info.mip_gap
        return Answer(values, info.objective_function_value, gap)


def total(columns: Iterable[int]) -> dict[int, float]:
    """Each once."""
    return dict.fromkeys(columns, 1.0)


def _highspy() -> Any:
    try:
        import highspy
    except ImportError as error:
        raise PlanError('the MILP needs highspy: pip install "antiphon[eval]"') from error
    return highspy


def _silent(highspy: Any) -> Any:
    """A solver that never speaks: `Highs` writes a banner to stdout as soon as it has callbacks."""

    class Silent(highspy.Highs):  # type: ignore[misc]  # Any
        def enableCallbacks(self) -> None:  # noqa: N802
            self.silent()
            super().enableCallbacks()

    return Silent()
