"""What was said in a session, as token ids and as messages: a list of entries, and what they add up to. Pure.

Every round that ended well adds an entry: what it kept of the conversation so far, the ids that its prompt
added, the ids that the model generated, and the messages behind both. A client that rewrote its history keeps
less than all. `Conversation` is immutable; its prompts share one growing log (`engines/prompt.py`).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from antiphon.engines.prompt import Prompt

Message = Mapping[str, Any]

MESSAGE_MEMORY_FACTOR = 4
"""A message takes about so many times its JSON in memory, with the text of its part of the prompt."""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One round, as it is stored (msgpack). Ids are 4-byte little-endian."""

    kept_tokens: int
    """Of the conversation before it: where one of its parts ended."""
    kept_messages: int
    prompt: bytes
    """Ids of the prompt beyond what was kept."""
    output: bytes
    messages: bytes
    """JSON array: beyond what was kept, without the reply."""
    reply: bytes
    """The answer's message as JSON."""
    options: bytes
    """What else went into the prompt (`history.Options`); empty = the same as before."""
    tokenizer: bytes
    """Fingerprint: ids of another one mean nothing."""
    model: str
    round: int
    plain: bool
    """The reply has no reasoning: what was generated is what it shows."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the conversation that came in one piece: from a client, or from the model."""

    start: int
    upto: Prompt
    """The conversation up to its end."""
    generated: bool
    messages: int
    """Of the conversation, up to its end."""
    plain: bool = True
    text: list[str] = field(default_factory=list, compare=False)
    """Its text, once somebody has decoded it."""

    @property
    def end(self) -> int:
        return len(self.upto)

    def ids(self) -> Sequence[int]:
        return self.upto.tail(self.start)


@dataclass(frozen=True, slots=True)
class Conversation:
    """All that is kept of one session at one moment."""

    tenant: str
    session_id: str
    header: bytes = b""
    """The stored list's first element, which no other list has; b"" = there is no list."""
    entries: int = 0
    """Its version."""
    ancestors: tuple[str, ...] = ()
    """Sessions whose lists this one's begins with, the nearest first."""
    parts: tuple[Part, ...] = ()
    messages: tuple[Message, ...] = ()
    options: bytes = b""
    tokenizer: bytes = b""
    model: str = ""
    round: int = 0
    """The session's last that is in it."""
    stored_bytes: int = 0
    message_bytes: int = 0
    notes: dict[str, Any] = field(default_factory=dict, compare=False)
    """What users of this version have worked out and want to find again; never stored."""

    @property
    def prompt(self) -> Prompt:
        """Everything that was said."""
        return self.parts[-1].upto if self.parts else Prompt()

    @property
    def size_bytes(self) -> int:
        """About, in memory."""
        return self.prompt.size_bytes + self.message_bytes * MESSAGE_MEMORY_FACTOR

    def kept(self, tokens: int) -> tuple[Part, ...]:
        """The parts up to `tokens`; raises ValueError if none ends there."""
        parts = self.parts
        while parts and parts[-1].end > tokens:
            parts = parts[:-1]
        if (parts[-1].end if parts else 0) != tokens:
            raise ValueError(f"no part of {self.session_id} ends at token {tokens}")
        return parts

    def before(self, messages: Sequence[Message]) -> Conversation:
        """Before its last round, if that is what brought these messages; else as it is.

        A client that did not get its answer asks again: the round takes the place of the first try. Where
        that tokenised the reply before it again, no part ends with that reply any more.
        """
        count = len(self.messages) - 1 - len(messages)
        if len(self.parts) < 2 or count < 0 or self.parts[-1].messages != len(self.messages):
            return self
        earlier = self.parts[-3].messages if len(self.parts) > 2 else 0
        after_reply = count > 0 and self.messages[count - 1].get("role") == "assistant"
        if earlier > count or not (earlier == count or after_reply):
            return self
        if list(self.messages[count:-1]) != list(messages):
            return self
        return replace(self, parts=self.parts[:-2], messages=self.messages[:count], notes={})

    def add(self, entry: Entry, said: Said | None = None) -> Conversation:
        """After one more entry; raises ValueError if it does not belong here. `said`: what it was made of."""
        parts = self.kept(entry.kept_tokens)
        messages = self.messages[: entry.kept_messages]
        if len(messages) != entry.kept_messages:
            raise ValueError(f"{self.session_id} has no {entry.kept_messages} messages")
        if said is None:
            before = parts[-1].upto if parts else Prompt()
            prompt = before.extended(_ids(entry.prompt))
            answered = prompt.extended(_ids(entry.output))
            new, reply = msgspec.json.decode(entry.messages), msgspec.json.decode(entry.reply)
        else:
            prompt, answered, new, reply = said.prompt, said.answered, said.messages, said.reply
        asked = Part(entry.kept_tokens, prompt, False, entry.kept_messages + len(new))
        if said is not None and said.text is not None:
            asked.text.append(said.text)
        answer = Part(len(prompt), answered, True, asked.messages + 1, entry.plain)
        size = len(entry.prompt) + len(entry.output) + len(entry.messages) + len(entry.reply)
        fresh = not parts
        return replace(
            self,
            entries=self.entries + 1,
            parts=(*parts, asked, answer),
            messages=(*messages, *new, reply),
            options=entry.options or self.options,
            tokenizer=entry.tokenizer,
            model=entry.model,
            round=entry.round,
            stored_bytes=self.stored_bytes + size,
            notes={},
            message_bytes=(0 if fresh else self.message_bytes) + len(entry.messages) + len(entry.reply),
        )


@dataclass(frozen=True, slots=True)
class Said:
    """A round that has ended, as it is to be added to the conversation that it was made of."""

    prompt: Prompt
    """All of it."""
    answered: Prompt
    """And what was generated."""
    kept_tokens: int
    kept_messages: int
    messages: Sequence[Message]
    """Beyond those kept, without the reply."""
    reply: Message
    plain: bool
    options: bytes
    tokenizer: bytes
    model: str
    round: int
    text: str | None = None
    """Of the prompt beyond what was kept, where it is known."""

    def entry(self, base: Conversation) -> Entry:
        """What is to be stored after `base`."""
        return Entry(
            kept_tokens=self.kept_tokens,
            kept_messages=self.kept_messages,
            prompt=_bytes(self.prompt.tail(self.kept_tokens)),
            output=_bytes(self.answered.tail(len(self.prompt))),
            messages=msgspec.json.encode(self.messages),
            reply=msgspec.json.encode(self.reply),
            options=b"" if base.parts and self.options == base.options else self.options,
            tokenizer=self.tokenizer,
            model=self.model,
            round=self.round,
            plain=self.plain,
        )

    def alone(self, base: Conversation) -> Said:
        """The same as the beginning of a conversation, which needs nothing of `base`."""
        messages = (*base.messages[: self.kept_messages], *self.messages)
        return replace(self, kept_tokens=0, kept_messages=0, messages=messages, text=None)


def _bytes(ids: array[int]) -> bytes:
    return _little_endian(ids).tobytes()


def _ids(raw: bytes) -> array[int]:
    ids = array("I")
    ids.frombytes(raw)
    return _little_endian(ids)


def _little_endian(ids: array[int]) -> array[int]:
    import sys

    if sys.byteorder == "big":  # pragma: no cover
        ids.byteswap()
    return ids
