"""The routes of other APIs than chat and completions, on one chat route."""

from __future__ import annotations

from starlette.routing import Route

from antiphon.scheduler.config import Config
from antiphon.scheduler.gateway.completions import CompletionRoute
from antiphon.scheduler.gateway.intake import Intake
from antiphon.scheduler.gateway.messages import COUNT_ROUTE, MESSAGES_ROUTE
from antiphon.scheduler.gateway.messages_route import CountRoute, MessagesRoute
from antiphon.scheduler.gateway.responses import RESPONSES_ROUTE
from antiphon.scheduler.gateway.responses_route import ResponsesRoute, StoredResponses
from antiphon.scheduler.gateway.tokenize import Tokenizing
from antiphon.scheduler.response_store import ResponseStore


def surface_routes(
    chat: CompletionRoute, intake: Intake, config: Config, store: ResponseStore | None
) -> list[Route]:
    """Responses, messages, tokenize."""
    stored = StoredResponses(store)
    tokenizing = Tokenizing(intake)
    one = f"{RESPONSES_ROUTE}/{{response_id}}"
    tokenize = [
        Route(f"{prefix}/{name}", handler, methods=["POST"])
        for prefix in ("", "/v1")
        for name, handler in (("tokenize", tokenizing.tokenize), ("detokenize", tokenizing.detokenize))
    ]
    return [
        Route(RESPONSES_ROUTE, ResponsesRoute(chat, intake, config, store), methods=["POST"]),
        Route(one, stored.get, methods=["GET"]),
        Route(one, stored.delete, methods=["DELETE"]),
        Route(MESSAGES_ROUTE, MessagesRoute(chat, intake), methods=["POST"]),
        Route(COUNT_ROUTE, CountRoute(tokenizing, intake), methods=["POST"]),
        *tokenize,
    ]
