"""Going on with an answer that broke: which rounds can, from where, and what of the rest the client has.

An engine's incremental detokeniser holds back what may still change: half a character, and with it the words
before it. So only an event of one token is a seam, whose text surely is that of all up to it. An answer goes
on from the last seam; text and tokens that the client has beyond it are generated again, compared and left
out. What comes out otherwise than before is an error, never shown. No clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from antiphon.engines.base import Chunk, EngineError, FailureKind, Usage

FREE = frozenset({
    "model", "messages", "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop_token_ids",
    "ignore_eos", "skip_special_tokens", "no_stop_trim", "chat_template_kwargs", "reasoning_effort",
    "logit_bias",
})  # fmt: skip
"""Fields that mean the same for the rest of an answer as for all of it."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ("", []),
    "stop_regex": ("", []),
    "min_tokens": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logprobs": (False,),
    "echo": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
}
"""Fields and the values with which they do nothing. With any other an answer has a state that its tokens do
not hold (a grammar, a parser, a penalty, a stop string that began), or tells more than its text."""

NOT_REPEATABLE = "only greedy answers go on elsewhere, and seeded ones between deterministic engines"


def why_not(body: Mapping[str, Any]) -> str:
    """Why an answer to this request cannot go on elsewhere; "" = it can."""
    for name, value in body.items():
        if name not in FREE and value is not None and not _is_neutral(name, value):
            return f"`{name}` does not allow it"
    if not is_greedy(body) and body.get("seed") is None:
        return NOT_REPEATABLE
    return ""


def _is_neutral(name: str, value: Any) -> bool:
    """`logprobs` 0 of a completion asks for them, False of a chat does not: equal is not enough."""
    neutral = NEUTRAL.get(name, ())
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)


def is_greedy(body: Mapping[str, Any]) -> bool:
    return body.get("temperature") == 0 or body.get("top_k") == 1


class Diverged(EngineError):
    """The rest of an answer does not begin as the client has it."""

    def __init__(self, engine_id: str) -> None:
        message = f"engine {engine_id} goes on otherwise than the answer began"
        super().__init__(FailureKind.BROKEN, message)


@dataclass(slots=True)
class Said:
    """What a client has been sent of an answer of one choice."""

    chat: bool
    ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finished: bool = False
    """A finish reason went out."""
    _has_role: bool = False
    odd: str = ""
    """Why what was sent does not allow to go on."""
    kept_ids: int = 0
    """The seam from which the present call goes on: so many ids are at the end of its prompt."""
    kept_chars: int = 0
    _seams: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    """The last ones: (ids, characters) up to them."""
    _seam: tuple[int, int] = (0, 0)
    """The latest, which counts when its event has been sent."""
    _at_ids: int = 0
    """How far the present call has come in the answer: less than the client has, at first."""
    _at_chars: int = 0
    _known: str = ""
    """All text that the client had when the present call was made."""
    _whole: bool = True
    """Nothing broke: all that comes is new."""

    @property
    def complete(self) -> bool:
        """The client has all of it, and its tokens are known: what has not come is only the usage."""
        return self.finished and bool(self.ids)

    def cut(self, max_tokens: int) -> None:
        """Choose the seam to go on from: the last one that leaves something to generate."""
        ids, chars = next((seam for seam in reversed(self._seams) if seam[0] < max_tokens), (0, 0))
        self.kept_ids, self.kept_chars, self._whole = ids, chars, False

    def begin(self) -> None:
        """A call is made that goes on from the seam."""
        self._at_ids, self._at_chars = self._seam = self.kept_ids, self.kept_chars
        if not self._whole:
            self.text = ["".join(self.text)]
            self._known = self.text[0]

    def rest(self, chunk: Chunk, engine_id: str) -> Chunk:
        """What of the chunk the client does not have; raises `Diverged`. Call `sent` when it went out."""
        before = self._at_ids, self._at_chars
        self._at_ids += len(chunk.token_ids)
        choice = _choice(chunk)
        said = _text(choice, self.chat)
        self._at_chars += len(said)
        one = len(chunk.token_ids) == 1  # of several, the last ones may be held back behind the others' text
        if one and said and is_sure(said[-1]):
            self._seam = self._at_ids, self._at_chars
        if self._whole:
            return chunk
        ids, known = chunk.token_ids, self.ids[before[0] : self._at_ids]
        text = self._known[before[1] : self._at_chars]
        if tuple(known) != ids[: len(known)] or not said.startswith(text):
            self.odd = "it went on otherwise there"
            raise Diverged(engine_id)
        return self._fitted(chunk, choice, said[len(text) :], ids[len(known) :])

    def sent(self, chunk: Chunk) -> None:
        """This went out to the client, or into its buffer: it is kept for it, whatever happens."""
        self.ids += chunk.token_ids
        if self._seam[0] > self._seams[-1][0]:
            self._seams = [self._seams[-1], self._seam]
        choice = _choice(chunk)
        if choice is None:
            return
        text = _text(choice, self.chat)
        if text:
            self.text.append(text)
        if choice.get("finish_reason"):
            self.finished = True
        delta = choice.get("delta")
        self._has_role = self._has_role or bool(delta and delta.get("role"))
        if delta and (delta.get("reasoning_content") or delta.get("tool_calls")):
            self.odd = "the engine parses the answer"

    def _fitted(self, chunk: Chunk, choice: dict[str, Any] | None, text: str, ids: tuple[int, ...]) -> Chunk:
        """The chunk as the next of the one stream that the client sees."""
        data, usage = chunk.data, chunk.usage
        if data is not None:
            data = {name: value for name, value in data.items() if name != "created"}
            if usage is not None:
                usage = Usage(
                    usage.prompt_tokens - self.kept_ids,
                    usage.completion_tokens + self.kept_ids,
                    usage.cached_tokens,
                )
                told = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
                data["usage"] = data["usage"] | told
            if choice is not None:
                data["choices"] = self._choices(choice, text)
        if data is not None and not data.get("choices") and not data.get("usage"):
            data = None
        return Chunk(data, ids, chunk.finish_reason, usage)

    def _choices(self, choice: dict[str, Any], text: str) -> list[dict[str, Any]]:
        """Without what has gone out: its role, text and end; [] if nothing is left."""
        fitted = dict(choice)
        if self.chat:
            delta = dict(choice.get("delta") or {})
            if self._has_role:
                delta.pop("role", None)
            if "content" in delta:
                delta["content"] = text
            fitted["delta"] = delta
            shows = bool(text) or any(value for name, value in delta.items() if name != "content")
        else:
            fitted["text"], shows = text, bool(text)
        if self.finished:
            fitted["finish_reason"] = None
        return [fitted] if shows or fitted.get("finish_reason") else []


def is_sure(last: str) -> bool:
    """Text that ends so is not a part of what a detokeniser holds back: of that it shows what comes before
    the last space, or ends in a Chinese character."""
    code = ord(last)
    chinese = 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x2FA1F
    return last != " " and not chinese


def _choice(chunk: Chunk) -> dict[str, Any] | None:
    choices = chunk.data.get("choices") if chunk.data is not None else None
    found: dict[str, Any] | None = choices[0] if choices else None
    return found


def _text(choice: dict[str, Any] | None, chat: bool) -> str:
    if choice is None:
        return ""
    said = (choice.get("delta") or {}).get("content") if chat else choice.get("text")
    return said or ""
