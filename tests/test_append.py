"""Append, and histories by served ids, through gateways, ledger and engine: what a client sees of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antiphon.scheduler.conversation import Conversation
from antiphon.scheduler.gateway.prompts import PromptTokenizer, TemplateOptions
from antiphon.scheduler.valkey import EmbeddedValkey
from tests.append_helpers import CHAT, Gateway, Stack, byte_by_byte, line, stack, user
from tests.replica_helpers import until

TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
LONG = " the of and to in is that for it as was with be by on not he his but at are this have from or had" * 3


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PromptTokenizer:
    return PromptTokenizer(tiny_model_dir)


@pytest.fixture
def run(valkey_url: str, tiny_model_dir: Path, tmp_path: Path) -> Callable[..., None]:
    """Run a scenario on a stack whose engine answers with these lines."""

    def start(
        work: Callable[[Stack], Coroutine[Any, Any, None]],
        lines: Sequence[dict[str, Any]] = (),
        **config: Any,
    ) -> None:
        async def all_of_it() -> None:
            async with stack(valkey_url, tiny_model_dir, tmp_path / "script.jsonl", lines, **config) as made:
                await work(made)

        asyncio.run(all_of_it())

    return start


def message(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["choices"][0]["message"]
    return found


def cached(answer: dict[str, Any]) -> int:
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def pages(tokens: int) -> int:
    return tokens // 16 * 16


def test_an_answer_that_tokenises_differently_hits_its_kv_whole(
    run: Callable[..., None], tokenizer: PromptTokenizer
) -> None:
    """Full histories: all that was served is found in the cache, though its text would give other ids."""
    text = LONG[:120]

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway:
            messages = [user("hello" + LONG)]
            for turn in range(4):
                status, answer = await gateway.chat("s", *messages)
                assert status == 200, answer
                await gateway.recorded()
                assert message(answer)["content"] == text
                if turn:
                    served = len(gateway.prompts[-2]) + answer["usage"]["completion_tokens"]
                    assert cached(answer) == pages(served - 1) == gateway_cached(gateway)
                messages += [message(answer), user(f"more {turn}")]
            again = tokenizer.encode_chat(messages[:-2], TemplateOptions())
            assert list(again) != gateway.prompts[-1], "else it shows nothing"
            assert tokenizer.decode(again) == tokenizer.decode(gateway.prompts[-1])

    run(work, [line(tokenizer, text)] * 4)


def gateway_cached(gateway: Gateway) -> int:
    """Of the last round's receipt."""
    return gateway.replica._receipts.newest(1, None, None)[0]["cached_tokens"]  # type: ignore[no-any-return]


def test_append_is_the_full_history(run: Callable[..., None], tokenizer: PromptTokenizer) -> None:
    """Ids, answers, rounds and cached tokens are those of a client that sends everything."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway:
            messages: list[dict[str, Any]] = []
            for turn in range(6):
                new = [user(f"question {turn}" + LONG)]
                messages += new
                status, full = await gateway.chat("full", *messages, cache_salt="a")
                assert status == 200, full
                if turn % 2:
                    status, short = await gateway.append("short", *new, cache_salt="b")
                else:
                    body = {"messages": new, "session": {"append": True, "id": "short"}, "cache_salt": "b"}
                    status, short = await gateway.post(CHAT, body)
                assert status == 200, short
                await gateway.recorded()
                assert gateway.prompts[-1] == gateway.prompts[-2]
                assert message(short) == message(full)
                assert short["usage"] == full["usage"]
                named = short["session"]
                assert named["round"] == full["session"]["round"] == turn + 1 and "warnings" not in named
                assert named["identified_by"] == ("path" if turn % 2 else "body:session.id")
                messages.append(message(full))
            assert gateway.prompts[-1][:-1] != gateway.prompts[-3]

    run(work, [line(tokenizer, f" answer {n // 2}") for n in range(12)])


def test_streamed_rounds_are_kept_too(run: Callable[..., None], tokenizer: PromptTokenizer) -> None:
    """Before [DONE]: the next round may come at once. A client that asked for no usage is served alike."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway, made.gateway() as other:
            for turn in range(4):
                mine = (gateway, other)[turn % 2]
                body: dict[str, Any] = {"messages": [user(f"question {turn}")]}
                if turn >= 2:
                    body["stream_options"] = {"include_usage": True}
                events = await mine.events("/v1/sessions/s/rounds", body)
                assert events[-1] == "[DONE]"
                await mine.recorded()
            served = [*other.prompts[0], *byte_by_byte(tokenizer, " x1")]
            assert gateway.prompts[1][: len(served)] == served
            assert events[-2]["session"]["round"] == 4 and "warnings" not in events[-2]["session"]
            text = tokenizer.decode(other.prompts[1])
            assert [text.count(f" x{n}<|im_end|>") for n in range(4)] == [1, 1, 1, 0]

    run(work, [line(tokenizer, f" x{n}") for n in range(4)])


