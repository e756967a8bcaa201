"""The Python client, sync and async, against a live gateway, and against a server that fails on command."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from antiphon.client import (
    AsyncClient,
    AsyncSession,
    Client,
    Delta,
    Overloaded,
    Refused,
    Reply,
    ServerFault,
    Session,
    SessionBusy,
    StreamBroke,
    Unreachable,
    tool_result,
)
from antiphon.client.wire import RETRY_COUNT
from tests.live_stack import LiveStack, live_stack, tool_call

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
WAYS = ("sync", "async")


@pytest.fixture(scope="module")
def stack(
    tiny_model_dir: Path, valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveStack]:
    script = [
        line
        for way in WAYS
        for line in (
            {"session_id": f"tools-{way}", "tool_calls": [tool_call("look", word="tea")]},
            {"session_id": f"tools-{way}", "text": "Tea is a drink."},
        )
    ]
    directory = tmp_path_factory.mktemp("client")
    with live_stack(directory, valkey_url, tiny_model_dir, script) as running:
        yield running


class Both:
    """Either client behind one interface: tests say what they mean once."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    def session(self, *arguments: Any, **named: Any) -> BothSession:
        return BothSession(self.client.session(*arguments, **named))


class BothSession:
    def __init__(self, session: Session | AsyncSession) -> None:
        self.session = session

    @property
    def id(self) -> str:
        return self.session.id

    async def append(self, *arguments: Any, **named: Any) -> Reply:
        if isinstance(self.session, Session):
            return await asyncio.to_thread(self.session.append, *arguments, **named)
        return await self.session.append(*arguments, **named)

    async def stream(self, *arguments: Any, **named: Any) -> list[Delta]:
        if isinstance(self.session, Session):
            return await asyncio.to_thread(lambda s: list(s.stream(*arguments, **named)), self.session)
        return [delta async for delta in self.session.stream(*arguments, **named)]

    async def fork(self, n: int) -> list[BothSession]:
        if isinstance(self.session, Session):
            return [BothSession(one) for one in await asyncio.to_thread(self.session.fork, n)]
        return [BothSession(one) for one in await self.session.fork(n)]

    @contextlib.asynccontextmanager
    async def tool(self, name: str) -> AsyncIterator[None]:
        if isinstance(self.session, Session):
            with self.session.tool(name):
                yield
        else:
            async with self.session.tool(name):
                yield

    async def close(self) -> None:
        if isinstance(self.session, Session):
            await asyncio.to_thread(self.session.close)
        else:
            await self.session.close()


@contextlib.asynccontextmanager
async def connected(way: str, url: str, **options: Any) -> AsyncIterator[Both]:
    options = {"model": "tiny-llama", **options}
    if way == "sync":
        with Client(url, **options) as client:
            yield Both(client)
    else:
        async with AsyncClient(url, **options) as async_client:
            yield Both(async_client)


both_ways = pytest.mark.parametrize("way", WAYS)


# ---------------------------------------------------------------- a live gateway


@both_ways
async def test_a_conversation(stack: LiveStack, way: str) -> None:
    """Each round sends what is new and finds the rest; it ends with the session."""
    async with connected(way, stack.url) as client:
        session = client.session(f"talk-{way}", max_tokens=8, temperature=0)
        first = await session.append(f"{way}: {LONG}")
        assert first.session is not None and first.session.id == session.id == f"talk-{way}"
        assert first.usage is not None
        deltas = await session.stream("And then?")
        second = session.session.last
        assert second is not None and "".join(delta.text for delta in deltas) == second.text
        assert second.usage is not None and second.session is not None
        assert second.session.round == 2
        assert second.usage.prompt_tokens > first.usage.prompt_tokens + first.usage.completion_tokens
        assert second.usage.cached_tokens > first.usage.prompt_tokens // 2
        assert [m["role"] for m in session.session.messages] == ["user", "assistant"] * 2
        await session.close()
        assert stack.session(session.id)["status"] == "closed"


@both_ways
async def test_tools(stack: LiveStack, way: str) -> None:
    """A call, its run between events, its result; the time that it took is known afterwards."""
    async with connected(way, stack.url) as client:
        session = client.session(f"tools-{way}", tools=[TOOL])
        asked = await session.append("What is tea?")
        (call,) = asked.tool_calls
        assert (call.name, call.parsed()) == ("look", {"word": "tea"})
        async with session.tool(call.name):
            result = "a drink"
        assert (client.client.tool_times.expected_s("look") or 0) > 0
        answered = await session.append(tool_result(call, result))
        assert answered.text == "Tea is a drink." and answered.finish_reason == "stop"


