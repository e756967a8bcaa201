"""Where `antiphon status`, `engines`, `sessions`, `receipts` get their items: a gateway or the ledger."""

from __future__ import annotations

import asyncio
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import msgspec

from antiphon.scheduler.errors import UserError, upstream_message

DEADLINE_S = 10.0
API_KEY_VARIABLE = "ANTIPHON_API_KEY"
"""For gateways that ask for a key."""

Item = Mapping[str, Any]


class Source(Protocol):
    """Raises `UserError` when what it asks is away or answers nonsense."""

    def ready(self) -> Item: ...

    def engines(self) -> Sequence[Item]: ...

    def sessions(self, limit: int) -> Sequence[Item]: ...

    def receipts(self, limit: int, session_id: str | None) -> Sequence[Item]: ...


@dataclass(frozen=True, slots=True)
class GatewaySource:
    """Asks a running gateway over HTTP."""

    url: str

    def ready(self) -> Item:
        answer = self._get("/ready")
        if not isinstance(answer, dict):
            raise UserError(f"{self.url}: /ready answered no object; is this an Antiphon gateway?")
        return answer

    def engines(self) -> Sequence[Item]:
        return self._list("/v1/engines")

    def sessions(self, limit: int) -> Sequence[Item]:
        return [_flat(item) for item in self._list(f"/v1/sessions?limit={limit}")]

    def receipts(self, limit: int, session_id: str | None) -> Sequence[Item]:
        chosen = f"&session_id={quote(session_id, safe='')}" if session_id is not None else ""
        return self._list(f"/v1/receipts?limit={limit}{chosen}")

    def _list(self, path: str) -> Sequence[Item]:
        answer = self._get(path)
        items = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(items, list):
            raise UserError(f"{self.url}{path}: {upstream_message(msgspec.json.encode(answer))[:200]}")
        return items

    def _get(self, path: str) -> Any:
        return self.ask("GET", path)

    def ask(self, method: str, path: str) -> Any:
        """The JSON of an answer, whatever its status: /ready says why it is 503."""
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise UserError(f"--url {self.url!r}: it must begin with http:// or https://")
        where = self.url.rstrip("/") + path
        key = os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            asked = urllib.request.Request(where, headers=headers, method=method)
            with urllib.request.urlopen(asked, timeout=DEADLINE_S) as answer:
                raw = answer.read()
        except urllib.error.HTTPError as error:
            raw = error.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"no gateway at {self.url} ({reason}): is `antiphon serve` running?") from error
        try:
            return msgspec.json.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: not JSON; is this an Antiphon gateway?") from error


def _flat(session: Item) -> Item:
    """A session of the gateway with the names that the ledger's records have."""
    if session.get("object") != "session":
        return session
    usage = session["usage"]
    return {
        **session,
        "session_id": session["id"],
        "rounds": session["round"],
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
    }


@dataclass(frozen=True, slots=True)
class LedgerSource:
    """Reads the ledger: works without a gateway, but knows no loads."""

    url: str
    fleet: str

    def ready(self) -> Item:
        engines = self.engines()
        return {"ready": bool(engines), "engines_alive": len(engines), "ledger": "ok", "policy": "-"}

    def engines(self) -> Sequence[Item]:
        def shown(record: Any) -> Item:
            return {**msgspec.to_builtins(record), "can_transfer": bool(record.kv_addresses)}

        return [shown(record) for record in self._ask(lambda ledger: ledger.engines())]

    def sessions(self, limit: int) -> Sequence[Item]:
        records, _ = self._ask(lambda ledger: ledger.sessions(limit))
        return [msgspec.to_builtins(record) for record in records]

    def receipts(self, limit: int, session_id: str | None) -> Sequence[Item]:
        return list(self._ask(lambda ledger: ledger.receipts(limit, session_id)))

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        from antiphon.scheduler.ledger import Ledger, LedgerUnavailable

        async def asked() -> Any:
            ledger = Ledger(self.url, fleet=self.fleet, deadline_s=DEADLINE_S)
            try:
                return await question(ledger)
            finally:
                await ledger.close()

        try:
            return asyncio.run(asked())
        except (LedgerUnavailable, ValueError) as error:
            raise UserError(f"--ledger: {error}") from error
