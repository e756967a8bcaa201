"""A rolling restart under traffic: every decode engine is drained, stopped and started again."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from antiphon.engines.simulated_request import expected_tokens
from tests.faults.client import RetryingClient
from tests.faults.conversation import VOCAB_TOKENS, Conversation, load_tokenizer
from tests.faults.fleet import SETTINGS, Condition, Fleet
from tests.faults.history import LogicalRound

SESSIONS = 6
DEADLINE_S = 20.0


def drain(fleet: Fleet, engine_id: str) -> str:
    """The command itself; returns what it says at last."""
    command = [
        sys.executable, "-m", "antiphon.scheduler.cli", "drain", engine_id,
        "--url", fleet.gateway_url(0), "--timeout", "30",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


async def test_no_round_notices_a_rolling_restart(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Every round is answered at its first attempt, rightly; histories are moved and not computed again."""
    fleet = Fleet(
        tmp_path / "fleet", tiny_model_dir, settings=SETTINGS.replace("remote_pull_always", "adaptive")
    )
    draw, rounds, over = random.Random(1), list[LogicalRound](), asyncio.Event()
    tokenizer = load_tokenizer(tiny_model_dir)
    async with fleet.running():
        client = RetryingClient([fleet.gateway_url(n) for n in range(2)], DEADLINE_S, DEADLINE_S)

        async def talk(number: int) -> None:
            conversation = Conversation(f"s{number}", "text", number % 2 == 0, draw, tokenizer)
            while not over.is_set() or conversation.number < 4:
                each, request = conversation.ask(100, 12, DEADLINE_S)
                rounds.append(each)
                conversation.heard(each, await client.ask(each, request, conversation.number % 2))
                await asyncio.sleep(draw.uniform(0.05, 0.3))  # its tool is at work

        try:
            async with asyncio.TaskGroup() as group:
                for number in range(SESSIONS):
                    group.create_task(talk(number))
                await fleet.until(enough(rounds, 2 * SESSIONS), "nothing is answered")
                for engine_id in ("d0", "d1"):
                    said = await asyncio.to_thread(drain, fleet, engine_id)
                    assert "safe to stop" in said and "in part" not in said
                    process = fleet.processes[engine_id]
                    await asyncio.to_thread(process.end)
                    process.start()
                    await fleet.ready()
                    await fleet.until(enough(rounds, len(rounds) + SESSIONS), "nothing is answered")
                over.set()
        finally:
            await client.close()
        receipts = await receipts_of(fleet)
    assert [e.name for e in rounds if len(e.attempts) != 1 or e.answer is None] == []
    for each in rounds:
        right = {tuple(expected_tokens(prompt, 12, VOCAB_TOKENS)) for prompt in each.expected}
        assert each.answer in right, each.name
    assert {("d0", "d1"), ("d1", "d0")} <= moves(receipts), "one was not used again"
    computed_again = [
        receipt for receipt in receipts
        if receipt["round_number"] > 1 and receipt["cached_tokens"] < receipt["prompt_tokens"] - 160
    ]  # fmt: skip
    assert computed_again == []


def enough(rounds: list[LogicalRound], count: int) -> Condition:
    async def answered() -> bool:
        return sum(each.answer is not None for each in rounds) >= count

    return answered


def moves(receipts: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """From which home to which one sessions went; receipts come newest first."""
    homes = dict[str, list[str]]()
    for receipt in reversed(receipts):
        homes.setdefault(receipt["session_id"], []).append(receipt["home"])
    return {pair for each in homes.values() for pair in pairwise(each) if pair[0] != pair[1]}


async def receipts_of(fleet: Fleet) -> list[dict[str, Any]]:
    ledger = fleet.ledger()
    try:
        return [r for r in await ledger.receipts(1000) if r["session_id"].startswith("s")]
    finally:
        await ledger.close()