def test_a_continued_answer_is_one_message(run: Callable[..., None], tokenizer: PromptTokenizer) -> None:
    """The last message is the beginning of the answer, whether the server has it already or not."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway:
            _, first = await gateway.chat("s", user("hello"))
            asked = [user("hello"), message(first)]
            parts = [{"type": "text", "text": "in"}, {"type": "text", "text": "parts"}]
            for session_id, begun in (
                ("s", asked[1]),
                ("t", asked[1]),
                ("u", {**asked[1], "content": parts}),
            ):
                status, more = await gateway.chat(session_id, asked[0], begun, continue_final_message=True)
                assert status == 200, more
                status, _ = await gateway.append(session_id, user("and then?"))
                assert status == 200
                text = " one" if begun is asked[1] else "in parts"
                meant = [asked[0], {"role": "assistant", "content": text + " two"}, user("and then?")]
                assert tokenizer.decode(gateway.prompts[-1]) == tokenizer.render(meant, TemplateOptions())

    answers = [line(tokenizer, text) for text in (" two", " x") * 3]
    run(work, [line(tokenizer, " one"), *answers])


def test_tool_rounds_by_append(run: Callable[..., None], tokenizer: PromptTokenizer) -> None:
    """Tools are given once; results are appended; the model's own spacing of its call stays."""
    arguments = '{"q":1,  "r":[2,3]}'
    written = f'<tool_call>\n{{"name":"search","arguments":{arguments}}}\n</tool_call>'
    ids = byte_by_byte(tokenizer, written)
    lines = [
        {"tool_calls": [{"name": "search", "arguments": arguments}], "token_ids": ids},
        line(tokenizer, " found it"),
        line(tokenizer, " bye"),
    ]

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway:
            status, answer = await gateway.append("s", user("look" + LONG), tools=TOOLS)
            assert status == 200 and message(answer)["tool_calls"][0]["function"]["arguments"] == arguments
            await gateway.recorded()
            call_id = message(answer)["tool_calls"][0]["id"]
            result = {"role": "tool", "tool_call_id": call_id, "content": "here"}
            status, answer = await gateway.append("s", result)
            assert status == 200 and message(answer)["content"] == " found it"
            await gateway.recorded()
            served = gateway.prompts[0] + ids
            assert gateway.prompts[1][: len(served)] == served and cached(answer) == pages(len(served) - 1)
            assert gateway.seen.requests[1].body["tools"] == TOOLS, "the engine's tool parser needs them"
            status, answer = await gateway.append("s", user("thanks"))
            await gateway.recorded()
            assert "<tools>" in tokenizer.decode(gateway.prompts[2])
            assert written in tokenizer.decode(gateway.prompts[2])

    run(work, lines)


