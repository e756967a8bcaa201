"""`ppd`: "Not All Prefills Are Equal" (arXiv:2603.13358): a static table says which rounds the home prefills.

    turn 1                   -> remote
    N < bypass_tokens        -> local                    N = what the home has to compute
    else the table's S > 0   -> local, else remote       S = w_ttft * (pd_ttft - ppd_ttft) / pd_ttft
                                                           - w_tpot * (ppd_tpot - pd_tpot) / pd_tpot

Theirs: the rule, S, its weights of 1, the 512; that the table is of one shape of fleet and has an entry per
class of context (up to 512, up to 4096, more), class of workload (nine of input and output) and rate (the
nearest of `RATES`); that an entry whose PD run failed says local; that no queue is looked at.

Antiphon's: their entries are benchmarks of hardware that is not ours, so each is computed, once, from the
latency model (`score`): every round of that class, random arrivals, M/D/1 queues, in PD a prefill engine that
holds the previous prompt but not its output. Also the bounds of the nine classes, what stands for a class,
the rate (rounds placed on the fleet, per second of the past window), context = what the home holds, turn 1 =
no home; an entry whose local prefills would fill the decode engines says remote. Remote is
`remote_recompute` with the least TTFT, as in `remote`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from msgspec import Struct

from antiphon.policies import arms, choices
from antiphon.policies.base import ClusterView, EngineView, Placement, Pool, Reject, RoundView
from antiphon.policies.home import choose_home, session_home
from antiphon.policies.latency import LatencyModel

RATES = (0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0)
"""Their grid: rounds per second on the whole fleet."""


class Class(NamedTuple):
    name: str
    most: float
    """Tokens up to which a round is of this class."""
    tokens: int
    """What stands for it in the table."""


CONTEXTS = (Class("small", 512, 256), Class("large", 4096, 2048), Class("huge", math.inf, 16_384))
INPUTS = (Class("short", 1024, 768), Class("middle", 4096, 2048), Class("long", math.inf, 8192))
OUTPUTS = (Class("short", 128, 64), Class("middle", 512, 256), Class("long", math.inf, 1024))
LARGEST_BATCH = 256


@dataclass(frozen=True, slots=True)
class PpdParameters:
    bypass_tokens: int = 512
    """New tokens under which a later round is always local."""
    w_ttft: float = 1.0
    w_tpot: float = 1.0
    shortlist: int = 4
    """Estimated are this many prefill engines with the shortest queue and as many with most history."""

    def __post_init__(self) -> None:
        choices.check_not_negative(bypass_tokens=self.bypass_tokens)
        for name, value in (("w_ttft", self.w_ttft), ("w_tpot", self.w_tpot)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value}")
        choices.check_shortlist(self.shortlist)


class Cell(Struct, frozen=True, gc=False):
    """One entry of the table: a shape of fleet, a class, a rate."""

    prefill: LatencyModel
    decode: LatencyModel
    prefill_engines: int
    decode_engines: int
    chunk_tokens: int
    """C and K of the decode engines."""
    decode_interval: int
    context: Class
    new: Class
    output: Class
    rate: float


class Gain(NamedTuple):
    """The two summands of S, before their weights."""

    ttft: float
    tpot_loss: float
    failed: str = ""
    """The run that cannot keep up with the rate: "PD" or "PPD"; then there are no numbers."""


@dataclass(frozen=True, slots=True)
class Ppd:
    parameters: PpdParameters = field(default_factory=PpdParameters)

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        home = choose_home(round, cluster)
        if isinstance(home, Reject):
            return home
        engines = arms.prefill_engines(round, home, cluster)
        if not engines:
            return choices.prefilled_at_home(round, home)
        at_home, reason = self._rule(round, home, engines[0], cluster)
        remotes = [
            arms.remote_recompute(round, engine, home)
            for engine in arms.shortlist(round, engines, self.parameters.shortlist)
        ]
        local = arms.local(round, home)
        best = local if at_home else choices.least_ttft(remotes)
        return choices.placement(home, best, f"ppd: {reason}", (local, *remotes))

    def _rule(
        self, round: RoundView, home: EngineView, engine: EngineView, cluster: ClusterView
    ) -> tuple[bool, str]:
        """Whether the home prefills, and why."""
        if session_home(round, cluster) is None:
            return False, "turn 1, remote"
        new = round.prompt_tokens - round.held(home.engine_id)
        if new < self.parameters.bypass_tokens:
            return True, f"{new} new tokens < {self.parameters.bypass_tokens}, local"
        cell = cell_of(round, home, engine, cluster)
        classes = f"{cell.context.name} context, {cell.new.name} input, {cell.output.name} output"
        at = f"at {classes}, {cell.rate:g}/s"
        gain = score(cell)
        if gain.failed:
            local = gain.failed == "PD"
            return local, f"{gain.failed} cannot keep up {at}, {'local' if local else 'remote'}"
        s = self.parameters.w_ttft * gain.ttft - self.parameters.w_tpot * gain.tpot_loss
        return s > 0, f"S = {s:.3f} {at}, {'local' if s > 0 else 'remote'}"


def cell_of(round: RoundView, home: EngineView, engine: EngineView, cluster: ClusterView) -> Cell:
    """The entry for a round of this home; `engine` stands for the prefill pool."""
    pools = [each.pool for each in cluster.engines.values()]
    rate = sum(each.arrivals_per_s for each in cluster.engines.values())
    held = round.held(home.engine_id)
    return Cell(
        prefill=engine.latency,
        decode=home.latency,
        prefill_engines=pools.count(Pool.PREFILL),
        decode_engines=pools.count(Pool.DECODE),
        chunk_tokens=home.chunk_tokens,
        decode_interval=home.decode_interval,
        context=_class(CONTEXTS, held),
        new=_class(INPUTS, round.prompt_tokens - held),
        output=_class(OUTPUTS, round.expected_output_tokens or round.max_output_tokens),
        rate=min(RATES, key=lambda known: (abs(known - rate), known)),
    )


@lru_cache(maxsize=4096)
def score(cell: Cell) -> Gain:
    """What a fleet gains in TTFT, and loses in TPOT, by prefilling all rounds of the class at home."""
    context, new, output = cell.context.tokens, cell.new.tokens, cell.output.tokens
    generated = min(context, output)
    pd_s = cell.prefill.prefill_s(new + generated, context - generated)
    pd_busy = pd_s * cell.rate / cell.prefill_engines
    if pd_busy >= 1:
        return Gain(0.0, 0.0, "PD")
    ppd_s = cell.decode.prefill_s(new, context)
    ppd_busy = ppd_s * cell.rate / cell.decode_engines
    if ppd_busy >= 1:
        return Gain(0.0, 0.0, "PPD")
    transfer_s = max(cell.prefill.transfer_s(new), cell.decode.transfer_s(new))
    pd_tpot_s, ppd_tpot_s = _tpot(cell, 0.0), _tpot(cell, ppd_busy)
    steps = (new - 1) // cell.chunk_tokens * cell.decode_interval if cell.chunk_tokens else 0
    step_s = ppd_tpot_s * (1 - ppd_busy)
    pd_ttft_s = _wait(pd_s, pd_busy) + pd_s + transfer_s
    ppd_ttft_s = _wait(ppd_s, ppd_busy) + ppd_s + steps * step_s
    return Gain((pd_ttft_s - ppd_ttft_s) / pd_ttft_s, (ppd_tpot_s - pd_tpot_s) / pd_tpot_s)


def _tpot(cell: Cell, busy: float) -> float:
    """Seconds per token where prefills take the share `busy` of the time; batch by Little's law."""
    context = cell.context.tokens + cell.new.tokens + cell.output.tokens // 2
    tokens_per_s = cell.rate / cell.decode_engines * cell.output.tokens
    tpot_s, batch = 0.0, 1
    for _ in range(LARGEST_BATCH):
        tpot_s = cell.decode.decode_step_s(batch, batch * context) / (1 - busy)
        larger = min(LARGEST_BATCH, max(1, round(tokens_per_s * tpot_s)))
        if larger <= batch:
            break
        batch = larger
    return tpot_s


def _wait(work_s: float, busy: float) -> float:
    """Mean seconds in an M/D/1 queue."""
    return busy * work_s / (2 * (1 - busy))


def _class(classes: tuple[Class, ...], tokens: int) -> Class:
    return next(each for each in classes if tokens <= each.most)
