"""The registry: records live as long as their engines' heartbeats, whatever happens to the ledger."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import redis.asyncio
from hypothesis import given
from hypothesis import strategies as st

from antiphon.engines.base import EngineRecord
from antiphon.engines.registry import (
    EngineIdTaken,
    Registration,
    fleet_tag,
    index_key,
    list_engines,
    record_key,
    shown,
)
from antiphon.scheduler.valkey import EmbeddedValkey

REGISTERED = """
import sys
from antiphon.engines.base import EngineRecord
from antiphon.engines.registry import Registration
record = EngineRecord("e", "http://127.0.0.1:1", "decode", "killed")
registration = Registration(sys.argv[1], record, fleet=sys.argv[2], ttl_s=1.0, interval_s=0.1)
registration.start()
print("up", flush=True)
sys.stdin.read()
"""


def record(engine_id: str = "e", incarnation: str = "one") -> EngineRecord:
    return EngineRecord(
        engine_id, "http://127.0.0.1:1", "prefill", incarnation, ("127.0.0.1:2",), "model", 512, 8
    )


def listed(url: str, fleet: str) -> dict[str, EngineRecord]:
    async def read() -> tuple[EngineRecord, ...]:
        async with redis.asyncio.Redis.from_url(url, decode_responses=True) as client:
            return await list_engines(client, fleet)

    return {found.engine_id: found for found in asyncio.run(read())}


def until(condition: Callable[[], object], deadline_s: float = 20.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.01)


@pytest.fixture
def fleet() -> str:
    return f"fleet-{secrets.token_hex(4)}"


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey.start(tmp_path) as server:
        yield server


def register(url: str, fleet: str, what: EngineRecord, **options: object) -> Registration:
    options = {"ttl_s": 1.0, "interval_s": 0.1, **options}
    return Registration(url, what, fleet=fleet, **options)  # type: ignore[arg-type]


def test_a_record_is_listed_whole_until_its_engine_closes(valkey_url: str, fleet: str) -> None:
    """What was registered is what is listed, in order of ids; close() takes it away."""
    first, second = register(valkey_url, fleet, record("b")), register(valkey_url, fleet, record("a"))
    first.start()
    second.start()
    assert listed(valkey_url, fleet) == {"a": record("a"), "b": record("b")}
    assert list(listed(valkey_url, fleet)) == ["a", "b"]
    assert listed(valkey_url, "another") == {}
    first.close()
    first.close()
    assert set(listed(valkey_url, fleet)) == {"a"}
    second.close()


def test_the_heartbeat_keeps_the_record_beyond_its_ttl(valkey_url: str, fleet: str) -> None:
    """The TTL is renewed while the engine lives."""
    registration = register(valkey_url, fleet, record(), ttl_s=0.3, interval_s=0.05)
    registration.start()
    with redis.Redis.from_url(valkey_url) as client:
        key = record_key(fleet, "e")
        ttls: list[int] = []

        def renewed() -> bool:
            ttls.append(client.pttl(key))
            return len(ttls) > 1 and ttls[-1] > ttls[-2]

        until(renewed)
        until(renewed)
    assert all(ttl > 0 for ttl in ttls)
    registration.close()


def test_a_killed_engine_disappears_and_its_id_is_free(valkey_url: str, fleet: str) -> None:
    """kill -9 leaves the record to its TTL; a newcomer with the same id waits for that and has it."""
    process = subprocess.Popen(
        [sys.executable, "-c", REGISTERED, valkey_url, fleet],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.kill()
    process.communicate()
    assert listed(valkey_url, fleet)["e"].incarnation == "killed"
    newcomer = register(valkey_url, fleet, record(incarnation="new"))
    newcomer.start()
    assert listed(valkey_url, fleet)["e"].incarnation == "new"
    newcomer.close()


def test_the_id_of_a_live_engine_is_refused(valkey_url: str, fleet: str) -> None:
    """A second incarnation gets an error that names the id and the holder, and changes nothing."""
    first = register(valkey_url, fleet, record())
    first.start()
    second = register(valkey_url, fleet, record(incarnation="two"), ttl_s=0.3)
    with pytest.raises(EngineIdTaken, match=r"'e'.*incarnation one"):
        second.start()
    second.close()
    assert listed(valkey_url, fleet)["e"].incarnation == "one"
    first.close()


def test_replace_takes_the_id_and_the_first_is_told(valkey_url: str, fleet: str) -> None:
    """With `replace` the newcomer has the id at once; the old one stops beating and cannot remove it."""
    holders: list[str] = []
    first = register(valkey_url, fleet, record(), on_taken=holders.append)
    first.start()
    second = register(valkey_url, fleet, record(incarnation="two"), replace=True)
    second.start()
    until(lambda: holders)
    assert holders == ["two"]
    first.close()
    assert listed(valkey_url, fleet)["e"].incarnation == "two"
    second.close()
    assert listed(valkey_url, fleet) == {}


def test_on_taken_may_close_the_registration(valkey_url: str, fleet: str) -> None:
    """An engine that ends itself when its id is taken does so from the heartbeat's own thread."""
    closed: list[str] = []

    def close(holder: str) -> None:
        first.close()
        closed.append(holder)

    first: Registration = register(valkey_url, fleet, record(), on_taken=close)
    first.start()
    second = register(valkey_url, fleet, record(incarnation="two"), replace=True)
    second.start()
    until(lambda: closed)
    second.close()


