"""POST /v1/sessions/{id}/rounds: a chat that brings only what is new in its session.

The body is a chat's, `messages` without those that were said, and `model` may be left out. The answer is a
chat's.
"""

from __future__ import annotations

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from antiphon.scheduler.errors import invalid
from antiphon.scheduler.gateway.completions import CompletionRoute
from antiphon.scheduler.gateway.intake import Intake

ROUNDS_PATH = "/v1/sessions/{session_id:path}/rounds"


class _Named(msgspec.Struct, frozen=True):
    model: str | None = None


_decoder = msgspec.json.Decoder(_Named)


class RoundsRoute:
    """ASGI application."""

    def __init__(self, chat: CompletionRoute, intake: Intake) -> None:
        self._chat = chat
        self._intake = intake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await self._intake.body(receive, Headers(scope=scope))
        session_id: str = scope["path_params"]["session_id"]
        await self._chat.answer(self._with_model(raw), scope, receive, send, append_to=session_id)

    def _with_model(self, raw: bytes) -> bytes:
        """The body, with the gateway's only model if it names none. What is wrong the chat will say."""
        try:
            named = _decoder.decode(raw).model
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return raw
        if named is not None:
            return raw
        only = self._intake.only_model()
        if only is None:
            raise invalid("`model` is required: several are served here.", param="model")
        # Behind the fields that are there: of two of one name the last one counts.
        return raw.rstrip()[:-1].rstrip() + (b"," if _has_fields(raw) else b"") + _field(only) + b"}"


def _has_fields(raw: bytes) -> bool:
    return raw.strip()[1:-1].strip() != b""


def _field(model: str) -> bytes:
    return b'"model":' + msgspec.json.encode(model)
