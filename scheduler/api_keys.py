"""API keys: whose request it is. They are kept as SHA-256 digests, in the configuration or in the ledger.

A key has 256 random bits, so its digest tells nothing of it and needs no salt. Nobody can steer the digest
of what he presents, so a look-up by digest leaks nothing by its time; digests are compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from antiphon.scheduler.access_config import KeyConfig, LimitsConfig
from antiphon.scheduler.config import Config
from antiphon.scheduler.errors import UserError
from antiphon.scheduler.ledger_connection import LedgerConnection, LedgerUnavailable

log = logging.getLogger(__name__)

KEY_PREFIX = "ak-"
MIN_KEY_CHARS = 16
MAX_CACHED = 10_000


class KeyLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """A key's own limits; None = those of [limits], 0 = none."""

    body_bytes: int | None = None
    sessions: int | None = None
    rounds_in_flight: int | None = None
    tokens_per_minute: int | None = None

    def over(self, default: LimitsConfig) -> LimitsConfig:
        """What counts: our own where there is one."""
        own = {name: getattr(self, name) for name in self.__struct_fields__}
        given = {name: value for name, value in own.items() if value is not None}
        return msgspec.convert(msgspec.to_builtins(default) | given, LimitsConfig)


class ApiKey(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of a key; never the key."""

    name: str
    tenant: str = "default"
    admin: bool = False
    limits: KeyLimits = KeyLimits()
    created_s: float = 0.0
    """Unix time; 0 = by the configuration."""


def new_key() -> str:
    """A key that nobody can guess."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str | bytes) -> bytes:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


class LedgerKeys:
    """The keys that the ledger keeps, for the whole fleet. Every call may raise `LedgerUnavailable`."""

    def __init__(self, connection: LedgerConnection) -> None:
        self._connection = connection
        self._records, self._names = connection.keys("api_keys", "api_key_names")

    async def add(self, key: ApiKey, digest: bytes) -> bool:
        """False if there is one of that name."""
        if not await self._connection.command("HSETNX", self._names, key.name, digest.hex()):
            return False
        await self._connection.command("HSET", self._records, digest.hex(), msgspec.json.encode(key))
        return True

    async def remove(self, name: str) -> bool:
        """False if there is none of that name."""
        digest = await self._connection.command("HGET", self._names, name)
        if digest is None:
            return False
        await self._connection.commands([("HDEL", self._records, digest), ("HDEL", self._names, name)])
        return True

    async def list(self) -> tuple[ApiKey, ...]:
        """By name."""
        records = await self._connection.command("HGETALL", self._records)
        found = (_decoded(text) for text in records.values())
        return tuple(sorted((key for key in found if key is not None), key=lambda key: key.name))

    async def find(self, digest: bytes) -> ApiKey | None:
        self._connection.not_if_it_failed()
        text = await self._connection.command("HGET", self._records, digest.hex())
        return None if text is None else _decoded(text)


@dataclass(frozen=True, slots=True)
class _Seen:
    key: ApiKey
    asked_s: float


class KeyRing:
    """Finds the key that a client presents. For one event loop.

    Keys of the ledger are kept for `key_cache_s`, and for `key_keep_s` while it is away.
    """

    def __init__(
        self,
        config: Config,
        ledger: LedgerKeys | None = None,
        *,
        env: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
        max_cached: int = MAX_CACHED,
    ) -> None:
        """`ledger` counts if the configuration says so. Raises `UserError` if the environment lacks a key."""
        self._configured = [(_digest(key, env), _from_config(key)) for key in config.keys]
        self._ledger = ledger
        self._access = config.access
        self._clock = clock
        self._max_cached = max_cached
        self._seen: OrderedDict[bytes, _Seen] = OrderedDict()

    @property
    def required(self) -> bool:
        """A request needs a key; else any is taken, and none."""
        return bool(self._configured) or self._access.ledger_keys

    async def find(self, presented: bytes) -> ApiKey | None:
        """None for a key that nobody knows. Raises `LedgerUnavailable` if only the ledger could say."""
        digest = digest_of(presented)
        found = None
        for known, key in self._configured:  # all of them: the time must not say which one it was
            if hmac.compare_digest(known, digest):
                found = key
        if found is not None or not self._access.ledger_keys:
            return found
        if self._ledger is None:
            raise LedgerUnavailable("this gateway has no ledger to look for keys in")
        return await self._in_ledger(self._ledger, digest)

    async def _in_ledger(self, ledger: LedgerKeys, digest: bytes) -> ApiKey | None:
        seen, now = self._seen.get(digest), self._clock()
        if seen is not None and now - seen.asked_s < self._access.key_cache_s:
            return seen.key
        try:
            key = await ledger.find(digest)
        except LedgerUnavailable:
            if seen is None or now - seen.asked_s >= self._access.key_keep_s:
                raise
            return seen.key
        self._seen.pop(digest, None)
        if key is not None:
            self._seen[digest] = _Seen(key, now)
            if len(self._seen) > self._max_cached:
                self._seen.popitem(last=False)
        return key


def _digest(key: KeyConfig, env: Mapping[str, str]) -> bytes:
    if key.key_sha256:
        return bytes.fromhex(key.key_sha256)
    value = env.get(key.key_env, "")
    if len(value) < MIN_KEY_CHARS:
        raise UserError(
            f"key {key.name!r}: the environment variable {key.key_env} must hold at least "
            f"{MIN_KEY_CHARS} characters, it has {len(value)}"
        )
    return digest_of(value)


def _from_config(key: KeyConfig) -> ApiKey:
    limits = KeyLimits(key.body_bytes, key.sessions, key.rounds_in_flight, key.tokens_per_minute)
    return ApiKey(key.name, key.tenant, key.admin, limits)


def _decoded(text: str) -> ApiKey | None:
    try:
        return msgspec.json.decode(text, type=ApiKey)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        log.warning("a key of the ledger cannot be read and is ignored: %s", error)
        return None
