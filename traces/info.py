"""What a trace holds and what it lacks: distributions in bounded memory, ideal reuse, fit to windows."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from antiphon.traces.schema import SessionTrace

INFO_SCHEMA = "antiphon.trace-info/1"
EXACT_VALUES = 20_000
"""Different values of one quantity that are kept as they are; beyond, values are rounded to 1 %."""
ROUNDED_STEP = math.log(1.01)
WINDOWS_TOKENS = (32_768, 131_072)


class Spread(msgspec.Struct, frozen=True):
    """One quantity over a trace. Percentiles are linear between the two nearest ranks."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p99: float
    max: float
    exact: bool
    """False: percentiles are within 1 %, for the trace has too many different values."""


class Tally:
    """Counts the values of one quantity, at least 0, in bounded memory."""

    def __init__(self, exact_values: int = EXACT_VALUES) -> None:
        self._exact_values = exact_values
        self._counts: dict[float, int] = {}
        self._total = 0.0
        self.count = 0
        self.exact = True
        self.least = math.inf
        self.most = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self._total += value
        self.least = min(self.least, value)
        self.most = max(self.most, value)
        key = value if self.exact else _rounded(value)
        self._counts[key] = self._counts.get(key, 0) + 1
        if self.exact and len(self._counts) > self._exact_values:
            self.exact = False
            exact, self._counts = self._counts, {}
            for old, count in exact.items():
                self._counts[_rounded(old)] = self._counts.get(_rounded(old), 0) + count

    def items(self) -> list[tuple[float, int]]:
        """(value, how often), in ascending order."""
        return sorted(self._counts.items())

    def spread(self) -> Spread | None:
        """None where nothing was counted."""
        if not self.count:
            return None
        p50, p90, p99 = self._percentiles(0.5, 0.9, 0.99)
        mean = self._total / self.count
        return Spread(self.count, mean, self.least, p50, p90, p99, self.most, self.exact)

    def _percentiles(self, *shares: float) -> list[float]:
        """As `results.percentile` of all values in order, without holding them all."""
        values, last_ranks = [], []
        rank = -1
        for value, count in self.items():
            rank += count
            values.append(min(max(value, self.least), self.most))
            last_ranks.append(rank)
        found = []
        for share in shares:
            place = share * (self.count - 1)
            low = values[bisect_left(last_ranks, math.floor(place))]
            high = values[bisect_left(last_ranks, math.ceil(place))]
            found.append(low + (high - low) * (place - math.floor(place)))
        return found


def _rounded(value: float) -> float:
    return math.exp(round(math.log(value) / ROUNDED_STEP) * ROUNDED_STEP) if value > 0 else 0.0


@dataclass(slots=True)
class Tallies:
    """The distributions of a trace. Lengths in tokens, times in seconds."""

    rounds_per_session: Tally = field(default_factory=Tally)
    first_prompt: Tally = field(default_factory=Tally)
    prompt: Tally = field(default_factory=Tally)
    increment: Tally = field(default_factory=Tally)
    """Of later rounds: prompt tokens that were not there."""
    output: Tally = field(default_factory=Tally)
    kept_share: Tally = field(default_factory=Tally)
    """Of later rounds: how much of the previous prompt and output begins the prompt."""
    gap_s: Tally = field(default_factory=Tally)
    longest_context: Tally = field(default_factory=Tally)
    """Of a session: its longest prompt and output."""
    session_prompts: Tally = field(default_factory=Tally)
    """Of a session: the sum of its prompts."""
    session_gaps_s: Tally = field(default_factory=Tally)


class Lack(msgspec.Struct, frozen=True):
    """Something that a trace does not say, and what that means for a run of it."""

    field: str
    missing: str
    """In words, as "no arrivals"."""
    meaning: str


class TraceSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What `antiphon trace info --json` prints."""

    schema: str = INFO_SCHEMA
    path: str
    bad_lines: int
    ignored: tuple[str, ...]
    """Files of a folder or archive that are no trace, and why."""
    sessions: int
    rounds: int
    sub_agents: int
    """Sessions with a parent."""
    shared_prefixes: int
    """Different ones."""
    prompt_tokens: int
    output_tokens: int
    cached_share: float
    """Of all prompt tokens: what an infinite cache would not compute."""
    cached_share_within: float
    """The same without what sessions share with each other."""
    compactions: int
    """Rounds whose prompt is shorter than the previous one."""
    partly_kept: int
    """Later rounds that do not keep all of the previous prompt and output."""
    rounds_over: dict[str, int]
    """Window in tokens -> rounds whose prompt and output exceed it."""
    tools: dict[str, int]
    spreads: dict[str, Spread | None]
    lacks: tuple[Lack, ...]


MAX_TOOLS = 1000
"""Names that are counted; the rest goes under "(other)"."""


@dataclass(slots=True)
class _Seen:
    """Which fields a trace fills."""

    starts: int = 0
    slos: int = 0
    gaps: int = 0
    tools: int = 0
    kept: int = 0
    prefixes: set[str] = field(default_factory=set)


class TraceReport:
    """Takes sessions one by one; `summary` at the end."""

    def __init__(self) -> None:
        self.tallies = Tallies()
        self._seen = _Seen()
        self._tools: dict[str, int] = {}
        self._over = dict.fromkeys(WINDOWS_TOKENS, 0)
        self._sessions = self._rounds = self._sub_agents = self._compactions = self._partly = 0
        self._prompts = self._outputs = self._kept = self._shared = 0

    def add_all(self, sessions: Iterable[SessionTrace]) -> None:
        for session in sessions:
            self.add(session)

    def add(self, session: SessionTrace) -> None:
        tallies, seen = self.tallies, self._seen
        self._sessions += 1
        self._sub_agents += session.parent is not None
        seen.starts += session.start_s is not None
        seen.slos += session.slo_ttft_s is not None or session.slo_itl_s is not None
        if session.shared_tokens:
            if session.shared_prefix in seen.prefixes:
                self._shared += min(session.shared_tokens, session.rounds[0].prompt_tokens - 1)
            seen.prefixes.add(session.shared_prefix)
        tallies.rounds_per_session.add(len(session.rounds))
        tallies.first_prompt.add(session.rounds[0].prompt_tokens)
        tallies.longest_context.add(max(turn.total_tokens for turn in session.rounds))
        tallies.session_prompts.add(sum(turn.prompt_tokens for turn in session.rounds))
        tallies.session_gaps_s.add(sum(turn.gap_s for turn in session.rounds))
        self._add_rounds(session)

    def _add_rounds(self, session: SessionTrace) -> None:
        tallies, seen = self.tallies, self._seen
        before = None
        for turn in session.rounds:
            self._rounds += 1
            self._prompts += turn.prompt_tokens
            self._outputs += turn.output_tokens
            self._kept += turn.kept_tokens
            tallies.prompt.add(turn.prompt_tokens)
            tallies.output.add(turn.output_tokens)
            for window in WINDOWS_TOKENS:
                self._over[window] += turn.total_tokens > window
            if turn.tool:
                seen.tools += 1
                name = turn.tool if turn.tool in self._tools or len(self._tools) < MAX_TOOLS else "(other)"
                self._tools[name] = self._tools.get(name, 0) + 1
            if before is not None:
                tallies.increment.add(turn.new_tokens)
                tallies.kept_share.add(turn.kept_tokens / before.total_tokens)
                tallies.gap_s.add(turn.gap_s)
                seen.gaps += turn.gap_s > 0
                seen.kept += turn.kept_tokens > 0
                self._compactions += turn.prompt_tokens < before.prompt_tokens
                self._partly += turn.kept_tokens < before.total_tokens
            before = turn

    def summary(self, path: str, bad_lines: int = 0, ignored: tuple[str, ...] = ()) -> TraceSummary:
        names = Tallies.__dataclass_fields__
        return TraceSummary(
            path=path,
            bad_lines=bad_lines,
            ignored=ignored,
            sessions=self._sessions,
            rounds=self._rounds,
            sub_agents=self._sub_agents,
            shared_prefixes=len(self._seen.prefixes),
            prompt_tokens=self._prompts,
            output_tokens=self._outputs,
            cached_share=(self._kept + self._shared) / max(1, self._prompts),
            cached_share_within=self._kept / max(1, self._prompts),
            compactions=self._compactions,
            partly_kept=self._partly,
            rounds_over={str(window): count for window, count in self._over.items()},
            tools=dict(sorted(self._tools.items(), key=lambda item: (-item[1], item[0]))),
            spreads={name: getattr(self.tallies, name).spread() for name in names},
            lacks=tuple(self._lacks()),
        )

    def _lacks(self) -> Iterator[Lack]:
        seen, later = self._seen, self._rounds - self._sessions
        for name, there, of, missing, meaning in (
            ("start_s", seen.starts, self._sessions - self._sub_agents, "arrivals",
             "give --session-rate or --load; --as-recorded is not possible"),
            ("slo_ttft_s, slo_itl_s", seen.slos, self._sessions, "SLOs",
             "attainment is against the cluster file's, or --slo-ttft and --slo-itl"),
            ("gap_s", seen.gaps, later, "gaps between rounds",
             "the next round comes at once: KV is never idle and a session holds it too short a time"),
            ("tool", seen.tools, later, "tool names",
             "nothing that depends on which tool runs can be tested"),
            ("shared_prefix", self._shared, self._sessions, "prefixes shared by sessions",
             "every first prompt is computed whole; reuse across sessions is not seen"),
            ("kept_tokens", seen.kept, later, "kept prefixes",
             "no round finds anything of the one before it: there is nothing to pull"),
        ):  # fmt: skip
            if of and not there:
                yield Lack(name, f"no {missing}", meaning)
            elif name == "start_s" and there < of:
                yield Lack(name, f"{of - there} of {of} sessions have no arrival", meaning)
        if not later:
            yield Lack("rounds", "no session has a second round", "no incremental prefill: all arms but the "
                       "first round's are unused")  # fmt: skip