def test_tools_that_a_round_hides_are_not_in_its_prompt(
    run: Callable[..., None], tokenizer: PromptTokenizer
) -> None:
    """`tool_choice` "none" hides them for one round; the next one shows them again."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway:
            asked: list[dict[str, Any]] = []
            hidden: dict[str, Any] = {"tool_choice": "none"}
            rounds: list[dict[str, Any]] = [{"tools": TOOLS}, {}, {}, hidden, hidden, {}, {}]
            for number, more in enumerate(rounds):
                asked.append(user(f"question {number}"))
                if number == 0:
                    status, answer = await gateway.chat("s", *asked, **more)
                else:
                    status, answer = await gateway.append("s", asked[-1], **more)
                assert status == 200, answer
                options = TemplateOptions(None if more is hidden else TOOLS)
                assert tokenizer.decode(gateway.prompts[-1]) == tokenizer.render(asked, options)
                asked.append(message(answer))

    run(work, [line(tokenizer, f" x{n}") for n in range(7)])


def test_an_append_chooses_among_the_sessions_tools(
    run: Callable[..., None], tokenizer: PromptTokenizer
) -> None:
    """Which it need not bring again."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway:
            named = {"type": "function", "function": {"name": "search"}}
            await gateway.chat("s", user("hello"), tools=TOOLS)
            for choice in ("required", named):
                status, answer = await gateway.append("s", user("look"), tool_choice=choice)
                assert status == 200, answer
            named = {"type": "function", "function": {"name": "another"}}
            for path, more in (
                ("/v1/sessions/s/rounds", {}),
                (CHAT, {"session": {"id": "s", "append": True}}),
            ):
                body = {"messages": [user("look")], "tool_choice": named, **more}
                status, answer = await gateway.post(path, body)
                assert (status, answer["error"]["param"]) == (400, "tool_choice"), answer
            none: tuple[list[Any] | None, ...] = (None, [])
            for tools in none:
                status, answer = await gateway.append(
                    "new", user("look"), tool_choice="required", tools=tools
                )
                assert (status, answer["error"]["param"]) == (400, "tool_choice"), answer

    run(work, [line(tokenizer, f" x{n}") for n in range(3)])


def test_a_restart_and_a_second_replica_change_nothing(
    run: Callable[..., None], tokenizer: PromptTokenizer
) -> None:
    """Rounds by turns on two replicas; then both go, and a third one goes on."""

    async def work(made: Stack) -> None:
        async with made.gateway() as one, made.gateway() as other:
            for turn in range(4):
                mine = (one, other)[turn % 2]
                status, answer = await mine.append("s", user(f"question {turn}"))
                assert status == 200 and answer["session"]["round"] == turn + 1, answer
                await mine.recorded()
            last = [*other.prompts[-1], *byte_by_byte(tokenizer, " x3")]
        async with made.gateway() as third:
            status, answer = await third.append("s", user("still there?"))
            assert status == 200 and answer["session"]["round"] == 5
            assert third.prompts[0][: len(last)] == last
            assert cached(answer) == pages(len(last) - 1)

    run(work, [line(tokenizer, f" x{n}") for n in range(5)])


