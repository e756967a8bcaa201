"""Which session each call of `ChatAntiphon` belongs to, however it is called; agents and their sub-agents."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda, RunnableParallel
from langchain_core.tools import BaseTool, tool
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from antiphon.langchain import ChatAntiphon, SessionKey, session_from_config
from antiphon.langchain.middleware import SessionMiddleware
from tests.live_stack import Line, LiveStack, live_stack, tool_call

TEXT = "Say something."
OBJECT: Line = {"text": msgspec.json.encode({"a": 1}).decode()}
SCHEMA = {"title": "Object", "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

AGENTS = ("agents-sync", "agents-async", "agents-stock", "agents-stock-async")
SCRIPT: list[Line] = [
    *({**OBJECT, "session_id": f"matrix/structured {way}".replace(" ", "-")} for way in ("invoke", "stream")),
    *(
        {**line, "session_id": thread}
        for thread in AGENTS
        for line in (
            {"tool_calls": [tool_call("research", topic="tea"), tool_call("research", topic="coffee")]},
            {"text": "Both are drinks."},
        )
    ),
    *(
        {**line, "session_id": f"{thread}/*"}
        for thread in AGENTS
        for line in ({"tool_calls": [tool_call("look_up", word="it")]}, {"text": "It is a drink."})
    ),
]


@pytest.fixture(scope="module")
def stack(
    tiny_model_dir: Path, valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveStack]:
    directory = tmp_path_factory.mktemp("sessions")
    with live_stack(directory, valkey_url, tiny_model_dir, SCRIPT) as running:
        yield running


@pytest.fixture
def model(stack: LiveStack) -> ChatAntiphon:
    return ChatAntiphon(model="tiny-llama", base_url=stack.url, max_tokens=16)


def thread(name: str) -> RunnableConfig:
    return {"configurable": {"thread_id": name}}


# ---------------------------------------------------------------- entry points

Way = Callable[[ChatAntiphon, RunnableConfig], Any]


async def _all(chunks: Any) -> list[Any]:
    return [chunk async for chunk in chunks]


async def _events(stream: Awaitable[Any]) -> Any:
    return await (await stream).output


def _inside(model: ChatAntiphon) -> RunnableLambda[Any, Any]:
    return RunnableLambda(lambda text: model.invoke(text), afunc=lambda text: model.ainvoke(text))


WAYS: dict[str, Way] = {
    "invoke": lambda model, config: model.invoke(TEXT, config),
    "ainvoke": lambda model, config: asyncio.run(model.ainvoke(TEXT, config)),
    "stream": lambda model, config: list(model.stream(TEXT, config)),
    "astream": lambda model, config: asyncio.run(_all(model.astream(TEXT, config))),
    "batch": lambda model, config: model.batch([TEXT], config),
    "abatch": lambda model, config: asyncio.run(model.abatch([TEXT], config)),
    "bind": lambda model, config: model.bind(temperature=0.5).invoke(TEXT, config),
    "bind_tools": lambda model, config: model.bind_tools([_look_up()]).invoke(TEXT, config),
    "bind_tools-astream": lambda model, config: asyncio.run(
        _all(model.bind_tools([_look_up()]).astream(TEXT, config))
    ),
    "with_config": lambda model, config: model.with_config(config).invoke(TEXT),
    "structured-invoke": lambda model, config: model.with_structured_output(SCHEMA).invoke(TEXT, config),
    "structured-stream": lambda model, config: list(
        model.with_structured_output(SCHEMA).stream(TEXT, config)
    ),
    "sequence": lambda model, config: (RunnableLambda(str) | model).invoke(TEXT, config),
    "parallel": lambda model, config: RunnableParallel(answer=model).invoke(TEXT, config),
    "inside": lambda model, config: _inside(model).invoke(TEXT, config),
    "inside-async": lambda model, config: asyncio.run(_inside(model).ainvoke(TEXT, config)),
    "events-v2": lambda model, config: asyncio.run(_all(model.astream_events(TEXT, config, version="v2"))),
    "events-v3": lambda model, config: model.stream_events(TEXT, config, version="v3").output,
    "events-v3-async": lambda model, config: asyncio.run(
        _events(model.astream_events(TEXT, config, version="v3"))
    ),
    "session_id": lambda model, config: model.invoke(
        TEXT, thread("not-this"), session_id=config["configurable"]["thread_id"]
    ),
    "generate": lambda model, config: model.generate(
        [model._convert_input(TEXT).to_messages()], session_id=config["configurable"]["thread_id"]
    ),
    "field": lambda model, config: model.model_copy(
        update={"session_id": config["configurable"]["thread_id"]}
    ).invoke(TEXT),
}


def _look_up() -> BaseTool:
    @tool
    def look_up(word: str) -> str:
        """Look a word up."""
        return f"{word}: a drink"

    return look_up


@pytest.mark.parametrize("way", WAYS)
def test_the_thread_is_the_session(stack: LiveStack, model: ChatAntiphon, way: str) -> None:
    """Whatever a model is called by, and in as many event loops as it likes, the thread's id arrives."""
    name = f"matrix/{way}"
    WAYS[way](model, thread(name))
    (only,) = stack.rounds(name, 1)
    assert only["session_id"] == name and only["round_number"] == 1


