"""Engines, gateway and ledger on two hosts: rounds move KV over the cable, and nothing listens elsewhere."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from antiphon.engines import wire
from antiphon.engines.directory_client import DirectoryClient, DirectoryError
from antiphon.scheduler.valkey import server_binary
from tests.engine_processes import wait_for
from tests.kv_peer import KEY, make_chain
from tests.two_hosts import Host, NoNamespaces, two_hosts

FLEET_KEY = "two-hosts-fleet-key-0123456789abcdef"
OTHER_KEY = "another-fleet-s-key-0123456789abcdef"
PASSWORD = "two-hosts-password"
USER = ("antiphon", "on", f">{PASSWORD}", "~{antiphon:*", "+@all", "-@dangerous")
"""As docs/operations.md has it."""
VALKEY_PORT, GATEWAY_PORT, HTTP_PORT, KV_PORT, ROUND_TOKENS = 6390, 8000, 30000, 20000, 400
DEADLINE_S = 60.0


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts() as (a, b):
            yield a, b
    except NoNamespaces as error:
        pytest.skip(f"two hosts: {error}")


def environment(key: str, ledger: str) -> dict[str, str]:
    return dict(os.environ) | {"ANTIPHON_FLEET_KEY": key, "ANTIPHON_REDIS_URL": ledger}


def start_engine(host: Host, name: str, pool: str, port: int, log: Path, env: dict[str, str]) -> None:
    host.start(
        [sys.executable, "-m", "antiphon.scheduler.cli", "engine", "--simulated", "--port", str(port),
         "--interface", host.address, "--kv-port", str(KV_PORT + port), "--pool", pool, "--engine-id", name],
        log / f"{name}.log", env,
    )  # fmt: skip


def ask(path: str, at: str, **more: Any) -> Any:
    url = f"http://{at}:{GATEWAY_PORT}{path}"
    answer = httpx.post(url, timeout=30.0, **more) if more else httpx.get(url, timeout=30.0)
    return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text


def says(log: Path, word: str) -> bool:
    return word in log.read_text()


def ready(a: Host) -> bool:
    try:
        found = a.inside(lambda: ask("/v1/engines", a.address))
    except httpx.HTTPError:
        return False
    return {each["engine_id"] for each in found["data"] if "pool" in each} >= {"p0", "d0"}


def ledger_answers(a: Host) -> bool:
    def ping() -> bool:
        with redis.Redis(
            a.address, VALKEY_PORT, username="antiphon", password=PASSWORD, socket_timeout=2.0
        ) as client:
            return bool(client.ping())

    try:
        return a.inside(ping)
    except redis.RedisError:
        return False


def test_rounds_between_two_hosts(hosts: tuple[Host, Host], tiny_model_dir: Path, tmp_path: Path) -> None:
    """p0 beside the gateway, d0 on the other host: histories move both ways.

    A third engine with another fleet key is refused by all. Only addresses on the cable are listened on.
    """
    a, b = hosts
    ledger = f"redis://antiphon:{PASSWORD}@{a.address}:{VALKEY_PORT}/0"
    env = environment(FLEET_KEY, ledger)
    (tmp_path / "data").mkdir()
    a.start(
        [server_binary(), "--bind", a.address, "--port", str(VALKEY_PORT), "--user", *USER,
         "--user", "default", "off",
         "--dir", str(tmp_path / "data"), "--save", ""],
        tmp_path / "valkey.log", env,
    )  # fmt: skip
    wait_for("the ledger", lambda: ledger_answers(a), DEADLINE_S)
    start_engine(a, "p0", "prefill", HTTP_PORT, tmp_path, env)
    start_engine(b, "d0", "decode", HTTP_PORT, tmp_path, env)
    start_engine(b, "x0", "decode", HTTP_PORT + 1, tmp_path, environment(OTHER_KEY, ledger))
    a.start(
        [sys.executable, "-m", "antiphon.scheduler.cli", "serve", "--host", a.address, "--port",
         str(GATEWAY_PORT), "--policy", "remote_pull_always", "--model", str(tiny_model_dir),
         "--state-dir", str(tmp_path / "state")],
        tmp_path / "gateway.log", env,
    )  # fmt: skip
    wait_for("both engines at the gateway", lambda: ready(a), DEADLINE_S)

    prompt = list(range(5, 5 + ROUND_TOKENS))
    for _ in range(3):
        body = {"model": "simulated", "prompt": prompt, "max_tokens": 64, "return_token_ids": True}
        posted = partial(ask, "/v1/completions", a.address, json=body, headers={"X-Session-ID": "two"})
        done = a.inside(posted)
        assert "choices" in done, done
        said = done["choices"][0]
        prompt = [*prompt, *said["token_ids"], *range(5, 5 + ROUND_TOKENS)]
    for direction in ("decode_to_prefill", "prefill_to_decode"):
        pattern = rf'kv_transfer_bytes_total{{direction="{direction}"}} [1-9]'
        metrics = partial(ask, "/metrics", a.address)
        wait_for(direction, lambda: re.search(pattern, a.inside(metrics)) is not None)  # noqa: B023

    wait_for("x0's record is refused", lambda: "unsigned" in a.inside(lambda: ask("/metrics", a.address)))
    listed = a.inside(lambda: ask("/v1/engines", a.address))["data"]
    assert {each["engine_id"] for each in listed if "pool" in each} == {"p0", "d0"}
    assert "'x0' is not signed" in (tmp_path / "gateway.log").read_text()
    stranger = DirectoryClient(f"{b.address}:{KV_PORT + HTTP_PORT}", OTHER_KEY.encode(), "stranger")
    with pytest.raises(DirectoryError, match="fleet key"):
        a.inside(lambda: stranger.connect(5.0))
    url = f"http://{b.address}:{HTTP_PORT}/v1/loads"
    assert a.inside(lambda: httpx.get(url).status_code) == 401

    assert (a.listening(), b.listening()) == ({a.address}, {b.address})


def test_nixl_between_two_hosts(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Real page stores: A pulls from B over the cable, byte by byte; NIXL and UCX listen nowhere else."""
    pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
    a, b = hosts
    for host in hosts:
        options = {
            "engine_id": host.namespace,
            "port": KV_PORT,
            "checksums": True,
            "hello": {"kv_addresses": [f"{host.address}:{KV_PORT}"], "incarnation": host.namespace},
        }
        env = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
        log = tmp_path / f"{host.namespace}.log"
        host.start([sys.executable, "-m", "tests.kv_peer", json.dumps(options)], log, env)
        wait_for("a page store", partial(says, log, f"{KV_PORT}"), DEADLINE_S)
    source = b.processes[0].stdin
    assert source is not None
    source.write(b"put two 20\n")
    source.flush()
    chain = make_chain("two", 20)
    puller = DirectoryClient(f"{a.address}:{KV_PORT}", KEY, "test")
    request = wire.Prefetch(f"{b.address}:{KV_PORT}", b.namespace, b"", chain, 20.0)

    def pulled() -> wire.Prefetched | None:
        reply = a.inside(lambda: puller.ask(request, wire.Prefetched, deadline_s=25.0))
        return reply if reply.pages == len(chain) else None

    assert wait_for("the pages", pulled, DEADLINE_S).pulled_bytes == 20 * 4096
    assert (a.listening(), b.listening()) == ({a.address}, {b.address})
