"""Pools that follow the load, with real processes; the gateway that leads is killed in mid-flip."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import httpx

from antiphon.engines.simulated_request import expected_tokens
from antiphon.scheduler.pool_store import PoolStore
from tests.faults.client import RetryingClient
from tests.faults.conversation import VOCAB_TOKENS, Conversation, load_tokenizer
from tests.faults.fleet import GATEWAYS, SETTINGS, Condition, Fleet
from tests.faults.history import LogicalRound

SESSIONS = 6
DEADLINE_S = 20.0
REPOOL = """
[repool]
enabled = true
period_s = 0.3
window_s = 1.5
margin = 0.0005
floor = 0.0
sustain = 1
cool_down_s = 1.0
drain_limit_s = 10.0
memory_s = 1.5
"""


def leader(fleet: Fleet) -> str | None:
    """The gateway that has begun to empty an engine, by its log."""
    said = "leaves for the prefill pool"
    return next((name for name in GATEWAYS if said in fleet.processes[name].log.read_text()), None)


def flips_are_over(store: PoolStore) -> Condition:
    """With nothing to do, the last flip ends and none follows."""

    async def over() -> bool:
        return not (await store.read())[1]

    return over


def pools_are(fleet: Fleet, expected: dict[str, int], gateways: int = 2) -> Condition:
    """As the gateways say it, each for itself."""

    async def agreed() -> bool:
        for number in range(gateways):
            try:
                answer = await fleet.http.get(f"{fleet.gateway_url(number)}/v1/engines")
            except httpx.TransportError:
                return False  # it is being started again
            if answer.status_code != 200:
                return False
            pools = [engine["pool"] for engine in answer.json()["data"]]
            if {pool: pools.count(pool) for pool in expected} != expected:
                return False
        return True

    return agreed


async def test_the_leader_dies_in_mid_flip_and_pools_follow_the_load(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Long prompts: a home changes pool though the gateway that began it is killed. Long answers: it comes
    back. Every round is answered rightly."""
    fleet = Fleet(tmp_path / "fleet", tiny_model_dir, settings=SETTINGS + REPOOL)
    draw, rounds, over = random.Random(1), list[LogicalRound](), asyncio.Event()
    tokenizer = load_tokenizer(tiny_model_dir)
    shape = 400, 2
    async with fleet.running():
        ledger = fleet.ledger()
        client = RetryingClient([fleet.gateway_url(n) for n in range(2)], DEADLINE_S, DEADLINE_S)

        async def talk(number: int) -> None:
            made = 0
            while not over.is_set():
                made += 1
                conversation = Conversation(f"s{number}-{made}", "text", True, draw, tokenizer)
                for _ in range(3):
                    each, request = conversation.ask(shape[0], shape[1], DEADLINE_S)
                    rounds.append(each)
                    conversation.heard(each, await client.ask(each, request, conversation.number % 2))

        async def begun() -> bool:
            return leader(fleet) is not None

        try:
            async with asyncio.TaskGroup() as group:
                for number in range(SESSIONS):
                    group.create_task(talk(number))
                await fleet.until(begun, "no engine leaves its pool")
                killed = leader(fleet)
                assert killed is not None
                await asyncio.to_thread(fleet.processes[killed].kill)
                fleet.processes[killed].start()
                await fleet.until(pools_are(fleet, {"prefill": 2, "decode": 1}), "nobody ends the flip")
                shape = 16, 120
                await fleet.until(pools_are(fleet, {"prefill": 1, "decode": 2}), "it does not come back")
                over.set()
            await fleet.until(flips_are_over(PoolStore(ledger.connection)), "a flip does not end")
            receipts = await ledger.receipts(1000)
            assert {"1p+2d", "2p+1d"} <= {receipt["pools"] for receipt in receipts}
        finally:
            over.set()
            await client.close()
            await ledger.close()
    assert [each.name for each in rounds if each.answer is None] == []
    for each in rounds:
        right = {
            tuple(expected_tokens(prompt, count, VOCAB_TOKENS))
            for prompt in each.expected
            for count in (2, 120)
        }
        assert each.answer in right, each.name
