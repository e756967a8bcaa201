"""The asyncio driver over simulated engines and a real Valkey: every way a round can go."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.rounds import STREAM_BUFFER_CHUNKS, RoundBroke, RoundRefused
from antiphon.scheduler.states import Phase
from tests.replica_helpers import Cluster, cluster, until


def idle(c: Cluster) -> bool:
    """Nothing runs, waits or is reserved anywhere."""
    engines = all(not e.loop.running and not e.loop.waiting for e in c.engines.values())
    books = c.replica.core.books.fleet.books.values()
    return (
        engines
        and c.replica.runtime.rounds_in_flight == 0
        and not any(b.queue or b.in_flight or b.decode or b.prefill_s for b in books)
    )


def test_a_session_of_rounds_moves_its_kv_both_ways(valkey_url: str) -> None:
    """ampd with slack prefills remotely: the history is pulled, the rest pushed, tokens do not change."""

    async def scenario() -> None:
        async with cluster(valkey_url, "ampd") as c, cluster(valkey_url, "local", engines="d0") as plain:
            prompt = list(range(100, 400))
            for number in (1, 2, 3):
                # more than a page of output, so that the home has one to be pulled
                handle, output = await c.run("s", prompt, 24)
                _, expected = await plain.run("s", prompt, 24)
                assert output == expected and len(output) == 24
                receipt = handle.receipt
                assert receipt is not None and receipt.outcome is Outcome.COMPLETED
                assert handle.round_number == number
                assert handle.arm == ("remote_recompute" if number == 1 else "remote_pull")
                assert receipt.bytes_prefill_to_decode > 0
                assert (receipt.bytes_decode_to_prefill > 0) == (number > 1)
                prompt += output + list(range(50, 50 + 60 * number))
            assert receipt is not None and receipt.cached_tokens > 300, "the history was computed by nobody"
            await until(lambda: idle(c))

    asyncio.run(scenario())


def test_an_engine_that_refuses_is_never_seen_by_the_client(valkey_url: str) -> None:
    """A 503 before the first token: same round, next arm; the receipt tells of both tries."""

    async def scenario() -> None:
        async with cluster(valkey_url, "remote") as c:
            await c.fault("p0", fault="refuse", count=1)
            handle, output = await c.run("s", list(range(100, 200)))
            assert len(output) == 8 and handle.receipt is not None
            assert handle.arm == "local" and len(handle.receipt.tries) == 2
            assert "p0" in handle.receipt.tries[0].failure

    asyncio.run(scenario())


def test_three_failures_are_the_end(valkey_url: str) -> None:
    """At most three tries; then a refusal that names them."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local") as c:
            for engine in ("p0", "d0"):
                await c.fault(engine, fault="refuse", count=10)
            with pytest.raises(RoundRefused, match="3 tries failed") as refused:
                await c.run("s", list(range(100, 200)))
            assert refused.value.code == "upstream_failed" and refused.value.retry_after_s > 0
            await until(lambda: idle(c))

    asyncio.run(scenario())


def test_a_stream_that_breaks_ends_in_an_error(valkey_url: str) -> None:
    """After tokens were relayed nothing is retried: what came is kept, then RoundBroke."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0") as c:
            await c.fault("d0", fault="break_stream", after_tokens=3)
            async with c.replica.submit(c.request("s", list(range(100, 200)))) as handle:
                await handle.start()
                got: list[int] = []
                with pytest.raises(RoundBroke):
                    async for chunk in handle:
                        got += chunk.token_ids
            assert len(got) >= 3 and handle.receipt is not None
            assert handle.receipt.outcome is Outcome.FAILED
            await until(lambda: idle(c))
            _, output = await c.run("s", list(range(100, 200)))
            assert len(output) == 8

    asyncio.run(scenario())


def test_no_engine_is_a_refusal_at_once(valkey_url: str) -> None:
    """Without engines a round is refused with a hint when to come again."""

    async def scenario() -> None:
        async with cluster(valkey_url, "ampd", engines="") as c:
            with pytest.raises(RoundRefused) as refused:
                await c.run("s", [1, 2, 3])
            assert refused.value.code == "no_engine_available" and refused.value.retry_after_s > 0

    asyncio.run(scenario())


@pytest.mark.parametrize("phase", [p for p in Phase if p not in (Phase.ENDED, Phase.QUEUED)])
def test_a_client_that_leaves_frees_lease_and_engines(valkey_url: str, phase: Phase) -> None:
    """Wherever the round is: its calls end, nothing stays reserved, and the session is not left leased."""

    async def scenario() -> None:
        async with cluster(valkey_url, "ampd", speed=1.0) as c:
            prompt = list(range(100, 1300))
            _, output = await c.run("s", prompt, 40)
            if phase in (Phase.PULLING, Phase.PUSHING):
                engine = "p0" if phase is Phase.PULLING else "d0"
                await c.fault(engine, fault="delay_prefetch", seconds=5)
            if phase is Phase.GENERATING:
                await c.fault("d0", fault="hang", count=1)
            request = c.request("s", [*prompt, *output, *range(300)], 400)
            async with c.replica.submit(request):
                await until(lambda: c.replica.core.rounds[request.round_id].phase is phase, deadline_s=20.0)
            assert request.round_id not in c.replica.core.rounds
            await until(lambda: idle(c))
            await c.fault("d0", fault="clear")
            await c.fault("p0", fault="clear")

            async def continues() -> bool:
                handle, _ = await c.run("s", [5] * 20, 2)
                return handle.session_id == "s"

            async with asyncio.timeout(20):
                while not await continues():  # a lease whose claim was cut off goes with the next heartbeat
                    pass

    asyncio.run(scenario())


def test_two_rounds_of_one_session_fork(valkey_url: str) -> None:
    """The second of two rounds at once never waits: it runs as a fork with a parent link."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", speed=1.0) as c:
            first = c.replica.submit(c.request("s", list(range(100, 200)), 200))
            async with first:
                await first.start()
                handle, output = await c.run("s", list(range(100, 250)))
                assert len(output) == 8
                assert handle.session_id != "s" and handle.parent_id == "s"

    asyncio.run(scenario())