def test_the_answer_says_which_session_it_was(model: ChatAntiphon) -> None:
    """`response_metadata["session"]`, whole and streamed, with usage and what was cached."""
    whole = model.invoke(TEXT, thread("told"))
    assert whole.response_metadata["session"]["id"] == "told"
    streamed = list(model.stream(TEXT, thread("told")))
    answer = streamed[0]
    for chunk in streamed[1:]:
        answer += chunk
    assert answer.response_metadata["session"]["id"] == "told"
    assert answer.response_metadata["session"]["round"] == 2
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_token_details"]["cache_read"] > 0


def test_an_answer_from_the_cache_is_one_for_any_session(stack: LiveStack, model: ChatAntiphon) -> None:
    """Session and hints are no part of the cache's key."""
    cached = model.model_copy(update={"cache": InMemoryCache()})
    first = cached.invoke(TEXT, thread("cache-1"), expected_gap_s=1.5)
    second = cached.invoke(TEXT, thread("cache-2"), expected_gap_s=2.5)
    assert first.content == second.content
    assert len(stack.rounds("cache-1", 1)) == 1 and not stack.receipts("cache-2")


def test_hints_are_in_the_request_and_not_among_the_models_options(model: ChatAntiphon) -> None:
    """By keyword, next to what the caller puts into the request himself."""
    payload = model._get_request_payload(
        TEXT,
        session_id="s", parent_session_id="p", session_final=True, expected_gap_s=2, remaining_rounds=0,
        slo={"ttft_ms": 500}, extra_headers={"x-session-id": "mine"}, extra_body={"session": {"ttl_s": 60}},
    )  # fmt: skip
    assert payload["extra_headers"] == {
        "x-session-id": "mine",
        "X-Parent-Session-ID": "p",
        "X-Session-Final": "true",
    }
    assert payload["extra_body"]["session"] == {
        "expected_gap_s": 2,
        "slo": {"ttft_ms": 500},
        "next_round": {"remaining_rounds": 0},
        "ttl_s": 60,
    }
    assert not {"session_id", "expected_gap_s", "slo"} & payload.keys()


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("configurable", "metadata", "expected"),
    [
        ({}, {}, SessionKey()),
        ({"thread_id": "t"}, {}, SessionKey("t")),
        ({"thread_id": 7}, {}, SessionKey("7")),
        ({"thread_id": "t", "checkpoint_ns": "model:1"}, {}, SessionKey("t")),
        ({}, {"session_id": "m"}, SessionKey("m")),
        ({"session_id": "s", "thread_id": "t", "checkpoint_ns": "tools:1|model:2"}, {}, SessionKey("s")),
        ({"thread_id": "t", "parent_session_id": "p"}, {}, SessionKey("t", "p")),
    ],
)
def test_session_of_a_config(
    configurable: dict[str, Any], metadata: dict[str, Any], expected: SessionKey
) -> None:
    assert session_from_config({"configurable": configurable, "metadata": metadata}) == expected


def test_sub_agents_have_sessions_of_their_own() -> None:
    """By the namespace less its last segment; one level out is the parent, a bare number is no level."""

    def key(namespace: str) -> SessionKey:
        return session_from_config({"configurable": {"thread_id": "t", "checkpoint_ns": namespace}})

    child, grandchild = key("tools:1|model:2"), key("tools:1|tools:5|model:6")
    assert child.parent_id == "t" and child.session_id != "t"
    assert key("tools:1|tools:9") == child, "a tool of the sub-agent is in its session"
    assert grandchild.parent_id == child.session_id
    twin = key("tools:1|1|model:2")
    assert twin.parent_id == "t" and twin.session_id not in ("t", child.session_id)
    assert key("tools:1|1|tools:5|model:6").parent_id == twin.session_id


# ---------------------------------------------------------------- agents


class Meeting:
    """Two sub-agents are in their tools at the same time, or it fails."""

    def __init__(self) -> None:
        self._threads = threading.Barrier(2, timeout=30)
        self._tasks = asyncio.Barrier(2)

    def look_up(self) -> BaseTool:
        @tool
        def look_up(word: str) -> str:
            """Look a word up."""
            self._threads.wait()
            return f"{word}: a drink"

        @tool("look_up")
        async def look_up_async(word: str) -> str:
            """Look a word up."""
            async with asyncio.timeout(30):
                await self._tasks.wait()
            return f"{word}: a drink"

        look_up.coroutine = look_up_async.coroutine  # type: ignore[attr-defined]
        return look_up


