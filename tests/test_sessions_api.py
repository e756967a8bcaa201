"""/v1/sessions over HTTP, on a replica with simulated engines and a real Valkey; and sessions in answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import uvicorn

from antiphon.scheduler.config import Config, ModelConfig
from antiphon.scheduler.gateway.app import create_app
from antiphon.scheduler.gateway.conversations import Conversations
from antiphon.scheduler.gateway.prompts import TokenizerSource
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.session_store import SessionStore
from antiphon.scheduler.sources import GatewaySource
from antiphon.scheduler.token_log import TokenLogs
from tests.gateway_helpers import CHAT_PATH, DEADLINE_S, sse_events
from tests.replica_helpers import Cluster, cluster

MODEL = "tiny"
PATH = "/v1/sessions"
Answer = dict[str, Any]


class Client:
    def __init__(self, url: str, http: aiohttp.ClientSession, c: Cluster) -> None:
        self.url = url
        self.c = c
        self._http = http

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Answer]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data = {"data": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
        async with self._http.request(method, self.url + path, headers=named, **data) as answer:
            return answer.status, await answer.json()

    async def good(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        status, answer = await self.ask(method, path, body, **headers)
        assert status in (200, 202), answer
        return answer

    async def error(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """(status, code, param) of an error in OpenAI's shape."""
        status, answer = await self.ask(method, path, body, **headers)
        assert set(answer["error"]) == {"message", "type", "param", "code"}, answer
        return status, answer["error"]["code"], answer["error"]["param"]

    async def chat(self, *texts: str, headers: dict[str, str] | None = None, **more: Any) -> Answer:
        """A conversation whose odd messages are ours; its `session` and usage."""
        roles = ("user", "assistant")
        messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]
        body = {"model": MODEL, "messages": messages, "max_tokens": 8, "ignore_eos": True, **more}
        answer = await self.good("POST", CHAT_PATH, body, **(headers or {}))
        await self.c.recorded()
        return answer

    async def ids(self, query: str = "") -> list[str]:
        return [item["id"] for item in (await self.good("GET", PATH + query))["data"]]


@contextlib.asynccontextmanager
async def served(valkey_url: str, model_dir: Any, **options: Any) -> AsyncIterator[Client]:
    """One decode engine, a replica, and the gateway in front with all that `serve` gives it."""
    async with cluster(valkey_url, "local", engines="d0", **options) as c:
        config = Config(model=ModelConfig(str(model_dir), (MODEL,)))
        store, fleet = SessionStore(c.ledger), c.ledger.connection.fleet
        conversations = Conversations(TokenLogs(valkey_url, fleet=fleet), store, c.ledger)
        app = create_app(
            c.replica, TokenizerSource(lambda: str(model_dir)), config, c.replica, Metrics(),
            store=store, conversations=conversations, on_session_ended=c.replica.session_ended,
        )  # fmt: skip
        async with listening(app) as (url, http):
            yield Client(url, http, c)


@contextlib.asynccontextmanager
async def listening(app: Any) -> AsyncIterator[tuple[str, aiohttp.ClientSession]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(settings)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
            async with aiohttp.ClientSession(timeout=timeout) as http:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}", http
        finally:
            server.should_exit = True
            await serving


# ---------------------------------------------------------------- the resource


def test_a_session_is_made_looked_at_and_changed(valkey_url: str, tiny_model_dir: Any) -> None:
    """Every field comes back; making it again changes what is given and keeps the rest."""

    async def scenario() -> None:
        async with served(valkey_url, tiny_model_dir) as c:
            given = {
                "id": "run/1", "parent_id": "run", "model": MODEL, "ttl_s": 600, "priority": 2,
                "expected_rounds": 5, "slo": {"ttft_ms": 800, "tpot_ms": 40}, "metadata": {"user": "ann"},
            }  # fmt: skip
            made = await c.good("POST", PATH, given)
            assert made["object"] == "session" and made["status"] == "active" and made["round"] == 0
            assert {name: made[name] for name in given} == given
            assert (made["root_id"], made["expires_at"] - made["created_at"]) == ("run", 600)
            where = f"{PATH}/{quote('run/1', safe='')}"
            assert await c.good("GET", where) == made
            again = await c.good("POST", PATH, {"id": "run/1", "priority": 3, "mood": "good"})
            assert again.pop("warnings") == ["unknown key `mood` was ignored"]
            assert {**again, "expires_at": 0} == {**made, "priority": 3, "expires_at": 0}
            changed = await c.good("POST", where, {"ttl_s": 60, "metadata": {}})
            assert (changed["ttl_s"], changed["metadata"], changed["priority"]) == (60, {}, 3)
            assert 55 <= changed["expires_at"] - made["created_at"] <= 70
            unnamed = await c.good("POST", PATH)
            assert unnamed["id"].startswith("sess_") and unnamed["root_id"] == unnamed["id"]
            assert unnamed["parent_id"] is None

    asyncio.run(scenario())


