"""Prompts that go on with what was said before, as the token ids that were served.

A model's output, turned to text and tokenised again, often gives other ids, and the KV of the rest of the
conversation would be lost. So the ids that the session's token log has are kept as far as their text begins
the text of the request, and only what follows is tokenised. The prompt's text is always that of the rendered
messages. With one exception: a reply with tool calls is the same reply however its JSON is spaced.

`go_on` takes all messages; `append` takes the new ones, and where the chat template allows it the time it
takes depends on them alone. Both only work out what is to be done (`Plan`), so they may run in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from antiphon.engines.prompt import Prompt
from antiphon.scheduler.conversation import Conversation, Message, Part
from antiphon.scheduler.gateway.message_chain import chain
from antiphon.scheduler.gateway.prompts import PromptTokenizer, TemplateOptions
from antiphon.scheduler.gateway.templates import CONTEXT_MESSAGES, FIRST_MESSAGES

MAX_RENDERINGS = 64
"""Of one request, to find replies whose tool calls are spaced otherwise."""
CUT_OFF = "\ufffd"
"""What a character that is not complete decodes to: a part that ends so has no text by itself."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A prompt: parts of a conversation and more ids."""

    kept: Part | None
    """The last part that is kept; None = nothing is."""
    ids: tuple[int, ...]
    """What follows it."""
    text: str
    """What these are the ids of."""
    spliced: bool
    """Only what is new was rendered."""

    @property
    def kept_tokens(self) -> int:
        return self.kept.end if self.kept is not None else 0

    def prompt(self) -> Prompt:
        """On the event loop's thread, as the conversation's prompts share a log."""
        return self.kept.upto.extended(self.ids) if self.kept is not None else Prompt(self.ids)


def options_key(tools: Sequence[Any] | None, options: TemplateOptions) -> bytes:
    """What besides the messages shaped a prompt; `tools` are all that the client gave, for rounds to come."""
    shown = True if options.tools == tools else options.tools  # None: the round showed none of them
    return msgspec.json.encode([tools, shown, options.kwargs or {}])


def tools_of(options: bytes) -> list[dict[str, Any]] | None:
    """The tools of an earlier round (`options_key`)."""
    tools: list[dict[str, Any]] | None = msgspec.json.decode(options)[0] if options else None
    return tools


def same_messages(ours: Sequence[Message], theirs: Sequence[Message]) -> int:
    """How many of the first messages are equal; a field that is null counts as absent."""
    count = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b and _without_nulls(a) != _without_nulls(b):
            break
        count += 1
    return count


def go_on(
    tokenizer: PromptTokenizer, base: Conversation, messages: Sequence[Message], options: TemplateOptions
) -> Plan:
    """The prompt of all messages; raises `ApiError` (400) if the template refuses them."""
    text = tokenizer.render(messages, options)
    if base.parts and base.tokenizer == tokenizer.fingerprint:
        kept, at = _Match(tokenizer, base, messages, options, text).deepest()
        if kept is not None:
            ids = tokenizer.encode_more(text[at:], kept.upto[-1])
            if ids is not None:
                return Plan(kept, ids, text[at:], spliced=False)
    return Plan(None, tokenizer.encode_rendered(text), text, spliced=False)


def append(
    tokenizer: PromptTokenizer,
    base: Conversation,
    new: Sequence[Message],
    options: TemplateOptions,
    *,
    same_options: bool,
) -> Plan:
    """The prompt of the conversation and the new messages; raises as `go_on`."""
    if same_options and base.tokenizer == tokenizer.fingerprint:
        plan = _splice(tokenizer, base, new, options)
        if plan is not None:
            return plan
    return go_on(tokenizer, base, (*base.messages, *new), options)


# ---------------------------------------------------------------- all messages


