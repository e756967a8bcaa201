"""The live half of `make fidelity`: real engines, a trace replayed in several ways, measured in between."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console

from antiphon.engines.tiny_model import write_tiny_model
from antiphon.eval.calibrate import CalibrateOptions, Sampler, sampling
from antiphon.eval.calibration import Calibration
from antiphon.eval.demo import BUNDLED_TRACE, free_ports
from antiphon.eval.gateway_cost import GatewayCost, measure_gateway
from antiphon.eval.stack import EngineSpec, Stack
from antiphon.traces.readers import read_trace
from antiphon.traces.replay import ReplayOptions, replay
from antiphon.traces.result_types import RoundRecord, RunResult

PREFILL_ENGINE, DECODE_ENGINE = "p0", "d0"


class FidelityError(Exception):
    """The comparison cannot be made: what failed."""


class Case(NamedTuple):
    """One way to run the trace: the same live and simulated."""

    name: str
    policy: str
    concurrency: int
    """Live sessions: a closed loop."""
    engines: int = 2
    """1 prefill and 1 decode engine, or the decode engine alone."""


CASES = (
    Case("two sessions", "ampd", 2),
    Case("one session", "ampd", 1),
    Case("four sessions on one engine", "local", 4, engines=1),
)
"""The first is the comparison that reports carry; the others show where its error comes from. With one
session the engines work in turns; one engine alone batches, chunks and queues, and has its core to itself."""


@dataclass(frozen=True, slots=True)
class FidelityOptions:
    """What `make fidelity` can be told."""

    directory: Path = Path("build/fidelity")
    trace: Path = BUNDLED_TRACE
    cases: tuple[Case, ...] = CASES
    max_gap_s: float = 60.0
    repeats: int = 3
    """Replays of each case, each with tokens of its own, and measurements after each; all rounds count."""
    slo_ttft_s: float = 1.0
    slo_itl_s: float = 0.1
    most_tokens: int = 2100
    """Longest prompt of the calibration: about the longest of the trace."""


class LiveRun(NamedTuple):
    """All replays of one case, and what was measured between them."""

    rounds: list[RoundRecord]
    window_tokens: int
    found: Calibration
    cost: GatewayCost
    slowdown: float | None
    """Time of a prefill while the other engine works, over its time alone: what shared cores cost."""


class Live(NamedTuple):
    """Everything that was measured on the live stack."""

    runs: dict[Case, LiveRun]
    seconds: float


async def measure_live(options: FidelityOptions, console: Console) -> Live:
    """The stack from start to end. Raises `FidelityError`, `StackError`, `ProbeError`, `FitFailed`."""
    model = options.directory / "model"
    write_tiny_model(model)
    async with Stack(options.directory) as stack:
        console.print("starting one prefill and one decode engine (about a minute) ...")
        ports = free_ports(2)
        specs = [
            EngineSpec(PREFILL_ENGINE, "prefill", ports[0]),
            EngineSpec(DECODE_ENGINE, "decode", ports[1]),
        ]
        await stack.start_engines(model, specs)
        async with sampling(_calibration_options(stack, options)) as sampler:
            return await _LiveStack(stack, sampler, options, console).measure()


class _LiveStack:
    """Measurements and replays by turns, in each case: a machine's speed drifts, and both must see it."""

    def __init__(self, stack: Stack, sampler: Sampler, options: FidelityOptions, console: Console) -> None:
        self._stack = stack
        self._sampler = sampler
        self._options = options
        self._console = console
        turns = [turn for session in read_trace(options.trace) for turn in session.rounds]
        self._typical_tokens = round(statistics.median(turn.prompt_tokens for turn in turns))

    async def measure(self) -> Live:
        options, sampler = self._options, self._sampler
        self._console.print("measuring ...")
        began = time.monotonic()
        await sampler.round()
        profile = options.directory / "first-profile.json"
        profile.write_bytes(msgspec.json.encode(sampler.fit().profile))
        runs: dict[Case, LiveRun] = {}
        for engines in (2, 1):  # the decode engine alone comes last: the other is then stopped
            cases = [case for case in options.cases if case.engines == engines]
            if engines == 1 and cases:
                sampler.drop_peer()
                await self._stack.stop(PREFILL_ENGINE)
            for policy in dict.fromkeys(case.policy for case in cases):
                await self._start_gateway(policy, engines, profile)
                for case in (case for case in cases if case.policy == policy):
                    runs[case] = await self._run(case)
                await self._stack.stop(f"{policy}-{engines}")
        return Live(runs, time.monotonic() - began)

    async def _run(self, case: Case) -> LiveRun:
        sampler, costs, slowdowns = self._sampler, list[GatewayCost](), list[float]()
        rounds: list[RoundRecord] = []
        sampler.clear()
        await sampler.round()
        for repeat in range(self._options.repeats):
            costs.append(await measure_gateway(self._stack.gateway_url, "model", self._typical_tokens))
            result = await self._replay(case, repeat)
            rounds += result.rounds
            await sampler.round()
            if case.engines > 1:
                slowdowns.append(await sampler.crowded_slowdown())
        return LiveRun(
            rounds=rounds,
            window_tokens=result.conditions.window_tokens or 0,
            found=sampler.fit(),
            cost=GatewayCost(*(statistics.median(values) for values in zip(*costs, strict=True))),
            slowdown=statistics.median(slowdowns) if slowdowns else None,
        )

    async def _start_gateway(self, policy: str, engines: int, profile: Path) -> None:
        (port,) = free_ports(1)
        options, name = self._options, f"{policy}-{engines}"
        await self._stack.start_gateway(
            *("--policy", policy, "--profile", str(profile)),
            *("--slo-ttft", f"{options.slo_ttft_s}", "--slo-itl", f"{options.slo_itl_s}"),
            *("--record", str(options.directory / f"recording-{name}")),
            port=port,
            name=name,
            engines=engines,
        )

    async def _replay(self, case: Case, repeat: int) -> RunResult:
        options = self._options
        result = await replay(
            ReplayOptions(
                options.trace,
                self._stack.gateway_url,
                concurrency=case.concurrency,
                max_gap_s=options.max_gap_s,
                # Other tokens each time: nothing of an earlier replay is cached.
                seed=100 * options.cases.index(case) + repeat,
                slo_ttft_s=options.slo_ttft_s,
                slo_itl_s=options.slo_itl_s,
            ),
            lambda record: None,
        )
        done, total = result.rounds_completed, result.rounds_total
        if done != total:
            raise FidelityError(f"{case.name}: only {done} of {total} rounds completed live")
        took = f"{result.wall_s:.0f} s, {result.arms}"
        self._console.print(f"{case.name}, replay {repeat + 1} of {options.repeats}: {took}")
        return result


def _calibration_options(stack: Stack, options: FidelityOptions) -> CalibrateOptions:
    return CalibrateOptions(
        url=stack.engines[DECODE_ENGINE].url,
        ledger=stack.ledger_url,
        fleet=stack.fleet,
        peer=PREFILL_ENGINE,
        state_dir=str(stack.state_dir),
        name="fidelity",
        most_tokens=options.most_tokens,
    )
