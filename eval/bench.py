"""`make bench`: what a decision costs against one Redis round trip, both measured in the same run.

The design asks that a decision take less than half a Redis round trip at 64 engines and 10,000 sessions.
Times of one machine say little about another's; ratios taken in one run, blocks of each measurement in turn,
say more. One thread does it all; round trips go through the asyncio client over a unix socket, as in `serve`:
a script that does nothing (the unit), and the claim that really comes before each decision.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from types import MappingProxyType
from typing import Any

import redis.asyncio
from rich.console import Console
from rich.table import Table

from antiphon.engines.page_hash import page_hashes
from antiphon.eval.bench_simulation import SpeedOptions, generated_trace, measure_speed, print_speed
from antiphon.policies.ampd import Ampd
from antiphon.policies.base import ClusterView, EngineView, Pool, RoundView
from antiphon.policies.fcfs import Fcfs
from antiphon.policies.latency import LatencyModel, load_latency_model
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.messages import Claimed, ClientGone, EngineUp, RoundArrived
from antiphon.scheduler.residency import ResidencyIndex, chain_checkpoints
from antiphon.scheduler.valkey import EmbeddedValkey
from antiphon.traces.provenance import commit, machine

SCHEMA = "antiphon.bench/1"
PAGE_TOKENS = 64
PROMPT_TOKENS = 8192
ROUND_TRIP = "round trip: EVALSHA that does nothing"
CLAIM = "round trip: claim of a round"
DECISION = "core decision, 64 engines, 10,000 sessions"
TARGET_RATIO = 0.5
WARM_UP = 20


@dataclass(slots=True)
class Row:
    """One measurement: what is called, and how long each call took. A Row of round trips is only filled."""

    name: str
    call: Callable[[int], object]
    """Called with the number of the sample; the time of the call is the sample."""
    after: Callable[[int], object] | None = None
    """Called after each sample, not timed."""
    samples_ns: list[int] = field(default_factory=list)

    def percentile_us(self, percent: float) -> float:
        ordered = sorted(self.samples_ns)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] / 1000

    def measure(self, count: int) -> None:
        done = len(self.samples_ns)
        for number in range(done, done + count):
            started = perf_counter_ns()
            self.call(number)
            self.samples_ns.append(perf_counter_ns() - started)
            if self.after is not None:
                self.after(number)


# ---------------------------------------------------------------- what is measured


def busy_cluster(count: int, latency: LatencyModel, window_ttft_s: float) -> ClusterView:
    """Half prefill, half decode engines; the windows decide in which tier AMPD ends."""
    engines = {}
    for number in range(count):
        pool = Pool.DECODE if number < count // 2 else Pool.PREFILL
        engine_id = f"{pool.value}-{number:02}"
        engines[engine_id] = EngineView(
            engine_id, pool, True, batch=number % 9, context_tokens=4000 * (number % 9),
            queue_s=0.1 * (number * 7 % 11), queued_rounds=number % 3, pool_tokens=500_000,
            used_tokens=1000 * number, sessions=150, latency=latency, window_ttft_s=window_ttft_s,
            window_itl_s=1.0, chunk_tokens=2048, decode_interval=1,
        )  # fmt: skip
    return ClusterView(MappingProxyType(engines))


def place_rows(count: int, latency: LatencyModel) -> list[Row]:
    """AMPD's shortest and longest way: slack in the first prefill engine, and slack nowhere."""
    policy = Ampd()
    rows = []
    for label, window_ttft_s in (("tier 1", 0.1), ("tier 3", 9.0)):
        cluster = busy_cluster(count, latency, window_ttft_s)
        history = MappingProxyType({name: 512 * (1 + i % 12) for i, name in enumerate(cluster.engines)})

        def place(number: int, cluster: ClusterView = cluster, history: Any = history) -> object:
            home = f"decode-{number % (count // 2):02}"
            return policy.place(
                RoundView("r", "s", number, PROMPT_TOKENS, 256, 1.0, 0.1, home, 0.0, history), cluster
            )

        rows.append(Row(f"ampd place, {label}, {count} engines", place))
    return rows