def test_two_appends_at_once_fork(run: Callable[..., None], tokenizer: PromptTokenizer) -> None:
    """The second one runs on the history as it was, in a session of its own, which goes on."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway:
            status, _ = await gateway.append("s", user("hello"))
            assert status == 200
            await gateway.recorded()
            answers = await asyncio.gather(
                gateway.append("s", user("left"), max_tokens=400),
                gateway.append("s", user("right"), max_tokens=400),
            )
            assert [status for status, _ in answers] == [200, 200]
            await gateway.recorded()
            sessions = [answer["session"] for _, answer in answers]
            fork = next(session for session in sessions if session["id"] != "s")
            assert fork["parent_id"] == "s" and {session["round"] for session in sessions} == {1, 2}
            shared = [*gateway.prompts[0], *byte_by_byte(tokenizer, " x")]
            for prompt in gateway.prompts[1:3]:
                assert prompt[: len(shared)] == shared
            said = {0: "left", 1: "right"}[sessions.index(fork)]
            status, _ = await gateway.append(fork["id"], user("go on"))
            assert status == 200
            text = tokenizer.decode(gateway.prompts[-1])
            assert said in text and {"left": "right", "right": "left"}[said] not in text and "hello" in text
            status, _ = await gateway.append("s", user("go on"))
            text = tokenizer.decode(gateway.prompts[-1])
            assert said not in text and "hello" in text

    run(work, [line(tokenizer, " x")])


def test_a_fork_shares_its_parents_kv(run: Callable[..., None], tokenizer: PromptTokenizer) -> None:
    """A full history under a new id with a parent link: the parent's served ids are used."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway:
            first = user("hello" + LONG)
            _, answer = await gateway.chat("parent", first)
            await gateway.recorded()
            served = [*gateway.prompts[0], *byte_by_byte(tokenizer, LONG[:90])]
            body = {"messages": [first, message(answer), user("as a child")]}
            headers = {"X_Session_ID": "child", "X_Parent_Session_ID": "parent"}
            status, answer = await gateway.post(CHAT, body, **headers)
            assert status == 200 and answer["session"]["id"] == "child"
            await gateway.recorded()
            assert gateway.prompts[1][: len(served)] == served and cached(answer) == pages(len(served) - 1)
            status, _ = await gateway.append("child", user("and more"))
            assert status == 200 and gateway.prompts[2][: len(gateway.prompts[1])] == gateway.prompts[1]
            assert await gateway.logs.fork("default", "parent", "branch", 60.0)
            status, answer = await gateway.append("branch", user("another"))
            assert status == 200 and gateway.prompts[3][: len(served)] == served
            assert cached(answer) == pages(len(served) - 1)

    run(work, [line(tokenizer, LONG[:90])] * 4)


def test_a_lost_history_is_said_to_be_lost_for_append_only(
    run: Callable[..., None], tokenizer: PromptTokenizer
) -> None:
    """410 `history_lost`, once and again, on every replica; the full history then heals it."""

    async def work(made: Stack) -> None:
        async with made.gateway() as one, made.gateway() as other:
            _, answer = await one.append("s", user("hello"))
            await one.recorded()
            await one.logs._connection.command("DEL", one.logs._key("default", "s"))
            for gateway in (one, other, one):
                status, error = await gateway.append("s", user("more"))
                assert (status, error["error"]["code"]) == (410, "history_lost"), error
            messages = [user("hello"), message(answer), user("more")]
            status, answer = await other.chat("s", *messages)
            assert status == 200 and answer["session"]["round"] == 2
            await other.recorded()
            status, answer = await one.append("s", user("and more"))
            assert status == 200 and answer["session"]["round"] == 3
            assert "hello" in tokenizer.decode(one.prompts[-1])

    run(work, [line(tokenizer, f" x{n}") for n in range(3)])


