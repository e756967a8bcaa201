"""How far each engine can be counted on now. Pure state: no clock, no I/O.

    draining    it is to be stopped: nothing new is placed there, what it holds is read from it
    suspect     its last probe failed: nothing new is placed there, nothing is read from it

An engine that cannot be counted on is still better than no answer: where nothing else is left, it is used.
"""

from __future__ import annotations

from msgspec.structs import replace

from antiphon.policies.base import ClusterView, Placement, Policy, Reject, RoundView

NOBODY: frozenset[str] = frozenset()


class Standings:
    """Written by the core only. Read `unusable` and `silent` after `refresh`."""

    def __init__(self) -> None:
        self.draining: frozenset[str] = NOBODY
        self.suspect: frozenset[str] = NOBODY
        self.unusable: frozenset[str] = NOBODY
        """Nothing new is placed there."""
        self.silent: frozenset[str] = NOBODY
        """Of `unusable`, those that are not read from either."""

    def refresh(self, now: float) -> None:
        """What ages by itself has aged up to `now`."""

    def set_draining(self, engine_id: str, on: bool) -> None:
        """Stays until it is taken back, whatever becomes of the engine."""
        self.draining = self.draining | {engine_id} if on else self.draining - {engine_id}
        self._renew()

    def set_suspect(self, engine_id: str, on: bool) -> None:
        self.suspect = self.suspect | {engine_id} if on else self.suspect - {engine_id}
        self._renew()

    def engine_gone(self, engine_id: str) -> None:
        """Whoever comes back under this name is not suspected of what this one did."""
        self.set_suspect(engine_id, False)

    def why_unread(self, puller: str, source: str) -> str:
        """Why `puller` is not to be sent for what `source` holds; "" = it is."""
        return f"{source} is suspect" if source in self.silent else ""

    def _renew(self) -> None:
        self.silent = self.suspect
        self.unusable = self.draining | self.silent


def decide(
    policy: Policy, standings: Standings, view: RoundView, cluster: ClusterView, *, retry: bool
) -> tuple[Placement | Reject, RoundView]:
    """What the policy answers, and what it saw of the round.

    `retry`: where it finds no engine, one that failed this round is better than none.
    """
    failed, unusable, silent = view.excluded, standings.unusable, standings.silent
    if silent:
        held = {e: tokens for e, tokens in view.history_tokens.items() if e not in silent}
        view = replace(view, history_tokens=held)
    if unusable:
        view = replace(view, excluded=failed | unusable)
    answer = policy.place(view, cluster)
    if isinstance(answer, Reject) and view.excluded:
        less = [failed | silent, failed] if unusable else []
        for excluded in (*less, NOBODY) if retry else less:
            if excluded != view.excluded:
                view = replace(view, excluded=excluded)
                answer = policy.place(view, cluster)
                if not isinstance(answer, Reject):
                    break
    return answer, view
