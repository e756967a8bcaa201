"""`make bench`: what a decision costs against one Redis round trip, both measured in the same run.

The design asks that a decision take less than half a Redis round trip at 64 engines and 10,000 sessions.
Times of one machine say little about another's; ratios taken in one run, blocks of each measurement in turn,
say more. One thread does it all; round trips go through the asyncio client over a unix socket, as in `serve`:
a script that does nothing (the unit), and the claim that really comes before each decision.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import redis.asyncio
from rich.console import Console
from rich.table import Table

from antiphon.engines.page_hash import page_hashes
from antiphon.eval.bench_append import measure_append, print_append
from antiphon.eval.bench_decisions import ORDERING, PAGE_TOKENS, PROMPT_TOKENS, Deciding, default_policy
from antiphon.eval.bench_simulation import SpeedOptions, generated_trace, measure_speed, print_speed
from antiphon.policies.latency import LatencyModel, load_latency_model
from antiphon.policies.registry import POLICIES
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.residency import ResidencyIndex, chain_checkpoints
from antiphon.scheduler.valkey import EmbeddedValkey
from antiphon.traces.provenance import commit, machine

SCHEMA = "antiphon.bench/1"
PROFILE = "qwen3-32b-h200-tp4"
ROUND_TRIP = "round trip: EVALSHA that does nothing"
CLAIM = "round trip: claim of a round"
ENGINES = (8, 64, 256)
SESSIONS = (100, 10_000, 100_000)
AT_ENGINES, AT_SESSIONS = 64, 10_000
"""Where the targets hold."""
STATES = ("calm", "busy")
"""Of the fleet: rounds find their home free, as below saturation; or no place is safe for them."""
TARGET_RATIO = 0.5
"""Of the decision's p50 to that of an empty round trip."""
TARGET_FLAT = 1.2
"""Of the decision's p50 with the most sessions to that with the fewest."""
WARM_UP = 20


@dataclass(slots=True)
class Row:
    """One measurement: what is called, and how long each call took. A Row of round trips is only filled."""

    name: str
    call: Callable[[int], object]
    """Called with the number of the sample, which is the time of the call, or the int that it returns."""
    before: Callable[[int], object] | None = None
    after: Callable[[int], object] | None = None
    """Called before and after each sample, not timed."""
    samples_ns: list[int] = field(default_factory=list)

    def percentile_us(self, percent: float) -> float:
        ordered = sorted(self.samples_ns)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] / 1000

    def measure(self, count: int) -> None:
        done = len(self.samples_ns)
        for number in range(done, done + count):
            if self.before is not None:
                self.before(number)
            started = perf_counter_ns()
            said = self.call(number)
            took = perf_counter_ns() - started
            self.samples_ns.append(said if isinstance(said, int) else took)
            if self.after is not None:
                self.after(number)


# ---------------------------------------------------------------- what is measured


def decision_rows(latency: LatencyModel, policy: str) -> list[Row]:
    """A decision at every size and in both states; and at 10,000 sessions what the policy alone takes."""
    rows = []
    for engines in ENGINES:
        for sessions in SESSIONS if engines == AT_ENGINES else (AT_SESSIONS,):
            for state in STATES:
                core = Deciding(engines, sessions, latency, policy, calm=state == "calm")
                rows.append(Row(decision(engines, sessions, state), core.decide, core.prepare, core.undo))
        rows.append(Row(f"{policy}.place alone, {engines} engines, busy", core.place, core.look))
    return rows


def decision(engines: int, sessions: int, state: str) -> str:
    return f"decision, {engines} engines, {sessions:,} sessions, {state}"


def residency_row(engines: int = AT_ENGINES) -> Row:
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


def result_of(rows: list[Row], server_version: str, policy: str) -> dict[str, Any]:
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
    packages = ("antiphon", "msgspec", "redis")
    return {
        "schema": SCHEMA,
        "conditions": {
            "commit": commit(),
            "machine": machine(),
            "versions": {name: importlib.metadata.version(name) for name in packages}
            | {"server": server_version},
            "policy": policy,
            "ordering": ORDERING,
            "prompt_tokens": PROMPT_TOKENS,
            "page_tokens": PAGE_TOKENS,
        },
        "rows": table,
        "decision": {state: verdicts(p50_us, state) for state in STATES},
    }


def verdicts(p50_us: dict[str, float], state: str) -> dict[str, Any]:
    """The two targets, at 64 engines: against a round trip, and from the fewest to the most sessions."""
    ratio = p50_us[decision(AT_ENGINES, AT_SESSIONS, state)] / p50_us[ROUND_TRIP]
    fewest, most = (p50_us[decision(AT_ENGINES, sessions, state)] for sessions in (SESSIONS[0], SESSIONS[-1]))
    return {
        "p50_per_round_trip": round(ratio, 4),
        "target": TARGET_RATIO,
        "met": ratio < TARGET_RATIO,
        "most_to_fewest_sessions": round(most / fewest, 4),
        "flat_target": TARGET_FLAT,
        "flat_met": most / fewest <= TARGET_FLAT,
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
    conditions = result["conditions"]
    console.print(f"A decision ({conditions['policy']}, {conditions['ordering']}; {AT_ENGINES} engines):")
    for state, found in result["decision"].items():
        console.print(
            f"{state}, {AT_SESSIONS:,} sessions: {found['p50_per_round_trip']:.2f} of an empty round trip;"
            f" target below {found['target']}: {_met(found['met'])}"
        )
        console.print(
            f"{state}, {SESSIONS[-1]:,} sessions against {SESSIONS[0]}:"
            f" {found['most_to_fewest_sessions']:.2f}; target at most {found['flat_target']}:"
            f" {_met(found['flat_met'])}"
        )


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, write the result file; the exit status does not depend on the figures."""
    parser = argparse.ArgumentParser(
        prog="antiphon.eval.bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/result.json"))
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--per-block", type=int, default=100)
    parser.add_argument("--policy", default=default_policy(), choices=sorted(POLICIES))
    parser.add_argument("--trace", type=Path, help="for the simulator; default: generated sessions")
    parser.add_argument("--no-append", action="store_true", help="leave out rounds through a gateway")
    parser.add_argument("--dynamo", type=Path, help="a Python with ai-dynamo 1.6.1, to be measured beside")
    options = parser.parse_args(arguments)
    rows = [*decision_rows(load_latency_model(PROFILE), options.policy), residency_row(), hash_row()]
    gc.collect()
    gc.freeze()  # the other cores' objects, which no one core has to carry
    with tempfile.TemporaryDirectory() as state, EmbeddedValkey.start(Path(state) / "valkey") as server:
        round_trips, version = asyncio.run(measure(server.url, rows, options.blocks, options.per_block))
    result = result_of([*round_trips, *rows], version, options.policy)
    if not options.no_append:
        result["append"] = measure_append()
    with tempfile.TemporaryDirectory() as folder:
        trace = options.trace or generated_trace(Path(folder) / "claude-code.jsonl")
        result["simulator"] = measure_speed(SpeedOptions(trace=trace, dynamo=options.dynamo))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result, Console(width=110))
    if not options.no_append:
        print_append(result["append"], Console(width=110))
    print_speed(result["simulator"], Console(width=110))
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
