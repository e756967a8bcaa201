"""What a simulation found: its rounds as records, added up to the result that `replay` writes too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from antiphon.engines.closed_form import ClosedFormEngine
from antiphon.engines.cluster import EngineSpec
from antiphon.engines.decode_run import GapHistogram
from antiphon.eval.simulation_plan import Prepared
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.simulation import RoundEnd, Simulation
from antiphon.traces.provenance import commit, machine
from antiphon.traces.result_types import ClusterInfo, Conditions, Distribution, RoundRecord, RunResult
from antiphon.traces.results import summarise


def records_of(ready: Prepared, ends: Iterable[RoundEnd]) -> Iterator[RoundRecord]:
    """Round ends as records of the result, in their order."""
    for end in ends:
        session, number, receipt = end.session, end.number, end.receipt
        turn = session.rounds[number - 1]
        slo_ttft_s, slo_itl_s = ready.targets.of(session)
        cached = turn.kept_tokens if number > 1 else session.shared_tokens
        done = receipt.outcome is Outcome.COMPLETED
        yield RoundRecord(
            session=session.session_id,
            round=number,
            prompt_tokens=turn.prompt_tokens,
            kept_tokens=turn.kept_tokens,
            status=STATUS[receipt.outcome],
            message="" if done else end.message or "; ".join(attempt.failure for attempt in receipt.tries),
            tries=1,
            round_id=receipt.round_id,
            session_round=receipt.round_number,
            arm=receipt.arm.value if receipt.arm else "",
            tool=turn.tool,
            gap_s=turn.gap_s,
            sent_s=end.sent_s,
            ttft_s=receipt.ttft_s,
            itl_s=receipt.itl_s,
            e2e_s=end.ended_s - end.sent_s if done else None,
            output_tokens=receipt.completion_tokens,
            cached_tokens=receipt.cached_tokens,
            slo_ttft_s=slo_ttft_s,
            slo_itl_s=slo_itl_s,
            unloaded_ttft_s=ready.bench.unloaded_ttft_s(turn, cached),
            receipt=True,
            bytes_decode_to_prefill=receipt.bytes_decode_to_prefill,
            bytes_prefill_to_decode=receipt.bytes_prefill_to_decode,
            bytes_home_to_home=receipt.bytes_home_to_home,
            pulled_tokens=receipt.pulled_tokens,
            predicted_ttft_s=receipt.predicted_ttft_s,
            gateway_ttft_s=receipt.ttft_s,
            queue_s=receipt.queue_s,
            pull_s=receipt.pull_s,
            prefill_s=receipt.prefill_s,
            push_s=receipt.push_s,
            home=receipt.home,
            prefill_engine=receipt.prefill_engine,
            reason=receipt.reason,
            degraded=receipt.degraded,
        )


STATUS = {
    Outcome.COMPLETED: "completed",
    Outcome.REFUSED: "refused",
    Outcome.FAILED: "failed",
    Outcome.CANCELLED: "failed",
}


def result_of(
    ready: Prepared, simulation: Simulation, records: Sequence[RoundRecord], wall_s: float
) -> RunResult:
    options, cluster = ready.options, ready.cluster
    engines = [*simulation.engines.values(), *simulation.dead]
    completed = sum(record.completed for record in records)
    gpu_s = simulation.now_s * sum(spec.latency.gpus for spec in ready.specs)
    found = summarise(
        kind="simulation",
        trace=ready.trace,
        conditions=_conditions(ready),
        policy=options.policy,
        ordering=options.ordering,
        seed=options.seed,
        slo={"ttft_s": ready.targets.ttft_s, "itl_s": ready.targets.itl_s},
        session_rounds={session.session_id: len(session.rounds) for session in ready.whole},
        records=[*records, *_refused(ready)],
        wall_s=wall_s,
        cluster=ClusterInfo(
            name=cluster.name,
            path=str(options.cluster),
            description=cluster.description,
            engines=[_group(spec) for spec in _first_of_groups(ready.specs)],
        ),
        load=ready.load,
        attainable=ready.bench.attainable(ready.whole, (ready.targets.of(s)[0] for s in ready.whole)),
        token_gap_s=_token_gaps(engines),
        prefill_tokens_computed=sum(engine.totals.prefill_tokens_computed for engine in engines),
        prefill_tokens_reused=sum(record.cached_tokens for record in records if record.completed),
        gpu_seconds=gpu_s,
        cost_per_1k_rounds=_cost(ready, simulation.now_s, completed),
        simulated_s=simulation.now_s,
    )
    found.variant, found.policy_parameters = options.variant, dict(options.policy_parameters)
    return found


def _refused(ready: Prepared) -> Iterator[RoundRecord]:
    """The first round of each session that the model's window cannot take: refused at the door, as live."""
    fits = {session.session_id: len(session.rounds) for session in ready.sessions}
    for session in ready.whole:
        number = fits.get(session.session_id, 0) + 1
        if number <= len(session.rounds):
            turn = session.rounds[number - 1]
            slo_ttft_s, slo_itl_s = ready.targets.of(session)
            yield RoundRecord(
                session=session.session_id,
                round=number,
                prompt_tokens=turn.prompt_tokens,
                kept_tokens=turn.kept_tokens,
                status="refused",
                http_status=400,
                message=f"{turn.total_tokens} tokens exceed the window of {ready.cluster.window_tokens}",
                tries=1,
                slo_ttft_s=slo_ttft_s,
                slo_itl_s=slo_itl_s,
            )


def _conditions(ready: Prepared) -> Conditions:
    return Conditions(
        arrivals=ready.arrivals.describe(),
        max_gap_s=ready.options.max_gap_s,
        commit=commit(),
        machine=machine(),
        concurrency=ready.arrivals.max_live,
        divide=ready.options.divide,
        window_tokens=ready.cluster.window_tokens,
    )


def _first_of_groups(specs: Sequence[EngineSpec]) -> Iterator[EngineSpec]:
    seen = None
    for spec in specs:
        if spec.group is not seen:
            yield spec
        seen = spec.group


def _group(spec: EngineSpec) -> dict[str, Any]:
    group = spec.group
    return {name: getattr(group, name) for name in group.__struct_fields__} | {
        "model": spec.latency.model,
        "gpu": spec.latency.gpu,
        "gpus": spec.latency.gpus,
    }


def _token_gaps(engines: Sequence[ClosedFormEngine]) -> Distribution | None:
    whole = GapHistogram()
    for engine in engines:
        whole.merge(engine.gaps)
    gaps = whole.summary()
    if not gaps.count:
        return None
    return Distribution(gaps.count, gaps.mean, gaps.p50, gaps.p90, gaps.p99)


def _cost(ready: Prepared, simulated_s: float, completed: int) -> float | None:
    """Price of all GPUs for all of the simulated time, for 1,000 completed rounds."""
    prices = [spec.group.price_per_gpu_hour for spec in ready.specs]
    if not completed or None in prices:
        return None
    per_hour = sum(spec.latency.gpus * (spec.group.price_per_gpu_hour or 0.0) for spec in ready.specs)
    return per_hour * simulated_s / 3600 / completed * 1000
