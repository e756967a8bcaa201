"""`ChatAntiphon`: LangChain's chat model on an Antiphon gateway.

Everything is the OpenAI-compatible base class but two things: which session a call belongs to, with what the
caller expects of it, goes onto the wire; and what the gateway says of the session comes back in
`response_metadata["session"]`.

The session id comes by two ways, since neither sees all calls: a `config` that is passed to this model is not
yet in the context (`ensure_config()`), so the public methods hand it on; a model inside a graph or a runnable
gets none passed, and finds it in the context when it builds the request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import openai
from langchain_core.language_models import LanguageModelInput, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from langchain_core.utils.utils import from_env, secret_from_env
from langchain_openai.chat_models.base import BaseChatOpenAI
from pydantic import Field, SecretStr, field_validator, model_validator

from antiphon.langchain.hints import HINTS, add_to_request, take_hints
from antiphon.langchain.per_loop import async_client_for
from antiphon.langchain.session import session_from_config

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
STREAM_CHUNK_TIMEOUT_S = 600.0
"""As long as a round may take: one that waits in a queue sends comments, which are no chunks."""


class ChatAntiphon(BaseChatOpenAI):
    """A chat model whose calls are rounds of sessions.

    Use it as any other, and pass a thread id:
    `model.invoke(messages, {"configurable": {"thread_id": "run-42"}})`. LangGraph agents pass theirs on; a
    sub-agent gets a session of its own, linked to the agent that called it.

    Keyword arguments of every call, and of `bind`: `session_id`, `parent_session_id`, `session_final`,
    `expected_gap_s`, `expected_output_tokens`, `expected_rounds`, `remaining_rounds`, `slo`, `priority`,
    `ttl_s`.
    """

    openai_api_base: str | None = Field(
        default_factory=from_env("ANTIPHON_BASE_URL", default=DEFAULT_BASE_URL),
        alias="base_url",
        validate_default=True,
    )
    # Callables too, as in the base class; a gateway without keys takes any.
    openai_api_key: SecretStr | Any = Field(
        default_factory=secret_from_env("ANTIPHON_API_KEY", default="none"), alias="api_key"
    )
    session_id: str | None = None
    """For all calls whose config or arguments name none."""
    stream_usage: bool | None = True
    use_responses_api: bool | None = False
    """Said, so that it does not hang on the model's name."""
    max_retries: int | None = 2
    """Retries wait as long as the gateway's `retry-after-ms` asks."""
    stream_chunk_timeout: float | None = STREAM_CHUNK_TIMEOUT_S

    @field_validator("openai_api_base")
    @classmethod
    def _with_version(cls, value: str | None) -> str | None:
        """`http://host:port` alone means its `/v1`."""
        if value and not urlsplit(value).path.strip("/"):
            return value.rstrip("/") + "/v1"
        return value

    @model_validator(mode="before")
    @classmethod
    def validate_temperature(cls, values: dict[str, Any]) -> Any:
        """The base class changes the temperature of models by their names; here names mean nothing."""
        return values

    @model_validator(mode="after")
    def _use_connections_of_each_loop(self) -> Self:
        """Runs after the base class has made its clients; an async one that was given stays."""
        own = self.http_async_client is not None or self.openai_proxy or self.root_async_client is None
        client = None if own else async_client_for(self.openai_api_base or "")
        if client is not None:
            self.http_async_client = client
            self.root_async_client = self.root_async_client.with_options(http_client=client)
            self.async_client = self.root_async_client.chat.completions
        return self

    @property
    def _llm_type(self) -> str:
        return "chat-antiphon"

    @property
    def lc_secrets(self) -> dict[str, str]:
        return {"openai_api_key": "ANTIPHON_API_KEY"}

    def _resolve_model_profile(self) -> ModelProfile | None:
        return None  # by name it would be that of an OpenAI model

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "antiphon"
        return params

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Key of the LLM cache: the same prompt has the same answer in any session."""
        take_hints(kwargs)
        return super()._get_llm_string(stop=stop, **kwargs)

    # ---- the request and its answer

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        hints = take_hints(kwargs)
        payload = super()._get_request_payload(input_, stop=stop, **kwargs)
        if "session_id" not in hints:
            found = session_from_config(ensure_config())
            if (session_id := found.session_id or self.session_id) is not None:
                hints["session_id"] = session_id
            if found.parent_id is not None:
                hints.setdefault("parent_session_id", found.parent_id)
        add_to_request(payload, hints)
        return payload

    def _create_chat_result(
        self, response: dict[str, Any] | openai.BaseModel, generation_info: dict[str, Any] | None = None
    ) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        extra = response if isinstance(response, dict) else response.model_extra or {}
        if session := extra.get("session"):
            for generation in result.generations:
                generation.message.response_metadata["session"] = session
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        made = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        if made is not None and (session := chunk.get("session")):
            made.message.response_metadata["session"] = session
        return made

    # ---- the public methods, which see the config that they are passed

    def invoke(
        self,
        input: LanguageModelInput,  # noqa: A002 - the name is the base class's
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        return super().invoke(input, config, stop=stop, **_with_session(config, kwargs))

    async def ainvoke(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        return await super().ainvoke(input, config, stop=stop, **_with_session(config, kwargs))

    def stream(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        return super().stream(input, config, stop=stop, **_with_session(config, kwargs))

    async def astream(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        async for chunk in super().astream(input, config, stop=stop, **_with_session(config, kwargs)):
            yield chunk

    def stream_events(  # one signature for what the base class overloads
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        version: Literal["v1", "v2", "v3"] = "v2",
        **kwargs: Any,
    ) -> Any:
        if version == "v3":  # the others come through `stream`
            kwargs = _with_session(config, kwargs)
        return super().stream_events(input, config, version=version, **kwargs)

    def astream_events(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        version: Literal["v1", "v2", "v3"] = "v2",
        **kwargs: Any,
    ) -> Any:
        if version == "v3":
            kwargs = _with_session(config, kwargs)
        return super().astream_events(input, config, version=version, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["function_calling", "json_mode", "json_schema"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """As in the base class, but by grammar unless told otherwise: no model can answer anything else."""
        return super().with_structured_output(
            schema, method=method, include_raw=include_raw, strict=strict, **kwargs
        )


def _with_session(config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with the session that `config` names, unless they name one themselves."""
    if config is None or kwargs.get("session_id") is not None:
        return kwargs
    found = session_from_config(ensure_config(config))
    named = {"session_id": found.session_id, "parent_session_id": found.parent_id}
    return {name: value for name, value in named.items() if value is not None} | {
        name: value for name, value in kwargs.items() if name not in HINTS or value is not None
    }
