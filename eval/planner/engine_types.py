"""Which engines an ask can have: GPU kinds by tensor-parallel degrees, each with its memory and price.

Tokens are of KV. An engine's device holds the weights and the KV beside them within `hardware.MEMORY_SHARE`
of its GPUs' memory, and at least the longest round that is asked of it; its page store lies in host memory.
Whatever falls out of the menu is told with the reason, for `--explain`. Raises `Infeasible` where nothing is
left, or nothing that an unloaded engine could do in time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil

from msgspec import Struct

from antiphon.engines.cluster import Slo
from antiphon.eval.hardware import device_tokens, gpu_name, gpu_named
from antiphon.eval.known_models import KnownModel, degrees_for, profile_for
from antiphon.eval.planner.ask import Ask, Infeasible, PlanError
from antiphon.eval.planner.plans import EngineType
from antiphon.eval.planner.prices import GpuPrice, price_of
from antiphon.eval.planner.tau import unloaded
from antiphon.eval.planner.workload import Workload


class LeftOut(Struct, frozen=True):
    """An engine of the menu that no plan can have."""

    gpu: str
    tp: int
    reason: str

    @property
    def name(self) -> str:
        return f"{self.tp}x{self.gpu}"


class Menu(Struct, frozen=True):
    """The engines of an ask."""

    types: tuple[EngineType, ...]
    """By GPU as the budget names them, then by degree; never empty."""
    left_out: tuple[LeftOut, ...]


class Unloaded(Struct, frozen=True):
    """What the best engine of the menu does when it has nothing else to do. Seconds; shares of the rounds."""

    share: float
    """Of the rounds: both targets can be met."""
    ttft_share: float
    itl_share: float
    ttft_p50_s: float
    ttft_p95_s: float
    itl_p50_s: float
    itl_p95_s: float


def gpu_budget(ask: Ask) -> dict[str, int]:
    """GPU by its short name -> how many. Raises `PlanError` for one that is unknown."""
    budget: dict[str, int] = {}
    for named, count in ask.budget.items():
        try:
            gpu = gpu_name(gpu_named(named)[0])
        except ValueError as error:
            raise PlanError(str(error)) from error
        budget[gpu] = budget.get(gpu, 0) + count
    return budget


def engine_types(
    ask: Ask, model: KnownModel, prices: Mapping[str, GpuPrice], longest_tokens: int | None = None
) -> Menu:
    """All engines of the ask's GPUs and degrees. `longest_tokens`: prompt and output of the longest round of
    the workload; None = the ask's window.

    Raises `Infeasible` when there is none, `PlanError` for a GPU that is unknown or has no price.
    """
    longest = ask.window_tokens if longest_tokens is None else longest_tokens
    types: list[EngineType] = []
    left_out: list[LeftOut] = []
    for gpu, count in gpu_budget(ask).items():
        for tp in sorted(set(ask.tensor_parallel)):
            made = _engine_type(model, gpu, tp, prices, longest)
            if isinstance(made, str):
                left_out.append(LeftOut(gpu, tp, made))
            elif tp > count:
                left_out.append(LeftOut(gpu, tp, f"the budget has {count} x {gpu}"))
            else:
                types.append(made)
    if not types:
        raise _nothing(ask, model, prices, longest, left_out)
    return Menu(tuple(types), tuple(left_out))


def typical(types: Sequence[EngineType]) -> EngineType:
    """By which it is told how long rounds last where nothing waits; the same in whatever order they come."""
    return min(types, key=lambda each: (abs(each.tp - 4), each.name))


def attainable(types: Sequence[EngineType], workload: Workload, slo: Slo) -> Unloaded:
    """What is left of the targets when nothing waits: every round on the best engine for it, alone.

    An upper bound: a round prefills what it does not keep (a first round what it does not share), and its KV
    goes nowhere. Raises `Infeasible` with the nearest targets when no round can be in time.
    """
    by_type = [unloaded(each.latency, workload) for each in types]
    ttfts_s = [min(each) for each in zip(*(ttfts_s for ttfts_s, _ in by_type), strict=True)]
    itls_s = [min(each) for each in zip(*(itls_s for _, itls_s in by_type), strict=True)]
    both = sum(
        ttft_s <= slo.ttft_s and itl_s <= slo.itl_s for ttft_s, itl_s in zip(ttfts_s, itls_s, strict=True)
    )
    ttfts_s.sort()
    itls_s.sort()
    best = Unloaded(
        both / len(ttfts_s),
        sum(ttft_s <= slo.ttft_s for ttft_s in ttfts_s) / len(ttfts_s),
        sum(itl_s <= slo.itl_s for itl_s in itls_s) / len(itls_s),
        _percentile(ttfts_s, 0.5),
        _percentile(ttfts_s, 0.95),
        _percentile(itls_s, 0.5),
        _percentile(itls_s, 0.95),
    )
    if not both:
        raise _too_tight(best, slo, types)
    return best


def _engine_type(
    model: KnownModel, gpu: str, tp: int, prices: Mapping[str, GpuPrice], longest_tokens: int
) -> EngineType | str:
    """It, or why there is none."""
    system, described = gpu_named(gpu)
    try:
        price = price_of(gpu, prices)
    except ValueError as error:
        raise PlanError(str(error)) from error
    if tp > price.gpus_per_node:
        return f"a server has {price.gpus_per_node} x {gpu}"
    try:
        tokens = device_tokens(model, described, tp)
    except ValueError as error:
        return str(error)
    if tokens < longest_tokens:
        return f"{tokens} tokens of KV fit beside the weights, the longest round has {longest_tokens}"
    try:
        latency = profile_for(model, gpu, tp)
    except ValueError as error:
        raise PlanError(str(error)) from error
    if latency is None:
        have = ", ".join(map(str, degrees_for(model, gpu))) or "none"
        return f"there is no latency profile (degrees that have one on {gpu_name(system)}: {have})"
    return EngineType(
        gpu=gpu_name(system),
        tp=tp,
        latency=latency,
        device_tokens=tokens,
        store_tokens=price.store_tokens(tp, latency.transfer.kv_bytes_per_token),
        link_bytes_per_s=price.nic_bytes_per_s,
        price_per_gpu_hour=price.price_per_gpu_hour,
    )


# ---------------------------------------------------------------- the nearest that can be asked


def _nothing(
    ask: Ask, model: KnownModel, prices: Mapping[str, GpuPrice], longest: int, left_out: Iterable[LeftOut]
) -> Infeasible:
    """No engine at all: what else would do, asked GPUs first."""
    reasons = "; ".join(f"{each.name}: {each.reason}" for each in left_out)
    asked = gpu_budget(ask)
    for gpus, whose in ((tuple(asked), "your GPUs"), (tuple(g for g in prices if g not in asked), "others")):
        fitting = [
            (gpu, tp)
            for gpu in gpus
            for tp in degrees_for(model, gpu)
            if not isinstance(_engine_type(model, gpu, tp, prices, longest), str)
        ]
        if fitting:
            smallest = {gpu: min(tp for g, tp in fitting if g == gpu) for gpu, _ in fitting}
            ways = ", or ".join(
                f"{gpu}:{tp}" + ("" if tp in ask.tensor_parallel else f" with tensor parallel {tp}")
                for gpu, tp in sorted(smallest.items(), key=lambda item: (item[1], item[0]))
            )
            nearest = f"one engine on {whose} takes {ways}"
            break
    else:
        nearest = (
            f"a model or a window that fits ({ask.model}: {model.weight_bytes / 1e9:.0f} GB of weights,"
            f" rounds of {longest} tokens)"
        )
    return Infeasible(f"no engine of this ask can run {ask.model}: {reasons}", nearest)


def _too_tight(best: Unloaded, slo: Slo, types: Sequence[EngineType]) -> Infeasible:
    told = []
    if not best.ttft_share:
        told.append(f"a first token in {slo.ttft_s:g} s")
    if not best.itl_share:
        told.append(f"a gap of {slo.itl_s:g} s between tokens")
    what = " and ".join(told) or f"{slo.ttft_s:g} s and {slo.itl_s:g} s together"
    names = ", ".join(each.name for each in types)
    return Infeasible(
        f"no round can have {what}, even alone on the best of {names}",
        "on the best engine of this budget, alone, "
        f"half of the rounds could have TTFT {_up(best.ttft_p50_s)} s and ITL {_up(best.itl_p50_s)}"
        f" s, 95 % TTFT {_up(best.ttft_p95_s)} s and ITL {_up(best.itl_p95_s)} s, each by itself",
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, ceil(share * len(ordered)) - 1)]


def _up(seconds: float) -> str:
    """Rounded up to the millisecond: a target that can be met."""
    return f"{ceil(seconds * 1000) / 1000:g}"
