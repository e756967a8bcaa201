"""The resource /v1/sessions: sessions made, looked at, changed, forked and closed, beside the rounds in them.

No client needs it: a round makes its session. What is said here is for what a round cannot say: a session's
targets and lifetime before its first one, children that will share its prefix, a tool that runs, its end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from antiphon.scheduler.errors import ApiError, invalid, ledger_unavailable, session_not_found
from antiphon.scheduler.gateway.caller import current_caller
from antiphon.scheduler.gateway.identity import checked_id, new_session_id
from antiphon.scheduler.gateway.intake import Intake
from antiphon.scheduler.gateway.limits import Limits
from antiphon.scheduler.gateway.session_fields import bad_hint
from antiphon.scheduler.hints import BadHint, Priority, Seconds, SloFields, Tokens, TtlS, converted
from antiphon.scheduler.session_documents import STATUSES, TOOL_START, SessionDocument, resource
from antiphon.scheduler.session_store import LedgerUnavailable, SessionStore

PATH = "/v1/sessions"
MAX_METADATA_KEYS, MAX_METADATA_KEY_CHARS, MAX_METADATA_CHARS = 16, 64, 512
MAX_FORKS = 64
MAX_LISTED = 10_000

EVENTS = (TOOL_START, "tool_end", "user_wait", "resume_soon")
Name = Annotated[str, Meta(max_length=255)]


class SessionUpdate(msgspec.Struct, frozen=True, kw_only=True):
    model: Name | None = None
    ttl_s: TtlS | None = None
    slo: SloFields | None = None
    priority: Priority | None = None
    expected_rounds: Tokens | None = None
    metadata: dict[str, str] | None = None


class SessionCreate(SessionUpdate, frozen=True, kw_only=True):
    id: str | None = None
    parent_id: str | None = None


class SessionFork(msgspec.Struct, frozen=True, rename={"from_round": "from"}):
    n: Annotated[int, Meta(ge=1, le=MAX_FORKS)] | None = None
    ids: Annotated[list[str], Meta(min_length=1, max_length=MAX_FORKS)] | None = None
    from_round: str | Annotated[int, Meta(ge=0)] = "tip"
    expected_start_s: Seconds | None = None


class SessionEvent(msgspec.Struct, frozen=True):
    type: str
    expected_gap_s: Seconds | None = None
    tool: Name | None = None
    next_input_tokens: Tokens | None = None
    prefill: Any = None


Handler = Callable[[Request], Awaitable[Response]]
S = TypeVar("S", bound=msgspec.Struct)


class SessionPages:
    """The resource's handlers."""

    def __init__(
        self,
        store: SessionStore,
        intake: Intake,
        default_ttl_s: float,
        on_ended: Callable[[str, str], None] = lambda tenant, session_id: None,
        limits: Limits | None = None,
    ) -> None:
        """`on_ended` is told (tenant, id) of every session that is closed here."""
        self._store = store
        self._intake = intake
        self._default_ttl_s = default_ttl_s
        self._on_ended = on_ended
        self._limits = limits

    def routes(self) -> list[Route]:
        """An id may hold slashes, so the longer paths come first."""
        return [
            Route(PATH, self._guarded(self.list), methods=["GET"]),
            Route(PATH, self._guarded(self.create), methods=["POST"]),
            Route(f"{PATH}/{{id:path}}/fork", self._guarded(self.fork), methods=["POST"]),
            Route(f"{PATH}/{{id:path}}/events", self._guarded(self.event), methods=["POST"]),
            Route(f"{PATH}/{{id:path}}", self._guarded(self.get), methods=["GET"]),
            Route(f"{PATH}/{{id:path}}", self._guarded(self.update), methods=["POST"]),
            Route(f"{PATH}/{{id:path}}", self._guarded(self.delete), methods=["DELETE"]),
        ]

    # ---------------------------------------------------------------- what there is

    async def list(self, request: Request) -> Response:
        query, caller = request.query_params, current_caller()
        limit = _limit(query.get("limit", "100"))
        status = query.get("status")
        if status is not None and status not in STATUSES:
            raise invalid(f"`status` must be one of {', '.join(STATUSES)}.", param="status")
        tenant = query.get("tenant", caller.sees_tenant if caller.key else caller.tenant)
        if caller.sees_tenant not in (None, tenant):
            tenant = caller.sees_tenant  # of its own only
        after = query.get("after")
        try:
            found, more = await self._store.page(
                tenant,
                limit,
                self._default_ttl_s,
                after=None if after is None else (tenant or caller.tenant, after),
                status=status,
                parent_id=query.get("parent_id"),
            )
        except KeyError:
            raise invalid(f"`after`: there is no session {after!r:.60}.", param="after") from None
        items = [resource(document) for document in found]
        ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else _NO_ENDS
        return _json({"object": "list", "data": items, **ends, "has_more": more})

    async def get(self, request: Request) -> Response:
        session_id = _id(request)
        document = await self._store.get(current_caller().tenant, session_id, self._default_ttl_s)
        return _json(resource(document or _unknown(session_id)))

    # ---------------------------------------------------------------- what is changed

    async def create(self, request: Request) -> Response:
        given, warnings = await self._body(request, SessionCreate)
        session_id = new_session_id() if given.id is None else checked_id(given.id, "id")
        parent_id = None if given.parent_id is None else checked_id(given.parent_id, "parent_id")
        await self._opened(session_id)
        document = await self._store.create(
            current_caller().tenant, session_id, self._default_ttl_s, parent_id, **_fields(given)
        )
        return _json(resource(document) | warnings)

    async def update(self, request: Request) -> Response:
        session_id = _id(request)
        given, warnings = await self._body(request, SessionUpdate)
        document = await self._update(session_id, **_fields(given))
        return _json(resource(document) | warnings)

    async def fork(self, request: Request) -> Response:
        parent_id = _id(request)
        given, warnings = await self._body(request, SessionFork)
        if given.ids is not None and given.n not in (None, len(given.ids)):
            raise invalid("`n` is not how many `ids` there are: leave one of them out.", param="n")
        ids = [checked_id(name, f"ids[{at}]") for at, name in enumerate(given.ids or ())]
        ids = ids or [new_session_id() for _ in range(given.n or 1)]
        if len({*ids, parent_id}) <= len(ids):
            raise invalid("`ids` must differ from each other and from the session.", param="ids")
        tenant = current_caller().tenant
        at_round: int | None = None
        parent = await self._store.get(tenant, parent_id, self._default_ttl_s) or _unknown(parent_id)
        if given.from_round != "tip":
            if not isinstance(given.from_round, int) or given.from_round > parent.record.rounds:
                what = f'`from` must be "tip" or a round that was: 0 to {parent.record.rounds}.'
                raise invalid(what, param="from")
            at_round = given.from_round
        await self._opened(*ids)
        children = await self._store.fork(
            tenant, parent_id, ids, self._default_ttl_s, at_round, given.expected_start_s
        )
        fresh = [child.record.session_id for child in children if child.record.rounds == 0]
        known, ttl_s = self._intake.conversations, children[0].ttl_s
        at_tip = at_round in (None, parent.record.rounds)
        if not (at_tip and await known.fork(tenant, parent_id, fresh, ttl_s)):
            # Said plainly, since an append to one of them would begin a conversation of its own.
            warnings.setdefault("warnings", []).append("the first round of each must bring all messages")
        items = [resource(child) for child in children]
        ends = {"first_id": ids[0], "last_id": ids[-1], "has_more": False}
        return _json({"object": "list", "data": items, **ends, **warnings})

    async def event(self, request: Request) -> Response:
        session_id = _id(request)
        given, warnings = await self._body(request, SessionEvent)
        if given.type not in EVENTS:
            raise _bad("type", f"`type` must be one of {', '.join(EVENTS)}.")
        taken = {"event": given.type, "expected_gap_s": given.expected_gap_s, "tool": given.tool}
        document = await self._update(session_id, **taken)
        told = {"next_input_tokens": given.next_input_tokens, "prefill": given.prefill}
        if unused := [name for name, value in told.items() if value is not None]:
            # Said plainly, so that nobody takes a warm-up for done.
            warnings.setdefault("warnings", []).extend(f"`{name}` has no effect yet" for name in unused)
        shown = {"object": "session.event", "id": session_id, "type": given.type, "status": document.status}
        return _json(shown | warnings, 202)

    async def delete(self, request: Request) -> Response:
        session_id, tenant = _id(request), current_caller().tenant
        children = request.query_params.get("children", "false")
        if children not in ("true", "false", "1", "0", ""):
            raise invalid("`children` must be true or false.", param="children")
        closed = await self._store.close(tenant, session_id, children=children in ("true", "1"))
        if closed is None:
            raise session_not_found(session_id)
        for each in closed:
            self._on_ended(tenant, each)
        await self._intake.conversations.forget(tenant, closed)
        shown: dict[str, Any] = {"id": session_id, "object": "session.deleted", "deleted": True}
        return _json(shown | ({"children": closed[1:]} if closed[1:] else {}))

    # ---------------------------------------------------------------- small things

    async def _opened(self, *session_ids: str) -> None:
        """Raises `ApiError` (429) if the caller's key may not have so many sessions."""
        if self._limits is not None:
            for session_id in session_ids:
                await self._limits.opened(session_id)

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except LedgerUnavailable as error:
                raise ledger_unavailable(f"Sessions are kept in the ledger, and {error}.") from error

        return guarded

    async def _update(self, session_id: str, **fields: Any) -> SessionDocument:
        tenant = current_caller().tenant
        found = await self._store.update(tenant, session_id, self._default_ttl_s, **fields)
        return found or _unknown(session_id)

    async def _body(self, request: Request, kind: type[S]) -> tuple[S, dict[str, Any]]:
        """The body, and a warning for each key that means nothing here. Raises `ApiError`."""
        raw = await self._intake.body(request.receive, request.headers)
        try:
            given = msgspec.json.decode(raw) if raw.strip() else {}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise invalid(f"The body is not valid JSON: {error}", code="invalid_json") from error
        if not isinstance(given, dict):
            raise invalid("The body is not a JSON object.", code="invalid_json")
        try:
            fields, warnings = converted(given, kind, "")
        except BadHint as error:
            raise bad_hint(error) from error
        return fields, {"warnings": list(warnings)} if warnings else {}


