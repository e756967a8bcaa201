"""Discovery against simulated engines that speak the real protocols: who is up, who is down, and when."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from antiphon.engines.base import EngineRecord
from antiphon.engines.http import HttpEngine
from antiphon.engines.registry import record_key
from antiphon.engines.simulated import SimulatedEngine, SimulatedOptions
from antiphon.scheduler.discovery import Discovery, DiscoveryTimes
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.messages import EngineDown, EngineSuspect, EngineUp
from antiphon.scheduler.valkey import EmbeddedValkey
from tests.ledger_helpers import ledger_at
from tests.simulated_helpers import FAST, FLEET_KEY

TIMES = DiscoveryTimes(
    poll_s=0.05,
    probe_s=0.1,
    probe_deadline_s=1.0,
    connect_deadline_s=1.0,
    retry_s=0.05,
    max_retry_s=0.2,
    missing_grace_s=1.5,
)


class Watcher:
    """A running Discovery and what it said."""

    def __init__(self, discovery: Discovery) -> None:
        self.discovery = discovery
        self.events: list[EngineUp | EngineDown] = []
        self.loads: list[str] = []
        self.suspects: list[EngineSuspect] = []

    def on_event(self, event: EngineUp | EngineDown) -> None:
        """`engines` must have changed before anybody hears of it."""
        assert (event.engine_id in self.discovery.engines) == isinstance(event, EngineUp)
        self.events.append(event)

    def kinds(self) -> list[str]:
        return [f"{type(event).__name__} {event.engine_id}" for event in self.events]

    async def until(self, condition: Callable[[], object], deadline_s: float = 20.0) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + deadline_s
        while not condition():
            assert loop.time() < deadline, f"did not come true; events: {self.events}"
            await asyncio.sleep(0.01)

    async def until_kinds(self, *expected: str) -> None:
        await self.until(lambda: self.kinds() == list(expected))


@contextlib.asynccontextmanager
async def watching(
    ledger: Ledger | None, static: Sequence[EngineRecord] = (), times: DiscoveryTimes = TIMES
) -> AsyncIterator[Watcher]:
    watcher: Watcher
    discovery = Discovery(
        ledger,
        make_engine=lambda record: HttpEngine(record, FLEET_KEY),
        on_event=lambda event: watcher.on_event(event),
        on_load=lambda engine_id, _: watcher.loads.append(engine_id),
        on_suspect=lambda event: watcher.suspects.append(event),
        static=static,
        times=times,
    )
    watcher = Watcher(discovery)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(discovery.run())
        try:
            yield watcher
        finally:
            task.cancel()
    assert not watch_tasks(), "a task outlived run()"


def watch_tasks() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task.get_name().startswith("watch ")}


def in_fleet(url: str, fleet: str, engine_id: str, **options: Any) -> SimulatedOptions:
    return replace(FAST, ledger=url, fleet=fleet, engine_id=engine_id, **options)


def simulated(options: SimulatedOptions) -> SimulatedEngine:
    return SimulatedEngine(options, fleet_key=FLEET_KEY)


@contextlib.asynccontextmanager
async def process(url: str, fleet: str, engine_id: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A simulated engine in a process of its own, to be stopped and killed."""
    code = (
        "from antiphon.engines.simulated import *;"
        f"run_simulated(SimulatedOptions(ledger={url!r}, fleet={fleet!r}, engine_id={engine_id!r}))"
    )
    environment = {**os.environ, "ANTIPHON_FLEET_KEY": FLEET_KEY.decode()}
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, env=environment)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


# ---------------------------------------------------------------- pools