@dataclass(slots=True)
class _Match:
    """How far a conversation's ids say what a request's text says."""

    tokenizer: PromptTokenizer
    base: Conversation
    messages: Sequence[Message]
    options: TemplateOptions
    text: str
    renderings: int = 0

    def deepest(self) -> tuple[Part | None, int]:
        """The last part that is kept, and where it ends in the text."""
        kept, at = None, 0
        for part in self.base.parts:
            end = self._end(part, at)
            if end is None:
                break
            kept, at = part, end
        return kept, at

    def _end(self, part: Part, at: int) -> int | None:
        piece = text_of(self.tokenizer, part)
        if not piece.endswith(CUT_OFF) and self.text.startswith(piece, at):
            return at + len(piece)
        for shown in part.text[1:]:  # how an earlier request showed it
            if self.text.startswith(shown, at):
                return at + len(shown)
        count = part.messages
        if not part.generated or count > min(len(self.messages), len(self.base.messages)):
            return None
        if not same_calls(part, self.base.messages[count - 1], self.messages[count - 1]):
            return None
        if self.renderings >= MAX_RENDERINGS:
            return None
        self.renderings += 1
        upto = self.tokenizer.render(self.messages[:count], self._without_continuing(), ask=False)
        end = after_reply(self.tokenizer, part, upto, at) if self.text.startswith(upto) else None
        if end is not None:
            part.text.append(self.text[at:end])
        return end

    def _without_continuing(self) -> TemplateOptions:
        return TemplateOptions(self.options.tools, self.options.kwargs)


def text_of(tokenizer: PromptTokenizer, part: Part) -> str:
    """What the part says where it stands; ends with CUT_OFF if that cannot be told."""
    if not part.text:
        ids = part.ids()
        text = tokenizer.decode_after(part.upto[part.start - 1], ids) if part.start else tokenizer.decode(ids)
        part.text.append(CUT_OFF if text is None else text)
    return part.text[0]


def same_calls(part: Part, reply: Message, theirs: Message) -> bool:
    """The generated part says what this message says: the same tool calls and text, and nothing besides."""
    return bool(reply.get("tool_calls")) and part.plain and chain([reply]) == chain([theirs])


def after_reply(tokenizer: PromptTokenizer, part: Part, upto: str, at: int) -> int | None:
    """Where the text goes on behind the generated ids, when it shows the reply from `at` on and ends there.

    What ends a turn was generated too, if the model came to an end by itself. None if there is more between
    what was generated and what is shown than spaces.
    """
    last = part.upto[-1]
    ended = part.end > part.start and last in tokenizer.eos_ids
    mark = tokenizer.decode([last]) if ended else tokenizer.eos_text
    found = upto.rfind(mark, at) if mark else -1
    if found < 0:
        return None
    end = found + len(mark) if ended else found
    return end if _squeezed(upto[at:end]) == _squeezed(text_of(tokenizer, part)) else None


def _squeezed(text: str) -> str:
    return "".join(text.split())


# ---------------------------------------------------------------- new messages only


def _splice(
    tokenizer: PromptTokenizer, base: Conversation, new: Sequence[Message], options: TemplateOptions
) -> Plan | None:
    """The prompt by the texts of the last messages; None if that does not prove what the whole would be."""
    messages = base.messages
    start = len(messages) - CONTEXT_MESSAGES - 1
    if start < CONTEXT_MESSAGES or len(messages) < FIRST_MESSAGES or len(base.parts) < 2:
        return None
    asked, answered = base.parts[-2:]
    if asked.generated or not answered.generated or answered.messages != len(messages):
        return None
    first, last_asked = messages[:FIRST_MESSAGES], messages[start:-1]
    before = tokenizer.render_pieces(first, last_asked, options)
    after = tokenizer.render_pieces(first, (*messages[start:], *new), options)
    if before is None or after is None:
        return None
    # The last message of the prompt was its end, and now something stands behind it: does it look the same?
    if before.messages[-1] != after.messages[len(last_asked) - 1]:
        return None
    if not text_of(tokenizer, asked).endswith(before.messages[-1][-1:] + before.answer):
        return None
    reply = after.messages[len(last_asked)]
    rest = reply + "".join(after.messages[len(last_asked) + 1 :]) + after.answer
    if not rest.startswith(before.answer):
        return None
    at = len(before.answer)
    said = text_of(tokenizer, answered)
    kept, end = asked, at
    if not said.endswith(CUT_OFF) and rest.startswith(said, at):
        kept, end = answered, at + len(said)
    elif answered.plain and messages[-1].get("tool_calls"):
        found = after_reply(tokenizer, answered, reply, at)
        if found is not None:
            answered.text.append(rest[at:found])
            kept, end = answered, found
    ids = tokenizer.encode_more(rest[end:], kept.upto[-1])
    return None if ids is None else Plan(kept, ids, rest[end:], spliced=True)


def _without_nulls(message: Message) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}
