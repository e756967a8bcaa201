"""The traces of the standard evaluation: found or generated, and sampled so that a run reaches its load.

A run of few sessions never reaches its load, and a trace may have few. So the sessions of a trace are
shuffled (always in the same way) and sent once or several times, each time under new ids and so with new
content, until there are as many as `Amount` asks for. A sub-agent goes where its parent goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import msgspec

from antiphon.eval.load import Workbench, with_cached
from antiphon.scheduler.simulated_sessions import split_children
from antiphon.traces.generate import generate, take
from antiphon.traces.profiles import load_profile
from antiphon.traces.readers import read_trace, trace_sha256
from antiphon.traces.results import percentile
from antiphon.traces.schema import SessionTrace, TraceError
from antiphon.traces.shape import Shape, shape

ENDINGS = (".jsonl", ".jsonl.gz")
OF_SESSIONS = re.compile(r"(^|_)(sessions|rounds)$")
"""How the name of a file ends whose lines are sessions, where its folder has others too."""
GENERATED_SESSIONS = 400
SHUFFLE_SEED = "standard evaluation"
TTFT_FACTOR, ITL_FACTOR = 3.0, 5.0
"""Targets: so many times what a round takes on an idle fleet, at the 90th percentile and at the median."""

Family = tuple[SessionTrace, ...]
"""A session that arrives, and the sub-agents that it starts."""


@dataclass(frozen=True, slots=True)
class Source:
    """A trace to evaluate: a file, or the profile that generates it."""

    name: str
    path: Path | None = None
    profile: str = ""

    def describe(self) -> str:
        """Where it is from, without anybody's folders."""
        if self.path is None:
            return f"generated: profile {self.profile}, seed 0, {GENERATED_SESSIONS} sessions"
        return f"{self.path.name}, sha256 {trace_sha256(self.path)[:12]}"


@dataclass(frozen=True, slots=True)
class Amount:
    """How many sessions a run sends: enough for each of the first three, and no more than the last."""

    sessions: int
    times_live: float
    """Times the sessions that would live at once, at the highest load, if no round had to wait."""
    rounds: int
    most_rounds: int
    whole: bool = False
    """At least every session of the trace once."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a trace is on one cluster: its sessions, as shaped, and what they are held to."""

    families: tuple[Family, ...]
    sent: int
    """Sessions that arrive in a run: the families, repeated if there are fewer."""
    live: float
    """Sessions that live at once at the highest load if no round waits (Little's law)."""
    slo_ttft_s: float
    slo_itl_s: float
    dropped_rounds: int
    """Of the trace, for the model's window."""

    @property
    def rounds(self) -> int:
        return sum(len(session.rounds) for session in self.sessions())

    def sessions(self) -> Iterator[SessionTrace]:
        """What a run sends, in its order."""
        for number in range(self.sent):
            copy, place = divmod(number, len(self.families))
            for session in self.families[place]:
                yield _renamed(session, f"~{copy}") if copy else session


# ---------------------------------------------------------------- where they are


def sources_of(folder: Path | None, profiles: Sequence[str]) -> list[Source]:
    """A trace for each file of a folder and each folder in it; the profiles where no folder is given.

    In a folder with several files those whose names end in `sessions` or `rounds` count. Raises `TraceError`.
    """
    if folder is None:
        return [Source(name, profile=name) for name in profiles]
    if not folder.is_dir():
        raise TraceError(f"{folder}: no folder of traces")
    found = [Source(_stem(path), path) for path in _files(folder)]
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = _files(inner)
        if len(files) > 1:
            files = [path for path in files if OF_SESSIONS.search(_stem(path))]
        if len(files) > 1:
            names = ", ".join(path.name for path in files)
            raise TraceError(f"{inner}: which of {names} is the trace? Give a folder with one of them")
        found += [Source(inner.name, path) for path in files]
    if not found:
        raise TraceError(f"{folder}: neither it nor a folder in it has a file {' or '.join(ENDINGS)}")
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(ENDINGS))


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


# ---------------------------------------------------------------- what is sent


