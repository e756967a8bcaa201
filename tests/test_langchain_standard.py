"""LangChain's own tests of a chat model, on a gateway over a simulated engine that answers by a script.

Each test of the standard suite runs in a session of its own name, and the script has that session's answers:
what a model would say is given, everything on the way there and back is not.

What the suite skips, and why that is right:
- `test_serdes`: the class does not claim to be serialisable: LangChain's `load()` refuses namespaces that are
  not its own;
- images, audio, PDF, also in tool messages: the gateway refuses content that is not text, with a clear 400;
- Anthropic's content blocks: the chat route speaks OpenAI's, `/v1/messages` is for the others;
- `test_stream_time`: it replays recorded HTTP, and here nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from antiphon.langchain import ChatAntiphon
from tests.live_stack import Line, live_stack, tool_call

# Said by langchain-openai of what the suite asks for: a pydantic 1 schema, and its own dump of parsed output.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Received a Pydantic BaseModel V1 schema:UserWarning"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
]

JOKE: Line = {"text": msgspec.json.encode({"setup": "Why?", "punchline": "Cats."}).decode()}
JOKE_BY_TOOL: Line = {"tool_calls": [tool_call("Joke", setup="Why?", punchline="Cats.")]}
MAGIC: Line = {"tool_calls": [tool_call("magic_function", input=3)]}
NO_ARGUMENTS: Line = {"tool_calls": [tool_call("magic_function_no_args")]}
WEATHER: Line = {"tool_calls": [tool_call("get_weather", location="San Francisco")]}
SUNNY: Line = {"text": "It is sunny."}

ANSWERS: dict[str, list[Line]] = {
    **{f"test_tool_calling[model{variant}]": [MAGIC, MAGIC] for variant in (0, 1)},
    "test_tool_calling_async": [MAGIC, MAGIC],
    "test_bind_runnables_as_tools": [
        {"tool_calls": [tool_call("greeting_generator", answer_style="Pirate")]}
    ],
    "test_tool_choice": [MAGIC, MAGIC],
    "test_tool_calling_with_no_arguments": [NO_ARGUMENTS, NO_ARGUMENTS],
    **{
        f"test_structured_output{way}[{schema}]": [JOKE, JOKE]
        for way in ("", "_async")
        for schema in ("pydantic", "typeddict", "json_schema")
    },
    # For pydantic 1 the base class falls back to a tool; its JSON schema goes by grammar.
    "test_structured_output_pydantic_2_v1": [JOKE_BY_TOOL, JOKE_BY_TOOL, JOKE, JOKE],
    "test_structured_output_optional_param": [JOKE] * 4,
    "test_json_mode": [JOKE] * 4,
    **{f"test_agent_loop[model{variant}]": [WEATHER, SUNNY] for variant in (0, 1)},
    "test_unicode_tool_call_integration": [
        {"tool_calls": [tool_call("unicode_customer", customer_name=name, description="technology")]}
        for name in ("你好啊集团", "こんにちは株式会社")
    ],
}


@pytest.fixture
def vcr() -> None:
    """Nothing is recorded here. The plugin imports itself in the middle of a run, and CPython 3.11 then fails
    now and then (gh-106905: an AST is made while another one is)."""


@pytest.fixture(scope="class")
def gateway_url(
    tiny_model_dir: Path, valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    script = [{**line, "session_id": name} for name, lines in ANSWERS.items() for line in lines]
    directory = tmp_path_factory.mktemp("standard")
    names = '[model]\nnames = ["tiny-llama", "another-name"]\n'
    with live_stack(directory, valkey_url, tiny_model_dir, script, config=names) as stack:
        yield stack.url


class TestChatAntiphonUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAntiphon

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "simulated", "base_url": "http://127.0.0.1:9/v1", "api_key": "test"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        environment = {"ANTIPHON_API_KEY": "from-env", "ANTIPHON_BASE_URL": "http://gateway:8000"}
        expected = {"openai_api_key": "from-env", "openai_api_base": "http://gateway:8000/v1"}
        return environment, {"model": "simulated"}, expected


class TestChatAntiphonIntegration(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _on(self, gateway_url: str) -> None:
        self.url = gateway_url

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAntiphon

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "tiny-llama", "base_url": self.url, "max_tokens": 64}

    @pytest.fixture
    def model(self, request: pytest.FixtureRequest) -> BaseChatModel:
        """In a session that is named as the test."""
        parameters = {**self.standard_chat_model_params, **self.chat_model_params}
        varied = getattr(request, "param", None) or {}
        return ChatAntiphon(**parameters, **varied, session_id=request.node.name)

    @property
    def model_override_value(self) -> str:
        return "another-name"

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:  # type: ignore[override]
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> Any:
        """The second round of a session finds the first one's tokens."""
        model = ChatAntiphon(**self.chat_model_params, session_id=f"cached-{stream}")
        text = "one two three four five six seven eight nine ten eleven twelve"
        model.invoke(text)
        if not stream:
            answer: Any = model.invoke(text)
        else:
            chunks = list(model.stream(text))
            answer = chunks[0]
            for chunk in chunks[1:]:
                answer = answer + chunk
        assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
        return answer