def decision_row(latency: LatencyModel, sessions: int = 10_000, engines: int = 64) -> Row:
    """RoundArrived and Claimed through the whole core: residency, views, policy, reservation."""
    core = Scheduler(Ampd(), Fcfs(), latency)
    for number in range(engines):
        pool = "decode" if number < engines // 2 else "prefill"
        core.receive(EngineUp(f"{pool}-{number:02}", "i", pool, True, PAGE_TOKENS, 500_000), 0.0)
    chains = [page_hashes(range(n, n + PROMPT_TOKENS), PAGE_TOKENS) for n in range(256)]

    def decide(number: int) -> None:
        session_id, round_id = f"s{number % sessions}", f"r{number}"
        hashes, now = chains[number % len(chains)], number * 0.01
        core.receive(
            RoundArrived(round_id, session_id, "t", PROMPT_TOKENS, hashes, PAGE_TOKENS, 256, 1.0, 0.1), now
        )
        core.receive(Claimed(round_id, 1, session_id, 1 + number // sessions), now)

    def end(number: int) -> None:
        hashes, engine_id = chains[number % len(chains)], f"decode-{number % (engines // 2):02}"
        core.books.residency.record(engine_id, "i", hashes, PAGE_TOKENS)
        core.receive(ClientGone(f"r{number}"), number * 0.01)

    for number in range(sessions):
        decide(number)
        end(number)
    return Row(DECISION, lambda number: decide(sessions + number), lambda number: end(sessions + number))


def residency_row(engines: int = 64) -> Row:
    """A prompt of which every engine holds another part."""
    index = ResidencyIndex()
    hashes = page_hashes(range(PROMPT_TOKENS), PAGE_TOKENS)
    for number in range(engines):
        index.admit(f"e{number}", "i")
        index.record(f"e{number}", "i", hashes[: 2 * number], PAGE_TOKENS)
    name = f"residency look-up, {PROMPT_TOKENS} tokens, {engines} engines"
    return Row(name, lambda _: index.held(hashes, PAGE_TOKENS))


def hash_row() -> Row:
    tokens = list(range(PROMPT_TOKENS))
    return Row(f"page hashes of {PROMPT_TOKENS} tokens", lambda _: page_hashes(tokens, PAGE_TOKENS))


# ---------------------------------------------------------------- the run


async def time_calls(call: Callable[[int], Awaitable[object]], row: Row, count: int) -> None:
    done = len(row.samples_ns)
    for number in range(done, done + count):
        started = perf_counter_ns()
        await call(number)
        row.samples_ns.append(perf_counter_ns() - started)


async def measure(url: str, rows: list[Row], blocks: int, per_block: int) -> tuple[list[Row], str]:
    """Blocks of every row and of round trips in turn; returns the round trips and the server's version."""
    client = redis.asyncio.Redis.from_url(url, socket_timeout=5.0, socket_connect_timeout=5.0)
    ledger = Ledger(url, deadline_s=5.0)
    candidates = chain_checkpoints(page_hashes(range(PROMPT_TOKENS), PAGE_TOKENS), PAGE_TOKENS)
    sha = await client.script_load("return KEYS[1]")

    async def evalsha(_: int) -> object:
        return await client.evalsha(sha, 1, "antiphon:bench")

    async def claim(number: int) -> object:
        return await ledger.claim(
            replica="bench", round_id=f"r{number}", session_id=f"s{number}", tenant="t",
            candidates=candidates, ttl_s=60.0,
        )  # fmt: skip

    trips, claims = Row(ROUND_TRIP, lambda _: None), Row(CLAIM, lambda _: None)
    try:
        await time_calls(evalsha, Row("warm-up", lambda _: None), WARM_UP)
        for row in rows:
            row.measure(WARM_UP)
            row.samples_ns.clear()
        for _ in range(blocks):
            await time_calls(evalsha, trips, per_block)
            await time_calls(claim, claims, per_block)
            for row in rows:
                row.measure(per_block)
        info = await client.info("server")
    finally:
        await ledger.close()
        await client.aclose()
    return [trips, claims], str(info.get("valkey_version") or info.get("redis_version"))


def result_of(rows: list[Row], server_version: str) -> dict[str, Any]:
    p50_us = {row.name: row.percentile_us(50) for row in rows}
    table = [
        {
            "name": row.name,
            "samples": len(row.samples_ns),
            "p50_us": round(p50_us[row.name], 2),
            "p99_us": round(row.percentile_us(99), 2),
            "p50_per_round_trip": round(p50_us[row.name] / p50_us[ROUND_TRIP], 4),
            "p50_per_claim": round(p50_us[row.name] / p50_us[CLAIM], 4),
        }
        for row in rows
    ]
    ratio = round(p50_us[DECISION] / p50_us[ROUND_TRIP], 4)
    packages = ("antiphon", "msgspec", "redis")
    return {
        "schema": SCHEMA,
        "conditions": {
            "commit": commit(),
            "machine": machine(),
            "versions": {name: importlib.metadata.version(name) for name in packages}
            | {"server": server_version},
            "prompt_tokens": PROMPT_TOKENS,
            "page_tokens": PAGE_TOKENS,
        },
        "rows": table,
        "decision": {"p50_per_round_trip": ratio, "target": TARGET_RATIO, "met": ratio < TARGET_RATIO},
    }


def print_table(result: dict[str, Any], console: Console) -> None:
    table = Table(title="One thread, one run; the last two columns are ratios of p50")
    for heading in ("measurement", "samples", "p50 us", "p99 us", "/ round trip", "/ claim"):
        table.add_column(heading, justify="left" if heading == "measurement" else "right")
    for row in result["rows"]:
        table.add_row(
            row["name"], str(row["samples"]), f"{row['p50_us']:.1f}", f"{row['p99_us']:.1f}",
            f"{row['p50_per_round_trip']:.2f}", f"{row['p50_per_claim']:.2f}",
        )  # fmt: skip
    console.print(table)
    ratio, met = result["decision"]["p50_per_round_trip"], result["decision"]["met"]
    said = "met" if met else "MISSED"
    console.print(f"decision: {ratio:.2f} of an empty round trip; target below {TARGET_RATIO}: {said}")


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, write the result file; the exit status does not depend on the figures."""
    parser = argparse.ArgumentParser(
        prog="antiphon.eval.bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/result.json"))
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--per-block", type=int, default=100)
    parser.add_argument("--trace", type=Path, help="for the simulator; default: generated sessions")
    parser.add_argument("--dynamo", type=Path, help="a Python with ai-dynamo 1.6.1, to be measured beside")
    options = parser.parse_args(arguments)
    latency = load_latency_model("tiny-cpu")
    rows = [*place_rows(8, latency), *place_rows(64, latency)]
    rows += [decision_row(latency), residency_row(), hash_row()]
    with tempfile.TemporaryDirectory() as state, EmbeddedValkey.start(Path(state) / "valkey") as server:
        round_trips, version = asyncio.run(measure(server.url, rows, options.blocks, options.per_block))
    result = result_of([*round_trips, *rows], version)
    with tempfile.TemporaryDirectory() as folder:
        trace = options.trace or generated_trace(Path(folder) / "claude-code.jsonl")
        result["simulator"] = measure_speed(SpeedOptions(trace=trace, dynamo=options.dynamo))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result, Console(width=110))
    print_speed(result["simulator"], Console(width=110))
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
