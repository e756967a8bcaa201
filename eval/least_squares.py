"""Coefficients of the latency formulas from points: relative least squares without negative coefficients.

The sum of ((formula - y) / y)^2 is least: a prefill of 10 ms counts as much as one of 10 s. A formula has
few terms, so every choice of terms that stay is tried and the best without a negative coefficient is taken:
exact, and cheaper to carry than a dependency on numpy, which the package does not otherwise have.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from antiphon.policies.latency import DecodeCost, FitError, PrefillCost

SINGULAR = 1e-12
"""A pivot below this (columns are scaled to length 1): the points do not tell these terms apart."""


class FitFailed(Exception):
    """The points do not determine the formula: too few, or none above zero."""


class PrefillPoint(NamedTuple):
    new_tokens: int
    cached_tokens: int
    seconds: float


class DecodePoint(NamedTuple):
    """One decode step."""

    batch: int
    context_tokens: int
    """Of the whole batch."""
    seconds: float


def fit_prefill(points: Sequence[PrefillPoint]) -> tuple[PrefillCost, FitError]:
    """fixed + a N + b N P + c N^2. Raises `FitFailed`."""
    rows = [(1.0, float(n), float(n) * p, float(n) * n) for n, p, _ in points]
    found = relative_least_squares(rows, [point.seconds for point in points])
    return PrefillCost(*found), fit_error(rows, [point.seconds for point in points], found)


def fit_decode(points: Sequence[DecodePoint], expert_missed: float = 0.0) -> tuple[DecodeCost, FitError]:
    """fixed + a B + b T, and + c (1 - expert_missed^B) for a mixture of experts. Raises `FitFailed`."""
    seconds = [point.seconds for point in points]
    if not expert_missed:
        dense = [(1.0, float(batch), float(context)) for batch, context, _ in points]
        found = relative_least_squares(dense, seconds)
        return DecodeCost(*found), fit_error(dense, seconds, found)
    rows = [(1.0, float(batch), float(context), 1.0 - expert_missed**batch) for batch, context, _ in points]
    found = relative_least_squares(rows, seconds)
    fixed_s, request_s, context_s, experts_s = found
    return DecodeCost(fixed_s, request_s, context_s, experts_s, expert_missed), fit_error(
        rows, seconds, found
    )


def relative_least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """The non-negative coefficients, one per column of `rows`, of the least relative squares."""
    width = len(rows[0]) if rows else 0
    if len(rows) <= width:
        raise FitFailed(
            f"{len(rows)} points for {width} coefficients: more points than coefficients are needed"
        )
    if min(values) <= 0:
        raise FitFailed(f"a point of {min(values)} s: every measured time must be above zero")
    weighted = [[cell / value for cell in row] for row, value in zip(rows, values, strict=True)]
    lengths = [sum(row[column] ** 2 for row in weighted) ** 0.5 for column in range(width)]
    usable = [column for column in range(width) if lengths[column] > 0]
    scaled = [[row[column] / (lengths[column] or 1.0) for column in range(width)] for row in weighted]
    best: tuple[float, list[float]] | None = None
    for size in range(len(usable), 0, -1):
        for columns in combinations(usable, size):
            solved = _solve([[row[column] for column in columns] for row in scaled])
            if solved is None or min(solved) < 0:
                continue
            found = [0.0] * width
            for column, coefficient in zip(columns, solved, strict=True):
                found[column] = coefficient / lengths[column]
            residual = sum((sum(map(_product, row, found)) - 1.0) ** 2 for row in weighted)
            if best is None or residual < best[0]:
                best = residual, found
    if best is None:
        raise FitFailed("the points do not determine the formula: vary every quantity in it")
    return best[1]


def fit_error(
    rows: Sequence[Sequence[float]], values: Sequence[float], coefficients: Sequence[float]
) -> FitError:
    """How far the formula is from the points, as shares of their values."""
    shares = sorted(
        abs(sum(map(_product, row, coefficients)) / value - 1.0)
        for row, value in zip(rows, values, strict=True)
    )
    p95 = shares[min(len(shares) - 1, int(len(shares) * 0.95))]
    return FitError(len(shares), sum(shares) / len(shares), p95, shares[-1])


def _product(a: float, b: float) -> float:
    return a * b


def _solve(rows: list[list[float]]) -> list[float] | None:
    """Least squares of rows @ x = 1 by the normal equations; None where the columns depend on each other."""
    width = len(rows[0])
    system = [
        [*(sum(row[i] * row[j] for row in rows) for j in range(width)), sum(row[i] for row in rows)]
        for i in range(width)
    ]
    for column in range(width):
        pivot = max(range(column, width), key=lambda row: abs(system[row][column]))
        system[column], system[pivot] = system[pivot], system[column]
        if abs(system[column][column]) < SINGULAR:
            return None
        for row in range(column + 1, width):
            factor = system[row][column] / system[column][column]
            for cell in range(column, width + 1):
                system[row][cell] -= factor * system[column][cell]
    solved = [0.0] * width
    for row in reversed(range(width)):
        known = sum(system[row][column] * solved[column] for column in range(row + 1, width))
        solved[row] = (system[row][width] - known) / system[row][row]
    return solved