def test_what_is_wrong_is_told(valkey_url: str, tiny_model_dir: Any) -> None:
    """404 for what is not there, 400 for what cannot be; nothing is made of it."""

    async def scenario() -> None:
        async with served(valkey_url, tiny_model_dir) as c:
            unknown = (404, "session_not_found", "session.id")
            assert await c.error("GET", f"{PATH}/nobody") == unknown
            assert await c.error("POST", f"{PATH}/nobody", {"ttl_s": 5}) == unknown
            assert await c.error("POST", f"{PATH}/nobody/fork", {}) == unknown
            assert await c.error("POST", f"{PATH}/nobody/events", {"type": "tool_end"}) == unknown
            assert await c.error("DELETE", f"{PATH}/nobody") == unknown
            assert (await c.error("GET", f"{PATH}/a%20b"))[:2] == (400, "invalid_session_id")
            bad = [
                ({"id": ""}, "invalid_session_id", "id"),
                ({"parent_id": "a b"}, "invalid_session_id", "parent_id"),
                ({"id": 5}, "invalid_session_hint", "id"),
                ({"ttl_s": 0}, "invalid_session_hint", "ttl_s"),
                ({"slo": {"ttft_ms": "x"}}, "invalid_session_hint", "slo.ttft_ms"),
                ({"metadata": {"a": 1}}, "invalid_session_hint", "metadata[...]"),
                ({"metadata": {str(n): "" for n in range(17)}}, "invalid_session_hint", "metadata"),
                ({"metadata": {"k" * 65: ""}}, "invalid_session_hint", "metadata"),
                ({"metadata": {"k": "v" * 513}}, "invalid_session_hint", "metadata"),
                (b"{", "invalid_json", None),
                (b"[]", "invalid_json", None),
            ]
            for body, code, param in bad:
                assert await c.error("POST", PATH, body) == (400, code, param), body
            for query in ("limit=0", "limit=x", "after=nobody", "status=odd"):
                assert (await c.error("GET", f"{PATH}?{query}"))[0] == 400, query
            assert await c.ids() == []
            await c.good("POST", PATH, {"id": "s"})
            for body, param in (
                ({"n": 0}, "n"), ({"n": 65}, "n"), ({"ids": []}, "ids"), ({"ids": ["a", "a"]}, "ids"),
                ({"ids": ["s"]}, "ids"), ({"ids": ["a b"]}, "ids[0]"), ({"n": 2, "ids": ["a"]}, "n"),
                ({"from": 1}, "from"), ({"from": "top"}, "from"),
            ):  # fmt: skip
                status, _, where = await c.error("POST", f"{PATH}/s/fork", body)
                assert (status, where) == (400, param), body
            assert await c.error("POST", f"{PATH}/s/events", {"type": "x"}) == (
                400, "invalid_session_hint", "type",
            )  # fmt: skip
            assert (await c.error("PUT", PATH))[0] == 405
            assert await c.ids() == ["s"]

    asyncio.run(scenario())


