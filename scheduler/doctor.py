"""`antiphon doctor`: what is missing here, and whether every signal of a running fleet is really there.

Each check is a function that returns `Check`s and raises nothing. The fleet is proved by doing: a random
prompt is prefilled, looked up by the hashes that we computed, and pulled by every other engine.
"""

from __future__ import annotations

import asyncio
import platform
import secrets
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from antiphon.engines.base import Engine, EngineError, EngineRecord
from antiphon.engines.http import HttpEngine
from antiphon.engines.page_hash import namespace_seed, page_hashes
from antiphon.engines.registry import shown
from antiphon.scheduler.config import Config
from antiphon.scheduler.engine_keys import StaticEngineKeys
from antiphon.scheduler.errors import UserError
from antiphon.scheduler.fleet_key import load_or_create_fleet_key
from antiphon.scheduler.ledger import Ledger, LedgerUnavailable
from antiphon.scheduler.valkey import ValkeyError, resolve_ledger_url

SUPPORTED_PYTHON = ((3, 11), (3, 13))
SGLANG_VERSION = "0.5.23"
ENGINE_PACKAGES = {"sglang": ("sglang",), "nixl": ("nixl-cu12", "nixl-cu13"), "torch": ("torch",)}
"""What an SGLang engine needs -> names under which it may be installed."""
INSTALL = {
    "sglang": f"pip install --no-deps sglang=={SGLANG_VERSION}",
    "nixl": "pip install --no-deps nixl-cu12 nixl",
    "torch": "pip install 'antiphon[sglang-cpu]'; on a GPU machine, the torch that its SGLang came with",
}
DEADLINE_S = 30.0
"""For each call to an engine: the first prefill after a start may be slow."""
OFFLOAD_DEADLINE_S = 10.0
POLL_S = 0.05
PROBE_PAGES = 3
MAX_PULLERS = 8
"""In a large fleet each engine's pages are pulled by this many others, not by all."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `fix` says what to do, where there is something to do."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def run_doctor(config: Config) -> list[Check]:
    """All checks, in the order in which they should be mended."""
    checks = [check_python(sys.version_info[:2]), *check_packages(installed_version)]
    try:
        key_file = Path(config.fleet.key_file).expanduser() if config.fleet.key_file else None
        fleet_key = load_or_create_fleet_key(config.state_dir(), key_file)
        server = resolve_ledger_url(config.ledger.url, config.state_dir())
    except UserError as error:
        return [*checks, Check("fleet key", False, str(error), "make the file readable by its owner only")]
    except ValkeyError as error:
        return [
            *checks,
            Check("ledger", False, str(error), "see the log named there, or use a Redis of yours"),
        ]
    static = [EngineRecord(e.engine_id, e.url, e.pool, "", e.kv_addresses) for e in config.engines]
    try:
        key_of = StaticEngineKeys(config.engines).get
        return checks + asyncio.run(
            _check_running(server.url, config.ledger.fleet, static, fleet_key, key_of)
        )
    except UserError as error:
        return [*checks, Check("engine keys", False, str(error), "set it, or take api_key_env out")]
    finally:
        if server.embedded is not None:
            server.embedded.stop()


# ---------------------------------------------------------------- this machine


def check_python(version: tuple[int, ...]) -> Check:
    oldest, newest = SUPPORTED_PYTHON
    text = ".".join(map(str, version))
    fix = "" if version >= oldest else f"use Python {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
    tested = "" if version <= newest else f"; tested up to {newest[0]}.{newest[1]}"
    return Check("python", not fix, f"{text} on {platform.system()} {platform.machine()}{tested}", fix)


def installed_version(distribution: str) -> str | None:
    """None = not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_packages(version_of: Callable[[str], str | None]) -> list[Check]:
    """What SGLang engines need. A machine with none of it is fine: it runs the gateway."""
    found = {name: _first(version_of, names) for name, names in ENGINE_PACKAGES.items()}
    if not any(found.values()):
        fix = "; ".join(INSTALL.values())
        return [
            Check("engine packages", True, "none: gateway and simulated engines only", f"for engines: {fix}")
        ]
    checks = []
    for name, version in found.items():
        ok = version is not None and (name != "sglang" or version == SGLANG_VERSION)
        detail = version or "not installed"
        if version is not None and not ok:
            detail += f", but the linker's extension point exists in {SGLANG_VERSION} only"
        checks.append(Check(f"package {name}", ok, detail, "" if ok else INSTALL[name]))
    return checks


def _first(version_of: Callable[[str], str | None], names: Iterable[str]) -> str | None:
    return next((version for name in names if (version := version_of(name)) is not None), None)


# ---------------------------------------------------------------- the running fleet


async def _check_running(
    url: str,
    fleet: str,
    static: Sequence[EngineRecord],
    fleet_key: bytes,
    key_of: Callable[[EngineRecord], str | None],
) -> list[Check]:
    ledger = Ledger(url, fleet=fleet, deadline_s=5.0, fleet_key=fleet_key)
    try:
        await ledger.check()
        registered = await ledger.engines()
    except LedgerUnavailable as error:
        registered = ()
        checks = [Check("ledger", False, str(error), "start it, or name another one by ANTIPHON_REDIS_URL")]
    else:
        checks = [Check("ledger", True, f"{shown(url)} answers and takes our scripts")]
    finally:
        await ledger.close()
    if refused := sum(ledger.records.refused.values()):
        fix = "one fleet key for all? engines older than this release? else somebody else writes the ledger"
        reasons = ", ".join(sorted(ledger.records.refused))
        checks.append(Check("engine records", False, f"{refused} refused ({reasons})", fix))
    records = {record.engine_id: record for record in (*static, *registered)}
    return checks + await check_fleet([records[name] for name in sorted(records)], fleet, fleet_key, key_of)


