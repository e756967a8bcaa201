"""The arm `move` on the asyncio driver: simulated engines, the real Valkey, two homes."""

from __future__ import annotations

import asyncio
from pathlib import Path

from antiphon.engines.page_hash import page_hashes
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.valkey import EmbeddedValkey
from tests.move_helpers import MovesEvery
from tests.replica_helpers import Cluster, cluster, until

PAGE = 16


def moves(c: Cluster) -> dict[str, float]:
    """Result -> attempts to set a home in the ledger, by the metric."""
    (family,) = c.replica._metrics.moves.collect()
    return {s.labels["result"]: s.value for s in family.samples if s.name.endswith("_total")}


async def home(c: Cluster) -> str | None:
    sessions, _ = await c.ledger.sessions(10)
    return sessions[0].home


def test_a_session_moves_to_another_home_and_back(valkey_url: str) -> None:
    """Every third round has a new home, which fetches the history: same tokens, nothing computed twice."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local") as c, cluster(valkey_url, "local", engines="d0") as plain:
            c.replica.core.policy = MovesEvery(("d0", "p0"))
            prompt, homes, known = list(range(100, 400)), [], 0
            for number in range(1, 10):
                handle, output = await c.run("s", prompt, 24)
                _, expected = await plain.run("s", prompt, 24)
                assert output == expected
                receipt = handle.receipt
                assert receipt is not None and receipt.home is not None
                homes.append(receipt.home)
                moved = number % 3 == 0
                assert (handle.arm, receipt.bytes_home_to_home > 0) == (("local", "move")[moved], moved)
                assert receipt.cached_tokens == known // PAGE * PAGE, "each page is computed once"
                await c.recorded()
                assert await home(c) == receipt.home
                known = len(prompt) + len(output) - 1  # the last token has no KV yet
                prompt += output + list(range(50, 50 + 60 * number))
            assert homes == ["d0"] * 2 + ["p0"] * 3 + ["d0"] * 3 + ["p0"]
            assert moves(c) == {"moved": 3}

    asyncio.run(scenario())


def test_the_new_home_counts_while_the_round_decodes(valkey_url: str) -> None:
    """A client that leaves a moved round in the middle: the next round goes on where its KV is."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", speed=2.0) as c:
            c.replica.core.policy = MovesEvery(("d0", "p0"), every=2)
            prompt = list(range(100, 400))
            _, output = await c.run("s", prompt, 24)
            await c.recorded()
            prompt += output
            async with c.replica.submit(c.request("s", prompt, 4000)) as handle:
                await handle.start()
                await until(lambda: moves(c) == {"moved": 1})
                assert await home(c) == "p0"
            await c.recorded()
            assert handle.receipt is not None and handle.receipt.outcome is Outcome.CANCELLED
            assert await home(c) == "p0"
            handle, _ = await c.run("s", prompt, 4)
            assert handle.receipt is not None
            assert (handle.receipt.home, handle.receipt.arm) == ("p0", handle.receipt.tries[0].placement.arm)
            assert handle.receipt.cached_tokens >= 304

    asyncio.run(scenario())


def test_pages_that_do_not_come_are_computed(valkey_url: str) -> None:
    """The source has lost its pages: the round moves all the same, with the right tokens, and says so."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local") as c, cluster(valkey_url, "local", engines="d0") as plain:
            c.replica.core.policy = MovesEvery(("d0", "p0"), every=2)
            prompt = list(range(100, 400))
            _, output = await c.run("s", prompt, 24)
            await c.recorded()
            prompt += output + [7] * 40
            await c.fault("p0", fault="delay_prefetch", seconds=2)
            handle, output = await c.run("s", prompt, 24)
            _, expected = await plain.run("s", prompt, 24)
            receipt = handle.receipt
            assert receipt is not None and output == expected
            assert (handle.arm, receipt.home, receipt.cached_tokens) == ("move", "p0", 0)
            assert any("pushing on p0" in note for note in receipt.notes)
            await c.recorded()
            assert await home(c) == "p0"

    asyncio.run(scenario())


def test_a_ledger_that_dies_costs_a_moved_round_nothing(tmp_path: Path) -> None:
    """It hangs after the claim: the tokens come, and what could not be told is counted."""

    async def scenario() -> None:
        server = EmbeddedValkey.start(tmp_path)
        try:
            async with cluster(server.url, "local") as c:
                c.replica.core.policy = MovesEvery(("d0", "p0"), every=2)
                prompt = list(range(100, 400))
                _, output = await c.run("s", prompt, 24)
                await c.recorded()
                prompt += output
                await c.fault("p0", fault="delay_prefetch", seconds=0.3)
                request = c.request("s", prompt, 24)
                async with c.replica.submit(request) as handle:
                    await until(lambda: request.round_id in c.replica.core.rounds)
                    round = c.replica.core.rounds[request.round_id]
                    await until(lambda: round.placement is not None)
                    await asyncio.to_thread(server.stop)
                    await handle.start()
                    output = [t async for chunk in handle for t in chunk.token_ids]
                assert len(output) == 24 and handle.arm == "move"
                assert handle.receipt is not None and handle.receipt.home == "p0"
                await until(lambda: moves(c) == {"away": 1})
                hashes = page_hashes(tuple(prompt), PAGE)
                held = c.replica.core.books.residency.held_by("p0", hashes, PAGE)
                assert held == len(hashes) * PAGE, "this replica knows where the session is"
        finally:
            server.stop()

    asyncio.run(scenario())
