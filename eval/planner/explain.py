"""`--explain`: what keeps the plan from being better or cheaper, and why it is set as it is.

The constraints of the MILP come first (`Solved.binding`); then what the search's own simulations say: whose
targets are missed and where their time went, an engine more or fewer, the KV in memory, policy, C and K.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median

from antiphon.eval.hardware import MEMORY_SHARE
from antiphon.eval.known_models import KnownModel
from antiphon.eval.planner.around import Around, Change
from antiphon.eval.planner.ask import Ask, Found, Rated, Solved
from antiphon.eval.planner.engine_types import LeftOut, Unloaded
from antiphon.eval.planner.planned import under_way
from antiphon.eval.planner.plans import Group
from antiphon.eval.planner.workload import Workload
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.simulation import RoundEnd

SPANS = ("queue_s", "pull_s", "prefill_s", "push_s")
SPAN_WORDS = ("queueing for a prefill engine", "pulling KV", "prefill on it", "pushing KV")


def explain(
    ask: Ask,
    model: KnownModel,
    workload: Workload,
    found: Found,
    solved: Solved,
    beside: Around,
    rounds: Sequence[RoundEnd],
) -> tuple[str, ...]:
    """Lines. `rounds`: those of the plan in one window; `beside`: what lies around it, in the same."""
    return (
        *(f"binding, by the MILP: {told}" for told in solved.binding),
        *_missed(ask, found.best, rounds),
        *_counts(beside),
        *_memory(model, workload, found.best),
        *_settings(beside),
    )


def left_out_lines(left_out: Sequence[LeftOut], unloaded: Unloaded) -> Iterator[str]:
    """Engines that no plan could have, and what the best engine does unloaded."""
    for each in left_out:
        yield f"no engine {each.name}: {each.reason}"
    if unloaded.share < 1:
        yield (
            f"unloaded, the best engine has {unloaded.share:.1%} of the rounds within both targets"
            f" (TTFT p95 {unloaded.ttft_p95_s:.3g} s, ITL p95 {unloaded.itl_p95_s * 1000:.3g} ms):"
            " no plan can do more"
        )


# ---------------------------------------------------------------- who misses what


def _missed(ask: Ask, best: Rated, rounds: Sequence[RoundEnd]) -> Iterator[str]:
    score = best.score
    counts = (score.ttft_missed, score.itl_missed, score.refused)
    ttft, itl, refused = (f"{count / max(1, score.rounds):.2%}" for count in counts)
    yield f"missed in {score.rounds:,} rounds: TTFT by {ttft}, ITL by {itl}, refused {refused}"
    done = [
        end for end in rounds if end.receipt.outcome is Outcome.COMPLETED and end.receipt.ttft_s is not None
    ]
    late = [end for end in done if (end.receipt.ttft_s or 0.0) > ask.slo.ttft_s]
    if late:
        yield from _late(late, done)
    slow = [end for end in done if (end.receipt.itl_s or 0.0) > ask.slo.itl_s]
    if slow:
        engines = Counter(end.receipt.home for end in slow).most_common(1)[0]
        short = median(end.receipt.completion_tokens for end in slow)
        yield (
            f"ITL is missed by rounds with {short:,.0f} output tokens (median; all rounds:"
            f" {median(end.receipt.completion_tokens for end in done):,.0f}), most at {engines[0]}"
            f" ({engines[1]} of {len(slow)})"
        )


def _late(late: Sequence[RoundEnd], done: Sequence[RoundEnd]) -> Iterator[str]:
    first = sum(end.number == 1 for end in late) / len(late)
    yield (
        f"TTFT is missed by rounds with {_new_tokens(late):,.0f} new tokens to prefill (median; all rounds:"
        f" {_new_tokens(done):,.0f}); {first:.0%} of them are a session's first"
        f" (of all: {sum(end.number == 1 for end in done) / len(done):.0%})"
    )
    total_s = sum(end.receipt.ttft_s or 0.0 for end in late)
    spent = [sum(getattr(end.receipt, span) for end in late) / total_s for span in SPANS]
    words = [f"{word} {share:.0%}" for word, share in zip(SPAN_WORDS, spent, strict=True) if share >= 0.005]
    words.append(
        f"at the engine that decodes (waiting, prefill there, first step) {max(0.0, 1 - sum(spent)):.0%}"
    )
    yield f"their time to the first token: {', '.join(words)}"


def _new_tokens(rounds: Sequence[RoundEnd]) -> float:
    return median(end.receipt.prompt_tokens - end.receipt.cached_tokens for end in rounds)


# ---------------------------------------------------------------- around it


def _counts(beside: Around) -> Iterator[str]:
    for change in beside.changes:
        if change.kind == "count":
            if change.rated is None:
                yield f"{change.what}: not within the budget"
            else:
                price = change.rated.plan.price_per_hour - beside.best.plan.price_per_hour
                points = "does not last" if change.drowns else _points(change, beside.best)
                yield f"{change.what}: {points}, USD {price:+.2f} per hour"


def _settings(beside: Around) -> Iterator[str]:
    plan = beside.best.plan
    now = {"policy": plan.policy}
    for name in ("C", "K"):
        values = (f"{_pool(group, plan.colocated)}{_value(group, name)}" for group in plan.groups)
        now[name] = ", ".join(dict.fromkeys(values))
    for kind, value in now.items():
        others = [change for change in beside.changes if change.kind == kind]
        told = "; ".join(f"{change.what}: {_points(change, beside.best)}" for change in others)
        yield f"{kind} is {value}" + (f" ({told})" if told else "")


def _value(group: Group, name: str) -> int:
    return group.chunk_tokens if name == "C" else group.decode_interval


def _pool(group: Group, colocated: bool) -> str:
    return "" if colocated else f"{group.pool} "


def _points(change: Change, best: Rated) -> str:
    assert change.rated is not None
    gap = change.rated.score.attainment - best.score.attainment
    return f"{gap * 100:+.2f} points"


# ---------------------------------------------------------------- memory


def _memory(model: KnownModel, workload: Workload, best: Rated) -> Iterator[str]:
    homes = best.plan.pool("decode")
    device = sum(group.count * group.type.device_tokens for group in homes)
    store = sum(group.count * max(group.type.device_tokens, group.type.store_tokens) for group in homes)
    for each in dict.fromkeys(group.type for group in best.plan.groups):
        weights = model.weight_bytes / each.tp / 1e9
        kv = each.device_tokens * model.kv_bytes_per_token(each.tp) / each.tp / 1e9
        yield (
            f"memory of a GPU of {each.name}: {weights:.1f} GB of weights, {kv:.1f} GB of KV"
            f" ({each.device_tokens:,} tokens an engine) within {MEMORY_SHARE:.0%} of it"
        )
    live = workload.live_tokens
    where = "fit the devices" if live <= device else "fit the page stores" if live <= store else "do not fit"
    yield (
        f"{under_way(workload.live_sessions, live)} if nothing waits; the engines that decode hold"
        f" {device / 1e6:.2f} million on their devices and {store / 1e6:.2f} million in their page stores:"
        f" they {where}"
    )