def test_sessions_are_listed_page_by_page(valkey_url: str, tiny_model_dir: Any) -> None:
    """The newest first, by status and parent; pages make the whole."""

    async def scenario() -> None:
        async with served(valkey_url, tiny_model_dir) as c:
            names = [f"s{number}" for number in range(7)]
            for name in names:
                await c.good("POST", PATH, {"id": name, "parent_id": "s0" if name in ("s3", "s5") else None})
            whole = await c.good("GET", PATH)
            assert {item["id"] for item in whole["data"]} == set(names)
            assert (whole["object"], whole["has_more"]) == ("list", False)
            page, pages = await c.good("GET", f"{PATH}?limit=3"), []
            while True:
                pages += [item["id"] for item in page["data"]]
                assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
                if not page["has_more"]:
                    break
                page = await c.good("GET", f"{PATH}?limit=3&after={page['last_id']}")
            assert pages == [item["id"] for item in whole["data"]]
            assert set(await c.ids("?parent_id=s0")) == {"s3", "s5"}
            await c.good("DELETE", f"{PATH}/s2")
            assert await c.ids("?status=closed") == ["s2"]
            assert "s2" not in await c.ids("?status=active")
            empty = await c.good("GET", f"{PATH}?parent_id=nobody")
            assert empty == {
                "object": "list",
                "data": [],
                "first_id": None,
                "last_id": None,
                "has_more": False,
            }

    asyncio.run(scenario())


def test_forks_are_children_at_their_parents_home(valkey_url: str, tiny_model_dir: Any) -> None:
    """Named or not; forking again makes no others; their first rounds start at the parent's home."""

    async def scenario() -> None:
        async with served(valkey_url, tiny_model_dir) as c:
            await c.chat("hello", session_id="parent")
            made = await c.good("POST", f"{PATH}/parent/fork", {"ids": ["a", "b"], "expected_start_s": 2})
            assert [item["id"] for item in made["data"]] == ["a", "b"]
            for item in made["data"]:
                assert (item["parent_id"], item["root_id"], item["home"]) == ("parent", "parent", "d0")
                assert (item["forked_at_round"], item["round"]) == (1, 0)
            again = await c.good("POST", f"{PATH}/parent/fork", {"ids": ["a", "b"]})
            assert [item["created_at"] for item in again["data"]] == [
                item["created_at"] for item in made["data"]
            ]
            assert "warnings" not in made and "warnings" not in again
            three = await c.good("POST", f"{PATH}/parent/fork", {"n": 3, "from": 0})
            assert three["warnings"] == ["the first round of each must bring all messages"]
            assert len({item["id"] for item in three["data"]}) == 3
            assert {item["forked_at_round"] for item in three["data"]} == {0}
            answer = await c.chat("hello", session_id="a")
            assert (answer["session"]["parent_id"], answer["session"]["round"]) == ("parent", 1)
            assert len(await c.ids("?parent_id=parent")) == 5

    asyncio.run(scenario())


def test_events_say_what_a_session_waits_for(valkey_url: str, tiny_model_dir: Any) -> None:
    """A tool that runs shows until it ends or a round comes; what has no effect is said."""

    async def scenario() -> None:
        async with served(valkey_url, tiny_model_dir) as c:
            await c.chat("hello", session_id="s")

            async def event(kind: str, **more: Any) -> Answer:
                status, answer = await c.ask("POST", f"{PATH}/s/events", {"type": kind, **more})
                assert (status, answer["object"], answer["type"]) == (202, "session.event", kind)
                return answer

            assert (await event("tool_start", tool="grep", expected_gap_s=3.5))["status"] == "waiting_tool"
            shown = await c.good("GET", f"{PATH}/s")
            assert (shown["status"], shown["expected_gap_s"]) == ("waiting_tool", 3.5)
            assert await c.ids("?status=waiting_tool") == ["s"]
            told = await event("tool_end", prefill={"messages": []}, next_input_tokens=9)
            assert told["status"] == "active"
            assert told["warnings"] == [
                "`next_input_tokens` has no effect yet",
                "`prefill` has no effect yet",
            ]
            await event("tool_start")
            await c.chat("hello", session_id="s")
            assert (await c.good("GET", f"{PATH}/s"))["status"] == "active"

    asyncio.run(scenario())


