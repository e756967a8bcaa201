"""A round's receipt, from the round's own record. Pure."""

from __future__ import annotations

from antiphon.policies.base import Arm
from antiphon.scheduler.messages import Outcome, Receipt, RoundFinished
from antiphon.scheduler.states import Round


def true_cached_tokens(round: Round, home_cached_tokens: int) -> int:
    """Prompt tokens that no engine computed for this round.

    Each engine computes a suffix of the prompt, from its own cached prefix on; what is computed by either
    is the longer suffix, so the answer is the smaller of the two prefixes.
    """
    if round.prefill_cached_tokens is None:
        return home_cached_tokens
    return min(round.prefill_cached_tokens, home_cached_tokens)


def make_receipt(
    round: Round, outcome: Outcome, now: float, finished: RoundFinished | None = None
) -> Receipt:
    """Everything that was decided, predicted and measured for `round`, as of `now`."""
    placement, last = round.placement, round.tries[-1].placement if round.tries else None
    predicted = last.predicted.ttft_s if last else 0.0
    ttft_s = None if round.first_token_s is None else round.first_token_s - round.arrived_s
    completion = finished.completion_tokens if finished else 0
    itl_s = None
    if finished and round.first_token_s is not None and completion > 1:
        itl_s = (now - round.first_token_s) / (completion - 1)
    dispatched = round.dispatched_s if round.dispatched_s is not None else now
    return Receipt(
        round_id=round.round_id,
        session_id=round.session_id,
        round_number=round.round_number,
        outcome=outcome,
        arm=round.arm,
        home=placement.home if placement else None,
        prefill_engine=placement.prefill_engine if placement else None,
        reason=last.reason if last else "never placed",
        tries=tuple(round.tries),
        degraded=round.degraded,
        prompt_tokens=round.arrived.prompt_tokens,
        history_tokens=round.history_tokens,
        completion_tokens=completion,
        cached_tokens=true_cached_tokens(round, finished.cached_tokens) if finished else 0,
        bytes_decode_to_prefill=round.bytes_decode_to_prefill,
        bytes_prefill_to_decode=round.bytes_prefill_to_decode,
        pulled_tokens=round.pulled_tokens,
        predicted_ttft_s=predicted,
        ttft_s=ttft_s,
        queue_s=dispatched - round.arrived_s,
        pull_s=round.pull_s,
        prefill_s=round.prefilled_s,
        push_s=round.push_s,
        itl_s=itl_s,
        notes=tuple(round.notes),
    )


def is_remote(arm: Arm | None) -> bool:
    """The round's prompt is prefilled on another engine than the one that decodes it."""
    return arm in (Arm.REMOTE_RECOMPUTE, Arm.REMOTE_PULL)
