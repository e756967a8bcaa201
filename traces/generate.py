"""Seeded agent sessions from a profile: an endless stream, equal for equal seeds, one family in memory.

A family is a session and the sub-agents that it starts. What family i holds depends on the profile, the seed,
the window and i alone, so a short trace is the beginning of a longer one. Only `Random.random` is drawn from,
whose sequence Python guarantees from version to version.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from random import Random

import msgspec

from antiphon.traces.profiles import Curve, Profile, Sometimes, SubAgents, Thread
from antiphon.traces.schema import RoundTrace, SessionTrace, TraceError

DEFAULT_WINDOW_TOKENS = 131_072
MOST_OF_WINDOW_PER_ANSWER = 0.25
"""A longer answer than this share of the window is cut to it, so that a prompt always has room."""

Draw = Callable[[], float]


class _Prefixes:
    """The shared prefixes of a thread: which one a session has, and how long each is."""

    def __init__(self, name: str, thread: Thread) -> None:
        self.name = name
        self.ids: list[str] = []
        self.lengths: list[int] = []
        self._up_to: list[float] = []
        if thread.shared is None:
            return
        length = thread.shared.curve()
        total = 0.0
        for number in range(1, thread.shared.variants + 1):
            self.ids.append(f"{name}-prefix-{number}")
            self.lengths.append(round(length(Random(self.ids[-1]).random())))
            total += number**-thread.shared.zipf
            self._up_to.append(total)

    def choose(self, draw: Draw) -> tuple[str, int]:
        """Id and length; ("", 0) where nothing is shared."""
        if not self.ids:
            return "", 0
        number = min(bisect_right(self._up_to, draw() * self._up_to[-1]), len(self.ids) - 1)
        return (self.ids[number], self.lengths[number]) if self.lengths[number] else ("", 0)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths, default=0)


class _Maker:
    """Makes the rounds of one thread of a profile within a window."""

    def __init__(self, name: str, thread: Thread, window_tokens: int) -> None:
        self.prefixes = _Prefixes(name, thread)
        self.window_tokens = window_tokens
        self.most_output = max(1, int(window_tokens * MOST_OF_WINDOW_PER_ANSWER))
        over = thread.compaction.over if thread.compaction else 1.0
        self.limit_tokens = int(window_tokens * over)
        if self.limit_tokens - self.most_output <= self.prefixes.longest:
            needed = int((self.prefixes.longest + 2) / (over - MOST_OF_WINDOW_PER_ANSWER)) + 8
            raise TraceError(
                f"a window of {window_tokens} tokens is too small for prefixes of {self.prefixes.longest}: "
                f"give at least {needed}"
            )
        self._count = thread.rounds.curve()
        self._first = thread.first.curve()
        self._output = thread.output.curve()
        self._human_share = thread.human.share if thread.human else 0.0
        self._tool_tokens, self._tool_gap = thread.tool_tokens.curve(), thread.tool_gap.curve()
        self._human_tokens = thread.human_tokens.curve() if thread.human_tokens else self._tool_tokens
        self._human_gap = thread.human_gap.curve() if thread.human_gap else self._tool_gap
        self._rewrite = _sometimes(thread.rewrite)
        self._unsent = _sometimes(thread.unsent)
        self._compact = thread.compaction.curve() if thread.compaction else None
        self._tools = list(thread.tools.weights)
        self._tools_up_to = list(itertools.accumulate(thread.tools.weights.values()))

    def rounds(self, draw: Draw, shared_tokens: int) -> list[RoundTrace]:
        """At least one; ends before a round that exceeds the window, if the thread does not compact."""
        count = max(1, round(self._count(draw())))
        output = self._answer(draw)
        prompt = shared_tokens + max(1, round(self._first(draw())))
        rounds = [RoundTrace(min(prompt, self.limit_tokens - output), output)]
        while len(rounds) < count:
            turn = self._next(rounds[-1], draw, shared_tokens)
            if turn is None:
                break
            rounds.append(turn)
        return rounds

    def _next(self, before: RoundTrace, draw: Draw, shared_tokens: int) -> RoundTrace | None:
        human = draw() < self._human_share
        added = max(1, round((self._human_tokens if human else self._tool_tokens)(draw())))
        gap_s = round((self._human_gap if human else self._tool_gap)(draw()), 2)
        tool = "" if human else self._tool(draw)
        output = self._answer(draw)
        prompt, kept = self._extend(before, added, draw)
        if prompt + output > self.limit_tokens:
            if self._compact is None:
                return None
            shrunk = round(before.prompt_tokens * self._compact(draw())) + added
            prompt = min(max(shrunk, shared_tokens + 1), self.limit_tokens - output)
            kept = min(shared_tokens, before.prompt_tokens)
        return RoundTrace(prompt, output, kept, gap_s, tool)

    def _extend(self, before: RoundTrace, added: int, draw: Draw) -> tuple[int, int]:
        """Prompt and kept tokens of a round that `added` tokens to what was there."""
        if draw() < self._rewrite[0]:
            return before.total_tokens + added, int(before.prompt_tokens * self._rewrite[1](draw()))
        if draw() < self._unsent[0]:
            sent = before.output_tokens - round(before.output_tokens * self._unsent[1](draw()))
            if sent < before.output_tokens:
                return before.prompt_tokens + sent + added, before.prompt_tokens
        return before.total_tokens + added, before.total_tokens

    def _answer(self, draw: Draw) -> int:
        return min(max(1, round(self._output(draw()))), self.most_output)

    def _tool(self, draw: Draw) -> str:
        if len(self._tools) == 1:
            return self._tools[0]
        number = bisect_right(self._tools_up_to, draw() * self._tools_up_to[-1])
        return self._tools[min(number, len(self._tools) - 1)]


def _sometimes(spread: Sometimes | None) -> tuple[float, Curve]:
    return (spread.chance, spread.curve()) if spread else (0.0, float)


def generate(
    name: str, profile: Profile, seed: int = 0, window_tokens: int = DEFAULT_WINDOW_TOKENS
) -> Iterator[SessionTrace]:
    """Sessions without end, a parent before its sub-agents; each passes `session_fault`.

    No round's prompt and output exceed `window_tokens`. Raises `TraceError` if the profile's shared prefixes
    do not fit it.
    """
    stem = f"{name}-{seed}"
    maker = _Maker(stem, profile, window_tokens)
    sub_agents = profile.sub_agents
    sub_maker = _Maker(f"{stem}-sub", sub_agents, window_tokens) if sub_agents else None
    return _families(stem, maker, sub_agents, sub_maker)


def _families(
    stem: str, maker: _Maker, sub_agents: SubAgents | None, sub_maker: _Maker | None
) -> Iterator[SessionTrace]:
    for index in itertools.count():
        session_id = f"{stem}-{index}"
        draw = Random(session_id).random
        session = _session(session_id, maker, draw)
        if sub_agents is None or sub_maker is None or draw() >= sub_agents.count.chance:
            yield session
            continue
        yield from _with_sub_agents(session, sub_agents, sub_maker, draw)


def _session(session_id: str, maker: _Maker, draw: Draw) -> SessionTrace:
    prefix, shared_tokens = maker.prefixes.choose(draw)
    rounds = tuple(maker.rounds(draw, shared_tokens))
    return SessionTrace(session_id, rounds, shared_prefix=prefix, shared_tokens=shared_tokens)


def _with_sub_agents(
    session: SessionTrace, sub_agents: SubAgents, maker: _Maker, draw: Draw
) -> Iterator[SessionTrace]:
    """The session, its next round waiting at least for the tools of its sub-agents; then they."""
    if len(session.rounds) < 2:
        yield session
        return
    after_round = 1 + int(draw() * (len(session.rounds) - 1))
    count = max(1, round(sub_agents.count.curve()(draw())))
    children = [
        msgspec.structs.replace(
            _session(f"{session.session_id}.{number}", maker, draw),
            parent=session.session_id, after_round=after_round,
        )
        for number in range(1, count + 1)
    ]  # fmt: skip
    longest_s = max(sum(turn.gap_s for turn in child.rounds) for child in children)
    rounds = list(session.rounds)
    waiting = rounds[after_round]
    rounds[after_round] = msgspec.structs.replace(
        waiting, gap_s=round(max(waiting.gap_s, longest_s), 2), tool=sub_agents.tool
    )
    yield msgspec.structs.replace(session, rounds=tuple(rounds))
    yield from children


def take(
    trace: Iterable[SessionTrace], sessions: int | None = None, rounds: int | None = None
) -> Iterator[SessionTrace]:
    """The first `sessions`, or the first that have `rounds` rounds together; sessions are whole."""
    there = 0
    for number, session in enumerate(trace, 1):
        yield session
        there += len(session.rounds)
        if number == sessions or (rounds is not None and there >= rounds):
            return
