"""Who may do what: signed records, the key of engines' HTTP, strangers at the directory, secrets."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import redis
import redis.asyncio

from antiphon.engines import wire
from antiphon.engines.base import EngineError, EngineRecord
from antiphon.engines.directory import DirectoryLimits, DirectoryServer
from antiphon.engines.directory_client import DirectoryClient
from antiphon.engines.fleet_secrets import engine_http_key, is_signed, record_signature
from antiphon.engines.handshake import read_frame, split_address, write_frame
from antiphon.engines.http import HttpEngine
from antiphon.engines.registry import RecordReader, Registration, index_key, parse_record, record_key, shown
from antiphon.scheduler.config import EngineConfig, load_config, to_toml
from antiphon.scheduler.engine_keys import StaticEngineKeys
from antiphon.scheduler.errors import UserError
from tests.conftest import FLEET_KEY, SglangPair
from tests.engine_processes import free_port, wait_for
from tests.fuzz_parsers import FRAMES
from tests.test_directory import Backend

KEY, OTHER_KEY = b"security-tests-fleet-key-01234567", b"another-fleet-key-0123456789abcdef"
RECORD = EngineRecord("e", "http://127.0.0.1:1", "decode", "life")


# ---------------------------------------------------------------- records


def test_a_signature_binds_key_fleet_and_record() -> None:
    """Any change of one of them, and it does not hold."""
    signed = record_signature(KEY, "f", b"record")
    assert is_signed(KEY, "f", b"record", signed)
    assert not is_signed(OTHER_KEY, "f", b"record", signed)
    assert not is_signed(KEY, "g", b"record", signed)
    assert not is_signed(KEY, "f", b"Record", signed)
    assert not is_signed(KEY, "fr", b"ecord", signed)
    assert not is_signed(KEY, "f", b"record", "") and not is_signed(KEY, "f", b"record", "\udcff")


def test_only_signed_records_are_read(valkey_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Unsigned, of another fleet key, copied to another id, changed, no text at all: each is refused, said
    once and counted; the good one beside them is read."""
    fleet = f"signed-{secrets.token_hex(4)}"
    good = Registration(valkey_url, RECORD, fleet=fleet, fleet_key=KEY)
    others = [
        Registration(valkey_url, EngineRecord("unsigned", "http://127.0.0.1:2", "decode", "x"), fleet=fleet),
        Registration(
            valkey_url, EngineRecord("foreign-key", "http://127.0.0.1:2", "decode", "x"),
            fleet=fleet, fleet_key=OTHER_KEY,
        ),
    ]  # fmt: skip
    for registration in (good, *others):
        registration.start()
    with redis.Redis.from_url(valkey_url) as client:
        fields = client.hgetall(record_key(fleet, "e"))
        client.hset(record_key(fleet, "copied"), mapping=fields)
        changed = fields[b"record"].replace(b"127.0.0.1:1", b"127.0.0.1:9")
        client.hset(record_key(fleet, "changed"), mapping=fields | {b"record": changed})
        client.hset(record_key(fleet, "bytes"), mapping=fields | {b"record": b"\xff\xfe"})
        client.sadd(index_key(fleet), "copied", "changed", "bytes")
    reader = RecordReader(fleet, KEY)

    async def read() -> tuple[EngineRecord, ...]:
        client = redis.asyncio.Redis.from_url(valkey_url, decode_responses=True, encoding_errors="replace")
        async with client:
            await reader.read(client)
            return await reader.read(client)

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(read()) == (RECORD,)
    assert reader.refused == {"unsigned": 8, "foreign": 2}
    assert len(caplog.messages) == 5
    for registration in (good, *others):
        registration.close()


# ---------------------------------------------------------------- the engine's HTTP


def test_static_engines_keys() -> None:
    """From the environment; the fleet's with a linker; none for others' engines. A missing one is said."""
    engines = (
        EngineConfig("named", "http://h:1", api_key_env="K"),
        EngineConfig("linked", "http://h:2", kv_addresses=("h:3",)),
        EngineConfig("plain", "http://h:4"),
    )
    keys = StaticEngineKeys(engines, {"K": "secret"})

    def record(engine: EngineConfig, incarnation: str = "") -> EngineRecord:
        return EngineRecord(engine.engine_id, engine.url, "decode", incarnation, engine.kv_addresses)

    assert [keys.get(record(engine)) for engine in engines] == ["secret", None, ""]
    assert keys.get(record(engines[2], "registered")) is None
    with pytest.raises(UserError, match="variable K is not set"):
        StaticEngineKeys(engines, {})


