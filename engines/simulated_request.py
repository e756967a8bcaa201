"""One request of a simulated engine, and the deterministic model that answers it."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from antiphon.engines.scripts import ScriptLine
from antiphon.engines.virtual_kv import Allocation


@dataclass(frozen=True, slots=True)
class Finish:
    """Why an answer ended, as in SGLang's meta_info."""

    kind: Literal["stop", "length", "abort"]
    message: str = ""
    status: int = 0


class TokenStream:
    """The deterministic model: the next token is a hash of all tokens before it."""

    def __init__(
        self, prompt: Sequence[int], vocab_tokens: int, *, wrong: bool = False, choice: int = 0
    ) -> None:
        """`choice`: which of several samples of one prompt; they differ."""
        self._digest = hashlib.sha256(b"choice %d" % choice if choice else b"")
        self._digest.update(array("I", prompt).tobytes())
        self._vocab_tokens = vocab_tokens
        if wrong:
            self._digest.update(b"wrong KV")

    def push(self, token_id: int) -> None:
        self._digest.update(array("I", (token_id,)).tobytes())

    def next(self) -> int:
        return int.from_bytes(self._digest.digest()[:8], "little") % self._vocab_tokens


def expected_tokens(prompt: Sequence[int], count: int, vocab_tokens: int) -> tuple[int, ...]:
    """What any simulated engine with right KV answers to `prompt`, unscripted."""
    stream = TokenStream(prompt, vocab_tokens)
    tokens = []
    for _ in range(count):
        tokens.append(stream.next())
        stream.push(tokens[-1])
    return tuple(tokens)


@dataclass(slots=True, eq=False)
class LoopRequest:
    """One request, from `submit` until its `finish` is set. `tokens` = prompt, then output."""

    rid: str
    prompt_tokens: int
    tokens: list[int]
    max_new_tokens: int
    seed: bytes
    natural_tokens: int | None
    """Where the answer ends by itself; None = only at `max_new_tokens`."""
    script: ScriptLine | None
    choice: int = 0
    """Which of the request's `n` answers."""
    matched_stop: str | None = None
    """The stop string at which `script` is cut."""
    finish: Finish | None = None
    cached_device_tokens: int = 0
    cached_host_tokens: int = 0
    retractions: int = 0
    hung: bool = False
    admitted: bool = False
    aborted: bool = False
    computed: int = 0
    """Tokens with KV."""
    kv: Allocation | None = None
    stream: TokenStream | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        return self.cached_device_tokens + self.cached_host_tokens

    async def progress(self) -> AsyncIterator[tuple[int, int]]:
        """Slices [start, stop) of the output as it grows; the last one comes with `finish` set."""
        async for _, start, stop in progress((self,)):
            yield start, stop


async def progress(requests: Sequence[LoopRequest]) -> AsyncIterator[tuple[int, int, int]]:
    """(choice, start, stop): slices of the outputs as they grow, the last of each with its `finish` set.

    All of `requests` share one `changed`.
    """
    changed = requests[0].changed
    seen = [0] * len(requests)
    left = set(range(len(requests)))
    while left:
        await changed.wait()
        changed.clear()
        for choice in sorted(left):
            request, start = requests[choice], seen[choice]
            stop, ended = request.output_tokens, request.finish is not None
            if ended:
                left.discard(choice)
            if ended or stop > start:
                seen[choice] = stop
                yield choice, start, stop
