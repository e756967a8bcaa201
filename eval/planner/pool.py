"""Processes that score plans: each has the workload once and makes the windows itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context, parent_process
from threading import Thread
from types import TracebackType
from typing import NamedTuple

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.ask import Rated
from antiphon.eval.planner.plans import Plan
from antiphon.eval.planner.score import Score, score, together
from antiphon.eval.planner.workload import Window, Workload

KEPT_WINDOWS = 6
"""That a process keeps for the next plan."""
FIRST = 6
"""Plans that are simulated to their end, to say what is far behind."""


class PoolError(Exception):
    """The processes are gone: what was running, and what to do."""


class View(NamedTuple):
    """A window that is to be made: `Workload.window`."""

    seed: int
    rounds: int
    rate_factor: float = 1.0


class Scorer:
    """One workload and its targets, with the windows that were used last."""

    def __init__(self, workload: Workload, slo: Slo, window_tokens: int) -> None:
        self._slo = slo
        self._window_tokens = window_tokens
        self._window: Callable[[View], Window] = lru_cache(KEPT_WINDOWS)(lambda view: workload.window(*view))

    def score(self, plan: Plan, view: View, least: float) -> Score:
        return score(plan, self._window(view), self._slo, self._window_tokens, least)


class ScorePool:
    """Scores plans on views of one workload, over `jobs` processes; one job runs in this process.

    What it says does not depend on `jobs`. A context: its processes end with it.
    """

    def __init__(self, workload: Workload, slo: Slo, window_tokens: int, jobs: int) -> None:
        self.workload = workload
        self.slo = slo
        self.window_tokens = window_tokens
        self.simulated_rounds = 0
        """By all scores until now."""
        self.executor: Executor | None = None
        """The processes, for other work too; None when there are none."""
        self._here: Scorer | None = None
        if jobs > 1:
            given = (workload, slo, window_tokens)
            self.executor = ProcessPoolExecutor(jobs, get_context("spawn"), _begin, given)
        else:
            self._here = Scorer(workload, slo, window_tokens)

    def score(self, plans: Iterable[Plan], views: Sequence[View], least: float = 0.0) -> tuple[Score, ...]:
        """Each plan on all the views together, in the order of the plans. `least`: see `score.score`.

        Raises `PoolError` when a process died.
        """
        wanted = [(plan, view) for plan in plans for view in views]
        if self._here is not None:
            scores = [self._here.score(plan, view, least) for plan, view in wanted]
        else:
            scores = self._over_processes(wanted, least)
        self.simulated_rounds += sum(each.simulated_rounds for each in scores)
        by_plan = (scores[first : first + len(views)] for first in range(0, len(scores), len(views)))
        return tuple(together(each) for each in by_plan)

    def rate(self, plans: Iterable[Plan], views: Sequence[View], far: float | None = None) -> list[Rated]:
        """As `score`, in order. `far`: how far behind the best of the first few (`FIRST`) a plan is given up;
        None = none is."""
        known = tuple(plans)
        few = len(known) if far is None else FIRST
        scores = self.score(known[:few], views)
        least = max((score.attainment for score in scores), default=0.0) - (far or 0.0)
        scores += self.score(known[few:], views, max(0.0, least))
        return [Rated(plan, score) for plan, score in zip(known, scores, strict=True)]

    def _over_processes(self, wanted: Sequence[tuple[Plan, View]], least: float) -> list[Score]:
        assert self.executor is not None
        futures: list[Future[Score]] = []
        try:
            futures += (self.executor.submit(_score, plan, view, least) for plan, view in wanted)
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise PoolError(
                "a process that simulates plans has died, perhaps for want of memory: run with fewer jobs"
            ) from error
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def close(self) -> None:
        """Ends the processes."""
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)

    def __enter__(self) -> ScorePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---------------------------------------------------------------- in the processes

_scorer: Scorer | None = None


def _begin(workload: Workload, slo: Slo, window_tokens: int) -> None:
    global _scorer
    Thread(target=_end_with_parent, daemon=True).start()
    _scorer = Scorer(workload, slo, window_tokens)


def _score(plan: Plan, view: View, least: float) -> Score:
    assert _scorer is not None, "a process is begun before it is asked"
    return _scorer.score(plan, view, least)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
