"""`antiphon simulate`: a trace through the production core on closed-form engines, in simulated time.

The same trace, cluster, options and seed give the same result, byte for byte but for `wall_s`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence

from antiphon.eval.simulation_plan import Prepared, SimulateOptions, SimulationError, prepare
from antiphon.eval.simulation_result import records_of, result_of
from antiphon.policies.leaving import Leaving
from antiphon.policies.registry import make_ordering, make_policy
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.simulated_flips import RepoolingSimulation
from antiphon.scheduler.simulated_sessions import split_children
from antiphon.scheduler.simulation import RoundEnd, Simulation
from antiphon.traces.arrivals import schedule
from antiphon.traces.output import check_writable
from antiphon.traces.result_types import RunResult
from antiphon.traces.results import write_result, write_rounds
from antiphon.traces.schema import SessionTrace

__all__ = ["Prepared", "SimulateOptions", "SimulationError", "prepare", "run_simulation"]


def run_simulation(options: SimulateOptions, prepared: Prepared | None = None) -> RunResult:
    """Simulate and write what the options name. Raises as `prepare`, and `OSError`."""
    ready = prepared or prepare(options)
    _check_outputs(options)
    policy = make_policy(options.policy, options.policy_parameters)
    ordering = make_ordering(options.ordering)
    config = CoreConfig(publish=False, corrections=options.corrections)
    repool = options.repool if options.repool is not None and options.repool.enabled else None
    if repool is not None:
        policy = Leaving(policy)
    core = Scheduler(policy, ordering, ready.bench.decode.latency, config)
    ends: list[RoundEnd] = []
    told = core, ready.cluster, ready.specs, ready.targets, ends.append, options.concurrency
    simulation = Simulation(*told) if repool is None else RepoolingSimulation(*told, config=repool)
    tops, children = split_children(ready.sessions)
    starts = iter(schedule(tops, ready.arrivals))
    wall_s = _timed(simulation, starts, children)
    result = result_of(ready, simulation, list(records_of(ready, ends)), wall_s)
    if isinstance(simulation, RepoolingSimulation):
        result.flips = [flip.words() for flip in simulation.flips]
    if options.rounds_path is not None:
        write_rounds(result.rounds, options.rounds_path)
    if options.json_path is not None:
        write_result(result, options.json_path)  # last: where it is, the rounds are too
    return result


def _timed(
    simulation: Simulation,
    starts: Iterator[tuple[float, SessionTrace]],
    children: Mapping[str, Sequence[SessionTrace]],
) -> float:
    """Run the event loop, and nothing else, on the clock. What it makes has no cycles to collect."""
    collecting = gc.isenabled()
    gc.disable()
    began_s = time.perf_counter()
    try:
        simulation.run(starts, children)
        return time.perf_counter() - began_s
    finally:
        if collecting:
            gc.enable()


def _check_outputs(options: SimulateOptions) -> None:
    """Raise `SimulationError` for a file that cannot be written, before hours of simulation are lost."""
    for option, path in (("--rounds", options.rounds_path), ("--json", options.json_path)):
        if path is None:
            continue
        try:
            check_writable(path)
        except OSError as error:
            raise SimulationError(f"{option} {path}: cannot be written: {error.strerror}") from error