def test_rounds_go_on_without_the_ledger(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The ledger dies: rounds are degraded, none is lost; the engines are not forgotten."""
    from antiphon.scheduler.valkey import EmbeddedValkey

    async def scenario() -> None:
        server = EmbeddedValkey.start(tmp_path_factory.mktemp("v"))
        try:
            async with cluster(server.url, "ampd") as c:
                prompt = list(range(100, 300))
                await c.run("s", prompt)
                await asyncio.to_thread(server.stop)
                for _ in range(3):
                    handle, output = await c.run("s", prompt)
                    assert handle.receipt is not None and len(output) == 8
                    assert handle.receipt.degraded
                    prompt += output
                assert handle.round_number == 4
        finally:
            server.stop()

    asyncio.run(scenario())


def test_a_slow_reader_holds_back_the_stream_and_loses_nothing(valkey_url: str) -> None:
    """The buffer is bounded; every token arrives in order once the reader goes on."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0", speed=500.0) as c:
            count = STREAM_BUFFER_CHUNKS * 3
            async with c.replica.submit(c.request("s", list(range(100, 200)), count)) as handle:
                await handle.start()
                await until(lambda: len(handle._chunks) >= STREAM_BUFFER_CHUNKS)
                assert len(handle._chunks) <= STREAM_BUFFER_CHUNKS
                output = [t async for chunk in handle for t in chunk.token_ids]
            assert len(output) == count
            _, again = await c.run("other", list(range(100, 200)), count)
            assert again == output

    asyncio.run(scenario())


def test_a_reader_that_leaves_at_the_end_leaves_no_task(valkey_url: str) -> None:
    """Leaving after the usage was known, but with chunks unread, does not hold a task for ever."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0", speed=500.0) as c:
            before = len(asyncio.all_tasks())
            async with c.replica.submit(c.request("s", list(range(100, 200)), 64)) as handle:
                await handle.start()
                await until(lambda: handle.receipt is not None)
            await until(lambda: len(asyncio.all_tasks()) <= before)

    asyncio.run(scenario())


def test_a_killed_prefill_engine_costs_time_not_rounds(valkey_url: str) -> None:
    """The directory and HTTP of p0 vanish mid-run: every round still answers, with the same tokens."""

    async def scenario() -> None:
        async with cluster(valkey_url, "ampd") as c, cluster(valkey_url, "local", engines="d0") as plain:

            async def session(name: str) -> None:
                prompt = [hash(name) % 400 + 30 + i % 60 for i in range(200)]
                for number in range(4):
                    _, output = await c.run(name, prompt)
                    _, expected = await plain.run(name, prompt)
                    assert output == expected
                    if name == "s0" and number == 1:
                        await c.engines.pop("p0").__aexit__(None, None, None)
                    prompt += output + [number + 40] * 50

            async with asyncio.TaskGroup() as tasks:
                for n in range(4):
                    tasks.create_task(session(f"s{n}"))
            assert c.replica.core.ended[Outcome.COMPLETED] == 16

    asyncio.run(scenario())


def test_engines_may_have_profiles_of_their_own(valkey_url: str) -> None:
    """An engine's id counts before its pool, both before the profile of all."""

    async def scenario() -> None:
        profiles = {"prefill": "llama-3.1-70b-h200-tp4", "p1": "mixtral-8x7b-h200-tp4"}
        engines, scheduler = "p0 p1 d0", {"profiles": profiles}
        async with cluster(valkey_url, "ampd", engines=engines, scheduler=scheduler) as c:
            views = c.replica.core.books.fleet.views(c.replica.runtime.now())
            names = {engine_id: view.latency.name for engine_id, view in views.items()}
            assert names == {"d0": "tiny-cpu", "p0": profiles["prefill"], "p1": profiles["p1"]}

    asyncio.run(scenario())


def test_shutting_down_cuts_off_what_does_not_end(valkey_url: str) -> None:
    """After the grace period rounds in flight are cancelled, and nothing of them stays on the engine."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0", speed=1.0) as c:
            request = c.request(uuid.uuid4().hex, list(range(100, 200)), 5000)
            handle = c.replica.submit(request)
            await handle.start()
            engine = c.engines["d0"]
            assert engine.loop.running
        assert handle.ended

    asyncio.run(scenario())