@both_ways
async def test_forks_share_what_was_said(stack: LiveStack, way: str) -> None:
    """Two go on side by side from where the parent is; what it said is found by both of them."""
    async with connected(way, stack.url) as client:
        parent = client.session(f"fork-{way}", max_tokens=8)
        said = await parent.append(f"{way}: {LONG} {LONG}")
        children = await parent.fork(2)
        replies = await asyncio.gather(*(child.append(f"Go on, {n}.") for n, child in enumerate(children)))
        assert said.usage is not None
        for child, reply in zip(children, replies, strict=True):
            assert reply.session is not None and reply.session.id == child.id
            assert reply.session.parent_id == parent.id
            assert reply.usage is not None and reply.usage.prompt_tokens > said.usage.total_tokens
            assert reply.usage.cached_tokens > said.usage.prompt_tokens // 2
        assert len({child.id for child in children}) == 2
        assert (await parent.append("And you?")).session is not None


@both_ways
async def test_history_that_is_lost_is_sent_again(stack: LiveStack, valkey_url: str, way: str) -> None:
    """Nobody notices but the receipts: the conversation goes on, whole."""
    async with connected(way, stack.url) as client:
        session = client.session(f"lost-{way}", max_tokens=8)
        first = await session.append(f"{way}: {LONG}")
        await forget_histories(valkey_url, session.id)
        second = await session.append("And then?")
        assert first.usage is not None and second.usage is not None
        assert second.usage.prompt_tokens > first.usage.prompt_tokens + first.usage.completion_tokens
        assert [m["role"] for m in session.session.messages] == ["user", "assistant"] * 2


@both_ways
async def test_a_session_that_another_program_began(stack: LiveStack, valkey_url: str, way: str) -> None:
    """It goes on with what the gateway knows; if that is lost, the caller hears of it."""
    async with connected(way, stack.url) as client:
        first = await client.session(f"resumed-{way}", max_tokens=8).append(f"{way}: {LONG}")
        resumed = client.session(f"resumed-{way}", resume=True, max_tokens=8)
        second = await resumed.append("And then?")
        assert first.usage is not None and second.usage is not None and second.session is not None
        assert second.session.round == 2
        assert second.usage.prompt_tokens > first.usage.prompt_tokens + first.usage.completion_tokens
        (branch,) = await resumed.fork(1)
        third = await branch.append("Or else?")
        assert third.session is not None and third.session.parent_id == resumed.id
        assert third.usage is not None and third.usage.prompt_tokens > second.usage.total_tokens
        await forget_histories(valkey_url, resumed.id)
        # This replica remembers it without the ledger: one that never saw it would say 410.
        with contextlib.suppress(Refused):
            await resumed.append("And?")


async def forget_histories(valkey_url: str, session_id: str) -> None:
    """As a Redis that was emptied: the token log of the session is gone."""
    import redis.asyncio

    client = redis.asyncio.Redis.from_url(valkey_url)
    keys = [key async for key in client.scan_iter(f"*{session_id}*:log")]
    assert keys, "the gateway keeps a token log"
    await client.delete(*keys)
    await client.aclose()


@both_ways
async def test_bad_input_is_refused_and_loses_nothing(stack: LiveStack, way: str) -> None:
    """The gateway's own words, by field; the conversation is as it was."""
    async with connected(way, stack.url) as client:
        session = client.session(f"bad-{way}", max_tokens=8)
        await session.append("Hello")
        with pytest.raises(Refused) as caught:
            await session.append("On", temperature=-1)
        assert caught.value.status == 400 and caught.value.param == "temperature"
        with pytest.raises(Refused):
            await session.stream("On", temperature=-1)
        assert len(session.session.messages) == 2
        assert (await session.append("On")).session is not None
        with pytest.raises(Refused) as caught:
            await client.session(f"bad-{way}-2", model="no-such-model").append("Hello")
        assert caught.value.status == 404


@both_ways
async def test_what_is_expected_reaches_the_gateway(stack: LiveStack, way: str) -> None:
    """Hints are checked there: a wrong one is refused by name, a right one is no warning."""
    async with connected(way, stack.url) as client:
        session = client.session(f"expect-{way}", max_tokens=8)
        session.session.expect(gap_s=2.5, output_tokens=8, remaining_rounds=1, slo={"ttft_ms": 900})
        reply = await session.append("Hello")
        assert reply.session is not None and not reply.session.warnings
        session.session.expect(gap_s=-1)
        with pytest.raises(Refused) as caught:
            await session.append("On")
        assert caught.value.param == "session.expected_gap_s"


def test_leaving_the_block_closes_the_session(stack: LiveStack) -> None:
    """Also by an exception, which is the one that is seen."""
    with Client(stack.url, model="tiny-llama") as client:
        with pytest.raises(ZeroDivisionError), client.session("left", max_tokens=4) as session:
            session.append("Hello")
            raise ZeroDivisionError
        assert client.get_session("left").status == "closed"
        with client.session("said-goodbye", max_tokens=4) as session:
            session.append("Bye", final=True)
        assert client.get_session("said-goodbye").status == "closed"
        assert "left" in {record.id for record in client.list_sessions(limit=100)}
        client.close_session("never-there")