def listening(pid: int) -> set[str]:
    """Addresses on which a process listens, of both families; one of IPv6 as its hexadecimal."""
    inodes = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                at = words[1].partition(":")[0]
                found.add(at if table == "tcp6" else socket.inet_ntoa(bytes.fromhex(at)[::-1]))
    return found


def test_a_simulated_engine_asks_for_the_key_and_listens_on_one_interface(tmp_path: Path) -> None:
    """By its own command: strangers get 401, whoever has another fleet's key too; health is open. It listens
    on the configured address only, and no secret is on its command line or in its log."""
    port, log = free_port(), tmp_path / "engine.log"
    command = [sys.executable, "-m", "antiphon.scheduler.cli", "engine", "--simulated", "--port", str(port),
               "--ledger", "none", "--interface", "127.0.0.1"]  # fmt: skip
    env = dict(os.environ) | {"ANTIPHON_FLEET_KEY": KEY.decode()}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
    try:
        record = EngineRecord("e", f"http://127.0.0.1:{port}", "decode", "")

        async def call(key: bytes, http_key: str | None = None) -> str:
            engine = HttpEngine(record, key, http_key=http_key)
            try:
                await engine.connect(5.0)
                await engine.load(deadline_s=5.0)
                return "ok"
            except EngineError as error:
                return str(error.status)
            finally:
                await engine.close()

        wait_for("the engine", lambda: asyncio.run(call(KEY)) == "ok", 60.0)
        refused = [
            asyncio.run(call(OTHER_KEY)),
            asyncio.run(call(KEY, "")),
            asyncio.run(call(KEY, "ek-\xff")),
        ]
        assert refused == ["401", "401", "401"]
        assert listening(process.pid) == {"127.0.0.1"}
        said = Path(f"/proc/{process.pid}/cmdline").read_text() + log.read_text()
        assert KEY.decode() not in said and engine_http_key(KEY) not in said
    finally:
        process.terminate()
        process.wait(20.0)


def test_real_engines_refuse_strangers(sglang_pair: SglangPair) -> None:
    """SGLang itself: with the fleet's key loads are told, without it 401; health is open to all."""

    async def call(http_key: str | None) -> int:
        record = EngineRecord("e", sglang_pair.decode.url, "decode", "")
        engine = HttpEngine(record, FLEET_KEY, http_key=http_key)
        try:
            await engine.connect(10.0)
            await engine.load(deadline_s=10.0)
            await engine.abort("nobody", deadline_s=10.0)
            return 200
        except EngineError as error:
            return error.status
        finally:
            await engine.close()

    assert [asyncio.run(call(key)) for key in (None, "", "ek-" + "0" * 64)] == [200, 401, 401]


# ---------------------------------------------------------------- strangers at a directory


def dial(server: DirectoryServer) -> socket.socket:
    return socket.create_connection(split_address(server.address), 5.0)


def authenticated(server: DirectoryServer) -> socket.socket:
    sock = dial(server)
    deadline = time.monotonic() + 5.0
    challenge = read_frame(sock, deadline)
    nonce = secrets.token_bytes(wire.NONCE_BYTES)
    write_frame(sock, wire.Auth("t", nonce, wire.client_mac(KEY, challenge.nonce, nonce)), deadline)
    assert isinstance(read_frame(sock, deadline), wire.Welcome)
    return sock


def test_what_was_heard_once_opens_nothing() -> None:
    """A recorded proof is refused (another nonce), and so is the server's own challenge sent back to it."""
    with DirectoryServer_(Backend()) as server:
        first = dial(server)
        deadline = time.monotonic() + 5.0
        challenge = read_frame(first, deadline)
        heard = wire.Auth("t", b"n" * 32, wire.client_mac(KEY, challenge.nonce, b"n" * 32))
        write_frame(first, heard, deadline)
        welcome = read_frame(first, deadline)
        for forged in (
            heard,  # replayed
            wire.Auth("t", b"n" * 32, welcome.mac),  # the server's proof, reflected
            wire.Auth("t", challenge.nonce, wire.server_mac(KEY, challenge.nonce, b"n" * 32)),
        ):
            other = dial(server)
            read_frame(other, deadline)
            write_frame(other, forged, deadline)
            assert read_frame(other, deadline).code == "denied"
            other.close()
        first.close()


