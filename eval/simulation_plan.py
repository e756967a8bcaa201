"""What a simulation is told and what it is going to run: all that is known before its first event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from antiphon.engines.cluster import Cluster, EngineSpec, load_cluster, resolve_engines
from antiphon.eval.cluster_files import find_cluster
from antiphon.eval.load import Workbench
from antiphon.policies.registry import make_ordering, make_policy
from antiphon.scheduler.repool_config import RepoolConfig
from antiphon.scheduler.simulation import Targets
from antiphon.traces.arrivals import Arrivals, Start
from antiphon.traces.formats import Form
from antiphon.traces.readers import BadLines, ReadOptions, read_trace, trace_sha256
from antiphon.traces.result_types import Load, TraceInfo
from antiphon.traces.schema import MAX_S, SessionTrace, TraceError
from antiphon.traces.shape import Shape, fit_window, shape

DEFAULT_LOAD = 0.7


class SimulationError(Exception):
    """Options that contradict each other or cannot be used: which, and what to do."""


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What `antiphon simulate` can be told: what, on what, under which policy, how sessions arrive."""

    trace: Path
    cluster: str | Path
    """A bundled name or a TOML file."""
    policy: str
    ordering: str = "fcfs"
    session_rate: float | None = None
    """Poisson session starts per second."""
    load: float | None = None
    """Share of the fleet's time that the sessions ask for (`load.py`); 0.7 when nothing else is given."""
    as_recorded: bool = False
    concurrency: int | None = None
    """Most live sessions; alone, all sessions are there at once and wait for their turn."""
    max_gap_s: float = 60.0
    max_sessions: int | None = None
    divide: int = 1
    slo_ttft_s: float | None = None
    """For every round; None = the session's own, else the cluster's."""
    slo_itl_s: float | None = None
    seed: int = 0
    json_path: Path | None = None
    rounds_path: Path | None = None
    share_system: bool = False
    form: Form = "auto"
    """Of Mooncake traces with sessions (`traces/formats.py`)."""
    skip_bad: bool = False
    policy_parameters: Mapping[str, object] = field(default_factory=dict)
    variant: str = ""
    """What the result calls this policy with these parameters; "" = by its own name."""
    corrections: bool = True
    """Whether the core corrects its latency model by what engines really take."""
    repool: RepoolConfig | None = None
    """How engines change pool as the load drifts; None = they do not."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything of a simulation that is known before its first event."""

    options: SimulateOptions
    cluster: Cluster
    specs: tuple[EngineSpec, ...]
    whole: tuple[SessionTrace, ...]
    """What is to be sent, before the model's window is looked at."""
    sessions: tuple[SessionTrace, ...]
    """What fits it: a session ends before its first round that does not."""
    trace: TraceInfo
    targets: Targets
    arrivals: Arrivals
    load: Load
    bench: Workbench
    seconds_per_arrival: float
    """Engine-seconds of a session that arrives, with its sub-agents."""
    bad_lines: tuple[str, ...]

    def describe(self) -> str:
        """What the run is about to do, in one line."""
        engines = ", ".join(f"{group.count} {group.pool}" for group in self.cluster.engines)
        work = f"; load {self.load.value:g} of the fleet's time" if self.load.kind == "rho" else ""
        return (
            f"{self.trace.sessions} sessions, {self.trace.rounds} rounds on {self.cluster.name} ({engines}); "
            f"arrivals: {self.arrivals.describe()}{work}, "
            f"{self.seconds_per_arrival:.4g} engine-seconds a session"
        )


def prepare(options: SimulateOptions) -> Prepared:
    """Read cluster and trace, choose the rate. Raises `SimulationError`, `ClusterError`, `TraceError`."""
    _check(options)
    path = find_cluster(options.cluster)
    cluster = load_cluster(path)
    specs = resolve_engines(cluster, path.parent)
    bad = BadLines()
    read = read_trace(
        options.trace,
        bad if options.skip_bad else None,
        options=ReadOptions(options.share_system, options.form),
    )
    shaped = shape(read, Shape(options.max_sessions, options.divide, options.max_gap_s))
    check_parents(shaped.sessions)
    fitted = [fit_window(session, cluster.window_tokens) for session in shaped.sessions]
    sessions = tuple(session for session in fitted if session.rounds)
    if not sessions:
        raise TraceError(
            f"{options.trace}: no session is left to run (window {cluster.window_tokens} tokens)"
        )
    slo_ttft_s = cluster.slo.ttft_s if options.slo_ttft_s is None else options.slo_ttft_s
    slo_itl_s = cluster.slo.itl_s if options.slo_itl_s is None else options.slo_itl_s
    bench = Workbench.of(cluster, specs)
    arrivals, load = _arrivals(options, bench, sessions, slo_itl_s)
    info = TraceInfo(
        path=str(options.trace),
        sha256=trace_sha256(options.trace),
        sessions=len(shaped.sessions),
        rounds=sum(len(session.rounds) for session in shaped.sessions),
        bad_lines=bad.count,
        dropped_rounds=sum(len(s.rounds) for s in shaped.sessions) - sum(len(s.rounds) for s in sessions),
        dropped_sessions=len(shaped.sessions) - len(sessions),
        capped_gaps=shaped.capped_gaps,
    )
    targets = Targets(slo_ttft_s, slo_itl_s, options.slo_ttft_s is not None, options.slo_itl_s is not None)
    return Prepared(
        options=options,
        cluster=cluster,
        specs=specs,
        whole=shaped.sessions,
        sessions=sessions,
        trace=info,
        targets=targets,
        arrivals=arrivals,
        load=load,
        bench=bench,
        seconds_per_arrival=bench.seconds_per_arrival(sessions, slo_itl_s),
        bad_lines=tuple(bad.first),
    )


