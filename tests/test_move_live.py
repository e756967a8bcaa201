"""The arm `move` between two real SGLang engines: whichever decodes, tokens are the checkpoint's."""

from __future__ import annotations

import asyncio
import statistics
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from antiphon.eval.verify import verify_rounds
from antiphon.scheduler.config import Config, EngineConfig, LedgerConfig, SchedulerConfig
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.outcomes import Receipt
from antiphon.scheduler.replica import Replica
from antiphon.traces.results import VerifyRecord
from tests.conftest import SglangPair
from tests.move_helpers import MovesEvery
from tests.replica_helpers import Cluster, until
from tests.test_drain import safe

PAGE, OUTPUT = 16, 20


@asynccontextmanager
async def replica_over(pair: SglangPair, valkey_url: str, key: bytes) -> AsyncIterator[Cluster]:
    """A replica in this process, in a fleet of its own, over the shared engines."""
    fleet = uuid.uuid4().hex
    engines = tuple(
        EngineConfig(record.engine_id, record.url, record.pool, record.kv_addresses)
        for record in (pair.prefill, pair.decode)
    )
    config = Config(
        scheduler=SchedulerConfig(policy="local"), ledger=LedgerConfig(fleet=fleet), engines=engines
    )
    ledger = Ledger(valkey_url, fleet=fleet)
    replica = Replica(config, ledger, key, uuid.uuid4().hex, Metrics())
    try:
        async with replica.running():
            await until(lambda: replica.readiness().engines_alive == 2 and replica.readiness().ready, 30.0)
            yield Cluster(replica, ledger)
    finally:
        await ledger.close()


async def played(c: Cluster, session: str, prompt: list[int]) -> tuple[list[int], Receipt]:
    """One greedy round, on the books before this returns: output ids and receipt."""
    async with c.replica.submit(c.request(session, prompt, OUTPUT, temperature=0)) as handle:
        await handle.start()
        output = [token async for chunk in handle for token in chunk.token_ids]
    assert handle.receipt is not None and len(output) == OUTPUT
    while c.replica.runtime._recording:
        await asyncio.wait(c.replica.runtime._recording)
    return output, handle.receipt