_NO_ENDS = {"first_id": None, "last_id": None}


def _fields(given: SessionUpdate) -> dict[str, Any]:
    """What was given, as the store names it."""
    slo = given.slo or SloFields()
    fields = {
        "model": given.model,
        "ttl_s": given.ttl_s,
        "slo_ttft_s": None if slo.ttft_ms is None else slo.ttft_ms / 1000,
        "slo_itl_s": None if slo.tpot_ms is None else slo.tpot_ms / 1000,
        "priority": given.priority,
        "expected_rounds": given.expected_rounds,
        "metadata": _metadata(given.metadata),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _metadata(given: dict[str, str] | None) -> dict[str, str] | None:
    if given is None:
        return None
    if len(given) > MAX_METADATA_KEYS:
        raise _bad("metadata", f"`metadata` has {len(given)} keys, and {MAX_METADATA_KEYS} are allowed.")
    for key, value in given.items():
        if len(key) > MAX_METADATA_KEY_CHARS or len(value) > MAX_METADATA_CHARS:
            what = (
                f"`metadata`: a key has at most {MAX_METADATA_KEY_CHARS} characters, and a value "
                f"{MAX_METADATA_CHARS}; {key[:20]!r} has more."
            )
            raise _bad("metadata", what)
    return given


def _bad(param: str, message: str) -> ApiError:
    return invalid(message, param=param, code="invalid_session_hint")


def _unknown(session_id: str) -> NoReturn:
    raise session_not_found(session_id)


def _id(request: Request) -> str:
    return checked_id(request.path_params["id"], "id")


def _limit(given: str) -> int:
    if not given.isdecimal() or not given.isascii() or len(given) > 9 or not 1 <= int(given) <= MAX_LISTED:
        raise invalid(f"`limit` must be 1 to {MAX_LISTED}, got {given[:20]!r}.", param="limit")
    return int(given)


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
