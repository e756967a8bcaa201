"""The directory: authentication both ways, limits, failures in words; both clients, the real server."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from antiphon.engines import wire
from antiphon.engines.directory import DirectoryLimits, DirectoryServer
from antiphon.engines.directory_client import (
    AsyncDirectoryClient,
    DirectoryClient,
    DirectoryError,
    load_fleet_key,
)
from antiphon.engines.handshake import read_frame, split_address, write_frame
from tests.kv_peer import make_hello

KEY = b"directory-tests-key-0123456789"
QUICK = DirectoryLimits(handshake_s=0.2, idle_s=30.0, frame_s=0.3)


class Backend:
    """Answers by rule; `block` holds `lookup` back until it is set."""

    def __init__(self, incarnation: str = "life-1") -> None:
        self.hello = make_hello("backend", 1, incarnation=incarnation)
        self.block = threading.Event()
        self.block.set()
        self.entered = threading.Event()

    def touch(self, request: wire.Touch) -> wire.Touched:
        return wire.Touched(len(request.tip))

    def lookup(self, request: wire.Lookup) -> wire.Found:
        self.entered.set()
        self.block.wait(10.0)
        return wire.Found(len(request.hashes))

    def chain(self, request: wire.Chain) -> wire.ChainPages:
        return wire.ChainPages(b"", (request.tip,))

    def reserve(self, request: wire.Reserve) -> wire.Reserved:
        raise DirectoryError("void_incarnation", "this is somebody else")

    def confirm(self, request: wire.Confirm) -> wire.Confirmed:
        raise RuntimeError("a bug")

    def prefetch(self, request: wire.Prefetch) -> wire.Prefetched:
        return wire.Prefetched(0, 0, 0, 0.0, "x" * request.deadline_s.__trunc__())

    def stats(self, request: wire.Stats) -> wire.StatsReply:
        return wire.StatsReply(*range(11))

    def corrupt(self, request: wire.Corrupt) -> wire.Corrupted:
        raise DirectoryError("denied", "no fault injection")

    def link_fault(self, request: wire.LinkFault) -> wire.LinkFaults:
        raise DirectoryError("denied", "no fault injection")


@contextmanager
def serving(
    backend: Backend | None = None, limits: DirectoryLimits | None = None, port: int = 0
) -> Iterator[DirectoryServer]:
    server = DirectoryServer(backend or Backend(), KEY, port=port, limits=limits)
    server.start()
    try:
        yield server
    finally:
        server.close()


def refused(code: str, action: Callable[[], object]) -> str:
    with pytest.raises(DirectoryError) as caught:
        action()
    assert caught.value.code == code, caught.value
    return str(caught.value)


def test_hello_and_requests() -> None:
    """After the handshake a client has the server's hello, and each request gets its own kind of reply."""
    with serving() as server:
        client = DirectoryClient(server.address, KEY, "me")
        assert client.connect(5.0).engine_id == "backend"
        assert client.ask(wire.Touch(b"abc"), wire.Touched, deadline_s=5.0).pages == 3
        assert client.ask(wire.Lookup((b"a", b"b")), wire.Found, deadline_s=5.0).pages == 2
        assert client.ask(wire.Stats(), wire.StatsReply, deadline_s=5.0).discarded_pages_total == 10
        client.close()


def test_failures_leave_the_connection_usable() -> None:
    """A backend's refusal keeps its code; a bug becomes `internal`; the next request is served."""
    with serving() as server:
        client = DirectoryClient(server.address, KEY, "me")
        reserve = wire.Reserve("p", "s", (), 1.0, 0.0)
        assert "somebody else" in refused(
            "void_incarnation", lambda: client.ask(reserve, wire.Reserved, deadline_s=5.0)
        )
        assert "a bug" in refused(
            "internal", lambda: client.ask(wire.Confirm(1), wire.Confirmed, deadline_s=5.0)
        )
        connected_to = client._sock
        assert client.ask(wire.Touch(b"a"), wire.Touched, deadline_s=5.0).pages == 1
        assert client._sock is connected_to
        client.close()


def test_a_client_without_the_key_gets_no_hello() -> None:
    """The server itself refuses a wrong MAC or a short nonce, and sends nothing about the engine."""
    nonce = bytes(wire.NONCE_BYTES)
    with serving() as server:
        for auth in (wire.Auth("me", nonce, bytes(32)), wire.Auth("me", b"", bytes(32))):
            with socket.create_connection(split_address(server.address)) as sock:
                deadline = time.monotonic() + 5.0
                read_frame(sock, deadline)
                write_frame(sock, auth, deadline)
                failure = read_frame(sock, deadline)
                assert isinstance(failure, wire.Failure) and failure.code == "denied"
        wrong = DirectoryClient(server.address, b"another key 0123456789", "me")
        refused("denied", lambda: wrong.connect(5.0))
        assert wrong.hello is None