def read_source(source: Source, max_gap_s: float) -> tuple[SessionTrace, ...]:
    """All its sessions, gaps capped. Raises `TraceError`."""
    sessions = _generated(source) if source.path is None else read_trace(source.path)
    return shape(sessions, Shape(max_gap_s=max_gap_s)).sessions


def _generated(source: Source) -> Iterator[SessionTrace]:
    """A generated trace has no end: the first sessions that arrive, each with its sub-agents."""
    arrived = 0
    for session in take(generate(source.profile, load_profile(source.profile))):
        arrived += session.parent is None
        if arrived > GENERATED_SESSIONS:
            return
        yield session


def sample_of(sessions: Sequence[SessionTrace], bench: Workbench, load: float, amount: Amount) -> Sample:
    """What to send of a trace to this fleet, the same for every load up to `load`."""
    fitted = shape(sessions, Shape(window_tokens=bench.cluster.window_tokens))
    slo_ttft_s, slo_itl_s = targets_of(fitted.sessions, bench)
    families = _families(fitted.sessions)
    Random(SHUFFLE_SEED).shuffle(families)
    rate = bench.session_rate(load, fitted.sessions, slo_itl_s)
    live = rate * sum(_idle_s(family, bench) for family in families) / len(families)
    sent = _count([sum(len(s.rounds) for s in family) for family in families], live, amount)
    return Sample(tuple(families), sent, live, slo_ttft_s, slo_itl_s, fitted.dropped_rounds)


def targets_of(sessions: Sequence[SessionTrace], bench: Workbench) -> tuple[float, float]:
    """(TTFT, ITL) in seconds, to two digits: multiples of what rounds of this trace take on an idle fleet."""
    ttfts_s, steps_s = [], []
    for session in sessions:
        for turn, cached_tokens in with_cached(session):
            ttfts_s.append(bench.unloaded_ttft_s(turn, cached_tokens))
            context = turn.prompt_tokens + turn.output_tokens // 2
            steps_s.append(bench.decode.latency.decode_step_s(1, context))
    if not ttfts_s:
        raise TraceError(f"no session fits a window of {bench.cluster.window_tokens} tokens")
    return (
        float(f"{TTFT_FACTOR * percentile(sorted(ttfts_s), 0.9):.2g}"),
        float(f"{ITL_FACTOR * percentile(sorted(steps_s), 0.5):.2g}"),
    )


def _families(sessions: Sequence[SessionTrace]) -> list[Family]:
    tops, children = split_children(sessions)
    return [tuple(_family(top, children)) for top in tops]


def _family(session: SessionTrace, children: dict[str, list[SessionTrace]]) -> Iterator[SessionTrace]:
    yield session
    for child in children.get(session.session_id, ()):
        yield from _family(child, children)


def _renamed(session: SessionTrace, ending: str) -> SessionTrace:
    """A copy that shares with the original only what all sessions of its prefix share."""
    parent = f"{session.parent}{ending}" if session.parent is not None else None
    return msgspec.structs.replace(session, session_id=f"{session.session_id}{ending}", parent=parent)


def _idle_s(family: Family, bench: Workbench) -> float:
    """Seconds for which its sessions live when nothing waits, together."""
    total_s = 0.0
    for session in family:
        for number, (turn, cached_tokens) in enumerate(with_cached(session)):
            step_s = bench.decode.latency.decode_step_s(1, turn.prompt_tokens + turn.output_tokens // 2)
            total_s += bench.unloaded_ttft_s(turn, cached_tokens) + (turn.output_tokens - 1) * step_s
            total_s += turn.gap_s if number else 0.0
    return total_s


def _count(rounds: Sequence[int], live: float, amount: Amount) -> int:
    """Families to send; `rounds` of each of them."""
    least = max(amount.sessions, amount.times_live * live, len(rounds) if amount.whole else 0)
    sent = there = 0
    while sent < least or there < amount.rounds:
        there += rounds[sent % len(rounds)]
        if sent and there > amount.most_rounds:
            return sent
        sent += 1
    return sent