def test_what_an_append_may_begin(run: Callable[..., None], tokenizer: PromptTokenizer) -> None:
    """An unknown session begins with it, unless it must exist, or the messages answer something."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway:
            status, error = await gateway.append("a", user("x"), session={"must_exist": True})
            assert (status, error["error"]["code"]) == (404, "session_not_found"), error
            result = {"role": "tool", "tool_call_id": "c", "content": "x"}
            status, error = await gateway.append("a", result)
            assert (status, error["error"]["code"]) == (410, "history_lost")
            assert not gateway.seen.requests
            status, answer = await gateway.append("a/b", user("x"))
            assert status == 200 and answer["session"]["id"] == "a/b" and answer["session"]["round"] == 1
            await gateway.recorded()
            status, answer = await gateway.append("a/b", user("y"), session={"must_exist": True})
            assert status == 200 and answer["session"]["round"] == 2
            status, error = await gateway.append("bad id", user("x"))
            assert (status, error["error"]["code"]) == (400, "invalid_session_id")
            status, error = await gateway.append("a", user("x"), model="unknown")
            assert (status, error["error"]["code"]) == (404, "model_not_found")
            for body in (b"", b"{", b"[]", b"{}", b'{"messages": []}', b'{"messages": 1}', b"\xff", b"null"):
                async with gateway.http.post(f"{gateway.url}/v1/sessions/a/rounds", data=body) as answer_:
                    assert answer_.status == 400, body
            async with gateway.http.post(
                f"{gateway.url}/v1/sessions/c/rounds",
                data=b'{"messages": [{"role": "user", "content": "x"}]}',
            ) as answer_:
                assert answer_.status == 200 and (await answer_.json())["model"] == "tiny"

    run(work, [line(tokenizer, " x")] * 4)


def test_an_append_that_is_sent_again_is_not_doubled(
    run: Callable[..., None], tokenizer: PromptTokenizer
) -> None:
    """OpenAI's clients say that they try again: the round takes the place of the first try."""
    again = {"x_stainless_retry_count": "1"}

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway, made.gateway() as other:
            path = "/v1/sessions/s/rounds"
            for number, (mine, text, headers) in enumerate(
                [(gateway, "a", {}), (gateway, "b", {}), (other, "b", again), (gateway, "c", again)]
            ):
                status, _ = await mine.post(path, {"messages": [user(text)]}, **headers)
                assert status == 200, number
                await mine.recorded()
            said = [m["content"] for m in (await other.logs.load("default", "s")).messages]
            assert said == ["a", " x0", "b", " x2", "c", " x3"]
            assert other.prompts[0] == gateway.prompts[1]
            status, _ = await gateway.post("/v1/sessions/n/rounds", {"messages": [user("a")]}, **again)
            status, _ = await gateway.post("/v1/sessions/n/rounds", {"messages": [user("a")]}, **again)
            assert status == 200 and gateway.prompts[-1] == gateway.prompts[-2]

    run(work, [line(tokenizer, f" x{n}") for n in range(6)])


def test_a_ledger_that_is_away_costs_no_round(
    run: Callable[..., None], tokenizer: PromptTokenizer, tmp_path: Path
) -> None:
    """A full history is answered, with a warning; an append is told to come again, and then goes on."""

    async def work(made: Stack) -> None:
        server = EmbeddedValkey.start(tmp_path / "logs")
        async with made.gateway(server.url) as gateway:
            _, answer = await gateway.chat("s", user("hello"))
            assert "warnings" not in answer["session"]
            await gateway.recorded()
            server.stop()
            messages = [user("hello"), message(answer), user("more")]
            status, later = await gateway.chat("s", *messages)
            assert status == 200 and "whole history" in later["session"]["warnings"][0], later
            await gateway.recorded()
            status, error = await gateway.append("s", user("more"))
            assert (status, error["error"]["code"]) == (503, "ledger_unavailable")
            server = EmbeddedValkey.start(tmp_path / "logs")
            await until(lambda: not gateway.logs._connection.failed_within(1.0))
            messages += [message(later), user("again")]
            status, last = await gateway.chat("s", *messages)
            assert status == 200 and "warnings" not in last["session"], last
            await gateway.recorded()
            status, last = await gateway.append("s", user("end"))
            assert status == 200 and "again" in tokenizer.decode(gateway.prompts[-1])
        server.stop()

    run(work, [line(tokenizer, f" x{n}") for n in range(4)])


