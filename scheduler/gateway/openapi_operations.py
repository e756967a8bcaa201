"""Every operation of the gateway, as the OpenAPI document tells of it: a table."""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.scheduler.gateway import messages, requests, responses, sessions, tokenize
from antiphon.scheduler.gateway.openapi_bodies import SESSION_ID
from antiphon.scheduler.gateway.openapi_schemas import (
    COUNT,
    FLAG,
    OBJECT,
    TEXT,
    Schema,
    a_list,
    an_object,
    const,
    listed,
    one_of,
    ref,
)
from antiphon.scheduler.session_documents import STATUSES

OPENAPI_PATH = "/openapi.json"
EVENTS = "text/event-stream"

HINTS: Schema = {"type": "string", "examples": ["expected_gap_s=3.5, osl=200, ttft_ms=800, tpot_ms=40"]}
KEY: Schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]{1,255}$"}
SESSION_HEADERS: tuple[tuple[str, Schema, str], ...] = (
    ("X-Session-ID", SESSION_ID, "The session of the request; 1 to 255 visible ASCII characters."),
    ("X-Parent-Session-ID", SESSION_ID, "The session that this one branches off from."),
    ("X-Session-Final", {"enum": ["true", "false"]}, "The session is closed after this answer."),
    ("X-Session-Hints", HINTS, "An RFC 8941 dictionary of hints."),
    ("Idempotency-Key", KEY, "Names the call: a request with the same key is a try of the same round."),
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    summary: str
    answer: Schema | None = None
    """As JSON; None = not JSON."""
    body: type | None = None
    or_body: type | None = None
    """What may be sent instead."""
    status: int = 200
    """Of the answer."""
    other: str = ""
    """Another content type of the answer."""
    query: tuple[tuple[str, Schema, str], ...] = ()
    """(name, schema, what it does)."""
    session: bool = False
    """Takes the headers of a session."""
    statuses: tuple[int, ...] = (400, 401, 429, 503)
    """Of errors."""


_ROUND = (400, 401, 404, 408, 410, 413, 422, 429, 502, 503, 504)
_SESSION = (400, 401, 404, 408, 413, 429, 503)
_DRAIN = (400, 401, 403, 404, 408, 413, 429, 503)
DRAIN = an_object(
    object=const("antiphon.drain"),
    engine_id=TEXT,
    draining=FLAG,
    incarnation=TEXT,
    replicas=COUNT,
    replicas_seen=COUNT,
    rounds=COUNT,
    work=OBJECT,
    safe=FLAG,
)
_LIMIT = ("limit", {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 100}, "At most so many.")


_FORKS = an_object(
    object=const("list"), data=listed(ref("SessionResource")), first_id=TEXT, last_id=TEXT, has_more=FLAG
)
_CHOSEN = (
    _LIMIT,
    ("after", SESSION_ID, "Those that come after this one."),
    ("status", one_of(*STATUSES), "In this state only."),
    ("parent_id", SESSION_ID, "Children of this one only."),
)


def _of_sessions() -> tuple[Operation, ...]:
    path = f"{sessions.PATH}/{{id}}"
    return (
        Operation(
            "get",
            sessions.PATH,
            "Sessions, the newest first",
            a_list(ref("SessionResource")),
            query=_CHOSEN,
        ),
        Operation(
            "post",
            sessions.PATH,
            "Make a session, or change the one of that id",
            ref("SessionResource"),
            sessions.SessionCreate,
            statuses=_SESSION,
        ),
        Operation("get", path, "One session", ref("SessionResource"), statuses=_SESSION),
        Operation(
            "post",
            path,
            "Change a session",
            ref("SessionResource"),
            sessions.SessionUpdate,
            statuses=_SESSION,
        ),
        Operation(
            "delete",
            path,
            "Close a session",
            an_object(id=TEXT, object=const("session.deleted"), deleted=FLAG),
            query=(("children", one_of("true", "false"), "Its children too."),),
            statuses=_SESSION,
        ),
        Operation(
            "post", f"{path}/fork", "Children of a session", _FORKS, sessions.SessionFork, statuses=_SESSION
        ),
        Operation(
            "post",
            f"{path}/events",
            "What goes on between two rounds",
            an_object(id=TEXT, object=const("session.event"), type=TEXT, status=TEXT),
            sessions.SessionEvent,
            status=202,
            statuses=_SESSION,
        ),
        Operation(
            "post",
            f"{sessions.PATH}/{{session_id}}/rounds",
            "A chat completion of which only the new messages are sent",
            ref("ChatCompletion"),
            requests.ChatBody,
            other=EVENTS,
            session=True,
            statuses=_ROUND,
        ),
    )


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "post",
        requests.CHAT_ROUTE,
        "A chat completion",
        ref("ChatCompletion"),
        requests.ChatBody,
        other=EVENTS,
        session=True,
        statuses=_ROUND,
    ),
    Operation(
        "post",
        requests.COMPLETION_ROUTE,
        "A text completion",
        ref("Completion"),
        requests.CompletionBody,
        other=EVENTS,
        session=True,
        statuses=_ROUND,
    ),
    Operation(
        "post",
        responses.RESPONSES_ROUTE,
        "A response",
        ref("Response"),
        responses.ResponsesBody,
        other=EVENTS,
        session=True,
        statuses=_ROUND,
    ),
    Operation(
        "get",
        "/v1/responses/{response_id}",
        "A stored response",
        ref("Response"),
        statuses=(401, 404, 429, 503),
    ),
    Operation(
        "delete",
        "/v1/responses/{response_id}",
        "Forget a stored response",
        an_object(id=TEXT, object=const("response"), deleted=FLAG),
        statuses=(401, 404, 429, 503),
    ),
    Operation(
        "post",
        messages.MESSAGES_ROUTE,
        "A message (Anthropic's API)",
        ref("Message"),
        messages.MessagesBody,
        other=EVENTS,
        session=True,
        statuses=_ROUND,
    ),
    Operation(
        "post",
        messages.COUNT_ROUTE,
        "How many tokens a message's prompt has",
        an_object(input_tokens=COUNT),
        messages.CountBody,
        statuses=_ROUND,
    ),
    *(
        Operation("post", f"{prefix}/{name}", summary, ref(answer), body, statuses=_ROUND)
        for prefix in ("", "/v1")
        for name, summary, answer, body in (
            ("tokenize", "Token ids of a text or a chat", "Tokens", tokenize.TokenizeBody),
            ("detokenize", "Text of token ids", "Detokenized", tokenize.DetokenizeBody),
        )
    ),
    Operation(
        "post",
        "/v1/explain",
        "What would be decided of a chat or completion",
        ref("Explanation"),
        requests.ChatBody,
        requests.CompletionBody,
        session=True,
        statuses=_ROUND,
    ),
    Operation("get", "/v1/models", "The models that are served", a_list(ref("Model")), statuses=(401, 429)),
    Operation("get", "/v1/models/{model}", "One model", ref("Model"), statuses=(401, 404, 429)),
    Operation(
        "get",
        "/v1/receipts",
        "The latest decisions",
        a_list(OBJECT),
        query=(_LIMIT, ("session_id", TEXT, "Of this session only.")),
    ),
    *(
        Operation(method, "/v1/engines/{id}/drain", summary, DRAIN, statuses=_DRAIN)
        for method, summary in (
            ("get", "How far an engine's drain is"),
            ("post", "Have an engine emptied: nothing new is placed there, its sessions are moved"),
            ("delete", "Use an engine again"),
        )
    ),
    Operation("get", "/v1/engines", "The engines", a_list(OBJECT), statuses=(401, 403, 429)),
    *_of_sessions(),
    Operation("get", "/health", "The process is up", an_object(status=const("ok"), policy=TEXT), statuses=()),
    Operation("get", "/ready", "Rounds can be served", ref("Readiness"), statuses=()),
    Operation("get", "/metrics", "Prometheus metrics", other="text/plain", statuses=()),
    Operation(
        "get", OPENAPI_PATH, "This document", an_object(openapi=TEXT, paths=OBJECT), statuses=(401, 429)
    ),
)
