"""`GET /openapi.json`: every route, what it takes and what it answers. Pure but for the route itself.

What is taken comes from the structs that read it; answers are in openapi_schemas.py. A test compares the
paths with the app's routes, and another sends the app what the document allows.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from antiphon.scheduler.gateway import messages, requests, responses, tokenize
from antiphon.scheduler.gateway.error_shapes import MESSAGES_PATH
from antiphon.scheduler.gateway.openapi_bodies import SESSION_ID, body_schemas
from antiphon.scheduler.gateway.openapi_schemas import (
    COMPONENTS,
    COUNT,
    FLAG,
    OBJECT,
    TEXT,
    Schema,
    a_list,
    an_object,
    const,
    either,
    ref,
)

OPENAPI_PATH = "/openapi.json"
EVENTS = "text/event-stream"
JSON = "application/json"

HINTS: Schema = {"type": "string", "examples": ["expected_gap_s=3.5, osl=200, ttft_ms=800, tpot_ms=40"]}
SESSION_HEADERS: tuple[tuple[str, Schema, str], ...] = (
    ("X-Session-ID", SESSION_ID, "The session of the request; 1 to 255 visible ASCII characters."),
    ("X-Parent-Session-ID", SESSION_ID, "The session that this one branches off from."),
    ("X-Session-Final", {"enum": ["true", "false"]}, "The session is closed after this answer."),
    ("X-Session-Hints", HINTS, "An RFC 8941 dictionary of hints."),
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    summary: str
    answer: Schema | None = None
    """Of status 200, as JSON; None = not JSON."""
    body: type | None = None
    or_body: type | None = None
    """What may be sent instead."""
    other: str = ""
    """Another content type of the answer."""
    query: tuple[tuple[str, Schema, str], ...] = ()
    """(name, schema, what it does)."""
    session: bool = False
    """Takes the headers of a session."""
    statuses: tuple[int, ...] = (400, 401, 429, 503)
    """That are answered besides 200."""


_ROUND = (400, 401, 404, 408, 413, 429, 502, 503, 504)
_LIMIT = ("limit", {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 100}, "At most so many.")

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
    Operation("get", "/v1/engines", "The engines", a_list(OBJECT), statuses=(401, 403, 429)),
    Operation("get", "/health", "The process is up", an_object(status=const("ok"), policy=TEXT), statuses=()),
    Operation("get", "/ready", "Rounds can be served", ref("Readiness"), statuses=()),
    Operation("get", "/metrics", "Prometheus metrics", other="text/plain", statuses=()),
    Operation(
        "get", OPENAPI_PATH, "This document", an_object(openapi=TEXT, paths=OBJECT), statuses=(401, 429)
    ),
)


def document(operations: Sequence[Operation] = OPERATIONS) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    bodies = list(dict.fromkeys(op.body for op in operations if op.body is not None))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Antiphon",
            "version": importlib.metadata.version("antiphon"),
            "description": "A session-aware scheduler for multi-round LLM agents on SGLang engines.",
        },
        "paths": paths,
        "components": {
            "schemas": {**body_schemas(bodies), **COMPONENTS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def openapi_route() -> Route:
    """Serves the document, made once."""
    content = msgspec.json.encode(document())

    async def openapi(request: Request) -> Response:
        return Response(content, media_type=JSON)

    return Route(OPENAPI_PATH, openapi)


def _described(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {} if operation.answer is None else {JSON: {"schema": operation.answer}}
    if operation.other:
        content[operation.other] = {}
    anthropic = operation.path.startswith(MESSAGES_PATH)
    error = {JSON: {"schema": ref("AnthropicError" if anthropic else "Error")}}
    answers: dict[str, Any] = {"200": {"description": operation.summary, "content": content}}
    if operation.path == "/ready":
        answers["503"] = {"description": "Not yet", "content": content}
    for status in operation.statuses:
        answers[str(status)] = {"description": "An error", "content": error}
    name = operation.path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace(".", "_")
    described: dict[str, Any] = {
        "operationId": f"{operation.method}_{name}",
        "summary": operation.summary,
        "parameters": _parameters(operation),
        "responses": answers,
    }
    if operation.body is not None:
        schema = ref(operation.body.__name__)
        if operation.or_body is not None:
            schema = either(schema, ref(operation.or_body.__name__))
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    return described


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    in_path = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    parameters = [{"name": name, "in": "path", "required": True, "schema": TEXT} for name in in_path]
    parameters += [
        {"name": name, "in": "query", "schema": schema, "description": what}
        for name, schema, what in operation.query
    ]
    if operation.session:
        parameters += [
            {"name": name, "in": "header", "schema": schema, "description": what}
            for name, schema, what in SESSION_HEADERS
        ]
    return parameters
