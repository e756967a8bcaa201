"""Sessions of a run: what each asks next, and every prompt that its request may rightly become. Pure.

Four kinds of clients: completions by ids, streamed or whole; chats that send all messages; chats that append.
Texts differ in every round, so that no prompt is the beginning of another session's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from antiphon.scheduler.gateway.prompts import PromptTokenizer, TemplateOptions
from tests.faults.client import Outcome, Request
from tests.faults.history import LogicalRound

Kind = Literal["text", "chat", "append"]
KINDS: tuple[Kind, ...] = ("text", "chat", "append")
MODEL = "model"
VOCAB_TOKENS = 512
"""Of simulated engines."""
FIRST_ID = 8
"""Below are special tokens."""
WORDS = ("list", "files", "of", "the", "project", "then", "read", "each", "and", "count", "lines", "slowly")
CHAT = "/v1/chat/completions"
PLAIN = TemplateOptions(None)


@dataclass(slots=True)
class Conversation:
    """One session. `ask` makes its next round; `heard` takes the answer."""

    session: str
    kind: Kind
    stream: bool
    draw: random.Random
    tokenizer: PromptTokenizer
    number: int = 0
    goes_by: str = ""
    """Its name for the gateway: another one than `session` after an answer that came from a fork."""
    forks: int = 0
    brings_all: bool = False
    """The server has not kept the last round, or nobody knows: an append would go on from the wrong place."""
    home: str = ""
    ids: list[int] = field(default_factory=list)
    """Of a completion: prompt and answer so far."""
    messages: list[dict[str, str]] = field(default_factory=list)
    said: list[tuple[str, tuple[tuple[int, ...], ...]]] = field(default_factory=list)
    """Of a chat: text of every prompt that was answered, and its possible ids."""

    def ask(self, new_tokens: int, max_tokens: int, deadline_s: float) -> tuple[LogicalRound, Request]:
        self.number += 1
        name = self.goes_by or self.session
        body: dict[str, Any] = {
            "model": MODEL, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "stream": self.stream,
        }  # fmt: skip
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.kind == "text":
            self.ids += [self.draw.randrange(FIRST_ID, VOCAB_TOKENS) for _ in range(new_tokens)]
            prompts: tuple[tuple[int, ...], ...] = (tuple(self.ids),)
            request = Request(name, "/v1/completions", body | {"prompt": list(self.ids)})
        else:
            message = {"role": "user", "content": self._words(new_tokens)}
            self.messages.append(message)
            prompts = self._possible(self.tokenizer.render(self.messages, PLAIN))
            request = Request(name, CHAT, body | {"messages": list(self.messages)})
            if self.kind == "append" and not self.brings_all:
                path = f"/v1/sessions/{name}/rounds"
                more: dict[str, Any] = {"messages": [message]}
                if self.said:  # else a server that has lost all would begin a conversation with half of it
                    more["session"] = {"must_exist": True}
                request = Request(name, path, body | more, whole=request)
        return LogicalRound(self.session, self.number, deadline_s, prompts), request

    def heard(self, each: LogicalRound, outcome: Outcome) -> None:
        """The session goes on from the answer; without one, from what it had said itself."""
        self.home = outcome.home or self.home
        self.brings_all = each.answer is None or not outcome.kept
        if outcome.session not in ("", self.goes_by or self.session):
            self.goes_by = outcome.session
            self.forks += 1
        if each.answer is None:
            if self.kind != "text":
                self.messages.pop()
            return
        if self.kind == "text":
            self.ids += each.answer
            return
        self.said.append((self.tokenizer.render(self.messages, PLAIN), tuple(each.expected)))
        self.messages.append({"role": "assistant", "content": self.text_of(each.answer)})

    def text_of(self, answer: tuple[int, ...]) -> str:
        """What a simulated engine says for these ids."""
        return "".join(f" {token_id}" for token_id in answer)

    def _words(self, tokens: int) -> str:
        """About so many tokens."""
        number = self.draw.randrange(10**6)
        return f"{number} " + " ".join(self.draw.choice(WORDS) for _ in range(tokens // 3))

    def _possible(self, text: str) -> tuple[tuple[int, ...], ...]:
        """All ways in which the text may become ids: whole, or after a prompt that was served before it."""
        found = [self.tokenizer.encode_rendered(text)]
        for before, prompts in self.said:
            if text.startswith(before):
                rest = self.tokenizer.encode_rendered(text[len(before) :])
                found += [(*prompt, *rest) for prompt in prompts]
        return tuple(dict.fromkeys(found))


def load_tokenizer(model: Path) -> PromptTokenizer:
    return PromptTokenizer(model)
