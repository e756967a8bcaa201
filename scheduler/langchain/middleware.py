"""`SessionMiddleware`: sessions for LangChain agents, whatever OpenAI-compatible chat model they use.

It stands where a model cannot: it sees tools start and end and runs end. The gateway hears of each tool with
the time that the tool took so far, with each round how long the tools of this agent take as a rule, and at
the end that nobody is coming back, or that it is the user's turn.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain.agents.middleware.types import ToolCallRequest
from langchain_core.messages import AIMessage, ToolMessage
from langchain_openai.chat_models.base import BaseChatOpenAI
from langgraph.config import get_config
from langgraph.types import Command

from antiphon.client import AntiphonError, Client
from antiphon.client.tool_times import ToolTimes
from antiphon.langchain.chat_model import ChatAntiphon
from antiphon.langchain.hints import add_to_request
from antiphon.langchain.session import SessionKey, session_from_config

log = logging.getLogger(__name__)

CALL_DEADLINE_S = 5.0
MAX_OPEN_GAPS = 10_000
"""Sessions whose tools are believed to run; more are forgotten, oldest first."""

Finish = Literal["sub_agents", "always", "never"]


class SessionMiddleware(AgentMiddleware[Any, Any, Any]):
    """Give it to every agent of a graph; one instance may serve all of them, in threads and event loops.

    `finish` says whose sessions end with a run: those of sub-agents, which nobody can go on with; all; none.
    A conversation that ends with this run wants "always", one with a checkpointer does not.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        finish: Finish = "sub_agents",
        events: bool = True,
    ) -> None:
        """Gateway and key as in `antiphon.client.Client`. Without `events` nothing but rounds is sent."""
        super().__init__()
        self._client = Client(base_url, api_key, timeout_s=CALL_DEADLINE_S, max_retries=0)
        self._finish = finish
        self._tell = events
        self._gaps = _Gaps()

    # ---- rounds

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        key = _key()
        response = handler(self._with_session(request, key))
        self._answered(key, response)
        return response

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        key = _key()
        response = await handler(self._with_session(request, key))
        self._answered(key, response)
        return response

    def _with_session(self, request: ModelRequest[Any], key: SessionKey) -> ModelRequest[Any]:
        """The request with session and expected gap; one to another kind of model as it is."""
        if not isinstance(request.model, BaseChatOpenAI):
            return request
        agent = ",".join(sorted(str(getattr(tool, "name", tool)) for tool in request.tools))
        gap_s = self._gaps.next_round(key.session_id, agent)
        named = {"session_id": key.session_id, "parent_session_id": key.parent_id, "expected_gap_s": gap_s}
        hints = {name: value for name, value in named.items() if value is not None}
        settings = dict(request.model_settings)
        if isinstance(request.model, ChatAntiphon):
            settings = {**hints, **settings}
        else:
            add_to_request(settings, hints)
        return request.override(model_settings=settings)

    def _answered(self, key: SessionKey, response: ModelResponse[Any]) -> None:
        messages = getattr(response, "result", [])
        if any(isinstance(message, AIMessage) and message.tool_calls for message in messages):
            self._gaps.begins(key.session_id)

    # ---- tools

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        name, key = request.tool_call["name"], _key()
        self._tool_starts(name, key)
        began_s = time.perf_counter()
        try:
            result = handler(request)
            self._client.tool_times.learn(name, time.perf_counter() - began_s)
            return result
        finally:
            self._event(key, "tool_end", tool=name)

    async def awrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> ToolMessage | Command[Any]:
        name, key = request.tool_call["name"], _key()
        await asyncio.to_thread(self._tool_starts, name, key)
        began_s = time.perf_counter()
        try:
            result = await handler(request)
            self._client.tool_times.learn(name, time.perf_counter() - began_s)
            return result
        finally:
            await asyncio.to_thread(self._event, key, "tool_end", tool=name)

    def _tool_starts(self, name: str, key: SessionKey) -> None:
        self._event(key, "tool_start", tool=name, expected_gap_s=self._client.tool_times.expected_s(name))

    # ---- the end of a run

    def after_agent(self, state: Any, runtime: Any) -> None:
        self._ended(_key())

    async def aafter_agent(self, state: Any, runtime: Any) -> None:
        await asyncio.to_thread(self._ended, _key())

    def _ended(self, key: SessionKey) -> None:
        if key.session_id is None:
            return
        ends = self._finish == "always" or (self._finish == "sub_agents" and key.parent_id is not None)
        if not ends:
            self._event(key, "user_wait")
            return
        try:
            self._client.close_session(key.session_id)
        except AntiphonError as error:  # it ends by itself when its time is over
            log.debug("session %s was not closed: %s", key.session_id, error)

    def _event(self, key: SessionKey, kind: str, **fields: Any) -> None:
        if self._tell and key.session_id is not None:
            self._client.notify(key.session_id, kind, **fields)


class _Gaps:
    """How long an agent's tools take between two of its rounds; an agent is known by its tools."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began_s: OrderedDict[str, float] = OrderedDict()
        self._times = ToolTimes()

    def begins(self, session_id: str | None) -> None:
        """The session's answer has come, and calls tools."""
        if session_id is not None:
            with self._lock:
                self._began_s[session_id] = time.perf_counter()
                if len(self._began_s) > MAX_OPEN_GAPS:
                    self._began_s.popitem(last=False)

    def next_round(self, session_id: str | None, agent: str) -> float | None:
        """A gap that was open is over; the one to be expected after this round, None = unknown."""
        with self._lock:
            began_s = self._began_s.pop(session_id, None) if session_id is not None else None
        if began_s is not None:
            self._times.learn(agent, time.perf_counter() - began_s)
        return self._times.expected_s(agent)


def _key() -> SessionKey:
    return session_from_config(get_config())
