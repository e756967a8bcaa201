"""A round's receipt, from the round's own record. Pure."""

from __future__ import annotations

from antiphon.policies.base import MOVE, REMOTE_PULL, REMOTE_RECOMPUTE, Arm, Placement
from antiphon.scheduler.messages import RoundFinished
from antiphon.scheduler.outcomes import Outcome, Receipt
from antiphon.scheduler.states import Round


def true_cached_tokens(round: Round, home_cached_tokens: int) -> int:
    """Prompt tokens that no engine computed for this round.

    Each engine computes a suffix of the prompt, from its own cached prefix on; what is computed by either
    is the longer suffix, so the answer is the smaller of the two prefixes.
    """
    cached = min(home_cached_tokens, round.prompt_tokens) if round.carried_tokens else home_cached_tokens
    if round.prefill_cached_tokens is None:
        return cached
    return min(round.prefill_cached_tokens, cached)


def make_receipt(
    round: Round, outcome: Outcome, now: float, finished: RoundFinished | None = None
) -> Receipt:
    """Everything that was decided, predicted and measured for `round`, as of `now`."""
    placement, last = round.placement, round.tries[-1].placement if round.tries else None
    first = round.tries[round.answered_by].placement if round.tries else None
    ttft_s = None if round.first_token_s is None else round.first_token_s - round.arrived_s
    completion = finished.completion_tokens if finished else 0
    itl_s = None
    if finished and round.first_token_s is not None and completion > 1:
        itl_s = (now - round.first_token_s) / (completion - 1)
    dispatched = round.dispatched_s if round.dispatched_s is not None else now
    return Receipt(  # by position, in the order of the fields: keywords cost five times as much
        round.round_id,
        round.session_id,
        round.round_number,
        outcome,
        round.arm,
        placement.home if placement else None,
        placement.prefill_engine if placement else None,
        last.reason if last else "never placed",
        tuple(round.tries),
        round.degraded,
        round.prompt_tokens,
        min(round.history_tokens, round.prompt_tokens),
        completion,
        true_cached_tokens(round, finished.cached_tokens) if finished else 0,
        round.bytes_decode_to_prefill,
        round.bytes_prefill_to_decode,
        round.pulled_tokens,
        first.predicted.ttft_s if first else 0.0,
        ttft_s,
        dispatched - round.arrived_s,
        round.pull_s,
        round.prefilled_s,
        round.push_s,
        itl_s,
        tuple(round.notes),
        round.bytes_home_to_home,
        round.arrived.slo_ttft_s,
        round.arrived.slo_itl_s,
        round.pools,
    )


def is_remote(arm: Arm | None) -> bool:
    """The round's prompt is prefilled on another engine than the one that decodes it."""
    return arm is REMOTE_RECOMPUTE or arm is REMOTE_PULL


def history_source(placement: Placement, home_before: str | None) -> str | None:
    """Where the placement has history pulled from; None = nothing is pulled."""
    if placement.arm is REMOTE_PULL:
        source = placement.source or placement.home
    elif placement.arm is MOVE:
        source = placement.source or home_before or ""
    else:
        return None
    return source if source and source != placement.prefill_engine else None