def test_a_closed_session_leaves_no_room_behind(valkey_url: str, tiny_model_dir: Any) -> None:
    """Deleting is idempotent, takes children along if asked, and the core forgets at once."""

    async def scenario() -> None:
        async with served(valkey_url, tiny_model_dir) as c:
            book = c.c.replica.core.books.fleet.books["d0"]
            await c.chat("hello there", session_id="s")
            await c.chat("hello there", session_id="child", headers={"X_Parent_Session_ID": "s"})
            await c.chat("hello there", session_id="grandchild", headers={"X_Parent_Session_ID": "child"})
            now = c.c.replica.runtime.now()
            assert book.store.live_tokens(now) > 0 and len(book.session_tokens) == 3
            gone = await c.good("DELETE", f"{PATH}/grandchild")
            assert gone == {"id": "grandchild", "object": "session.deleted", "deleted": True}
            assert await c.good("DELETE", f"{PATH}/grandchild") == gone
            assert len(book.session_tokens) == 2
            gone = await c.good("DELETE", f"{PATH}/s?children=true")
            assert gone["children"] == ["child", "grandchild"]
            assert book.store.live_tokens(now) == 0 and not book.session_tokens
            assert (await c.good("GET", f"{PATH}/child"))["status"] == "closed"
            again = await c.chat("hello there", session_id="s")
            assert again["session"]["round"] == 2, "it goes on as if it had not been closed"
            assert (await c.good("GET", f"{PATH}/s"))["status"] == "active"

    asyncio.run(scenario())


# ---------------------------------------------------------------- rounds and their sessions


def test_the_last_round_closes_its_session(valkey_url: str, tiny_model_dir: Any) -> None:
    """By header or body; who insists that it is open gets a 410, and for the unknown a 404."""

    async def scenario() -> None:
        async with served(valkey_url, tiny_model_dir) as c:
            book = c.c.replica.core.books.fleet.books["d0"]
            await c.chat("hello", session_id="s", headers={"X_Session_Final": "true"})
            await c.chat("hello", session={"id": "t", "final": True})
            for name in ("s", "t"):
                assert (await c.good("GET", f"{PATH}/{name}"))["status"] == "closed"
            assert not book.session_tokens
            body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
            closed = {**body, "session": {"id": "s", "must_exist": True}}
            assert await c.error("POST", CHAT_PATH, closed) == (410, "session_closed", "session.id")
            unknown = {**body, "session": {"id": "nobody", "must_exist": True}}
            assert await c.error("POST", CHAT_PATH, unknown) == (404, "session_not_found", "session.id")
            assert "nobody" not in await c.ids()

    asyncio.run(scenario())


def test_the_answer_tells_of_its_session(valkey_url: str, tiny_model_dir: Any) -> None:
    """How it was named, its round, how long it lives, and what was not understood."""

    async def scenario() -> None:
        async with served(valkey_url, tiny_model_dir) as c:
            answer = await c.chat(
                "hello", session={"ttl_s": 300, "mood": 1}, headers={"X_Claude_Code_Session_ID": "cc"}
            )
            assert answer["session"] == {
                "id": "cc", "parent_id": None, "round": 1, "arm": "local", "expires_in_s": 300.0,
                "identified_by": "header:x-claude-code-session-id", "worker": "d0",
                "warnings": ["unknown key `session.mood` was ignored"],
            }  # fmt: skip
            later = await c.chat("hello", session_id="cc")
            assert (later["session"]["round"], later["session"]["expires_in_s"]) == (2, 300.0)
            body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
            wrong = {**body, "session": {"slo": {"ttft_ms": "fast"}}}
            assert await c.error("POST", CHAT_PATH, wrong) == (
                400, "invalid_session_hint", "session.slo.ttft_ms",
            )  # fmt: skip
            status, code, _ = await c.error("POST", CHAT_PATH, body, X_Session_TTL="never")
            assert (status, code) == (400, "invalid_session_hint")

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_conversations_without_an_id_are_told_apart(
    valkey_url: str, tiny_model_dir: Any, stream: bool
) -> None:
    """Two at once, a branch of one, and the same ones over a gateway that has just started."""

    async def scenario() -> None:
        async with served(valkey_url, tiny_model_dir) as c:

            async def said(*texts: str) -> tuple[str, Answer]:
                if not stream:
                    answer = await c.chat(*texts)
                    return answer["choices"][0]["message"]["content"], answer["session"]
                return await streamed(c, *texts)

            one, first = await said("tell me of apples")
            two, second = await said("tell me of pears")
            assert first["id"] != second["id"]
            assert first["identified_by"] == second["identified_by"] == "new"
            _, third = await said("tell me of apples", one, "and of trees")
            _, fourth = await said("tell me of pears", two, "and of trees")
            assert (third["id"], third["round"], third["identified_by"]) == (first["id"], 2, "prefix")
            assert (fourth["id"], fourth["round"]) == (second["id"], 2)
            _, branch = await said("tell me of apples", one, "and of worms")
            assert branch["identified_by"] == "prefix:fork"
            assert (branch["parent_id"], branch["round"]) == (first["id"], 1)

    asyncio.run(scenario())