def check_parents(sessions: Sequence[SessionTrace]) -> None:
    """Raise `TraceError` for a sub-agent that could never start: a round its parent lacks, or a cycle."""
    by_id = {session.session_id: session for session in sessions}
    for session in sessions:
        parent = by_id.get(session.parent or "")
        if parent is None:
            continue
        if session.after_round > len(parent.rounds):
            raise TraceError(
                f"session {session.session_id!r} starts after round {session.after_round} of "
                f"{parent.session_id!r}, which has {len(parent.rounds)}: it would never start"
            )
        seen = {session.session_id}
        while parent is not None and parent.session_id not in seen:
            seen.add(parent.session_id)
            parent = by_id.get(parent.parent or "")
        if parent is not None:
            raise TraceError(f"session {session.session_id!r} is among its own parents: it would never start")


def _check(options: SimulateOptions) -> None:
    try:
        make_policy(options.policy, options.policy_parameters)
        make_ordering(options.ordering)
    except ValueError as error:
        raise SimulationError(str(error)) from error
    written = [path for path in (options.json_path, options.rounds_path) if path is not None]
    paths = [path.resolve() for path in (options.trace, *written)]
    if len(set(paths)) < len(paths):
        raise SimulationError("trace, --json and --rounds must be different files")
    ways = [options.session_rate is not None, options.load is not None, options.as_recorded]
    if sum(ways) > 1:
        raise SimulationError("--session-rate, --load and --as-recorded exclude each other: give one")
    for name, value in (("--session-rate", options.session_rate), ("--load", options.load)):
        if value is not None and not 0 < value < float("inf"):
            raise SimulationError(f"{name} must be above 0, not {value:g}")
    for name, value in (("--slo-ttft", options.slo_ttft_s), ("--slo-itl", options.slo_itl_s)):
        if value is not None and not 0 < value < float("inf"):
            raise SimulationError(f"{name} must be above 0 seconds, not {value:g}")
    if not options.max_gap_s >= 0 or options.divide < 1:
        raise SimulationError("--max-gap must not be below 0, --divide not below 1")
    if min(options.max_sessions or 1, options.concurrency or 1) < 1 or 0 in (
        options.max_sessions,
        options.concurrency,
    ):
        raise SimulationError("--max-sessions and --concurrency must be at least 1")


def _arrivals(
    options: SimulateOptions, bench: Workbench, sessions: Sequence[SessionTrace], slo_itl_s: float
) -> tuple[Arrivals, Load]:
    most = options.concurrency
    if options.as_recorded:
        return Arrivals(Start.RECORDED, max_live=most), Load("as_recorded")
    if options.session_rate is not None:
        rate = options.session_rate
        _check_rate(rate, "--session-rate", len(sessions))
        return Arrivals(Start.POISSON, rate, options.seed, most), Load("session_rate", rate, rate)
    if options.load is None and most is not None:
        return Arrivals(Start.AT_ONCE, max_live=most), Load("concurrency", most)
    rho = DEFAULT_LOAD if options.load is None else options.load
    rate = bench.session_rate(rho, sessions, slo_itl_s)
    _check_rate(rate, "--load", len(sessions))
    return Arrivals(Start.POISSON, rate, options.seed, most), Load("rho", rho, rate)


def _check_rate(rate: float, option: str, sessions: int) -> None:
    """Beyond MAX_S seconds a float has no microseconds left: times would be noise."""
    if sessions > rate * MAX_S:
        raise SimulationError(
            f"{option} is too low: {sessions} sessions at {rate:g} a second take more than {MAX_S:g} seconds"
        )