def test_a_server_without_the_key_is_not_believed() -> None:
    """A hello counts only after the server's own proof of the key."""

    def impostor(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            deadline = time.monotonic() + 5.0
            write_frame(sock, wire.Challenge(wire.PROTOCOL_VERSION, bytes(wire.NONCE_BYTES)), deadline)
            read_frame(sock, deadline)
            write_frame(sock, wire.Welcome(bytes(32), make_hello("impostor", 1)), deadline)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=impostor, args=(listener,))
        thread.start()
        client = DirectoryClient(f"127.0.0.1:{listener.getsockname()[1]}", KEY, "me")
        refused("denied", lambda: client.connect(5.0))
        thread.join(5.0)


def test_requests_before_authentication_are_denied() -> None:
    """The first frame must be a valid proof of the key; anything else ends the connection."""
    with serving() as server, socket.create_connection(split_address(server.address)) as sock:
        deadline = time.monotonic() + 5.0
        assert isinstance(read_frame(sock, deadline), wire.Challenge)
        write_frame(sock, wire.Touch(b"a"), deadline)
        failure = read_frame(sock, deadline)
        assert isinstance(failure, wire.Failure) and failure.code == "denied"
        with pytest.raises(EOFError):
            read_frame(sock, deadline)


def authenticated(server: DirectoryServer) -> socket.socket:
    client = DirectoryClient(server.address, KEY, "me")
    client.connect(5.0)
    assert client._sock is not None
    return client._sock


