"""`GET /openapi.json`: every route, what it takes and what it answers. Pure but for the route itself.

openapi_operations.py is the table of them. What is taken comes from the structs that read it
(openapi_bodies.py); answers are in openapi_schemas.py. A test compares the
paths with the app's routes, and another sends the app what the document allows.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from antiphon.scheduler.gateway.error_shapes import MESSAGES_PATH
from antiphon.scheduler.gateway.openapi_bodies import body_schemas
from antiphon.scheduler.gateway.openapi_operations import (
    OPENAPI_PATH,
    OPERATIONS,
    SESSION_HEADERS,
    Operation,
)
from antiphon.scheduler.gateway.openapi_schemas import COMPONENTS, TEXT, either, ref
from antiphon.scheduler.hints import SessionFields

JSON = "application/json"


def document(operations: Sequence[Operation] = OPERATIONS) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    bodies = dict.fromkeys(body for op in operations for body in (op.body, op.or_body) if body is not None)
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
            "schemas": {**body_schemas([*bodies, SessionFields]), **COMPONENTS},
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
    answers: dict[str, Any] = {str(operation.status): {"description": operation.summary, "content": content}}
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
