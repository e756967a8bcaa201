"""An append that is asked again after its first try was kept: it takes that try's place."""

from __future__ import annotations

import asyncio
from pathlib import Path

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
            again = {"x_stainless_retry_count": "1", "idempotency_key": "another"}
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
