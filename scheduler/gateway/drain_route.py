"""/v1/engines/{id}/drain: have an engine emptied, see how far that is, take it back. For admin keys."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import structs
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from antiphon.scheduler.drain_store import DrainStatus, DrainStore
from antiphon.scheduler.errors import ApiError, ledger_unavailable, permission_denied
from antiphon.scheduler.gateway.caller import current_caller
from antiphon.scheduler.ledger_connection import LedgerUnavailable

DRAIN_PATH = "/v1/engines/{id:path}/drain"


class DrainRoute:
    """POST marks, GET tells, DELETE takes back; each answers how far the drain is."""

    def __init__(
        self, store: DrainStore, engines: Callable[[], Awaitable[Sequence[Mapping[str, Any]]]]
    ) -> None:
        """`engines`: those that are up, with `engine_id`, `incarnation` and `model`."""
        self._store = store
        self._engines = engines

    def routes(self) -> list[Route]:
        return [Route(DRAIN_PATH, self.answer, methods=["GET", "POST", "DELETE"])]

    async def answer(self, request: Request) -> Response:
        if not current_caller().admin:
            raise permission_denied("Engines are drained with admin keys only.")
        engine_id = request.path_params["id"]
        try:
            engines = {str(item["engine_id"]): item for item in await self._engines()}
            engine = engines.get(engine_id)
            if request.method == "POST":
                await self._store.mark(engine_id, _to_be_drained(engine_id, engines))
            # The mark of one that is gone already can be taken back.
            elif request.method == "DELETE" and not await self._store.unmark(engine_id) and engine is None:
                raise _unknown(engine_id, engines)
            status = await self._store.status(engine_id)
        except LedgerUnavailable as error:
            raise ledger_unavailable(f"Drains are kept in the ledger: {error}.") from error
        if request.method == "GET":
            if engine is None and not status.draining:
                raise _unknown(engine_id, engines)
            if engine is not None and engine["incarnation"] != status.incarnation:
                # It was started again: the mark is of its last life.
                status = structs.replace(status, draining=False, safe=False)
        return Response(msgspec.json.encode(_shown(status)), media_type="application/json")


def _to_be_drained(engine_id: str, engines: Mapping[str, Mapping[str, Any]]) -> str:
    """The incarnation of an engine that is up and not alone; raises `ApiError` (404, or 400)."""
    engine = engines.get(engine_id)
    if engine is None:
        raise _unknown(engine_id, engines)
    if not [e for e in engines.values() if e is not engine and e.get("model") == engine.get("model")]:
        why = f"Engine {engine_id!r} is the only one of its model: nothing can take its place."
        raise ApiError(400, "no_other_engine", why)
    return str(engine["incarnation"])


def _unknown(engine_id: str, engines: Mapping[str, Any]) -> ApiError:
    known = ", ".join(sorted(engines)) or "none"
    return ApiError(404, "engine_not_found", f"No engine {engine_id!r} is up; up are: {known}.")


def _shown(status: DrainStatus) -> dict[str, Any]:
    return {"object": "antiphon.drain", **msgspec.to_builtins(status)}
