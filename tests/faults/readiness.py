"""Whether a stack is well: what is waited for before a run."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import httpx
import redis.asyncio
from redis.exceptions import RedisError

from antiphon.engines.directory_client import AsyncDirectoryClient, DirectoryError

if TYPE_CHECKING:
    from tests.faults.fleet import Fleet

DEADLINE_S = 3.0
PROMPT_TOKENS = 40


async def ledger_answers(fleet: Fleet) -> bool:
    client = redis.asyncio.Redis(port=fleet.valkey_port, socket_timeout=DEADLINE_S)
    try:
        return bool(await client.ping())
    except (RedisError, OSError):
        return False
    finally:
        await client.aclose()


async def is_ready(fleet: Fleet) -> bool:
    """Both gateways see the ledger and every engine's present life."""
    lives = {engine_id: await incarnation(fleet, engine_id) for engine_id in fleet.engine_ids}
    for number in range(2):
        url = fleet.gateway_url(number)
        try:
            ready = await fleet.http.get(f"{url}/ready")
            listed = await fleet.http.get(f"{url}/v1/engines")
        except httpx.HTTPError:
            return False
        alive = [each for each in listed.json().get("data", ()) if "pool" in each]
        if ready.status_code != 200 or ready.json().get("ledger") != "ok":
            return False
        if {each["engine_id"]: each["incarnation"] for each in alive} != lives:
            return False
    return True


async def incarnation(fleet: Fleet, engine_id: str) -> str:
    """By the engine's own word; "" while it does not answer."""
    client = AsyncDirectoryClient(f"127.0.0.1:{fleet.ports[engine_id].directory}", fleet.key, "faults")
    try:
        return (await client.connect(deadline_s=DEADLINE_S)).incarnation
    except DirectoryError:
        return ""
    finally:
        await client.close()


async def transfers(fleet: Fleet, number: int) -> bool:
    """A small round by this gateway is prefilled remotely and transferred."""
    url, session = fleet.gateway_url(number), f"warm-{secrets.token_hex(4)}"
    prompt = [8 + secrets.randbelow(256) for _ in range(PROMPT_TOKENS)]
    body = {"model": "model", "prompt": prompt, "max_tokens": 2}
    try:
        answer = await fleet.http.post(f"{url}/v1/completions", json=body, headers={"X-Session-ID": session})
        listed = await fleet.http.get(f"{url}/v1/receipts", params={"session_id": session, "limit": 1})
    except httpx.HTTPError:
        return False
    receipts = listed.json().get("data", []) if answer.status_code == listed.status_code == 200 else []
    return any(each["bytes_prefill_to_decode"] > 0 for each in receipts)


async def breakers_closed(fleet: Fleet, number: int) -> bool:
    """This gateway counts on every engine, and on links that small rounds can try. Sends one."""
    await transfers(fleet, number)
    try:
        answer = await fleet.http.get(f"{fleet.gateway_url(number)}/v1/engines")
    except httpx.HTTPError:
        return False
    engines = answer.json().get("data", [])
    links = [link for each in engines for link in each.get("links_not_closed") or ()]
    return not links and not any(each.get("standing") for each in engines)