def test_a_directory_outlives_strangers() -> None:
    """Random frames before and after the handshake, slow senders, half-open ends, more connections than it
    takes: a good client is then served at once."""
    dice = random.Random(7)
    limits = DirectoryLimits(max_connections=64, handshake_s=0.5, idle_s=5.0, frame_s=0.5)
    with DirectoryServer_(Backend(), limits) as server:
        frames = [wire.encode(frame) for frame in FRAMES]
        for number in range(60):
            sock = authenticated(server) if number % 3 == 0 else dial(server)
            raw = bytearray(dice.choice(frames))
            raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
            noise = dice.choice((bytes(raw), dice.randbytes(60), struct.pack(">I", 40) + dice.randbytes(40)))
            try:
                sock.sendall(noise)
                if number % 2:
                    sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it has thrown us out already
            sock.close()
        held = []
        for _ in range(300):
            try:
                held.append(dial(server))
            except OSError:
                break
        slow = held[0]
        slow.sendall(b"\x00")

        def served() -> bool:
            client = DirectoryClient(server.address, KEY, "good")
            try:
                return client.ask(wire.Lookup((b"h" * 32,)), wire.Found, deadline_s=5.0).pages == 1
            except Exception:
                return False
            finally:
                client.close()

        wait_for("a good client is served", served, 15.0)
        for sock in held:
            sock.close()


class DirectoryServer_:  # noqa: N801 - the server, as a context
    def __init__(self, backend: Backend, limits: DirectoryLimits | None = None) -> None:
        self._server = DirectoryServer(backend, KEY, limits=limits)

    def __enter__(self) -> DirectoryServer:
        self._server.start()
        return self._server

    def __exit__(self, *ignored: object) -> None:
        self._server.close()


# ---------------------------------------------------------------- secrets


def test_the_configuration_is_printed_without_secrets(tmp_path: Path) -> None:
    """Passwords of the ledger, whatever part of the URL they are in; keys are named by their variables."""
    file = tmp_path / "antiphon.toml"
    file.write_text('[[engines]]\nengine_id = "e"\nurl = "http://h:1"\napi_key_env = "ENGINE_KEY"\n')
    for url in ("rediss://user:hunter22@h:6379/0", "redis://:hunter22@h/0", "redis://h/0?password=hunter22"):
        env = {"ANTIPHON_REDIS_URL": url, "ENGINE_KEY": "hunter22", "ANTIPHON_FLEET_KEY": "hunter22hunter22"}
        printed = to_toml(load_config(file, env=env))
        assert "hunter22" not in shown(url)
        assert "hunter22" not in printed and "ENGINE_KEY" in printed


def test_an_answer_that_is_too_large_is_cut_off() -> None:
    """An engine that answers without end costs a bounded amount of memory."""

    ended = asyncio.Event()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
            ended.set()

    async def main() -> str:
        server = await asyncio.start_server(endless, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        engine = HttpEngine(EngineRecord("e", f"http://127.0.0.1:{port}", "decode", ""), KEY)
        try:
            await engine.load(deadline_s=20.0)
        except EngineError as error:
            return str(error)
        finally:
            await engine.close()
            server.close()
            await asyncio.wait_for(ended.wait(), 10.0)
        return "believed"

    assert "more than" in asyncio.run(main())


def test_records_are_small(valkey_url: str) -> None:
    """What a record may hold is bounded, in bytes, ranks, text and numbers."""
    good = msgspec.to_builtins(RECORD)
    for change in ({"model_id": "x" * 5000}, {"kv_addresses": ["h:1"] * 2000}, {"chunk_tokens": -1},
                   {"url": "file:///etc/passwd"}, {"url": "http://user@h"}, {"engine_id": ""},
                   {"model_path": "x" * 70_000}):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            parse_record(msgspec.json.encode(good | change))
    assert parse_record(msgspec.json.encode(good)) == RECORD
