"""Frames of the directory protocol: 4-byte big-endian length, then msgpack of one tagged struct.

A connection is authenticated first, both ways, by a shared fleet key that never crosses the wire:

    server -> Challenge(nonce)
    client -> Auth(peer, nonce, mac = HMAC(key, "client" + server nonce + client nonce))
    server -> Welcome(mac = HMAC(key, "server" + client nonce + server nonce), hello)

Then the client sends one request at a time and reads one reply (pool connections to overlap). A request
that cannot be served is answered by `Failure`; a frame that cannot be read ends the connection.
Page hashes are 32 raw bytes. `hashes` lists are always one contiguous piece of a chain, `parent` being the
hash before the first of them (empty at the root).
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any, Literal

import msgspec

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 8 * 1024 * 1024
NONCE_BYTES = 32
HASH_BYTES = 32


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Any frame."""


class Hello(msgspec.Struct, frozen=True):
    """The truth about one rank of an engine; everything the scheduler believes starts here."""

    engine_id: str
    incarnation: str
    model_id: str
    model_revision: str
    dtype: str
    page_size_tokens: int
    page_bytes: int
    layout: str
    """Names the byte order inside a page; pages move only between equal layouts."""
    pool_tokens: int
    """Capacity of the device pool."""
    store_pages: int
    rank: int
    world_size: int
    kv_addresses: tuple[str, ...]
    """host:port of the directory of every rank, in rank order."""
    transport: str
    """"nixl" or "virtual" (simulated engines)."""
    agent_name: str = ""
    agent_metadata: bytes = b""
    store_address: int = 0
    """Where the store lies in the engine's memory: what a peer's READ is relative to."""
    context_tokens: int = 0
    """The model window."""


class Challenge(Message, tag="challenge", frozen=True):
    version: int
    nonce: bytes


class Auth(Message, tag="auth", frozen=True):
    peer: str
    nonce: bytes
    mac: bytes


class Welcome(Message, tag="welcome", frozen=True):
    mac: bytes
    hello: Hello


class Failure(Message, tag="failure", frozen=True):
    code: str
    """bad_request | denied | void_incarnation | layout_mismatch | peer_unreachable | busy | internal"""
    message: str


class Touch(Message, tag="touch", frozen=True):
    """Mark the chain that ends in `tip` as just used (a full device hit never reaches the linker)."""

    tip: bytes


class Touched(Message, tag="touched", frozen=True):
    pages: int


class Lookup(Message, tag="lookup", frozen=True):
    """How many of these pages, from the first on, does this store hold?"""

    hashes: tuple[bytes, ...]


class Found(Message, tag="found", frozen=True):
    pages: int


class Chain(Message, tag="chain", frozen=True):
    """Which pages lead up to `tip` in this store?"""

    tip: bytes


class ChainPages(Message, tag="chain_pages", frozen=True):
    """They end in `tip`; none if it is not here."""

    parent: bytes
    """The digest before the first of them, as far as it is known."""
    hashes: tuple[bytes, ...]


class Reserve(Message, tag="reserve", frozen=True):
    """Pin the longest stored prefix of `hashes` for a peer's READ.

    Waits up to `wait_s` while offloads that may still bring the pages are under way.
    """

    puller: str
    """Incarnation of the engine that will read."""
    source_incarnation: str
    """Who the puller believes it speaks to; another one answers void_incarnation."""
    hashes: tuple[bytes, ...]
    ttl_s: float
    wait_s: float


class Reserved(Message, tag="reserved", frozen=True):
    pin_id: int
    slots: tuple[int, ...]
    checksums: tuple[int, ...] = ()
    """crc32 of each page in checksum mode, else empty."""


class Confirm(Message, tag="confirm", frozen=True):
    """The READ is over: give the pin back and say whether it was held all the time."""

    pin_id: int


class Confirmed(Message, tag="confirmed", frozen=True):
    held: bool


class Prefetch(Message, tag="prefetch", frozen=True):
    """Scheduler -> puller: bring these pages from that source into your store."""

    source_address: str
    source_incarnation: str
    parent: bytes
    hashes: tuple[bytes, ...]
    deadline_s: float


class Prefetched(Message, tag="prefetched", frozen=True, omit_defaults=True):
    pages: int
    """Of `hashes`, from the first on, how many are in the puller's store now (already there or pulled)."""
    pulled_pages: int
    pulled_bytes: int
    elapsed_s: float
    reason: str
    """"" when everything came; else why not, in words."""
    blame: bool = False
    """The way from the source, or the source itself, failed: not what it holds, nor the puller."""


class Stats(Message, tag="stats", frozen=True):
    """Ask for counters."""


class StatsReply(Message, tag="stats_reply", frozen=True):
    free_pages: int
    used_pages: int
    inflight_pages: int
    quarantined_pages: int
    pins: int
    pending_offloads: int
    pulled_pages_total: int
    pulled_bytes_total: int
    served_pages_total: int
    evicted_pages_total: int
    discarded_pages_total: int
    """Read but not made visible: pin lost, checksum wrong, deadline passed."""


class Corrupt(Message, tag="corrupt", frozen=True):
    """Test hook: flip bytes of one stored page. Denied unless the engine was started with fault injection."""

    page_hash: bytes


class Corrupted(Message, tag="corrupted", frozen=True):
    found: bool


LinkFaultKind = Literal["none", "slow", "cut", "corrupt", "clear"]


class LinkFault(Message, tag="link_fault", frozen=True):
    """Test hook: what the next READs of this puller do wrong (`link_faults.py`). Denied as `Corrupt` is."""

    kind: LinkFaultKind
    """`none` only asks."""
    seconds: float = 0.0
    bytes_per_s: float = 0.0
    count: int = 0
    """READs that it hits; 0 = all until `clear`."""


class LinkFaults(Message, tag="link_faults", frozen=True):
    hit_reads: int
    reading: int
    """READs under way."""


Frame = (
    Challenge | Auth | Welcome | Failure | Touch | Touched | Lookup | Found | Reserve | Reserved
    | Confirm | Confirmed | Prefetch | Prefetched | Stats | StatsReply | Corrupt | Corrupted
    | LinkFault | LinkFaults | Chain | ChainPages
)  # fmt: skip

Request = Touch | Lookup | Chain | Reserve | Confirm | Prefetch | Stats | Corrupt | LinkFault

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


class WireError(Exception):
    """The other side broke the protocol: too long, not msgpack, unknown tag, wrong type."""


def encode(frame: Frame) -> bytes:
    """Length prefix and body; raises `WireError` over MAX_FRAME_BYTES."""
    body = _encoder.encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return len(body).to_bytes(4, "big") + body


def body_length(prefix: bytes) -> int:
    """Length that a 4-byte prefix announces; raises `WireError` over MAX_FRAME_BYTES."""
    length = int.from_bytes(prefix, "big")
    if length > MAX_FRAME_BYTES:
        raise WireError(f"peer announces a frame of {length} bytes, over the limit of {MAX_FRAME_BYTES}")
    return length


def decode(body: bytes | memoryview) -> Any:
    """One frame's struct; raises `WireError` naming what is wrong."""
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"unreadable frame: {error}") from error


def client_mac(key: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.digest(key, b"client" + server_nonce + client_nonce, hashlib.sha256)


def server_mac(key: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.digest(key, b"server" + client_nonce + server_nonce, hashlib.sha256)