def test_a_pool_that_an_engine_was_given_counts_until_it_is_taken_back(valkey_url: str) -> None:
    """At once, and in its next life too; what is no pool is nothing that was given."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger, watching(ledger) as watcher:
            options = in_fleet(valkey_url, ledger.connection.fleet, "d0", pool="decode")
            told = watcher.discovery.set_pools

            def pools() -> list[str]:
                return [event.pool for event in watcher.events if isinstance(event, EngineUp)]

            async with simulated(options):
                await watcher.until_kinds("EngineUp d0")
                told({"d0": "prefill", "later": "decode"})
                told({"d0": "prefill", "later": "decode"})
                assert pools() == ["decode", "prefill"]
                first, second = watcher.events
                assert isinstance(first, EngineUp) and isinstance(second, EngineUp)
                assert first.incarnation == second.incarnation
            await watcher.until(lambda: watcher.kinds()[-1] == "EngineDown d0")
            async with simulated(options):
                await watcher.until(lambda: pools() == ["decode", "prefill", "prefill"])
                told({"d0": "neither"})
                assert pools()[-1] == "decode"

    run(scenario())


# ---------------------------------------------------------------- coming and going


def test_a_registered_engine_comes_up_with_the_facts_of_its_hello(valkey_url: str) -> None:
    """EngineUp says what the hello and the record say; probes bring its load; leaving brings EngineDown."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger, watching(ledger) as watcher:
            fleet = ledger.connection.fleet
            options = in_fleet(valkey_url, fleet, "p0", pool="prefill", chunk_tokens=64, decode_interval=4)
            async with simulated(options) as engine:
                await watcher.until_kinds("EngineUp p0")
                hello = engine.hello
                assert watcher.events[0] == EngineUp(
                    engine_id="p0",
                    incarnation=engine.record.incarnation,
                    pool="prefill",
                    can_transfer=True,
                    page_size_tokens=16,
                    pool_tokens=hello.pool_tokens,
                    kv_bytes_per_token=hello.page_bytes // 16,
                    chunk_tokens=64,
                    decode_interval=4,
                    store_tokens=hello.store_pages * 16,
                )
                assert watcher.discovery.engines["p0"].record == engine.record
                await watcher.until(lambda: "p0" in watcher.loads)
            await watcher.until_kinds("EngineUp p0", "EngineDown p0")
            assert watcher.events[1].incarnation == engine.record.incarnation
            assert watcher.discovery.engines == {}

    run(scenario())


def test_a_killed_engine_is_down_long_before_its_record_expires(valkey_url: str) -> None:
    """After report_failure a dead engine is down at once, not when its registration runs out."""

    async def scenario() -> None:
        slow = replace(TIMES, probe_s=60.0, missing_grace_s=60.0)
        async with (
            ledger_at(valkey_url) as ledger,
            watching(ledger, times=slow) as watcher,
            process(valkey_url, ledger.connection.fleet, "d0") as child,
        ):
            await watcher.until_kinds("EngineUp d0")
            child.kill()
            await child.wait()
            watcher.discovery.report_failure("d0")
            await watcher.until_kinds("EngineUp d0", "EngineDown d0")
            assert "3 probes failed" in getattr(watcher.events[1], "reason", "")
            assert await ledger.engines(), "the record had expired: this shows nothing"

    run(scenario())


def test_an_engine_that_hangs_goes_down_and_comes_back(valkey_url: str) -> None:
    """A stopped process is down after bounded probes; when it goes on, the same incarnation is up again."""

    async def scenario() -> None:
        patient = replace(TIMES, probe_deadline_s=0.3, connect_deadline_s=0.3, missing_grace_s=60.0)
        async with (
            ledger_at(valkey_url) as ledger,
            watching(ledger, times=patient) as watcher,
            process(valkey_url, ledger.connection.fleet, "d0") as child,
        ):
            await watcher.until_kinds("EngineUp d0")
            child.send_signal(signal.SIGSTOP)
            await watcher.until_kinds("EngineUp d0", "EngineDown d0")
            (suspect,) = watcher.suspects
            assert suspect.suspect and suspect.incarnation == watcher.events[0].incarnation
            child.send_signal(signal.SIGCONT)
            await watcher.until_kinds("EngineUp d0", "EngineDown d0", "EngineUp d0")
            assert watcher.events[0] == watcher.events[2]

    run(scenario())


