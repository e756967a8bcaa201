"""An append that is asked again after its first try was kept: it takes that try's place."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.append_helpers import stack, user


def test_an_append_asked_again_is_not_said_twice(
    valkey_url: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Hashed tokens do not decode to the text that they are shown as, so every round tokenises the answer
    before it again, and keeps the log only up to the prompt before it. `make faults` found the round said
    twice, and the session's answers wrong from there on (prefill.stop.transfer)."""

    async def scenario() -> None:
        async with stack(valkey_url, tiny_model_dir, None) as made, made.gateway() as gateway:
            body = {"max_tokens": 8, "ignore_eos": True}
            replies = []
            for text in ("one", "two"):
                status, answer = await gateway.append("s", user(text), **body)
                assert status == 200, answer
                replies.append(answer["choices"][0]["message"])
            path = "/v1/sessions/s/rounds"
            again = {"x_stainless_retry_count": "1"}
            status, repeated = await gateway.post(path, {"messages": [user("two")], **body}, **again)
            assert status == 200, repeated
            _, second, third = gateway.prompts
            assert third == second
            assert repeated["choices"][0]["message"] == replies[1]
            everything = [user("one"), replies[0], user("two"), replies[1], user("three")]
            status, _ = await gateway.append("s", user("three"), **body)
            assert status == 200
            status, _ = await gateway.chat("whole", *everything, **body)
            assert status == 200
            assert gateway.prompts[-1] == gateway.prompts[-2]

    asyncio.run(scenario())


def test_the_same_message_twice_is_two_rounds(valkey_url: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The retry of the second one, whose first try never ran, is not taken for the first one's."""

    async def scenario() -> None:
        async with stack(valkey_url, tiny_model_dir, None) as made, made.gateway() as gateway:
            body = {"messages": [user("go on")], "max_tokens": 8, "ignore_eos": True}
            path = "/v1/sessions/s/rounds"
            for number, count in enumerate(("0", "1", "1")):
                named = {"x_stainless_retry_count": count, "idempotency_key": f"key-{number}"}
                status, answer = await gateway.post(path, body, **named)
                assert status == 200, answer
            lengths = [len(prompt) for prompt in gateway.prompts]
            assert lengths == sorted(set(lengths)) and len(lengths) == 3
            after = body | {"session": {"after_round": 3}}
            status, answer = await gateway.post(path, after, x_stainless_retry_count="1")
            assert status == 200 and len(gateway.prompts[-1]) > lengths[-1], answer

    asyncio.run(scenario())


def test_a_late_copy_is_answered_as_then_and_changes_nothing(
    valkey_url: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The session has gone on: the kept answer is given again; asked in another form, a chat runs again, and
    the session's history stays that of its later rounds."""

    async def scenario() -> None:
        async with stack(valkey_url, tiny_model_dir, None) as made, made.gateway() as gateway:
            path, form = "/v1/sessions/s/rounds", {"max_tokens": 8, "ignore_eos": True}

            async def append(key: str, text: str) -> dict[str, Any]:
                body = {"messages": [user(text)], **form}
                status, answer = await gateway.post(path, body, idempotency_key=key)
                assert status == 200, answer
                message: dict[str, Any] = answer["choices"][0]["message"]
                return message

            first = await append("one", "hello")
            second = await append("two", "more")
            asked = len(gateway.prompts)
            assert await append("one", "hello") == first
            assert len(gateway.prompts) == asked
            await append("three", "third")
            said: list[dict[str, Any]] = [user("begin")]
            for named in ({"idempotency_key": "w1"}, {"idempotency_key": "w2"}):
                whole = {"messages": said, **form, "session_id": "w"}
                status, answer = await gateway.post("/v1/chat/completions", whole, **named)
                assert status == 200, answer
                said = [*said, answer["choices"][0]["message"], user("on")]
            late = {"messages": [user("begin")], **form, "session_id": "w", "return_token_ids": True}
            status, answer = await gateway.post("/v1/chat/completions", late, idempotency_key="w1")
            assert status == 200, answer
            status, answer = await gateway.append("w", user("still there?"), **form)
            assert status == 200 and second, answer

    asyncio.run(scenario())