async def test_leaving_the_block_closes_the_async_session(stack: LiveStack) -> None:
    async with AsyncClient(stack.url, model="tiny-llama") as client:
        async with client.session("left-async", max_tokens=4) as session:
            await session.append("Hello")
        assert (await client.get_session("left-async")).status == "closed"


def test_a_stream_that_is_left_early_leaves_the_session_usable(stack: LiveStack) -> None:
    """The conversation is as before it, and the next round runs."""
    with Client(stack.url, model="tiny-llama") as client:
        session = client.session("early", max_tokens=64)
        stream = session.stream("Hello")
        next(stream)
        with pytest.raises(SessionBusy):
            session.append("On")
        stream.close()
        assert session.messages == []
        first = session.append("Hello", max_tokens=4)
        stream = session.stream("On")
        next(stream)
        stream.close()
        second = session.append("On", max_tokens=4)
        assert first.usage is not None and second.usage is not None
        alone = client.session("not-left", max_tokens=4)
        alone.append("Hello")
        assert second.usage.prompt_tokens == (alone.append("On").usage or second.usage).prompt_tokens


# ---------------------------------------------------------------- a server that fails on command

REPLY = {"choices": [{"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}]}
EVENT = b'data: {"choices": [{"delta": {"content": "ye"}}]}\n\n'


@dataclass
class FailingServer:
    """Answers as its list says: (status, headers, body), the body None = hang up without a word. A body that
    is shorter than its Content-Length ends by hanging up."""

    answers: list[tuple[int, dict[str, str], bytes | None]]
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = msgspec.json.decode(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, dict(self.headers), body))
                status, headers, content = outer.answers.pop(0)
                if content is not None:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(content)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        return Handler


def error(status: int, **headers: str) -> tuple[int, dict[str, str], bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, msgspec.json.encode({"error": {"message": "m", "code": "c"}})


OK: tuple[int, dict[str, str], bytes] = (200, {}, msgspec.json.encode(REPLY))
HANG_UP: tuple[int, dict[str, str], None] = (0, {}, None)


@both_ways
@pytest.mark.parametrize(
    "before", [[], [error(503, retry_after_ms="1")], [HANG_UP], [error(500, retry_after_ms="1"), HANG_UP]]
)
async def test_failures_that_pass(way: str, before: Sequence[Any]) -> None:
    """The round is made again, and says so."""
    server = FailingServer([*before, OK])
    with server.running() as url:
        async with connected(way, url) as client:
            assert (await client.session("s").append("Hello")).text == "yes"
    counts = [{k.lower(): v for k, v in headers.items()}.get(RETRY_COUNT) for _, headers, _ in server.asked]
    assert counts == [None, "1", "2"][: len(before) + 1]


@both_ways
@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ([error(500, x_should_retry="false")], ServerFault),
        ([error(429, retry_after_ms="1")] * 3, Overloaded),
        ([HANG_UP] * 3, Unreachable),
        ([(200, {}, b"<html>")], ServerFault),
    ],
)
async def test_failures_that_stay(way: str, answers: Sequence[Any], kind: type[Exception]) -> None:
    """Every answer is used up, none is asked for twice where the server says so; nothing was said."""
    server = FailingServer(list(answers))
    with server.running() as url:
        async with connected(way, url) as client:
            session = client.session("s")
            with pytest.raises(kind):
                await session.append("Hello")
            assert session.session.messages == [] and not server.answers


@both_ways
@pytest.mark.parametrize(
    "broken",
    [
        (200, {"Content-Length": "9999"}, EVENT),
        (200, {}, EVENT),
        (200, {}, EVENT + b'data: {"error": {}}\n\n'),
    ],
    ids=["cut", "no end", "error"],
)
async def test_a_stream_that_breaks_is_not_made_again(way: str, broken: Any) -> None:
    """Tokens were shown already; the conversation is as it was."""
    server = FailingServer([broken])
    with server.running() as url:
        async with connected(way, url) as client:
            session = client.session("s")
            with pytest.raises(StreamBroke):
                await session.stream("Hello")
            assert session.session.messages == [] and len(server.asked) == 1


@both_ways
async def test_nobody_there(way: str) -> None:
    """A gateway that is away is an error of its own, and no event is one at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    async with connected(way, f"http://127.0.0.1:{port}", max_retries=0) as client:
        session = client.session("s")
        with pytest.raises(Unreachable):
            await session.append("Hello")
        async with session.tool("look"):
            pass
        assert client.client.tool_times.expected_s("look") is not None