def test_an_append_does_not_undo_one_that_it_has_not_seen(
    run: Callable[..., None], tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another round began and ended between the look at the history and the claim: neither goes on unseen."""

    async def work(made: Stack) -> None:
        async with made.gateway() as one, made.gateway() as two:
            await one.append("s", user("hello"))
            await one.recorded()
            load = two.logs.load

            async def late(tenant: str, session_id: str) -> Conversation:
                found = await load(tenant, session_id)
                status, _ = await one.append("s", user("first"))
                await one.recorded()
                assert status == 200
                return found

            monkeypatch.setattr(two.logs, "load", late)
            status, answer = await two.append("s", user("second"))
            assert status == 200 and answer["session"]["id"] == "s"
            assert "whole history" in answer["session"]["warnings"][0]
            monkeypatch.undo()
            await two.recorded()
            for gateway in (one, two):
                status, error = await gateway.append("s", user("end"))
                assert (status, error["error"]["code"]) == (410, "history_lost"), error

    run(work, [line(tokenizer, f" x{n}") for n in range(4)])


def test_a_round_that_was_not_kept_is_not_forgotten(
    run: Callable[..., None], tokenizer: PromptTokenizer, tmp_path: Path
) -> None:
    """What is held of the session ends before its last round: an append must not go on from there."""

    async def work(made: Stack) -> None:
        server = EmbeddedValkey.start(tmp_path / "logs")
        async with made.gateway(server.url) as gateway:
            _, answer = await gateway.chat("s", user("hello"))
            await gateway.recorded()
            server.stop()
            messages = [user("hello"), message(answer), user("more")]
            status, later = await gateway.chat("s", *messages)
            assert status == 200 and later["session"]["warnings"], later
            await gateway.recorded()
            server = EmbeddedValkey.start(tmp_path / "logs")
            await until(lambda: not gateway.logs._connection.failed_within(1.0))
            status, error = await gateway.append("s", user("end"))
            assert (status, error["error"]["code"]) == (410, "history_lost"), error
            status, forked = await gateway.post("/v1/sessions/s/fork", {"n": 1})
            assert status == 200 and "bring all messages" in forked["warnings"][-1]
            messages += [message(later), user("end")]
            status, last = await gateway.chat("s", *messages)
            assert status == 200 and "warnings" not in last["session"], last
            await gateway.recorded()
            status, _ = await gateway.append("s", user("and now?"))
            meant = [*messages, message(last), user("and now?")]
            assert status == 200
            assert tokenizer.decode(gateway.prompts[-1]) == tokenizer.render(meant, TemplateOptions())
        server.stop()

    run(work, [line(tokenizer, f" x{n}") for n in range(4)])


def test_other_tenants_histories_are_not_there(run: Callable[..., None], tokenizer: PromptTokenizer) -> None:
    """The log is a tenant's own, whatever the session's id."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway:
            status, _ = await gateway.append("s", user("secret"))
            assert status == 200
            assert (await gateway.logs.load("default", "s")).parts
            assert not (await gateway.logs.load("another", "s")).parts

    run(work, [line(tokenizer, " x")])


words = st.text(alphabet="ab äß🙂<|>\n", max_size=6)
steps = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from(["append", "full", "edit"]), words, words, st.booleans()),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_any_mixture_gives_prompts_that_say_what_was_said(
    run: Callable[..., None], tokenizer: PromptTokenizer, rounds: list[Any]
) -> None:
    """Append and full by turns, edited pasts, two replicas, cut-off answers: never a wrong prompt."""
    lines = [
        {
            "text": text,
            "token_ids": byte_by_byte(tokenizer, text, ended=ended) or [3],
            "finish_reason": "stop",
        }
        for *_, text, ended in rounds
    ]

    async def work(made: Stack) -> None:
        async with made.gateway() as one, made.gateway() as other:
            messages: list[dict[str, Any]] = []
            for replica, kind, new, _, _ in rounds:
                gateway = (one, other)[replica]
                if kind == "edit" and messages:
                    messages[0] = user(f"edited {len(messages)}")
                messages.append(user(new))
                if kind == "append":
                    status, answer = await gateway.append("s", messages[-1])
                else:
                    status, answer = await gateway.chat("s", *messages)
                assert status == 200 and "warnings" not in answer["session"], answer
                await gateway.recorded()
                assert tokenizer.decode(gateway.prompts[-1]) == tokenizer.render(messages, TemplateOptions())
                messages.append(message(answer))

    run(work, lines)
