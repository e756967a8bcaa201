"""A sequential model of the ledger's leases, written from what they are to do; and a search for an order.

`step` does one call on a state as the specification says and tells whether the ledger's answer is the one
that it may give. `linearized` finds an order of a history's calls that the model accepts and that no call's
answer contradicts: one that was answered before another was asked stands before it (Wing and Gong's search,
with Lowe's memory of configurations that were seen).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Op:
    """One call that the ledger carried out, maybe without anyone hearing its answer."""

    kind: str
    asked: tuple[Any, ...]
    answer: Any
    invoked_s: float
    answered_s: float


@dataclass(frozen=True, slots=True)
class Session:
    lease: tuple[str, str, int] | None = None
    """(round, replica, fence)."""
    last_fence: int = 0
    """Of its last recorded completion."""
    rounds: int = 0
    home: str | None = None
    closed: bool = False
    closing: bool = False
    parent: str | None = None

    @property
    def newest(self) -> int:
        return max(self.last_fence, self.lease[2] if self.lease else 0)


@dataclass(frozen=True, slots=True)
class Round:
    session: str = ""
    replica: str = ""
    number: int | None = None
    """Which its call has had before."""
    replaces: str = ""
    fence: int = 0
    done: int | None = None
    """Fence of the completion that was recorded."""
    gone: str = ""
    """Why it ended otherwise: "replaced", "released" or "fenced"."""


@dataclass(frozen=True, slots=True)
class Call:
    round: str
    session: str
    number: int | None = None
    completed: bool = False
    shared: bool = False
    """Several clients may have made it: a retry cannot be told."""


@dataclass(frozen=True, slots=True)
class State:
    alive: frozenset[str] = frozenset()
    newest: int = 0
    """Fence of all that were given."""
    sessions: Mapping[str, Session] = field(default_factory=lambda: MappingProxyType({}))
    rounds: Mapping[str, Round] = field(default_factory=lambda: MappingProxyType({}))
    calls: Mapping[str, Call] = field(default_factory=lambda: MappingProxyType({}))
    counts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def key(self) -> tuple[Any, ...]:
        parts = (self.sessions, self.rounds, self.calls, self.counts)
        return self.alive, self.newest, *(frozenset(part.items()) for part in parts)

    def lives(self, replica: str, asker: str) -> bool:
        return replica == asker or replica in self.alive


def _with(known: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    changed = {**known, name: value}
    if value is None:
        del changed[name]
    return changed


Verdict = tuple[State, Any] | None
"""The state after a call, and what was to be answered; None where the answer's own part is impossible."""


def step(state: State, op: Op) -> State | None:
    """The state after it; None if it must not have been answered so, here."""
    found = STEPS[op.kind](state, op)
    if found is None:
        return None
    after, expected = found
    return after if expected == op.answer else None


def _claim(state: State, op: Op) -> Verdict:
    """Asked (replica, round, session, call, word, unnamed); answered (fence, session, number, parent,
    replaces), or "taken"."""
    replica, round_id, session_id, call_name, word, unnamed = op.asked
    rounds, calls = state.rounds, state.calls
    known, call = rounds.get(round_id), calls.get(call_name)
    asked_id, number, replaces = session_id, None, ""
    if known is not None and (known.done is not None or known.gone):
        return state, "taken"
    if known is not None:
        session_id, number, replaces = known.session, known.number, known.replaces
    elif word:
        if word == "first" and call is not None:
            lease = state.sessions.get(call.session, Session()).lease
            if unnamed or (lease is not None and lease[0] == call.round):
                call = replace(call, shared=True)
                calls = _with(calls, call_name, call)
            elif not call.shared:
                call = None
        if call is not None and call.shared:
            word = ""
        elif call is not None and call.round != round_id:
            session_id, number, replaces = call.session, call.number, call.round
            first = rounds.get(call.round)
            if first is not None and first.done is None and first.session:
                rounds = _with(rounds, call.round, replace(first, gone="replaced"))
    if op.answer == "taken":
        return None
    fence = op.answer[0]
    session = state.sessions.get(session_id, Session())
    lease, newest, sessions = session.lease, state.newest, state.sessions
    if lease is not None and lease[:2] == (round_id, replica):
        if fence != lease[2]:
            return None
    else:
        if fence <= newest:  # fences only grow
            return None
        newest = fence
        if lease is not None and state.lives(lease[1], replica) and lease[0] != replaces:
            parent_id, session_id, number = session_id, f"{asked_id}~{fence:x}", None
            session = Session(home=session.home, parent=parent_id)
    session = replace(session, lease=(round_id, replica, fence), closed=False, closing=False)
    answer = fence, session_id, number or session.rounds + 1, session.parent, replaces
    rounds = _with(rounds, round_id, Round(session_id, replica, number, replaces, fence))
    if word and known is None:
        completed = call.completed if call is not None else False
        calls = _with(calls, call_name, Call(round_id, session_id, number, completed))
    sessions = _with(sessions, session_id, session)
    return State(state.alive, newest, sessions, rounds, calls, state.counts), answer


