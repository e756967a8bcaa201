"""How far each engine can be counted on now. Pure state: no clock, no I/O.

    draining    it is to be stopped: nothing new is placed there, what it holds is read from it
    suspect     its last probe failed: nothing new is placed there, nothing is read from it
    shunned     its circuit breaker is open: as suspect, until its pause is over and one round tries it

An engine that cannot be counted on is still better than no answer: where nothing else is left, it is used.
Between two engines, (puller, source), a breaker of its own says whether the link is to be used.
"""

from __future__ import annotations

from collections.abc import Container

from msgspec.structs import replace

from antiphon.policies.base import MOVE, REMOTE_PULL, ClusterView, Placement, Policy, Reject, RoundView
from antiphon.scheduler.breakers import CLOSED, Breakers
from antiphon.scheduler.core_config import CoreConfig

NOBODY: frozenset[str] = frozenset()
OTHER_LINKS = 3
"""How often a policy is asked again because its answer goes over a link that is not to be used."""
NOT_THE_ENGINES_FAULT = frozenset({"bad_request", "bug"})

Pair = tuple[str, str]
"""Puller, source."""


class Standings:
    """Written by the core only. Read `unusable` and `silent` after `refresh`."""

    def __init__(self, config: CoreConfig | None = None) -> None:
        config = config or CoreConfig()
        limits = config.breaker_failures, config.breaker_open_s, config.breaker_max_open_s
        self.engines: Breakers[str] = Breakers(*limits)
        self.links: Breakers[Pair] = Breakers(*limits)
        self.draining: frozenset[str] = NOBODY
        self.suspect: frozenset[str] = NOBODY
        self.unusable: frozenset[str] = NOBODY
        """Nothing new is placed there."""
        self.silent: frozenset[str] = NOBODY
        """Of `unusable`, those that are not read from either."""
        self._progress_s: dict[str, float] = {}
        """Engine -> when it last brought something for a round."""

    def refresh(self, now: float) -> None:
        """What ages by itself has aged up to `now`."""
        if self.engines.not_closed or self.silent is not self.suspect:
            shunned = self.engines.refused(now)
            self.silent = self.suspect | shunned if shunned else self.suspect
            self.unusable = self.draining | self.silent

    # ---- what is told of engines

    def set_draining(self, engine_id: str, on: bool) -> None:
        """Stays until it is taken back, whatever becomes of the engine."""
        self.draining = self.draining | {engine_id} if on else self.draining - {engine_id}
        self._renew()

    def set_suspect(self, engine_id: str, on: bool) -> None:
        self.suspect = self.suspect | {engine_id} if on else self.suspect - {engine_id}
        self._renew()

    def engine_gone(self, engine_id: str) -> None:
        """Whoever comes back under this name is not blamed for what this one did."""
        self.engines.forget(engine_id)
        self.links.forget_if_about(engine_id)
        self._progress_s.pop(engine_id, None)
        self.set_suspect(engine_id, False)

    def _renew(self) -> None:
        """Until the next `refresh`, an open breaker counts as it did."""
        shunned = self.silent - self.suspect if self.engines.not_closed else NOBODY
        self.silent = self.suspect | shunned if shunned else self.suspect
        self.unusable = self.draining | self.silent

    # ---- what rounds tell of them

    def progressed(self, engine_id: str, now: float) -> None:
        """It brought a first token, a prefill or an end."""
        self._progress_s[engine_id] = now
        self.engines.succeeded(engine_id)

    def engine_failed(self, engine_id: str, round_id: str, kind: str, since_s: float, now: float) -> None:
        """A call of this round failed there, which began at `since_s`.

        One that missed its deadline while nobody got anything from the engine is enough to shun it: it hangs,
        whatever its health check says.
        """
        if kind in NOT_THE_ENGINES_FAULT:
            self.engines.left(round_id)
            return
        hangs = kind == "deadline" and self._progress_s.get(engine_id, -1.0) < since_s
        self.engines.failed(engine_id, round_id, now, at_once=hangs)

    def link_told(self, pair: Pair, round_id: str, *, failed: bool, came: bool, now: float) -> None:
        """A prefetch over the link ended: it is to blame, or pages came, or it says nothing of the link."""
        if failed:
            self.links.failed(pair, round_id, now)
        elif came:
            self.links.succeeded(pair)
        else:
            self.links.left(round_id)

    def round_left(self, round_id: str) -> None:
        """The round tries nothing any more."""
        self.engines.left(round_id)
        self.links.left(round_id)

    def placed(self, placement: Placement, round_id: str, now: float) -> None:
        """A round is to use these engines: the probe of those that are half open."""
        if self.engines.not_closed:
            for engine_id in (placement.home, placement.prefill_engine):
                self.engines.trying(engine_id, round_id, now)

    def words(self, engine_id: str, now: float) -> list[str]:
        """For an operator: draining, suspect, and the state of its breaker unless that is closed."""
        breaker = self.engines.state(engine_id, now)
        said = {"draining": self.draining, "suspect": self.suspect}
        return [word for word, whose in said.items() if engine_id in whose] + [breaker] * (breaker != CLOSED)

    def links_of(self, puller: str, now: float) -> dict[str, str]:
        """Source -> state of the breaker of the link to it, of those that are not closed."""
        states = self.links.not_closed_now(now)
        return {source: state for (to, source), state in sorted(states.items()) if to == puller}

    def check(self, rounds: Container[str]) -> None:
        """Raise AssertionError if something contradicts itself; `rounds` are those in flight."""
        assert self.suspect <= self.silent <= self.unusable, "a suspect is used"
        assert self.draining <= self.unusable, "a draining engine is used"
        self.engines.check(rounds)
        self.links.check(rounds)

    def why_unread(self, puller: str, source: str, now: float, *, just_spoke: bool = False) -> str:
        """Why `puller` is not to be sent for what `source` holds; "" = it is. `just_spoke`: it lives."""
        if source in self.silent and not just_spoke:
            return f"{source} is suspect" if source in self.suspect else f"{source} keeps failing"
        if not self.links.allows((puller, source), now):
            return "the link between them keeps failing"
        return ""