def agent_with_two_sub_agents(model: BaseChatModel, middleware: list[SessionMiddleware]) -> Any:
    """Its script lets it ask two researchers at once, each of whom looks something up."""
    researcher: Any = create_agent(model, [Meeting().look_up()], middleware=middleware)

    @tool
    def research(topic: str) -> str:
        """Ask a researcher."""
        return str(researcher.invoke({"messages": [("user", topic)]})["messages"][-1].text)

    @tool("research")
    async def research_async(topic: str) -> str:
        """Ask a researcher."""
        state = await researcher.ainvoke({"messages": [("user", topic)]})
        return str(state["messages"][-1].text)

    research.coroutine = research_async.coroutine  # type: ignore[attr-defined]
    return create_agent(model, [research], middleware=middleware)


def run(agent: Any, name: str, *, in_a_loop: bool) -> AIMessage:
    question = {"messages": [("user", "Compare tea and coffee.")]}
    if in_a_loop:
        state = asyncio.run(agent.ainvoke(question, thread(name)))
    else:
        state = agent.invoke(question, thread(name))
    answer = state["messages"][-1]
    assert isinstance(answer, AIMessage)
    return answer


def check_one_session_per_agent(stack: LiveStack, name: str) -> list[str]:
    """Two rounds each; the children name their parent. Returns the children's ids."""
    assert [item["round_number"] for item in stack.rounds(name, 2)] == [1, 2]
    listed = stack.http.get("/v1/sessions", params={"parent_id": name}).json()["data"]
    children = [item["id"] for item in listed if item["parent_id"] == name]
    assert len(children) == 2
    for child in children:
        assert [item["round_number"] for item in stack.rounds(child, 2)] == [1, 2]
        assert stack.session(child)["parent_id"] == name
    return children


@pytest.mark.parametrize("in_a_loop", [False, True], ids=["sync", "async"])
def test_one_session_per_agent(stack: LiveStack, model: ChatAntiphon, in_a_loop: bool) -> None:
    """An agent with two sub-agents at work side by side: three sessions, and who started whom."""
    name = "agents-async" if in_a_loop else "agents-sync"
    answer = run(agent_with_two_sub_agents(model, []), name, in_a_loop=in_a_loop)
    assert answer.text == "Both are drinks."
    assert answer.response_metadata["session"]["id"] == name
    check_one_session_per_agent(stack, name)


@pytest.mark.parametrize("in_a_loop", [False, True], ids=["sync", "async"])
def test_middleware_for_a_stock_chat_model(stack: LiveStack, in_a_loop: bool) -> None:
    """The same with ChatOpenAI: sessions of sub-agents are closed at the end of their runs, the thread's is
    waiting for its user; the tools' times are known."""
    name = "agents-stock-async" if in_a_loop else "agents-stock"
    stock = ChatOpenAI(
        model="tiny-llama", base_url=f"{stack.url}/v1", api_key=SecretStr("none"), max_retries=0
    )
    middleware = SessionMiddleware(stack.url)
    answer = run(agent_with_two_sub_agents(stock, [middleware]), name, in_a_loop=in_a_loop)
    assert answer.text == "Both are drinks."
    children = check_one_session_per_agent(stack, name)
    assert {stack.session(child)["status"] for child in children} == {"closed"}
    assert stack.session(name)["status"] == "active"
    assert (middleware._client.tool_times.expected_s("look_up") or 0) > 0
    assert (middleware._gaps.next_round(None, "look_up") or 0) > 0, "learnt from the sub-agents' tools"


def test_middleware_without_a_gateway_for_events(stack: LiveStack, model: ChatAntiphon) -> None:
    """Events are hints: an agent runs when nobody takes them."""
    agent: Any = create_agent(model, [_look_up()], middleware=[SessionMiddleware("http://127.0.0.1:9")])
    assert agent.invoke({"messages": [("user", TEXT)]}, thread("no-events"))["messages"][-1].text
    assert len(stack.rounds("no-events", 1)) == 1


def test_a_model_in_several_event_loops_and_threads(stack: LiveStack, model: ChatAntiphon) -> None:
    """One model object, loop after loop and several at once."""
    for _ in range(3):
        asyncio.run(model.ainvoke(TEXT, thread("loops")))
    failures: list[BaseException] = []

    def in_a_thread() -> None:
        try:
            asyncio.run(model.ainvoke(TEXT, thread("loops")))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=in_a_thread) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert not failures
    stack.rounds("loops", 3)