def test_a_missed_probe_makes_a_suspect_until_the_next_good_one(valkey_url: str) -> None:
    """It is told at once and taken back; the engine is up all the time."""

    async def scenario() -> None:
        slow = replace(TIMES, probe_deadline_s=0.3, connect_deadline_s=0.3, failures_to_down=1000)
        async with (
            ledger_at(valkey_url) as ledger,
            watching(ledger, times=replace(slow, missing_grace_s=60.0)) as watcher,
            process(valkey_url, ledger.connection.fleet, "d0") as child,
        ):
            await watcher.until_kinds("EngineUp d0")
            incarnation = watcher.events[0].incarnation
            child.send_signal(signal.SIGSTOP)
            await watcher.until(lambda: watcher.suspects)
            child.send_signal(signal.SIGCONT)
            await watcher.until(lambda: len(watcher.suspects) == 2)
            assert watcher.suspects == [EngineSuspect("d0", incarnation, on) for on in (True, False)]
            assert watcher.kinds() == ["EngineUp d0"]

    run(scenario())


def test_a_new_incarnation_replaces_the_old_one(valkey_url: str) -> None:
    """The old incarnation goes down before the new one comes up under the same id."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger, watching(ledger) as watcher:
            options = in_fleet(valkey_url, ledger.connection.fleet, "d0")
            async with simulated(options) as first:
                await watcher.until_kinds("EngineUp d0")
                async with simulated(replace(options, replace=True)) as second:
                    await watcher.until_kinds("EngineUp d0", "EngineDown d0", "EngineUp d0")
                    told = [event.incarnation for event in watcher.events]
                    old, new = first.record.incarnation, second.record.incarnation
                    assert told == [old, old, new]

    run(scenario())


def test_an_engine_that_restarts_between_two_probes_is_noticed() -> None:
    """A configured engine names no incarnation: after a failed probe its hello tells if it is the same."""

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(simulated(replace(FAST, engine_id="d0")))
            record = replace(first.record, incarnation="")
            port, kv_port = (int(at.rsplit(":", 1)[1]) for at in (record.url, record.kv_addresses[0]))
            patient = replace(TIMES, failures_to_down=1000)
            async with watching(None, static=[record], times=patient) as watcher:
                await watcher.until_kinds("EngineUp d0")
                await stack.aclose()
                again = replace(FAST, engine_id="d0", port=port, kv_port=kv_port)
                async with simulated(again) as second:
                    await watcher.until_kinds("EngineUp d0", "EngineDown d0", "EngineUp d0")
                    assert watcher.events[2].incarnation == second.record.incarnation

    run(scenario())


# ---------------------------------------------------------------- engines that do not fit


def test_an_engine_with_other_pages_is_refused(valkey_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Another page size or model stays out, with one log line that says why, until the others are gone."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger, watching(ledger) as watcher:
            fleet = ledger.connection.fleet
            async with contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(simulated(in_fleet(valkey_url, fleet, "a")))
                await watcher.until_kinds("EngineUp a")
                async with (
                    simulated(in_fleet(valkey_url, fleet, "b", page_size_tokens=32)),
                    simulated(in_fleet(valkey_url, fleet, "c", model_id="other")),
                ):
                    await watcher.until(lambda: caplog.text.count(" is refused: ") >= 2)
                    await watcher.until(lambda: watcher.loads.count("a") > 5)
                    assert watcher.kinds() == ["EngineUp a"]
                    assert "engine b at" in caplog.text
                    assert "its page_size_tokens is 32, that of a is 16" in caplog.text
                    assert "its model_id is 'other', that of a is 'simulated'" in caplog.text
                    assert caplog.text.count(" is refused: ") == 2
                    await stack.aclose()
                    await watcher.until(lambda: len(watcher.events) == 3)
                    assert watcher.kinds()[1] == "EngineDown a"
                    assert watcher.kinds()[2] in ("EngineUp b", "EngineUp c")

    with caplog.at_level(logging.WARNING):
        run(scenario())


def test_an_engine_without_a_linker_is_local_only() -> None:
    """No directory: no transfer, the pool from its load, and a fresh incarnation whenever it comes back."""

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            engine = await stack.enter_async_context(simulated(replace(FAST, engine_id="plain")))
            record = EngineRecord("plain", engine.record.url, "decode", "")
            async with watching(None, static=[record]) as watcher:
                await watcher.until_kinds("EngineUp plain")
                up = watcher.events[0]
                assert isinstance(up, EngineUp)
                assert (up.can_transfer, up.kv_bytes_per_token) == (False, 0)
                assert up.pool_tokens == engine.hello.pool_tokens
                await stack.aclose()
                await watcher.until_kinds("EngineUp plain", "EngineDown plain")
                port = int(record.url.rsplit(":", 1)[1])
                async with simulated(replace(FAST, engine_id="plain", port=port)):
                    await watcher.until_kinds("EngineUp plain", "EngineDown plain", "EngineUp plain")
                    assert watcher.events[2].incarnation not in ("", up.incarnation)

    run(scenario())


def test_the_registry_wins_over_the_configuration(valkey_url: str) -> None:
    """An engine that is configured and registered is one engine, where the registry says."""

    async def scenario() -> None:
        configured = EngineRecord("d0", "http://127.0.0.1:1", "decode", "")
        async with (
            ledger_at(valkey_url) as ledger,
            watching(ledger, static=[configured]) as watcher,
            simulated(in_fleet(valkey_url, ledger.connection.fleet, "d0")) as engine,
        ):
            await watcher.until_kinds("EngineUp d0")
            assert watcher.events[0].incarnation == engine.record.incarnation

    run(scenario())


def test_an_engine_that_is_not_there_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """An address where nobody listens, or where somebody accepts and says nothing, never comes up."""

    async def scenario() -> None:
        hanging = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = hanging.sockets[0].getsockname()[1]
        records = [
            EngineRecord("nobody", "http://127.0.0.1:1", "decode", ""),
            EngineRecord("silent", f"http://127.0.0.1:{port}", "decode", ""),
        ]
        impatient = replace(TIMES, connect_deadline_s=0.1)
        async with hanging, watching(None, static=records, times=impatient) as watcher:
            await watcher.until(lambda: caplog.text.count("is not reachable") >= 2)
            for _ in range(3):
                watcher.discovery.report_failure("nobody")
                watcher.discovery.report_failure("unknown")
                await asyncio.sleep(0.1)
            assert watcher.events == []
            assert caplog.text.count("engine nobody at http://127.0.0.1:1 is not reachable") == 1

    with caplog.at_level(logging.WARNING):
        run(scenario())


# ---------------------------------------------------------------- the ledger's troubles are not the engines'


def test_an_outage_of_the_ledger_takes_no_engine_down(tmp_path: Path) -> None:
    """A ledger that dies, comes back and has lost all: the engines that live stay up all the time."""

    async def scenario(server: EmbeddedValkey) -> None:
        async with (
            ledger_at(server.url, deadline_s=1.0) as ledger,
            watching(ledger) as watcher,
            simulated(in_fleet(server.url, ledger.connection.fleet, "d0")),
        ):
            await watcher.until_kinds("EngineUp d0")
            killed = server.pointer.pid
            os.kill(killed, signal.SIGKILL)
            await watcher.until(lambda: server.pointer.pid != killed)
            await ledger.connection.command("FLUSHALL")
            assert await ledger.engines() == ()
            probed = len(watcher.loads)
            await watcher.until(lambda: len(watcher.loads) > probed + 3)
            loop = asyncio.get_running_loop()
            deadline = loop.time() + 20
            while not await ledger.engines():
                assert loop.time() < deadline, "it did not register again"
                await asyncio.sleep(0.01)
            probed = len(watcher.loads)
            await watcher.until(lambda: len(watcher.loads) > probed + 3)
            assert watcher.kinds() == ["EngineUp d0"]

    with EmbeddedValkey.start(tmp_path) as server:
        run(scenario(server))


def test_a_ledger_that_hangs_takes_no_engine_down(tmp_path: Path) -> None:
    """No answer says nothing of the engines, however long it lasts."""

    async def scenario(server: EmbeddedValkey) -> None:
        hasty = replace(TIMES, missing_grace_s=0.0)
        async with (
            ledger_at(server.url, deadline_s=0.1) as ledger,
            watching(ledger, times=hasty) as watcher,
            simulated(in_fleet(server.url, ledger.connection.fleet, "d0")),
        ):
            await watcher.until_kinds("EngineUp d0")
            os.kill(server.pointer.pid, signal.SIGSTOP)
            try:
                probed = len(watcher.loads)
                await watcher.until(lambda: len(watcher.loads) > probed + 8)
                assert watcher.kinds() == ["EngineUp d0"]
            finally:
                os.kill(server.pointer.pid, signal.SIGCONT)

    with EmbeddedValkey.start(tmp_path) as server:
        run(scenario(server))


def test_a_record_that_is_gone_makes_the_engine_suspect(valkey_url: str) -> None:
    """When a record disappears the engine is probed at once: a dead one is down without any grace."""

    async def scenario() -> None:
        slow = replace(TIMES, probe_s=60.0, missing_grace_s=60.0)
        async with (
            ledger_at(valkey_url) as ledger,
            watching(ledger, times=slow) as watcher,
            process(valkey_url, ledger.connection.fleet, "d0") as child,
        ):
            await watcher.until_kinds("EngineUp d0")
            child.kill()
            await child.wait()
            await ledger.connection.command("DEL", record_key(ledger.connection.fleet, "d0"))
            await watcher.until_kinds("EngineUp d0", "EngineDown d0")

    run(scenario())


def test_without_a_ledger_the_configured_engines_are_there(tmp_path: Path) -> None:
    """A ledger that was never there does not keep configured engines away."""

    async def scenario() -> None:
        async with (
            ledger_at(f"unix://{tmp_path}/none.sock") as ledger,
            simulated(replace(FAST, engine_id="d0")) as engine,
            watching(ledger, static=[engine.record]) as watcher,
        ):
            await watcher.until_kinds("EngineUp d0")

    run(scenario())


def test_run_can_be_cancelled_at_any_await(valkey_url: str) -> None:
    """However early it is cancelled, it ends as cancelled and no task of its own is left."""

    async def scenario() -> None:
        async with (
            ledger_at(valkey_url) as ledger,
            simulated(in_fleet(valkey_url, ledger.connection.fleet, "d0")) as engine,
        ):
            static = replace(engine.record, engine_id="static", incarnation="")
            for steps in range(0, 200, 7):
                discovery = Discovery(
                    ledger,
                    make_engine=lambda record: HttpEngine(record, FLEET_KEY),
                    on_event=lambda event: None,
                    static=[static],
                    times=TIMES,
                )
                task = asyncio.create_task(discovery.run())
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert not watch_tasks()

    run(scenario())


def test_fleets_are_apart(valkey_url: str) -> None:
    """An engine of another fleet on the same ledger is not seen."""

    async def scenario() -> None:
        async with (
            ledger_at(valkey_url) as ledger,
            watching(ledger) as watcher,
            simulated(in_fleet(valkey_url, secrets.token_hex(4), "other")),
            simulated(in_fleet(valkey_url, ledger.connection.fleet, "ours")),
        ):
            await watcher.until_kinds("EngineUp ours")

    run(scenario())
