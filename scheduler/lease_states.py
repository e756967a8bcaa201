"""The lease of a session: what may happen to it from where, and what whoever asks is told. A table.

data/leases.lua and the scripts behind it carry it out, each in one step; tests/test_lease_states.py compares
them with this. A state is seen from one round and its replica:

    FREE    no round has the session          OURS    this round has it
    EARLIER an earlier try of its call has it OTHERS  another round, of a replica that lives, has it
    LAPSED  the round that has it is of a dead replica, or its time is over
    NEWER   another round, with a newer fence than this one's, had it or has it

A replica lives as long as its heartbeat key does: one heartbeat renews all its leases.
"""

from __future__ import annotations

from enum import Enum


class Lease(Enum):
    FREE = "free"
    OURS = "ours"
    EARLIER = "earlier"
    OTHERS = "others"
    LAPSED = "lapsed"
    NEWER = "newer"


class Step(Enum):
    CLAIM = "claim"
    """By a round that has no claim yet, or the same one again, after a lost answer."""
    RETRY = "retry"
    """A claim by the next try of a call."""
    COMPLETE = "complete"
    RELEASE = "release"
    MOVE = "move"
    """Of the session's home, under the lease."""
    EXPIRE = "expire"
    """The replica that has the lease dies, or its time is over."""
    CLOSE = "close"
    """Of the session, by its client."""


class Answer(Enum):
    GIVEN = "given"
    """The lease, under a fence that is newer than all before."""
    SAME = "same"
    """As the last time: nothing has changed."""
    FORK = "fork"
    """The lease of a new session that begins as this one."""
    TAKEN = "taken"
    """The round must not run: another one has its place, or it has ended."""
    RECORDED = "recorded"
    FENCED = "fenced"
    """Nothing is recorded but a count."""
    FREED = "freed"
    NOTHING = "nothing"
    """There is nothing of ours to give back."""
    MOVED = "moved"
    CLOSED = "closed"
    CLOSING = "closing"
    """With the end of the round that has the session."""
    SILENT = "silent"
    """Nobody asked."""


L, S, A = Lease, Step, Answer

TRANSITIONS: dict[tuple[Lease, Step], tuple[Answer, Lease]] = {
    (L.FREE, S.CLAIM): (A.GIVEN, L.OURS),
    (L.OURS, S.CLAIM): (A.SAME, L.OURS),
    (L.EARLIER, S.CLAIM): (A.FORK, L.EARLIER),
    (L.OTHERS, S.CLAIM): (A.FORK, L.OTHERS),
    (L.LAPSED, S.CLAIM): (A.GIVEN, L.OURS),
    (L.FREE, S.RETRY): (A.GIVEN, L.OURS),
    (L.OURS, S.RETRY): (A.SAME, L.OURS),
    (L.EARLIER, S.RETRY): (A.GIVEN, L.OURS),
    (L.OTHERS, S.RETRY): (A.FORK, L.OTHERS),
    (L.LAPSED, S.RETRY): (A.GIVEN, L.OURS),
    (L.NEWER, S.CLAIM): (A.TAKEN, L.NEWER),
    (L.OURS, S.COMPLETE): (A.RECORDED, L.FREE),
    (L.LAPSED, S.COMPLETE): (A.RECORDED, L.FREE),
    (L.FREE, S.COMPLETE): (A.SAME, L.FREE),
    (L.NEWER, S.COMPLETE): (A.FENCED, L.NEWER),
    (L.OURS, S.RELEASE): (A.FREED, L.FREE),
    (L.LAPSED, S.RELEASE): (A.FREED, L.FREE),
    (L.FREE, S.RELEASE): (A.NOTHING, L.FREE),
    (L.NEWER, S.RELEASE): (A.NOTHING, L.NEWER),
    (L.OURS, S.MOVE): (A.MOVED, L.OURS),
    (L.LAPSED, S.MOVE): (A.MOVED, L.LAPSED),
    (L.FREE, S.MOVE): (A.NOTHING, L.FREE),
    (L.NEWER, S.MOVE): (A.FENCED, L.NEWER),
    (L.OURS, S.EXPIRE): (A.SILENT, L.LAPSED),
    (L.FREE, S.CLOSE): (A.CLOSED, L.FREE),
    (L.OURS, S.CLOSE): (A.CLOSING, L.OURS),
    (L.LAPSED, S.CLOSE): (A.CLOSED, L.LAPSED),
}
"""(state, step) -> (what is answered, state after it). What is not here cannot be asked from there.

NEWER, CLAIM: the same round again, after a retry of its call took its place. LAPSED is of a round of ours for
COMPLETE, RELEASE and MOVE: nobody has taken the session yet, so that its late end counts.
"""