def _complete(state: State, op: Op) -> Verdict:
    """Asked (replica, round, fence, session, home, outcome, call); answered whether it is recorded."""
    _, round_id, fence, session_id, home, outcome, call_name = op.asked
    round, call = state.rounds.get(round_id, Round()), state.calls.get(call_name)
    session = state.sessions.get(session_id, Session())
    if round.done == fence:
        return state, True
    if round.done is not None or round.gone or session.newest > fence:
        rounds = state.rounds
        if round.fence == fence and round.done is None and not round.gone:
            # For good, whatever becomes of the newer claim.
            rounds = _with(rounds, round_id, replace(round, gone="fenced"))
        counts = _with(state.counts, "fenced", state.counts.get("fenced", 0) + 1)
        return replace(state, rounds=rounds, counts=counts), False
    ours = call is not None and call.round == round_id
    repeated = ours and call is not None and call.completed and outcome == "completed"
    number = round.number or session.rounds + 1
    before = session.rounds
    after = session if outcome == "refused" else replace(session, rounds=max(before, number))
    if outcome == "completed" and number >= before:
        after = replace(after, home=home)
    closed = session.closed or session.closing
    after = replace(after, lease=None, last_fence=fence, closing=False, closed=closed)
    sessions = _with(state.sessions, session_id, after if after.rounds else None)
    calls = state.calls
    if ours and call is not None:
        call = replace(call, completed=call.completed or outcome == "completed")
        calls = _with(calls, call_name, call if outcome == "refused" else replace(call, number=number))
    counted = "repeated" if repeated else outcome
    counts = _with(state.counts, counted, state.counts.get(counted, 0) + 1)
    rounds = _with(state.rounds, round_id, replace(round, done=fence))
    return State(state.alive, state.newest, sessions, rounds, calls, counts), True


def _release(state: State, op: Op) -> Verdict:
    """Asked (replica, round); answered whether a lease was given back."""
    replica, round_id = op.asked
    round = state.rounds.get(round_id)
    if round is not None and (round.done is not None or (round.session and round.replica != replica)):
        return state, False
    rounds = _with(state.rounds, round_id, Round(gone="released"))
    session = state.sessions.get(round.session) if round is not None else None
    if round is None or session is None or session.lease is None:
        return replace(state, rounds=rounds), False
    if session.lease[:2] != (round_id, replica):
        return replace(state, rounds=rounds), False
    left = replace(session, lease=None, closing=False) if session.rounds else None
    return replace(state, rounds=rounds, sessions=_with(state.sessions, round.session, left)), True


def _rehome(state: State, op: Op) -> Verdict:
    """Asked (session, fence, from, to); answered as `Moved`."""
    session_id, fence, from_home, to_home = op.asked
    session = state.sessions.get(session_id)
    if session is None:
        return state, "unknown_session"
    if session.lease is None or session.lease[2] != fence:
        return state, "ended" if session.lease is None and session.newest == fence else "fenced"
    if session.home == to_home:
        return state, "moved"
    if session.home != from_home:
        return state, "other_home"
    moved = _with(state.sessions, session_id, replace(session, home=to_home))
    return replace(state, sessions=moved), "moved"


def _close(state: State, op: Op) -> Verdict:
    """Asked (session,); answered (what it is now, whether it was open)."""
    (session_id,) = op.asked
    session = state.sessions.get(session_id)
    if session is None:
        return state, ("unknown", False)
    if session.closed:
        return state, ("closed", False)
    if session.lease is not None and session.lease[1] in state.alive:
        closing = _with(state.sessions, session_id, replace(session, closing=True))
        return replace(state, sessions=closing), ("closing", not session.closing)
    closed = replace(session, closed=True, closing=False)
    return replace(state, sessions=_with(state.sessions, session_id, closed)), ("closed", True)


def _heartbeat(state: State, op: Op) -> Verdict:
    """Asked (replica, rounds that it believes to run); answered which of them are to end."""
    replica, running = op.asked
    gone = tuple(name for name in running if state.rounds.get(name, Round()).gone == "replaced")
    return replace(state, alive=state.alive | {replica}), gone


def _retire(state: State, op: Op) -> Verdict:
    """The replica dies, or its time is over."""
    (replica,) = op.asked
    return replace(state, alive=state.alive - {replica}), None


def _look_at_all(state: State, op: Op) -> Verdict:
    """When nothing runs any more: ({session: (rounds, home, round in flight)}, counts)."""
    sessions = {
        name: (session.rounds, session.home, session.lease[0] if session.lease else None)
        for name, session in state.sessions.items()
    }
    return state, (sessions, dict(state.counts))


STEPS: dict[str, Callable[[State, Op], Verdict]] = {
    "claim": _claim,
    "complete": _complete,
    "release": _release,
    "rehome": _rehome,
    "close": _close,
    "heartbeat": _heartbeat,
    "retire": _retire,
    "all": _look_at_all,
}


def linearized(history: Sequence[Op], limit: int = 500_000) -> list[Op] | None:
    """An order that the model accepts; None if there is none. Raises RuntimeError after `limit` steps."""
    ops = sorted(history, key=lambda op: op.invoked_s)
    everything = (1 << len(ops)) - 1
    seen: set[tuple[Any, ...]] = set()
    order: list[int] = []
    stack = [(0, State(), _next_ones(ops, 0))]
    steps = 0
    while stack:
        done, state, choices = stack[-1]
        if done == everything:
            return [ops[at] for at in order]
        if not choices:
            stack.pop()
            if order:
                order.pop()
            continue
        at = choices.pop()
        steps += 1
        if steps > limit:
            raise RuntimeError(f"no order was found in {limit} steps")
        after = step(state, ops[at])
        if after is None:
            continue
        now_done = done | 1 << at
        key = now_done, *after.key()
        if key in seen:
            continue
        seen.add(key)
        order.append(at)
        stack.append((now_done, after, _next_ones(ops, now_done)))
    return None


def _next_ones(ops: Sequence[Op], done: int) -> list[int]:
    """Those left that were asked before any of them was answered; the one that was answered first, last."""
    left = [at for at in range(len(ops)) if not done >> at & 1]
    if not left:
        return []
    first_s = min(ops[at].answered_s for at in left)
    return sorted((at for at in left if ops[at].invoked_s <= first_s), key=lambda at: -ops[at].answered_s)