def decide(
    policy: Policy, standings: Standings, view: RoundView, cluster: ClusterView, now: float, *, retry: bool
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
    if view.home in standings.draining and view.home not in failed:
        view = replace(view, leaving=True)
    answer = policy.place(view, cluster)
    if isinstance(answer, Reject) and view.excluded:
        less = [failed | silent, failed] if unusable else []
        if retry:  # who failed this round may only be slow: before whoever brings nothing to anybody
            less += [unusable, silent, NOBODY] if unusable else [NOBODY]
        for excluded in less:
            if excluded != view.excluded:
                view = replace(view, excluded=excluded)
                answer = policy.place(view, cluster)
                if not isinstance(answer, Reject):
                    break
    if standings.links.not_closed:
        answer = _over_other_links(policy, standings, view, cluster, now, answer)
    return answer, view


def _over_other_links(
    policy: Policy,
    standings: Standings,
    view: RoundView,
    cluster: ClusterView,
    now: float,
    answer: Placement | Reject,
) -> Placement | Reject:
    """A placement whose pages need not cross a link that keeps failing, if the policy has one."""
    first, looked = answer, view
    for _ in range(OTHER_LINKS):
        if isinstance(answer, Reject):
            break
        blocked = _blocked(standings, looked, answer, now)
        if blocked is None:
            return answer
        looked = replace(looked, excluded=looked.excluded | {blocked})
        answer = policy.place(looked, cluster)
    else:
        if not isinstance(answer, Reject) and _blocked(standings, looked, answer, now) is None:
            return answer
    return first  # it will recompute what does not come


def _blocked(standings: Standings, view: RoundView, placement: Placement, now: float) -> str | None:
    """The engine that it had better do without: pages would cross a link that is not to be used."""
    home, engine, held = placement.home, placement.prefill_engine, view.history_tokens.get
    allows = standings.links.allows
    if placement.arm is REMOTE_PULL or placement.arm is MOVE or placement.source is not None:
        source = placement.source or (view.home if placement.arm is MOVE else home)
        pulled = bool(source) and source != engine and held(source or "", 0) > held(engine, 0)
        if pulled and not allows((engine, source or ""), now):
            return engine
    if home != engine and not allows((home, engine), now):
        return engine
    return None