async def streamed(c: Client, *texts: str) -> tuple[str, Answer]:
    """The same over a stream: its text, and the session of its last event."""
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]
    body = {
        "model": MODEL, "messages": messages, "max_tokens": 8, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    async with aiohttp.ClientSession() as http, http.post(c.url + CHAT_PATH, json=body) as answer:
        events = sse_events(await answer.read())
    await c.c.recorded()
    text = "".join(
        event["choices"][0]["delta"].get("content") or "" for event in events[:-2] if event["choices"]
    )
    session: Answer = events[-2]["session"]
    return text, session


def test_a_forks_prompt_is_cached_where_its_parent_is(valkey_url: str, tiny_model_dir: Any) -> None:
    """The parent's KV is hit: the child's prompt begins with the parent's."""

    async def scenario() -> None:
        async with served(valkey_url, tiny_model_dir) as c:
            trunk = "a long story " * 60
            answer = await c.chat(trunk, session_id="parent")
            text = answer["choices"][0]["message"]["content"]
            for number in range(2):
                child = await c.chat(
                    trunk, text, f"task {number}", session_id=f"child-{number}",
                    headers={"X_Parent_Session_ID": "parent"},
                )  # fmt: skip
                usage = child["usage"]
                assert child["session"]["parent_id"] == "parent"
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                assert cached >= answer["usage"]["prompt_tokens"] // 16 * 16 - 16

    asyncio.run(scenario())


def test_the_listing_of_the_command_line(valkey_url: str, tiny_model_dir: Any) -> None:
    """`antiphon sessions` gets the names that it shows."""

    async def scenario() -> None:
        async with served(valkey_url, tiny_model_dir) as c:
            answer = await c.chat("hello", session_id="s")
            (item,) = await asyncio.to_thread(GatewaySource(c.url).sessions, 10)
            usage = answer["usage"]
            assert (item["session_id"], item["rounds"], item["home"]) == ("s", 1, "d0")
            assert (item["prompt_tokens"], item["completion_tokens"]) == (usage["prompt_tokens"], 8)

    asyncio.run(scenario())


def test_sessions_need_the_ledger(valkey_url: str, tiny_model_dir: Any) -> None:
    """While it is away the resource says so; no 500, and chats go on."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0") as c:
            away = Ledger("redis://127.0.0.1:9/0", fleet="away", deadline_s=0.2)
            config = Config(model=ModelConfig(str(tiny_model_dir), (MODEL,)))
            app = create_app(
                c.replica, TokenizerSource(lambda: str(tiny_model_dir)), config, c.replica, Metrics(),
                store=SessionStore(away),
            )  # fmt: skip
            async with listening(app) as (url, http):
                client = Client(url, http, c)
                for method, path, body in (
                    ("GET", PATH, None), ("POST", PATH, {}), ("GET", f"{PATH}/s", None),
                    ("DELETE", f"{PATH}/s", None), ("POST", f"{PATH}/s/fork", {}),
                ):  # fmt: skip
                    assert (await client.error(method, path, body))[:2] == (503, "ledger_unavailable")
                answer = await client.chat("hello", "hm", "more")
                assert answer["session"]["identified_by"] == "new"
            await away.close()

    asyncio.run(scenario())
