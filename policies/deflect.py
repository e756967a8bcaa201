"""`deflect`: prefill deflection (arXiv:2607.02043): to a decode engine where that keeps its ITL targets.

    local on d   iff its chunks are ITL-safe on d, and TTFT(local on d) <= alpha * least TTFT(remote)
    else         remote, least TTFT

A session with a home has one d. A new session has every decode engine that can be its home: the least TTFT of
those where it is safe.

Safe: with the chunk size C and the decode interval K that the engine runs, the mean ITL of the rounds that
decode on d while this prefill runs, and that of the batch with this round in it, stay within the tightest ITL
target there and this round's own.

Theirs: the two conditions. Antiphon's: alpha 1; ITL as a mean over the prefill (our target is a mean; theirs
bounds every step); ties (default home first). Their search for the largest safe chunk schedule has one
candidate here, since C and K are start options of SGLang and the core makes no slices (prefill-only calls on
growing prefixes, whose fixed cost would be paid per slice).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import replace

from antiphon.policies import arms, choices
from antiphon.policies.base import Candidate, ClusterView, EngineView, Placement, Pool, Reject, RoundView
from antiphon.policies.home import can_be_home, choose_home, session_home


@dataclass(frozen=True, slots=True)
class DeflectParameters:
    alpha: float = 1.0
    """How many times the remote TTFT a local prefill may take. At least 1; the value is Antiphon's."""
    shortlist: int = 4
    """Estimated are this many prefill engines with the shortest queue and as many with most history."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 1):
            raise ValueError(f"alpha must be a number of at least 1, got {self.alpha}")
        choices.check_shortlist(self.shortlist)


class _Local(Struct, frozen=True, gc=False):
    """A prefill on one decode engine."""

    candidate: Candidate
    itl_s: float
    """Mean ITL there: of the others while it runs, or of all after it, whichever is more."""
    limit_s: float

    @property
    def safe(self) -> bool:
        return self.itl_s <= self.limit_s


@dataclass(frozen=True, slots=True)
class Deflect:
    parameters: DeflectParameters = field(default_factory=DeflectParameters)

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        home = choose_home(round, cluster)
        if isinstance(home, Reject):
            return home
        engines = arms.prefill_engines(round, home, cluster)
        if not engines:
            return choices.prefilled_at_home(round, home)
        locals_ = [_local(round, engine) for engine in _decoders(round, home, cluster)]
        remotes = [
            arms.remote_pull(round, engine, home)
            for engine in arms.shortlist(round, engines, self.parameters.shortlist)
        ]
        remote = choices.least_ttft(remotes)
        considered = (*(each.candidate for each in locals_), *remotes)
        least = min((each for each in locals_ if each.safe), key=_order(home), default=None)
        if least is not None and least.candidate.ttft_s <= self.parameters.alpha * remote.ttft_s:
            c = least.candidate
            reason = f"deflected to {c.home}: {_words(least)}; {self._against(c, remote)}"
            return Placement(c.arm, c.home, c.prefill_engine, reason, c, considered)
        if least is None:
            nearest = min(locals_, key=_order(home))
            why = f"safe on no decode engine, {nearest.candidate.home}: {_words(nearest)}"
        else:
            why = f"{least.candidate.home}: {self._against(least.candidate, remote)}"
        reason = f"not deflected, {why}"
        return choices.placement(home, remote, reason, considered)

    def _against(self, local: Candidate, remote: Candidate) -> str:
        sign = "<=" if local.ttft_s <= self.parameters.alpha * remote.ttft_s else ">"
        return (
            f"local TTFT {local.ttft_s:.3f} s {sign} {self.parameters.alpha:g} x {remote.ttft_s:.3f} s"
            f" remote on {remote.prefill_engine}"
        )


def itl_during(engine: EngineView, prompt_tokens: int, cached_tokens: int) -> float:
    """Mean ITL, seconds, of the rounds that decode there while the prompt is prefilled; 0 if none does.

    K steps follow each chunk; with K 0 the chunks run back to back, and one step follows them all.
    """
    if not engine.batch:
        return 0.0
    new = max(1, prompt_tokens - cached_tokens)
    busy_s = engine.latency.prefill_s(new, prompt_tokens - new) * engine.corrections.prefill
    chunks = -(-new // engine.chunk_tokens) if engine.chunk_tokens else 1
    steps = max(1, chunks * engine.decode_interval)
    return busy_s / steps + arms.decode_step(engine)


def _local(round: RoundView, engine: EngineView) -> _Local:
    joined_s = arms.decode_step(engine, 1, round.prompt_tokens)
    during_s = itl_during(engine, round.prompt_tokens, round.held(engine.engine_id))
    tightest_s = engine.tightest_itl_slo_s
    limit_s = round.slo_itl_s if tightest_s is None else min(tightest_s, round.slo_itl_s)
    candidate = replace(arms.local(round, engine), home=engine.engine_id, itl_s=joined_s)
    return _Local(candidate, max(during_s, joined_s), limit_s)


def _decoders(round: RoundView, home: EngineView, cluster: ClusterView) -> Sequence[EngineView]:
    """Where it could be prefilled and decoded: its home, or for a new session any decode engine."""
    if session_home(round, cluster) is home:
        return (home,)
    return [engine for engine in cluster.pool(Pool.DECODE) if can_be_home(engine, round)]


def _words(local: _Local) -> str:
    return f"ITL {local.itl_s:.4f} s {'<=' if local.safe else '>'} {local.limit_s:.4f} s"


def _order(home: EngineView) -> Callable[[_Local], tuple[float, bool, str]]:
    """Least TTFT, then the default home, then engine id."""
    return lambda local: (
        local.candidate.ttft_s,
        local.candidate.home != home.engine_id,
        local.candidate.home,
    )
