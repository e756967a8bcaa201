"""A trace in steady state: the sessions of a window of time, as in the middle of a long day.

A trace that starts on an empty fleet is a ramp, not a load. So sessions arrive (Poisson, for as long before
the window as any of them lasts), and those that are under way when the window opens enter it there: their
history was computed before. They are as many as in a fleet that is half-way to its targets (`OPENING`): a
fleet that is too small drowns over many minutes, since slow rounds keep more sessions under way, which make
rounds slower; from there most do so at once, and one that can do the load gets ahead in the warm-up. Equal
seeds give equal sessions to every plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import msgspec

from antiphon.engines.cluster import Slo
from antiphon.eval.load import with_cached
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.simulated_sessions import split_children
from antiphon.traces.schema import RoundTrace, SessionTrace, TraceError

ENTRY_S = 1.0
"""Sessions under way bring their history in the first second, which costs nothing (`score.py`)."""
OPENING = 0.5
"""Share of its targets that a round takes, or what it takes where nothing waits, before the window opens."""
WARM_UP_SHARE = 0.6
"""Of the time that is measured."""
LEAST_WARM_UP_S = 30.0
"""Or less, where all is shorter: twice as long as sessions last, or `ROUNDS_OF_WARM_UP` long rounds."""
ROUNDS_OF_WARM_UP = 2
"""What was in the engines when the window opened is not simulated: by then as much is again."""
MOST_WARM_UP_ROUNDS = 1000
"""Or two of each live session, where these are more: a fleet that can do the load is ahead by then, and
of a long window all that follows tells whether it stays so."""


class Timed(NamedTuple):
    """A session, and when its rounds would be sent and end if nothing waited; 0 is its family's arrival."""

    session: SessionTrace
    sent_s: tuple[float, ...]
    ended_s: tuple[float, ...]


Family = tuple[Timed, ...]
"""A session that arrives, first, and the sub-agents that it starts."""


@dataclass(frozen=True, slots=True)
class Window:
    """What one simulation sends. Rounds sent within [`from_s`, `until_s`] count."""

    starts: tuple[tuple[float, SessionTrace], ...]
    children: dict[str, list[SessionTrace]]
    from_s: float
    until_s: float
    live: int
    """Sessions that were under way when it opened."""

    def sessions(self) -> Iterator[SessionTrace]:
        """All of them, sub-agents included."""
        yield from (session for _, session in self.starts)
        for started in self.children.values():
            yield from started


@dataclass(frozen=True, slots=True)
class Workload:
    """Sessions and the rate at which they arrive."""

    families: tuple[Family, ...]
    rate_per_s: float
    """Families that arrive per second."""
    opening: tuple[Family, ...]
    """The same families, as slow as before a window opens."""

    @classmethod
    def of(
        cls, sessions: Sequence[SessionTrace], rate_per_s: float, idle: LatencyModel, slo: Slo | None = None
    ) -> Workload:
        """`idle`: an engine by which it is told how long rounds last. `slo`: the targets by which it is told
        who is under way when a window opens; None = nothing waits before either. Raises `TraceError`."""
        tops, children = split_children(sessions)

        def timed(slow: Slo | None) -> tuple[Family, ...]:
            return tuple(tuple(_timed(top, 0.0, children, idle, slow)) for top in tops if top.rounds)

        families = timed(None)
        if not families:
            raise TraceError("no session arrives by itself: there is nothing to plan for")
        return cls(families, rate_per_s, timed(slo))

    def rounds(self) -> Iterator[tuple[RoundTrace, int]]:
        """Every round of every session once, with the tokens of its prompt that were there before it."""
        for family in self.families:
            for session, *_ in family:
                yield from with_cached(session)

    @property
    def rounds_per_s(self) -> float:
        rounds = sum(len(timed.sent_s) for family in self.families for timed in family)
        return self.rate_per_s * rounds / len(self.families)

    @property
    def live_sessions(self) -> float:
        """Sessions under way at any time, if nothing waits (Little's law)."""
        lasting = sum(t.ended_s[-1] - t.sent_s[0] for family in self.families for t in family)
        return self.rate_per_s * lasting / len(self.families)

    @property
    def live_tokens(self) -> float:
        """KV of the sessions under way at any time, if nothing waits: each round's context until the next."""
        token_s = 0.0
        for family in self.families:
            for session, sent_s, ended_s in family:
                for turn, begin_s, end_s in zip(
                    session.rounds, sent_s, (*sent_s[1:], ended_s[-1]), strict=True
                ):
                    token_s += turn.total_tokens * (end_s - begin_s)
        return self.rate_per_s * token_s / len(self.families)

    @property
    def long_round_s(self) -> float:
        """95th percentile of how long rounds last, if nothing waits."""
        lasting = sorted(
            ended_s - sent_s
            for family in self.families
            for timed in family
            for sent_s, ended_s in zip(timed.sent_s, timed.ended_s, strict=True)
        )
        return lasting[int(0.95 * len(lasting))]

    def measured_s(self, rounds: int) -> float:
        """How long a window must be to hold about so many rounds."""
        return rounds / self.rounds_per_s

    def window(self, seed: int, rounds: int, rate_factor: float = 1.0) -> Window:
        """A window with about `rounds` rounds that count, times `rate_factor`, after a warm-up."""
        chance = Random(f"plan/{seed}")
        measured_s = self.measured_s(rounds)
        from_s = ENTRY_S + self._warm_up_s(measured_s, rate_factor)
        until_s = from_s + measured_s
        starts: list[tuple[float, SessionTrace]] = []
        children: dict[str, list[SessionTrace]] = {}
        live = 0
        for number, (arrived_s, family) in enumerate(self._arrivals(chance, until_s, rate_factor)):
            for start_s, session in _within(*family, arrived_s, until_s, f"~{number}"):
                if session.parent is not None:
                    children.setdefault(session.parent, []).append(session)
                else:
                    starts.append((start_s, session))
                    live += start_s < ENTRY_S
        starts.sort(key=lambda start: start[0])
        return Window(tuple(starts), children, from_s, until_s, live)

    def _warm_up_s(self, measured_s: float, rate_factor: float) -> float:
        twice_live = 2 * self.live_sessions
        least_s = min(LEAST_WARM_UP_S, twice_live / self.rate_per_s, ROUNDS_OF_WARM_UP * self.long_round_s)
        most_s = max(MOST_WARM_UP_ROUNDS / rate_factor, twice_live) / self.rounds_per_s
        return max(least_s, min(most_s, WARM_UP_SHARE * measured_s))

    def _arrivals(
        self, chance: Random, until_s: float, rate_factor: float
    ) -> Iterator[tuple[float, tuple[Family, Family]]]:
        """Poisson from the longest family before the window on; every family once before any again."""
        longest_s = max(timed.ended_s[-1] for family in self.opening for timed in family)
        now_s = ENTRY_S - longest_s
        deck: list[tuple[Family, Family]] = []
        while True:
            now_s += chance.expovariate(self.rate_per_s * rate_factor)
            if now_s > until_s:
                return
            if not deck:
                deck = list(zip(self.families, self.opening, strict=True))
                chance.shuffle(deck)
            yield now_s, deck.pop()


