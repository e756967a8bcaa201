"""What both ends of a directory connection share: the fleet key, authentication, framing, errors."""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any, TypeVar

from antiphon.engines import wire

MAX_HANDSHAKE_BYTES = 64 * 1024
"""Longest frame before both sides have proved the key: a stranger must not make us allocate much."""

MAX_HELLO_CHARS = 4096
MAX_HELLO_NUMBER = {"page_size_tokens": 2**20, "page_bytes": 2**31, "rank": 1023, "world_size": 1024}
"""Of the others 2^40; of an address all 64 bits."""

FLEET_KEY_ENV = "ANTIPHON_FLEET_KEY"
MIN_KEY_BYTES = 16

ReplyT = TypeVar("ReplyT", bound=wire.Message)


class DirectoryError(Exception):
    """A directory did not do what was asked.

    `code` is a code of `wire.Failure` (raised by a backend, or read from the peer's answer), or of our side
    of the connection: unreachable | deadline | broken.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def load_fleet_key(env_name: str = FLEET_KEY_ENV, path: str = "") -> bytes:
    """The fleet's shared key: the content of the file at `path`, else of the environment variable `env_name`.

    Raises ValueError when there is none or it is shorter than 16 bytes.
    """
    if path:
        try:
            key, origin = Path(path).read_bytes().strip(), f"file {path}"
        except OSError as error:
            raise ValueError(f"fleet key file {path} cannot be read: {error}") from error
    else:
        key, origin = os.environ.get(env_name, "").encode(), f"environment variable {env_name}"
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(
            f"the fleet key in {origin} has {len(key)} bytes, at least {MIN_KEY_BYTES} are needed; "
            f"set the same random value for every engine and scheduler of the fleet"
        )
    return key


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port"; raises DirectoryError(bad_request)."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise DirectoryError("bad_request", f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def make_auth(challenge: Any, peer: str, key: bytes) -> tuple[wire.Auth, bytes]:
    """Our proof of the key, and the MAC that the server must answer with."""
    if isinstance(challenge, wire.Failure):
        raise DirectoryError(challenge.code, challenge.message)
    if not isinstance(challenge, wire.Challenge):
        raise DirectoryError("broken", f"expected a challenge, got {type(challenge).__name__}")
    if challenge.version != wire.PROTOCOL_VERSION:
        raise DirectoryError(
            "broken", f"directory speaks protocol {challenge.version}, we speak {wire.PROTOCOL_VERSION}"
        )
    if len(challenge.nonce) != wire.NONCE_BYTES:
        raise DirectoryError("broken", f"challenge nonce has {len(challenge.nonce)} bytes")
    nonce = secrets.token_bytes(wire.NONCE_BYTES)
    auth = wire.Auth(peer=peer, nonce=nonce, mac=wire.client_mac(key, challenge.nonce, nonce))
    return auth, wire.server_mac(key, challenge.nonce, nonce)


def check_welcome(welcome: Any, expected_mac: bytes) -> wire.Hello:
    """The server's hello, once it has proved the key; raises DirectoryError(denied)."""
    if isinstance(welcome, wire.Failure):
        raise DirectoryError(welcome.code, welcome.message)
    if not isinstance(welcome, wire.Welcome):
        raise DirectoryError("broken", f"expected a welcome, got {type(welcome).__name__}")
    if not hmac.compare_digest(welcome.mac, expected_mac):
        raise DirectoryError("denied", "the directory does not know the fleet key")
    check_hello(welcome.hello)
    return welcome.hello


def check_hello(hello: wire.Hello) -> None:
    """Raises DirectoryError(broken) for numbers and texts that no engine has: others calculate with them."""
    at_least = {
        "page_size_tokens": 1, "page_bytes": 1, "pool_tokens": 0, "store_pages": 0, "rank": 0,
        "world_size": 1, "store_address": 0, "context_tokens": 0,
    }  # fmt: skip
    for name, lowest in at_least.items():
        highest = 2**64 if name == "store_address" else MAX_HELLO_NUMBER.get(name, 2**40)
        if not lowest <= getattr(hello, name) <= highest:
            raise DirectoryError("broken", f"the directory's hello has a {name} of {getattr(hello, name)}")
    if hello.rank >= hello.world_size or len(hello.kv_addresses) > MAX_HELLO_NUMBER["world_size"]:
        raise DirectoryError("broken", f"the directory says it is rank {hello.rank} of {hello.world_size}")
    texts = (
        hello.engine_id, hello.incarnation, hello.model_id, hello.model_revision, hello.dtype, hello.layout,
        hello.transport, hello.agent_name, *hello.kv_addresses,
    )  # fmt: skip
    if any(len(text) > MAX_HELLO_CHARS for text in texts):
        raise DirectoryError("broken", f"the directory's hello has a text over {MAX_HELLO_CHARS} characters")


def check_reply(reply: Any, reply_type: type[ReplyT]) -> ReplyT:
    """`reply` if it is a `reply_type`; raises DirectoryError with the peer's code, or broken."""
    if isinstance(reply, reply_type):
        return reply
    if isinstance(reply, wire.Failure):
        raise DirectoryError(reply.code, reply.message)
    raise DirectoryError("broken", f"expected {reply_type.__name__}, got {type(reply).__name__}")


def write_frame(sock: socket.socket, frame: wire.Frame, deadline: float) -> None:
    """Send one frame before `deadline` (time.monotonic); raises TimeoutError, OSError, WireError."""
    data = wire.encode(frame)
    sock.settimeout(remaining_s(deadline))
    sock.sendall(data)


def read_frame(sock: socket.socket, deadline: float, limit_bytes: int = wire.MAX_FRAME_BYTES) -> Any:
    """Read one frame before `deadline`; raises TimeoutError, OSError, EOFError, WireError."""
    length = wire.body_length(read_exactly(sock, 4, deadline))
    if length > limit_bytes:
        raise wire.WireError(
            f"peer announces a frame of {length} bytes, over the limit of {limit_bytes} here"
        )
    return wire.decode(read_exactly(sock, length, deadline))


def read_exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    """Exactly `count` bytes; raises EOFError when the peer closes first."""
    buffer = bytearray(count)
    view = memoryview(buffer)
    filled = 0
    while filled < count:
        sock.settimeout(remaining_s(deadline))
        got = sock.recv_into(view[filled:])
        if got == 0:
            raise EOFError(f"peer closed the connection after {filled} of {count} bytes")
        filled += got
    return bytes(buffer)


def remaining_s(deadline: float) -> float:
    """Seconds until `deadline` (time.monotonic); raises TimeoutError when it has passed."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("deadline passed")
    return remaining


async def read_frame_async(reader: asyncio.StreamReader, limit_bytes: int) -> Any:
    """As `read_frame`, without a deadline of its own: the caller has one."""
    length = wire.body_length(await reader.readexactly(4))
    if length > limit_bytes:
        raise wire.WireError(
            f"peer announces a frame of {length} bytes, over the limit of {limit_bytes} here"
        )
    return wire.decode(await reader.readexactly(length))


def translated(error: Exception, address: str, deadline_s: float) -> DirectoryError:
    """The DirectoryError for an error of the socket or of the protocol."""
    if isinstance(error, TimeoutError):
        return DirectoryError("deadline", f"directory {address} did not answer within {deadline_s:.3g} s")
    if isinstance(error, ConnectionRefusedError | socket.gaierror):
        return DirectoryError("unreachable", f"directory {address} is not reachable: {error}")
    return DirectoryError("broken", f"connection to directory {address} broke: {error!r}")
