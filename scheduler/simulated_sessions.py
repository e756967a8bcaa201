"""Sessions of a trace as the simulator runs them: the pages of every round's prompt, and when it is sent.

Nobody has tokens here. A page's name is its branch and its depth; a round that keeps what was there goes on
in its branch, one that keeps less forks a new branch off (`engines/chains.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple

from antiphon.engines.chains import Branch, Chain
from antiphon.traces.schema import RoundTrace, SessionTrace

Names = tuple[bytes, ...]
"""What the core takes for page hashes."""


class PlannedRound(NamedTuple):
    """One round, as it will be sent. Pages are whole pages."""

    trace: RoundTrace
    chain: Chain
    """Of the prompt."""
    end: Chain
    """Of everything that has KV at the home when the round is over: the last token has none."""
    hashes: Names
    end_hashes: Names


class PageNames:
    """Makes branches, and names their pages: unique in a simulation, equal for equal content."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self._numbers = count()
        self._roots: dict[str, Branch] = {}
        self._root_names: dict[str, list[bytes]] = {}
        self._depths: list[bytes] = []
        """Every depth in four bytes: names are made by the million."""

    def plan(self, session: SessionTrace) -> Iterator[PlannedRound]:
        """The session's rounds, each made when it is asked for; equal sessions get equal plans."""
        size = self.page_tokens
        branch, names = self._first_branch(session)
        there = session.shared_tokens // size
        for turn in session.rounds:
            kept = min(turn.kept_tokens // size, there) if turn is not session.rounds[0] else there
            if kept < there:
                branch = Branch(next(self._numbers), branch, kept)
                names = names[:kept]
            pages = turn.prompt_tokens // size
            end = (turn.prompt_tokens + turn.output_tokens - 1) // size
            self._extend(names, branch, end)
            end_names = tuple(names)
            yield PlannedRound(turn, Chain(branch, pages), Chain(branch, end), end_names[:pages], end_names)
            there = end

    def _first_branch(self, session: SessionTrace) -> tuple[Branch, list[bytes]]:
        shared = session.shared_tokens // self.page_tokens
        if not shared:
            return Branch(next(self._numbers)), []
        root = self._roots.get(session.shared_prefix)
        if root is None:
            root = self._roots[session.shared_prefix] = Branch(next(self._numbers))
            self._root_names[session.shared_prefix] = []
        names = self._root_names[session.shared_prefix]
        self._extend(names, root, shared)
        return Branch(next(self._numbers), root, shared), names[:shared]

    def _extend(self, names: list[bytes], branch: Branch, pages: int) -> None:
        while len(self._depths) < pages:
            self._depths.append(len(self._depths).to_bytes(4, "big"))
        prefix = branch.number.to_bytes(5, "big")
        names += [prefix + depth for depth in self._depths[len(names) : pages]]


class SessionRun:
    """One session on its way through the simulation."""

    __slots__ = ("children", "rounds", "sent", "top", "trace")

    def __init__(
        self, trace: SessionTrace, names: PageNames, children: Sequence[SessionTrace], top: bool
    ) -> None:
        self.trace = trace
        self.rounds = names.plan(trace)
        self.children = children
        """Sub-agents that its rounds start."""
        self.top = top
        """It arrived by itself: no parent started it."""
        self.sent = 0
        """Rounds that have been sent."""


class Clients:
    """Agents: a session sends its first round when it arrives, each later one `gap_s` after an answer's end.

    A round that fails ends its session. Sub-agents start when their parent's round `after_round` has ended,
    and run beside it; one whose parent never came so far is never started.
    """

    def __init__(
        self,
        names: PageNames,
        at: Callable[[float, Callable[[], None]], None],
        send: Callable[[SessionRun, PlannedRound], None],
        max_live: int | None = None,
    ) -> None:
        """`at(when, act)` schedules; `send` submits a round now; `max_live` bounds the arrived sessions."""
        self.open = 0
        """Sessions that arrived or are about to, and have not ended."""
        self._names = names
        self._at = at
        self._send = send
        self._max_live = max_live
        self._live = 0
        self._held_back: deque[SessionTrace] = deque()
        self._children: Mapping[str, Sequence[SessionTrace]] = {}

    def feed(
        self,
        starts: Iterator[tuple[float, SessionTrace]],
        children: Mapping[str, Sequence[SessionTrace]],
    ) -> None:
        """Sessions in order of time, read one at a time; `children` by their parents' ids."""
        self._children = children
        self._next_arrival(starts)

    def ended(self, run: SessionRun, completed: bool, now: float) -> None:
        """The round that `run` sent last is over."""
        if completed:
            self._start_children(run, now)
            following = next(run.rounds, None)
            if following is not None:
                self._at(now + following.trace.gap_s, lambda: self._go_on(run, following))
                return
        self.open -= 1
        if run.top:
            self._live -= 1
            if self._held_back:
                self._start(self._held_back.popleft(), now)

    def _next_arrival(self, starts: Iterator[tuple[float, SessionTrace]]) -> None:
        arrival = next(starts, None)
        if arrival is not None:
            when, session = arrival
            self.open += 1
            self._at(when, lambda: self._arrive(session, when, starts))

    def _arrive(
        self, session: SessionTrace, now: float, starts: Iterator[tuple[float, SessionTrace]]
    ) -> None:
        self._next_arrival(starts)
        if self._max_live is not None and self._live >= self._max_live:
            self._held_back.append(session)
        else:
            self._start(session, now)

    def _start(self, session: SessionTrace, now: float, *, top: bool = True) -> None:
        self._live += top
        run = SessionRun(session, self._names, self._children.get(session.session_id, ()), top)
        self._start_children(run, now)
        self._go_on(run, next(run.rounds))

    def _start_children(self, run: SessionRun, now: float) -> None:
        for child in run.children:
            if child.after_round == run.sent:
                self.open += 1
                self._at(now, lambda child=child: self._start(child, now, top=False))  # type: ignore[misc]

    def _go_on(self, run: SessionRun, following: PlannedRound) -> None:
        run.sent += 1
        self._send(run, following)


def split_children(
    sessions: Iterable[SessionTrace],
) -> tuple[list[SessionTrace], dict[str, list[SessionTrace]]]:
    """Sessions that arrive by themselves, and those that a parent in the same trace starts, by its id."""
    known = list(sessions)
    ids = {session.session_id for session in known}
    tops: list[SessionTrace] = []
    children: dict[str, list[SessionTrace]] = {}
    for session in known:
        parent = session.parent
        if parent is not None and parent in ids and parent != session.session_id:
            children.setdefault(parent, []).append(session)
        else:
            tops.append(session)
    return tops, children
