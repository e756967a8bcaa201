"""A recording as what a simulation needs: its fleet as a cluster, and its rounds as they were measured."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from antiphon.engines.cluster import Cluster, EngineEvent, EngineGroup, Slo
from antiphon.policies.base import Arm
from antiphon.scheduler.recorded_facts import EngineChange, EngineFacts, ReplicaFacts, read_facts
from antiphon.traces.recording import recorded_rounds
from antiphon.traces.result_types import RoundRecord
from antiphon.traces.schema import RecordedRound

RECEIPT_FILES = "receipts-*.jsonl"
DEFAULT_CLAIM_S = 0.0005
SETTLED_S = 30.0
"""Engines that came up this soon after the first arrival were there from the beginning."""


class RecordingError(Exception):
    """A recording cannot be used for this: what is missing or contradicts itself."""


def load_facts(directory: Path) -> list[ReplicaFacts]:
    """What the replicas said of themselves; at least one. Raises `RecordingError`."""
    try:
        facts = read_facts(directory)
    except ValueError as error:
        raise RecordingError(str(error)) from error
    if not facts:
        raise RecordingError(f"{directory}: no replica described itself there: it never saw an engine")
    return facts


def recorded_policy(facts: Sequence[ReplicaFacts]) -> ReplicaFacts:
    """The replica whose policy stands for all. Raises `RecordingError` if they had several."""
    names = sorted({(item.policy, item.ordering) for item in facts})
    if len(names) > 1:
        several = ", ".join(f"{policy}/{ordering}" for policy, ordering in names)
        raise RecordingError(
            f"the recording has rounds under several policies ({several}): record each into its own folder"
        )
    return facts[-1]


def measured_records(directory: Path) -> list[RoundRecord]:
    """Completed rounds as the replicas measured them, numbered as in the recording's sessions."""
    receipts: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob(RECEIPT_FILES)):
        for line in path.read_bytes().split(b"\n")[:-1]:
            receipt = msgspec.json.decode(line)
            receipts[receipt["round_id"]] = receipt
    counts: Counter[str] = Counter()
    rounds = [item for item in recorded_rounds(directory) if item.outcome == "completed"]
    began_s = min((item.arrived_s for item in rounds), default=0.0)
    records = []
    for item in rounds:
        counts[item.session] += 1
        records.append(_record(item, counts[item.session], receipts.get(item.round_id, {}), began_s))
    return records


def _record(item: RecordedRound, number: int, receipt: dict[str, Any], began_s: float) -> RoundRecord:
    return RoundRecord(
        session=item.session,
        round=number,
        prompt_tokens=item.prompt_tokens,
        kept_tokens=item.kept_tokens or 0,
        status="completed",
        round_id=item.round_id,
        sent_s=item.arrived_s - began_s,
        e2e_s=item.ended_s - item.arrived_s,
        output_tokens=item.output_tokens,
        slo_ttft_s=item.slo_ttft_s,
        slo_itl_s=item.slo_itl_s,
        tool=item.tool,
        arm=receipt.get("arm") or "unknown",
        ttft_s=receipt.get("ttft_s"),
        itl_s=receipt.get("itl_s"),
        queue_s=receipt.get("queue_s"),
        pull_s=receipt.get("pull_s"),
        prefill_s=receipt.get("prefill_s"),
        push_s=receipt.get("push_s"),
        bytes_decode_to_prefill=receipt.get("bytes_decode_to_prefill", 0),
        bytes_prefill_to_decode=receipt.get("bytes_prefill_to_decode", 0),
        bytes_home_to_home=receipt.get("bytes_home_to_home", 0),
        pulled_tokens=receipt.get("pulled_tokens", 0),
        receipt=bool(receipt),
    )


def recorded_cluster(
    facts: Sequence[ReplicaFacts], measured: Sequence[RoundRecord], began_s: float
) -> Cluster:
    """The recorded fleet, every engine a group of its own, by its recorded name.

    `began_s` is the Unix time of the first arrival. What a recording does not tell is that of the profile
    (link) or a default (the fixed cost of a request).
    """
    engines = {name: engine for item in facts for name, engine in item.engines.items()}
    if "decode" not in {engine.pool for engine in engines.values()}:
        raise RecordingError("the recorded fleet has no engine of the decode pool: give --cluster")
    for name, engine in engines.items():
        if engine.device_tokens < engine.page_tokens:
            raise RecordingError(
                f"the recording does not say how much KV engine {name} holds: give --cluster"
            )
    last = facts[-1]
    groups = tuple(_group(engine, last) for _, engine in sorted(engines.items()))
    windows = [engine.window_tokens for engine in engines.values() if engine.window_tokens]
    claims = [item.queue_s for item in measured if item.arm == Arm.LOCAL.value and item.queue_s is not None]
    return Cluster(
        name="recorded",
        description="the fleet of a recording",
        slo=Slo(last.slo_ttft_s, last.slo_itl_s),
        engines=groups,
        page_tokens=max(engine.page_tokens for engine in engines.values()),
        window_tokens=min(windows, default=131_072),
        claim_s=statistics.median(claims) if claims else DEFAULT_CLAIM_S,
        events=_events([change for item in facts for change in item.changes], began_s),
    )


def _group(engine: EngineFacts, facts: ReplicaFacts) -> EngineGroup:
    return EngineGroup(
        count=1,
        pool="prefill" if engine.pool == "prefill" else "decode",
        profile="profile.json",
        device_tokens=engine.device_tokens,
        store_tokens=engine.store_tokens,
        link_bytes_per_s=facts.profile.transfer.bytes_per_s,
        chunk_tokens=engine.chunk_tokens,
        decode_interval=engine.decode_interval,
        name=engine.engine_id,
    )


def _events(changes: Sequence[EngineChange], began_s: float) -> tuple[EngineEvent, ...]:
    """Deaths and starts during the recording, told once however many replicas saw them."""
    by_engine: defaultdict[str, list[EngineChange]] = defaultdict(list)
    for change in sorted(changes, key=lambda change: change.at_s):
        seen = by_engine[change.engine_id]
        if not seen or seen[-1].kind != change.kind:
            seen.append(change)
    events: list[EngineEvent] = []
    for engine_id, seen in by_engine.items():
        name = f"{engine_id}-0"  # the simulator numbers the engines of a group
        late = [change for change in seen if change.at_s > began_s]
        there = len(late) < len(seen) and seen[-len(late) - 1].kind == "up"
        if not there and late and late[0].kind == "up" and late[0].at_s <= began_s + SETTLED_S:
            there, late = True, late[1:]
        if not there:
            events.append(EngineEvent(0.0, name, "down"))
        events += [
            EngineEvent(change.at_s - began_s, name, "down" if change.kind == "down" else "up")
            for change in late
        ]
    return tuple(sorted(events, key=lambda event: (event.at_s, event.engine)))