def test_sessions_that_move_get_the_checkpoints_tokens(
    sglang_pair: SglangPair, valkey_url: str, fleet_key: bytes, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """6 sessions of 9 rounds at once, every second round on another home: transformers' tokens."""
    records: list[VerifyRecord] = []
    receipts: list[Receipt] = []

    async def session(c: Cluster, n: int) -> None:
        prompt, kept = [(n * 41 + i * 13) % 400 + 40 for i in range(250 + 24 * n)], 0
        for turn in range(9):
            output, receipt = await played(c, f"move-{n}", prompt)
            arm = receipt.arm.value if receipt.arm else ""
            records.append(VerifyRecord(f"move-{n}", turn + 1, kept, prompt, output, arm))
            receipts.append(receipt)
            assert receipt.cached_tokens >= max(kept - 1, 0) // PAGE * PAGE, receipt
            kept = len(prompt) + len(output)
            prompt = [*prompt, *output, *[(turn * 59 + n * 5 + i) % 400 + 40 for i in range(70)]]

    async def run() -> None:
        async with replica_over(sglang_pair, valkey_url, fleet_key) as c:
            engines = (sglang_pair.decode.engine_id, sglang_pair.prefill.engine_id)
            c.replica.core.policy = MovesEvery(engines, every=2)
            async with asyncio.TaskGroup() as tasks:
                for n in range(6):
                    tasks.create_task(session(c, n))

    asyncio.run(run())
    moved = [receipt for receipt in receipts if receipt.arm and receipt.arm.value == "move"]
    assert len(receipts) == 54 and len(moved) == 24
    assert all(receipt.bytes_home_to_home > 0 for receipt in moved)
    assert len({receipt.home for receipt in moved}) == 2, "both ways"
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    report = verify_rounds(tiny_model_dir, log)
    assert report.rounds_checked == 54 and report.ok, report.mismatches
    total = sum(receipt.bytes_home_to_home for receipt in moved)
    share = sum(r.cached_tokens for r in moved) / sum(r.prompt_tokens for r in moved)
    print(f"\n{len(moved)} of {len(receipts)} rounds moved, {total} bytes, {share:.1%} of them cached")


def test_a_move_computes_only_what_is_new(sglang_pair: SglangPair, valkey_url: str, fleet_key: bytes) -> None:
    """A long session's first round elsewhere: moved, its history is cached there; else all is computed."""
    engines = (sglang_pair.decode.engine_id, sglang_pair.prefill.engine_id)
    history, new = 3000, 100

    async def second_round(c: Cluster, n: int, recompute: bool) -> Receipt:
        c.replica.core.policy = MovesEvery(engines, every=2, recompute=recompute)
        prompt = [(n * 97 + i * i * 7 + i * (n + 3)) % 400 + 40 for i in range(history)]
        output, _ = await played(c, f"cost-{n}", prompt)
        _, receipt = await played(c, f"cost-{n}", [*prompt, *output, *range(40, 40 + new)])
        assert receipt.home == engines[1]
        return receipt

    async def run() -> tuple[list[Receipt], list[Receipt]]:
        async with replica_over(sglang_pair, valkey_url, fleet_key) as c:
            rounds = [await second_round(c, n, n % 2 == 1) for n in range(6)]
            return rounds[::2], rounds[1::2]

    moved, computed = asyncio.run(run())
    assert all(receipt.cached_tokens >= history for receipt in moved), moved
    assert all(receipt.cached_tokens == 0 for receipt in computed), computed
    for name, receipts in (("moved", moved), ("recomputed", computed)):
        ttft_s = statistics.median(receipt.ttft_s or 0.0 for receipt in receipts)
        pull_s = statistics.median(receipt.pull_s for receipt in receipts)
        first = receipts[0]
        print(f"\n{name}: TTFT {ttft_s:.3f} s, of it pull {pull_s:.3f} s; {first.bytes_home_to_home} bytes")


def test_sessions_leave_an_engine_that_drains(
    sglang_pair: SglangPair, valkey_url: str, fleet_key: bytes, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Between their rounds, whole: the next rounds find all of the history at the new home."""
    home, other = sglang_pair.decode.engine_id, sglang_pair.prefill.engine_id
    records: list[VerifyRecord] = []
    moved_bytes = 0

    async def run() -> list[tuple[int, Receipt]]:
        nonlocal moved_bytes
        second = []
        async with replica_over(sglang_pair, valkey_url, fleet_key) as c:
            c.replica.core.policy = MovesEvery((home, other), every=1000)
            drains, prompts = c.replica.drains, dict[str, list[int]]()
            for n in range(3):
                prompt = [(n * 67 + i * 11 + i * i) % 400 + 40 for i in range(500 + 37 * n)]
                output, receipt = await played(c, f"drained-{n}", prompt)
                assert receipt.home == home
                records.append(VerifyRecord(f"drained-{n}", 1, 0, prompt, output, ""))
                prompts[f"drained-{n}"] = [*prompt, *output]
            (engine,) = [e for e in await c.replica.engines() if e["engine_id"] == home]
            await drains.mark(home, engine["incarnation"])
            status = await safe(drains, home)
            assert (status.work.moved, status.work.moved_partly, status.work.stuck) == (3, 0, "")
            moved_bytes = status.work.moved_bytes
            for name, told in prompts.items():
                prompt = [*told, *range(40, 110)]
                output, receipt = await played(c, name, prompt)
                records.append(VerifyRecord(name, 2, len(told), prompt, output, ""))
                second.append((len(told), receipt))
        return second

    second = asyncio.run(run())
    for history, receipt in second:
        assert receipt.home == other and receipt.arm is not None and receipt.arm.value == "local"
        assert receipt.cached_tokens >= (history - 1) // PAGE * PAGE, receipt
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    report = verify_rounds(tiny_model_dir, log)
    assert report.rounds_checked == 6 and report.ok, report.mismatches
    assert moved_bytes > 0
    print(f"\n3 sessions moved, {moved_bytes} bytes")