async def check_fleet(
    records: Sequence[EngineRecord],
    fleet: str,
    fleet_key: bytes,
    key_of: Callable[[EngineRecord], str | None] = lambda record: None,
) -> list[Check]:
    """Every engine by itself, then every transfer between two. `key_of`: its HTTP's, None = the fleet's."""
    if not records:
        fix = "start one: antiphon engine --model DIR --port N --ledger URL"
        return [Check("engines", False, f"none is registered in fleet {fleet!r} or configured", fix)]
    checks: list[Check] = []
    engines = [HttpEngine(record, fleet_key, peer="doctor", http_key=key_of(record)) for record in records]
    try:
        linked: list[Engine] = []
        for engine in engines:
            reachable = await check_engine(engine)
            checks.append(reachable)
            if reachable.ok and engine.hello is not None:
                linked.append(engine)
                checks.append(await check_page_hashes(engine))
        for at, source in enumerate(linked):
            # Pages never move between engines of different models.
            others = [
                engine for engine in (*linked[at + 1 :], *linked[:at]) if _model(engine) == _model(source)
            ]
            pullers = others[:MAX_PULLERS]
            checks += await check_transfers(source, pullers)
        if len(linked) == 1:
            fix = "start another one with the linker"
            checks.append(
                Check("transfers", True, "only one engine has the linker: nothing to pull from", fix)
            )
    finally:
        for engine in engines:
            await engine.close()
    return checks


async def check_engine(engine: Engine) -> Check:
    """Health over HTTP, and the hello of every rank."""
    record = engine.record
    name = f"engine {record.engine_id}"
    try:
        await engine.connect(DEADLINE_S)
    except EngineError as error:
        fix = "same fleet key on both sides? address and port reachable? its log says more"
        return Check(name, False, f"{record.url}: {error}", fix)
    hello = engine.hello
    if hello is None:
        detail = f"{record.url} is healthy; it has no linker: local rounds only"
        return Check(name, True, detail, "start it by `antiphon engine` to have its KV moved")
    detail = (
        f"{record.url} is healthy; linker over {hello.transport}, {hello.world_size} rank(s), "
        f"{hello.store_pages} pages of {hello.page_size_tokens} tokens; {hello.model_id}"
    )
    return Check(name, True, detail)


async def check_page_hashes(engine: Engine) -> Check:
    """A prompt that was prefilled there is found by the hashes computed here, with and without a salt."""
    name = f"page hashes of {engine.record.engine_id}"
    for cache_salt in (None, "doctor"):
        try:
            _, hashes = await _prefilled(engine, cache_salt)
            found = await _lookup(engine, hashes)
        except EngineError as error:
            return Check(name, False, str(error), "see the engine's log")
        if found != len(hashes):
            salted = "with" if cache_salt else "without"
            detail = f"{found} of {len(hashes)} pages found {salted} a cache salt"
            fix = f"is it SGLang {SGLANG_VERSION}? other versions may hash otherwise; see the engine's log"
            return Check(name, False, detail, fix)
    return Check(name, True, "equal to ours, with and without a cache salt")


def _model(engine: Engine) -> str | None:
    return engine.hello.model_id if engine.hello is not None else None


async def check_transfers(source: Engine, pullers: Sequence[Engine]) -> list[Check]:
    """Each puller brings a fresh prompt's pages from the source into its own store."""
    if not pullers:
        return []
    names = [f"KV {source.record.engine_id} -> {puller.record.engine_id}" for puller in pullers]
    try:
        seed, hashes = await _prefilled(source, None)
    except EngineError as error:
        return [Check(name, False, f"the prompt was not prefilled: {error}") for name in names]
    return [
        await _check_transfer(name, source, puller, seed, hashes)
        for name, puller in zip(names, pullers, strict=True)
    ]


async def _check_transfer(
    name: str, source: Engine, puller: Engine, seed: bytes, hashes: Sequence[bytes]
) -> Check:
    hello = source.hello
    assert hello is not None
    addresses = source.record.kv_addresses
    result = await puller.prefetch(addresses, hello.incarnation, seed, hashes, deadline_s=DEADLINE_S)
    moved = f"{result.pulled_pages} of {len(hashes)} pages, {result.pulled_bytes} bytes"
    if result.pulled_pages == len(hashes) and result.pulled_bytes > 0:
        return Check(name, True, f"{moved} in {result.elapsed_s * 1000:.0f} ms")
    fix = "are both on one --interface, with the same page size, dtype and number of ranks?"
    return Check(name, False, f"{moved}: {result.reason or 'no reason given'}", fix)


async def _prefilled(engine: Engine, cache_salt: str | None) -> tuple[bytes, tuple[bytes, ...]]:
    """Prefill a prompt that nobody has; its namespace seed and page hashes. Raises `EngineError`."""
    hello = engine.hello
    assert hello is not None
    page = hello.page_size_tokens
    prompt = [5 + byte for byte in secrets.token_bytes(PROBE_PAGES * page + 1)]  # ids that every model has
    seed = namespace_seed(None, cache_salt)
    await engine.prefill(
        prompt, uuid.uuid4().hex, session_id="doctor", cache_salt=cache_salt, deadline_s=DEADLINE_S
    )
    return seed, page_hashes(prompt, page, seed)


async def _lookup(engine: Engine, hashes: Sequence[bytes]) -> int:
    """Pages found, once all are or the offload has had its time. Raises `EngineError`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + OFFLOAD_DEADLINE_S
    while True:
        found = await engine.lookup(hashes, deadline_s=DEADLINE_S)
        if found == len(hashes) or loop.time() > deadline:
            return found
        await asyncio.sleep(POLL_S)
