"""The asyncio driver on a virtual clock and the heap driver decide the same, at the same times.

Both drive the same core over the same closed-form engines; what differs is everything else: tasks, futures
and timers here, a heap there; real page hashes here, names there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from antiphon.engines.cluster import Cluster, EngineSpec, load_cluster, resolve_engines
from antiphon.engines.page_hash import page_hashes
from antiphon.engines.prompt import Prompt
from antiphon.policies.registry import make_ordering, make_policy
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.messages import (
    Claimed,
    Reserved,
)
from antiphon.scheduler.outcomes import Receipt
from antiphon.scheduler.rounds import RoundRequest
from antiphon.scheduler.runtime import Runtime
from antiphon.scheduler.simulated_sessions import PageNames
from antiphon.scheduler.simulation import RoundEnd, Simulation, Targets, up_event
from antiphon.traces.arrivals import Arrivals, Start, schedule
from antiphon.traces.prompts import Vocabulary, prompt_ids
from antiphon.traces.schema import SessionTrace
from tests.closed_form_client import ClosedFormFleet
from tests.simulation_helpers import agent_sessions, cluster_file
from tests.virtual_time import run_virtually

WORDS = Vocabulary(10, 30_000)


class InstantLedger:
    """A recorder that takes `claim_s` for a claim and keeps nothing: one replica, as in a simulation."""

    epoch = "e"
    lost_data = False
    session_ttl_s = 3600.0

    def __init__(self, claim_s: float) -> None:
        self._claim_s = claim_s
        self._rounds: dict[str, int] = {}

    async def claim(self, request: RoundRequest, candidates: Sequence[object]) -> Claimed:
        await asyncio.sleep(self._claim_s)
        number = self._rounds[request.session_id] = self._rounds.get(request.session_id, 0) + 1
        return Claimed(request.round_id, 1, request.session_id, number)

    async def record(self, request: RoundRequest, *what: object) -> None: ...

    def note(self, reserved: Reserved) -> bool:
        return False

    async def publish(self) -> None: ...


def live(
    cluster: Cluster, specs: tuple[EngineSpec, ...], core: Scheduler, starts: list[tuple[float, SessionTrace]]
) -> dict[str, Receipt]:
    """The trace through `Runtime`, every session a task."""
    receipts: dict[str, Receipt] = {}
    names, targets = PageNames(cluster.page_tokens), Targets(cluster.slo.ttft_s, cluster.slo.itl_s)

    async def session(runtime: Runtime, fleet: ClosedFormFleet, when: float, trace: SessionTrace) -> None:
        await asyncio.sleep(when)
        said: list[int] = []
        for index, plan in enumerate(names.plan(trace)):
            if index:
                await asyncio.sleep(plan.trace.gap_s)
            ids = prompt_ids(trace, index, said, WORDS, 0)
            round_id = f"{trace.session_id}/{index + 1}"
            fleet.learn(plan, round_id, page_hashes(ids, cluster.page_tokens))
            ttft_s, itl_s = targets.of(trace)
            request = RoundRequest(
                round_id, trace.session_id, "simulated", "/v1/completions", Prompt(ids), {},
                plan.trace.output_tokens, ttft_s, itl_s,
            )  # fmt: skip
            output: list[int] = []
            async with runtime.submit(request) as handle:
                await handle.start()
                async for chunk in handle:
                    output += chunk.token_ids
            said = [*ids, *output]

    async def scenario() -> None:
        fleet = ClosedFormFleet(cluster.page_tokens)
        clients = {spec.engine_id: fleet.add(spec) for spec in specs}
        loop = asyncio.get_running_loop()

        def keep(receipt: Receipt) -> None:
            receipts[receipt.round_id] = receipt

        ledger = InstantLedger(cluster.claim_s)
        runtime = Runtime(core, ledger, clients, on_receipt=keep, clock=loop.time)  # type: ignore[arg-type]
        started = asyncio.Event()
        driving = asyncio.create_task(runtime.run(started))
        await started.wait()
        for spec in specs:
            runtime.post(up_event(spec, f"{spec.engine_id}/0", cluster.page_tokens))
        async with asyncio.TaskGroup() as group:
            for when, trace in starts:
                group.create_task(session(runtime, fleet, when, trace))
        driving.cancel()
        await asyncio.wait([driving])

    run_virtually(scenario())
    return receipts


@pytest.mark.parametrize("policy", ["ampd", "local", "remote"])
@pytest.mark.parametrize("seed", [0, 1])
def test_both_drivers_decide_the_same(policy: str, seed: int, tmp_path: Path) -> None:
    """Equal arms, engines, reasons, bytes and cached tokens for every round; equal times to a nanosecond."""
    path = cluster_file(tmp_path)
    cluster = load_cluster(path)
    specs = resolve_engines(cluster, path.parent)
    starts = schedule(agent_sessions(24, seed), Arrivals(Start.POISSON, 6.0, seed))

    def core() -> Scheduler:
        return Scheduler(make_policy(policy), make_ordering("fcfs"), specs[0].latency)

    simulated: dict[str, Receipt] = {}

    def keep(end: RoundEnd) -> None:
        simulated[end.receipt.round_id] = end.receipt

    targets = Targets(cluster.slo.ttft_s, cluster.slo.itl_s)
    Simulation(core(), cluster, specs, targets, keep).run(iter(starts))
    lived = live(cluster, specs, core(), starts)

    assert sum(len(session.rounds) for _, session in starts) == len(simulated) == len(lived)
    arms = {receipt.arm for receipt in simulated.values()}
    assert len(arms) >= (2 if policy == "ampd" else 1), f"the trace shows too little of the policy: {arms}"
    for round_id, ours in simulated.items():
        theirs = lived[round_id]
        assert decision(theirs) == decision(ours), round_id
        for name in ("ttft_s", "itl_s", "queue_s", "pull_s", "prefill_s", "push_s", "predicted_ttft_s"):
            expected = pytest.approx(getattr(ours, name) or 0.0, rel=1e-9, abs=1e-8)
            assert (getattr(theirs, name) or 0.0) == expected, (round_id, name)


def decision(receipt: Receipt) -> tuple[object, ...]:
    """Everything in a receipt that is not a time."""
    names = (
        "outcome", "arm", "home", "prefill_engine", "reason", "history_tokens", "cached_tokens",
        "completion_tokens", "pulled_tokens", "bytes_decode_to_prefill", "bytes_prefill_to_decode", "notes",
    )  # fmt: skip
    return (len(receipt.tries), *(getattr(receipt, name) for name in names))