def test_it_registers_again_after_an_outage(own_server: EmbeddedValkey, fleet: str) -> None:
    """A server that is killed, restarted and emptied knows the engine again without its help."""
    registration = register(own_server.url, fleet, record())
    registration.start()
    killed = own_server.pointer.pid
    os.kill(killed, signal.SIGKILL)
    until(lambda: own_server.pointer.pid != killed)
    with redis.Redis.from_url(own_server.url) as client:
        client.flushall()
    until(lambda: listed(own_server.url, fleet))
    registration.close()
    assert listed(own_server.url, fleet) == {}


def test_an_engine_may_start_before_its_ledger(tmp_path: Path, fleet: str) -> None:
    """A ledger that is away at the start is waited for in the background, not an error."""
    registration = register(f"unix://{tmp_path}/valkey.sock", fleet, record())
    registration.start()
    with EmbeddedValkey.start(tmp_path) as server:
        until(lambda: listed(server.url, fleet))
        registration.close()


def test_close_without_a_ledger_returns(tmp_path: Path, fleet: str) -> None:
    """An engine can end while the ledger is away."""
    registration = register(f"unix://{tmp_path}/valkey.sock", fleet, record())
    registration.start()
    registration.close()


@pytest.mark.parametrize("raw", ["", "{", "[]", '{"engine_id": 1}', '{"engine_id": "bad"}', "null"])
def test_unreadable_records_are_left_out(
    valkey_url: str, fleet: str, raw: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A record that nobody can read is logged and skipped; the others are there."""
    good = register(valkey_url, fleet, record("good"))
    good.start()
    with redis.Redis.from_url(valkey_url) as client:
        client.sadd(index_key(fleet), "bad")
        client.hset(record_key(fleet, "bad"), "record", raw)
    with caplog.at_level(logging.WARNING):
        assert set(listed(valkey_url, fleet)) == {"good"}
    assert "'bad'" in caplog.text
    good.close()


def test_a_record_that_names_another_engine_is_left_out(valkey_url: str, fleet: str) -> None:
    """A record stored under a foreign id is not believed."""
    mine = register(valkey_url, fleet, record("mine"))
    mine.start()
    with redis.Redis.from_url(valkey_url) as client:
        client.sadd(index_key(fleet), "other")
        client.copy(record_key(fleet, "mine"), record_key(fleet, "other"))
    assert set(listed(valkey_url, fleet)) == {"mine"}
    mine.close()


def test_nonsense_is_refused_at_once(valkey_url: str) -> None:
    """A record without id or incarnation, or a heartbeat slower than the TTL, is the caller's error."""
    with pytest.raises(ValueError, match="engine_id"):
        Registration(valkey_url, record(engine_id=""))
    with pytest.raises(ValueError, match="incarnation"):
        Registration(valkey_url, record(incarnation=""))
    with pytest.raises(ValueError, match="interval_s"):
        Registration(valkey_url, record(), ttl_s=1.0, interval_s=1.0)


@given(st.text(), st.text(), st.text(), st.text())
def test_names_cannot_leave_their_key(fleet: str, other_fleet: str, name: str, other_name: str) -> None:
    """Different fleets or ids never share a key, and a fleet's keys have exactly one hash tag, its own."""
    key = record_key(fleet, name)
    assert (key == record_key(other_fleet, other_name)) == ((fleet, name) == (other_fleet, other_name))
    assert key.startswith(fleet_tag(fleet))
    assert key.count("{") == key.count("}") == 1


def test_passwords_are_not_shown() -> None:
    """URLs in logs and errors have neither user nor password."""
    assert shown("redis://me:secret@host:1/0?x=1") == "redis://host:1/0?x=1"
    assert shown("redis://:sec@ret@host:1") == "redis://host:1"
    assert shown("unix:///run/valkey.sock") == "unix:///run/valkey.sock"
