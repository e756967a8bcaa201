"""The OpenAPI document is true: it has every route, and no request that it allows breaks the stack."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation.meta import CoveragePhaseData
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from antiphon.scheduler.config import Config
from antiphon.scheduler.drain_store import DrainStore
from antiphon.scheduler.gateway.app import create_app
from antiphon.scheduler.gateway.openapi import document
from antiphon.scheduler.gateway.openapi_operations import OPENAPI_PATH, OPERATIONS
from antiphon.scheduler.gateway.prompts import TokenizerSource
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.session_store import SessionStore
from tests.gateway_helpers import FakeState, ScriptedRunner, three_words
from tests.live_stack import LiveStack, live_stack

ALL = "ANTIPHON_OPENAPI_ALL" in os.environ
"""`make fuzz`: every case that schemathesis makes of the boundaries of every field, and more random ones."""
EXAMPLES = 60 if ALL else 6
"""Random ones, for each operation."""
MORE = 0.1
"""Share of the boundary cases that are sent beside the first of each kind."""
TAKEN_APART_ELSEWHERE = {
    "/v1/explain", "/v1/sessions/{session_id}/rounds", "/v1/messages/count_tokens", "/v1/tokenize",
}  # fmt: skip
"""Bodies that another route takes too, read by the same code."""
MOST_TOKENS = 1
"""Of an answer: a client that sets no limit would get a window full."""
MOST_CHOICES = 2
NUMBERS = itertools.count()
LIMITS = {
    "/v1/responses": "max_output_tokens",
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/completions": "max_tokens",
    "/v1/sessions/{session_id}/rounds": "max_completion_tokens",
    "/v1/messages": "max_tokens",
}
WANTED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

schema = schemathesis.openapi.from_dict(document())


class Sample:
    """Which boundary cases are sent: more than half differ from another only in the value that is wrong."""

    def __init__(self) -> None:
        self._kinds: set[object] = set()
        self._chances: dict[str, random.Random] = {}

    def has(self, case: schemathesis.Case[Any]) -> bool:
        about = case.meta.phase.data if case.meta else None
        if ALL or not isinstance(about, CoveragePhaseData):
            return True
        route = case.operation.label
        chance = self._chances.setdefault(route, random.Random(route)).random()
        if case.operation.path in TAKEN_APART_ELSEWHERE:
            return chance < MORE
        hints = "session" in (about.description or "")  # the same on every route, read by the same code
        kind = ("" if hints else route), about.scenario, about.parameter, about.description
        new = kind not in self._kinds
        self._kinds.add(kind)
        return new or chance < MORE


sample = Sample()


def test_every_route_is_described() -> None:
    """And nothing else is."""
    ledger = Ledger("redis://127.0.0.1:1", fleet="nobody asks it")
    app: Any = create_app(
        ScriptedRunner(three_words),
        TokenizerSource({}),
        Config(),
        FakeState(),
        Metrics(),
        store=SessionStore(ledger),
        drains=DrainStore(ledger.connection),
    )
    routes = {path.replace(":path}", "}") for path in app._paths}
    assert routes == {operation.path for operation in OPERATIONS}


def test_names_are_unique_and_references_resolve() -> None:
    made = document()
    ids = [op["operationId"] for path in made["paths"].values() for op in path.values()]
    assert len(ids) == len(set(ids)) == len(OPERATIONS)

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    known = {f"#/components/schemas/{name}" for name in made["components"]["schemas"]}
    assert set(references(made)) <= known
    schema.validate()


@pytest.fixture(scope="module")
def stack(
    tiny_model_dir: Path, valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveStack]:
    with live_stack(tmp_path_factory.mktemp("openapi"), valkey_url, tiny_model_dir) as running:
        yield running


def test_the_document_is_served(stack: LiveStack) -> None:
    assert stack.http.get(OPENAPI_PATH).json() == document()


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=not ALL,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_breaks_it(case: schemathesis.Case[Any], stack: LiveStack, tiny_model_dir: Path) -> None:
    """No 5xx, and every answer has a status, a type and a form that the document names.

    Requests are what the document allows and what it does not; where they name a model it is the one that
    is served, and every other session is one that there is, so that they come further than to a 404.
    """
    if not sample.has(case):
        return
    for name in {"id", "session_id"} & set(case.path_parameters):
        given = str(case.path_parameters[name])
        case.path_parameters[name] = f"{given}-{next(NUMBERS)}"  # else one session would grow and grow
        if len(given) % 2 == 0:
            made = stack.http.post("/v1/sessions", json={"model": tiny_model_dir.name})
            case.path_parameters[name] = made.raise_for_status().json()["id"]
    body: Any = case.body
    if isinstance(body, dict):
        if isinstance(body.get("model"), str):
            body["model"] = tiny_model_dir.name
        limit = LIMITS.get(case.path)
        if limit is not None and (body.get(limit) is None or isinstance(body[limit], int)):
            body[limit] = min(body.get(limit) or MOST_TOKENS, MOST_TOKENS)
        if isinstance(body.get("n"), int):
            body["n"] = min(body["n"], MOST_CHOICES)
    case.call_and_validate(base_url=stack.url, checks=WANTED, timeout=30)