def _timed(
    session: SessionTrace,
    start_s: float,
    children: dict[str, list[SessionTrace]],
    idle: LatencyModel,
    slow: Slo | None,
) -> Iterator[Timed]:
    """`slow`: each round takes `OPENING` of these targets, if that is longer."""
    sent_s: list[float] = []
    ended_s: list[float] = []
    now_s = start_s
    for index, (turn, cached) in enumerate(with_cached(session)):
        now_s += turn.gap_s if index else 0.0
        sent_s.append(now_s)
        steps = turn.output_tokens - 1
        alone_s = idle.prefill_s(turn.prompt_tokens - cached, cached)
        alone_s += steps * idle.decode_step_s(1, turn.total_tokens)
        slow_s = OPENING * (slow.ttft_s + steps * slow.itl_s) if slow is not None else 0.0
        now_s += max(alone_s, slow_s)
        ended_s.append(now_s)
    yield Timed(session, tuple(sent_s), tuple(ended_s))
    for child in children.get(session.session_id, ()):
        if child.rounds and child.after_round <= len(ended_s):
            begin_s = ended_s[child.after_round - 1] if child.after_round else start_s
            yield from _timed(child, begin_s, children, idle, slow)


def _within(
    family: Family, opening: Family, arrived_s: float, until_s: float, ending: str
) -> Iterator[tuple[float, SessionTrace]]:
    """What of a family lies between the window's ends: (start, session) of each of its sessions.

    Before it, time passes as in `opening`; within it, for what is sent at most, as if nothing waited. A
    sub-agent whose parent's round was before the window starts by itself.
    """
    offsets: dict[str, tuple[int, bool]] = {}
    """Session within the window -> its rounds before it, and whether it enters under way."""
    shifts_s: dict[str | None, float] = {}
    for (session, sent_s, _), (_, before_s, _) in zip(family, opening, strict=True):
        first = sum(arrived_s + at_s < ENTRY_S for at_s in before_s)
        if first == len(sent_s):
            continue
        shift_s = arrived_s + before_s[first] - sent_s[first]
        if not first:
            shift_s = shifts_s.get(session.parent, shift_s)
        shifts_s[session.session_id] = shift_s
        times_s = [at_s + shift_s for at_s in sent_s]
        last = first + sum(at_s <= until_s for at_s in times_s[first:])
        under_way = first > 0
        if first >= last and not under_way:
            continue
        rounds, shared = session.rounds[first:last], session.shared_tokens
        kept = session.rounds[first].kept_tokens if under_way else 0
        enters = kept > 1
        if enters:  # one round more: what it had done before; alone if it only rests here meanwhile
            entered = (msgspec.structs.replace(turn, gap_s=times_s[first]) for turn in rounds[:1])
            rounds = (RoundTrace(prompt_tokens=kept, output_tokens=1), *entered, *rounds[1:])
        if not rounds:
            continue
        if first:
            shared = min(shared, rounds[0].prompt_tokens - 1)
        offsets[session.session_id] = first, enters
        parent, after_round = _parent(session, first, offsets)
        yield (
            (0.0 if enters else times_s[first]),
            msgspec.structs.replace(
                session,
                session_id=session.session_id + ending,
                rounds=rounds,
                parent=None if parent is None else parent + ending,
                after_round=after_round,
                shared_tokens=shared,
                start_s=None,
            ),
        )


def _parent(
    session: SessionTrace, first: int, offsets: dict[str, tuple[int, bool]]
) -> tuple[str | None, int]:
    """The parent and its round within the window that starts this session; None where that was before."""
    if first or session.parent not in offsets:
        return None, 0
    before, enters = offsets[session.parent]
    if before and session.after_round <= before:
        return None, 0
    return session.parent, session.after_round - before + enters