def test_oversized_frames_end_the_connection() -> None:
    """A prefix over the limit is answered by a Failure, before a byte is allocated, and the server closes."""
    with serving() as server, authenticated(server) as sock:
        sock.sendall((wire.MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
        failure = read_frame(sock, time.monotonic() + 5.0)
        assert failure.code == "bad_request" and "over the limit" in failure.message
        with pytest.raises(EOFError):
            read_frame(sock, time.monotonic() + 5.0)


def test_strangers_may_not_announce_large_frames() -> None:
    """Before the key is proved, frames are limited to a few KiB."""
    with serving() as server, socket.create_connection(split_address(server.address)) as sock:
        deadline = time.monotonic() + 5.0
        read_frame(sock, deadline)
        sock.sendall((1024 * 1024).to_bytes(4, "big"))
        assert read_frame(sock, deadline).code == "bad_request"


def test_a_frame_that_is_no_request_is_answered() -> None:
    """Replies sent as requests get `bad_request`; garbage ends the connection with one too."""
    with serving() as server, authenticated(server) as sock:
        deadline = time.monotonic() + 5.0
        write_frame(sock, wire.Found(1), deadline)
        assert read_frame(sock, deadline).code == "bad_request"
        sock.sendall((3).to_bytes(4, "big") + b"\xc1\xc1\xc1")
        assert read_frame(sock, deadline).code == "bad_request"


@pytest.mark.parametrize("sent", [b"", b"\x00\x00"])
def test_silence_in_the_handshake_is_cut(sent: bytes) -> None:
    """A stranger who sends nothing, or half a frame, is closed after `handshake_s`."""
    with serving(limits=QUICK) as server, socket.create_connection(split_address(server.address)) as sock:
        read_frame(sock, time.monotonic() + 5.0)
        sock.sendall(sent)
        with pytest.raises(EOFError):
            read_frame(sock, time.monotonic() + 5.0)


def test_half_a_request_is_cut() -> None:
    """A request that does not arrive whole within `frame_s` ends the connection."""
    with serving(limits=QUICK) as server, authenticated(server) as sock:
        sock.sendall(b"\x00\x00\x00")
        with pytest.raises(EOFError):
            read_frame(sock, time.monotonic() + 5.0)


def test_connections_are_limited() -> None:
    """One connection too many is told `busy`; when one closes there is room again."""
    with serving(limits=DirectoryLimits(max_connections=1)) as server:
        first = DirectoryClient(server.address, KEY, "first")
        first.connect(5.0)
        second = DirectoryClient(server.address, KEY, "second")
        refused("busy", lambda: second.connect(5.0))
        first.close()
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            try:
                second.connect(5.0)
                break
            except DirectoryError as error:
                assert error.code == "busy"
        assert second.hello is not None
        second.close()


def test_deadlines_of_the_blocking_client() -> None:
    """A slow answer is `deadline`, nobody listening is `unreachable`, and the next ask connects anew."""
    backend = Backend()
    with serving(backend) as server:
        client = DirectoryClient(server.address, KEY, "me")
        backend.block.clear()
        refused("deadline", lambda: client.ask(wire.Lookup(()), wire.Found, deadline_s=0.1))
        backend.block.set()
        assert client.ask(wire.Lookup((b"a",)), wire.Found, deadline_s=5.0).pages == 1
        client.close()
        address = server.address
    refused("unreachable", lambda: DirectoryClient(address, KEY, "me").connect(1.0))
    refused("bad_request", lambda: DirectoryClient("nonsense", KEY, "me").connect(1.0))


def test_a_kept_connection_survives_a_restart_of_the_server() -> None:
    """After the server came back on the same port, the next ask works and brings the new incarnation."""
    with serving(Backend("life-1")) as server:
        client = DirectoryClient(server.address, KEY, "me")
        assert client.connect(5.0).incarnation == "life-1"
        port = split_address(server.address)[1]
    with serving(Backend("life-2"), port=port):
        assert client.ask(wire.Touch(b"a"), wire.Touched, deadline_s=5.0).pages == 1
        assert client.hello is not None and client.hello.incarnation == "life-2"
        client.close()


def test_async_client_overlaps_requests() -> None:
    """Concurrent asks use several connections: one that blocks does not hold up another."""
    backend = Backend()

    async def run(address: str) -> None:
        client = AsyncDirectoryClient(address, KEY, "me", max_connections=3)
        assert (await client.connect(deadline_s=5.0)).engine_id == "backend"
        backend.block.clear()
        slow = asyncio.create_task(client.ask(wire.Lookup((b"a",)), wire.Found, deadline_s=10.0))
        touched = await asyncio.gather(
            *(client.ask(wire.Touch(bytes(n)), wire.Touched, deadline_s=5.0) for n in range(20))
        )
        assert [reply.pages for reply in touched] == list(range(20)) and not slow.done()
        backend.block.set()
        assert (await slow).pages == 1
        await client.close()

    with serving(backend) as server:
        asyncio.run(run(server.address))


def test_async_client_errors_and_cancellation() -> None:
    """Failures carry their code; a deadline or a cancel closes the connection, so replies stay in step."""
    backend = Backend()

    async def run(address: str) -> None:
        client = AsyncDirectoryClient(address, KEY, "me", max_connections=1)
        with pytest.raises(DirectoryError) as caught:
            await client.ask(wire.Corrupt(b"x"), wire.Corrupted, deadline_s=5.0)
        assert caught.value.code == "denied"
        backend.block.clear()
        with pytest.raises(DirectoryError) as caught:
            await client.ask(wire.Lookup((b"a",)), wire.Found, deadline_s=0.1)
        assert caught.value.code == "deadline"
        backend.entered.clear()
        task = asyncio.create_task(client.ask(wire.Lookup((b"a",)), wire.Found, deadline_s=10.0))
        await asyncio.to_thread(backend.entered.wait, 10.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        backend.block.set()
        assert (await client.ask(wire.Touch(b"abcd"), wire.Touched, deadline_s=5.0)).pages == 4
        await client.close()
        wrong = AsyncDirectoryClient(address, b"another key 0123456789", "me")
        with pytest.raises(DirectoryError) as caught:
            await wrong.connect(deadline_s=5.0)
        assert caught.value.code == "denied"

    with serving(backend) as server:
        asyncio.run(run(server.address))


def test_async_client_after_a_restart() -> None:
    """Idle connections to a server that went away are replaced, and the new hello is seen."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = DirectoryServer(Backend("life-1"), KEY)
        server.start()
        client = AsyncDirectoryClient(server.address, KEY, "me")
        await client.ask(wire.Touch(b""), wire.Touched, deadline_s=5.0)
        await loop.run_in_executor(None, server.close)
        with pytest.raises(DirectoryError) as caught:
            await client.ask(wire.Touch(b""), wire.Touched, deadline_s=5.0)
        assert caught.value.code == "unreachable"
        again = DirectoryServer(Backend("life-2"), KEY, port=split_address(server.address)[1])
        again.start()
        await client.ask(wire.Touch(b""), wire.Touched, deadline_s=5.0)
        assert client.hello is not None and client.hello.incarnation == "life-2"
        await client.close()
        await loop.run_in_executor(None, again.close)

    asyncio.run(run())


def test_closing_ends_all_threads() -> None:
    """`close` cuts connections and leaves no thread behind."""
    before = set(threading.enumerate())
    with serving() as server:
        for _ in range(3):
            authenticated(server)
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert left == []


def test_a_taken_port_is_named() -> None:
    """The error of a second server on one address says which address it is."""
    with serving() as server:
        port = split_address(server.address)[1]
        with pytest.raises(OSError, match=str(port)):
            DirectoryServer(Backend(), KEY, port=port)


def test_fleet_key_from_environment_or_file(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """A key comes from a file or the environment; a short or missing one is refused by name."""
    path = f"{tmp_path}/key"
    monkeypatch.setenv("SOME_KEY", KEY.decode())
    assert load_fleet_key("SOME_KEY") == KEY
    with open(path, "wb") as file:
        file.write(b"  file-key-0123456789\n")
    assert load_fleet_key("SOME_KEY", path) == b"file-key-0123456789"
    monkeypatch.setenv("SOME_KEY", "short")
    with pytest.raises(ValueError, match="SOME_KEY has 5 bytes"):
        load_fleet_key("SOME_KEY")
    with pytest.raises(ValueError, match="cannot be read"):
        load_fleet_key("SOME_KEY", path + ".missing")
