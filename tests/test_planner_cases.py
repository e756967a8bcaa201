"""`--cases`: loads made so that one form must win, by arithmetic; and that both are searched alike.

All on two engines of qwen3-32b on 4 x H100, by the profile that ships: prefill of 16,384 tokens takes 0.63 s,
of 8,192 0.27 s, of 1,024 0.037 to 0.042 s; a decode step of 1 to 5 requests 8.2 to 9.0 ms; a token has
262,144 bytes of KV.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.known_models import read_models
from antiphon.eval.planner.ask import Ask
from antiphon.eval.planner.cases import Case, Variant, tried
from antiphon.eval.planner.effort import Effort
from antiphon.eval.planner.prices import GpuPrice, read_prices
from antiphon.policies.latency import load_latency_model
from antiphon.traces.schema import RoundTrace, SessionTrace

MODEL, PRICES = read_models()["qwen3-32b"], read_prices()
QUICK = Effort(((5, 80),), (4, 400, 1), 120, 2, 4000, 0)
ASK = Ask(
    model="qwen3-32b", budget={"h100": 8}, slo=Slo(4.0, 0.05), session_rate_per_s=2.0,
    window_tokens=MODEL.window_tokens, tensor_parallel=(4,), chunk_tokens=(1024, 8192),
    decode_intervals=(1, 16), jobs=1,
)  # fmt: skip
PROFILE = load_latency_model("qwen3-32b-h100-tp4")


def of_one_round(prompt_tokens: int, output_tokens: int) -> tuple[SessionTrace, ...]:
    return (SessionTrace("s", (RoundTrace(prompt_tokens, output_tokens),)),)


def case(ask: Ask, sessions: Sequence[SessionTrace], prices: Mapping[str, GpuPrice] = PRICES) -> Case:
    return tried(Variant("by hand", "", ask, MODEL, prices, sessions), QUICK)


def test_who_leads_a_form_is_looked_at_for_long() -> None:
    """Both lead by all rounds in short windows and in a long one, which is five times as long at least."""
    ask, sessions = replace(ASK, slo=Slo(1.0, 0.05)), of_one_round(256, 20)
    effort = QUICK._replace(long_rounds=500)
    found = tried(Variant("by hand", "", ask, MODEL, PRICES, sessions), effort)
    for each in (found.colocated, found.disaggregated):
        assert each is not None and each.long is not None
        assert each.long.rounds > 4 * each.score.rounds and each.long.attainment > 0.99
    assert found.winner == "co-located" and found.margin.startswith("50% cheaper")


def attained(found: Case) -> tuple[float, float]:
    """Co-located, disaggregated."""
    assert found.colocated is not None and found.disaggregated is not None
    return found.colocated.score.attainment, found.disaggregated.score.attainment


# ---------------------------------------------------------------- co-location must win


def test_little_load_needs_one_engine_and_pools_need_two() -> None:
    """2 rounds of 256 new tokens and 20 of output per second: 0.015 s of prefill and 0.16 s of decode each,
    a third of one engine. Pools cost twice as much, whatever the policy."""
    found = case(replace(ASK, slo=Slo(1.0, 0.05)), of_one_round(256, 20))
    assert found.winner == "co-located" and found.margin.startswith("50% cheaper"), found.margin
    assert min(attained(found)) > 0.99
    assert found.colocated is not None and found.colocated.plan.engines == 1


SLOW: Mapping[str, GpuPrice] = {name: replace(price, nic_bytes_per_s=0.5e9) for name, price in PRICES.items()}


def test_a_network_so_slow_that_moving_misses_the_target() -> None:
    """16,384 tokens are 4.3 GB, 8.6 s over 0.5 GB/s: what is prefilled in the prefill pool misses 4 s. One
    engine prefills 1 / 0.63 = 1.58 of 2 rounds per second: 79 % at the most, if nothing queued. Two
    co-located ones are used 63 % each: a wait is 0.5 s on average (M/D/1), so that 4 s are enough."""
    assert 16_384 * PROFILE.transfer.kv_bytes_per_token / 0.5e9 > 8
    ask = replace(ASK, policies=("ampd", "remote"), colocated_policies=("local",))
    found = case(ask, of_one_round(16_384, 2), SLOW)
    together, apart = attained(found)
    assert found.winner == "co-located", found.margin
    assert together > 0.95 and apart < 0.79


def test_adaptive_needs_no_network() -> None:
    """The same under `adaptive`, which decodes on engines of either pool: the form makes no difference."""
    ask = replace(ASK, policies=("adaptive",), colocated_policies=("adaptive",))
    found = case(ask, of_one_round(16_384, 2), SLOW)
    assert found.winner == "equal", found.margin
    assert min(attained(found)) > 0.95


# ---------------------------------------------------------------- disaggregation must win

LONG_PREFILLS = of_one_round(8_192, 41)
TIGHT = replace(ASK, session_rate_per_s=2.2, slo=Slo(2.0, 0.0095))
"""A round's 40 gaps take 0.33 s alone and may take 0.38 s: there is time for one chunk of 1,024 between them,
not for two. Prefilled elsewhere, a round's ITL is 8.2 to 9.0 ms, within the target, for one to five at once
(0.7 on average); the prefill pool is used 60 %: a mean wait of 0.2 s, far within 2 s.

Prefilled at home, 1.1 rounds come to each of two engines per second, 0.27 s of prefill each. No other begins
to be prefilled while one decodes with a probability of exp(-1.1 * 0.33) = 70 %, less those that waited; one
that does takes eight chunks of 1,024, and if K = 16 steps lie between two of them, two come within 40 gaps.
Larger chunks stop all for longer, but hit fewer. So at most about 70 % attain."""


def test_long_prefills_beside_tight_gaps() -> None:
    found = case(replace(TIGHT, policies=("remote",), colocated_policies=("local",)), LONG_PREFILLS)
    together, apart = attained(found)
    assert found.winner == "disaggregated", found.margin
    assert apart > 0.95 and together < 0.75


def test_adaptive_without_a_prefill_pool_cannot_avoid_it_either() -> None:
    """Every engine decodes there: wherever a prompt is prefilled, it stops somebody."""
    ask = replace(TIGHT, policies=("adaptive", "remote"), colocated_policies=("adaptive", "local"))
    found = case(ask, LONG_PREFILLS)
    together, apart = attained(found)
    assert found.winner == "disaggregated", found.margin
    assert apart > 0.95 and together < 0.75
    assert found.disaggregated is not None and found.disaggregated.plan.policy == "remote"


# ---------------------------------------------------------------- settings


def test_both_forms_are_tuned() -> None:
    """With gaps of 20 ms allowed, chunks of 1,024 between decode steps keep co-located rounds within them.
    Under the C of 2,048 and K of 4 that a plan begins with, a fifth of them misses."""
    ask = replace(ASK, session_rate_per_s=2.2, slo=Slo(2.0, 0.02), decode_intervals=(4,))
    ask = replace(ask, policies=("remote",), colocated_policies=("local",))
    found = case(ask, of_one_round(8_192, 11))
    assert min(attained(found)) > 0.97
    assert found.colocated is not None and found.colocated.plan.groups[0].chunk_tokens == 1024
