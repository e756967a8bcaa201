"""Options of completion requests on real engines: what is asked, and what two answers must have in common."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.gateway_helpers import sse_events

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LOGPROB_TOLERANCE = 1e-3
"""Float32 sums in another order: chunks, batches and pages of one prompt differ between arms."""

SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2, 3]}, "city": {"enum": ["Bern", "Basel"]}},
    "required": ["n", "city"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
WORDS = {"regex": "one two HALT three", "max_tokens": 30}
"""The same text always; HALT is of several tokens."""


@dataclass(frozen=True, slots=True)
class Option:
    name: str
    path: str
    change: dict[str, Any]
    drawn: bool = False
    """Its tokens are drawn, and no seed fixes them: how many there are and how they end is compared."""
    gaps: bool = False
    """Its last tokens bring no text, and of those an engine's stream has no log probabilities, unless they
    come together with one that does."""
    tail: str = ""
    """On /v1/completions: its prompt is text and ends so; else it is ids, with those of the round before."""


OPTIONS = [
    Option("n", CHAT, {"n": 2}),
    Option("logprobs", CHAT, {"logprobs": True, "top_logprobs": 3}),
    Option("logprobs of n", CHAT, {"n": 2, "logprobs": True, "top_logprobs": 1}),
    Option("response_format", CHAT, {"response_format": JSON_SCHEMA, "max_tokens": 40}),
    Option("stop", CHAT, {"stop": ["HALT"], **WORDS}),
    Option("stop kept", CHAT, {"stop": ["nowhere", "HALT"], "no_stop_trim": True, **WORDS}),
    Option("stop with logprobs", CHAT, {"stop": "HALT", "logprobs": True, **WORDS}, gaps=True),
    Option("logprobs to the end", CHAT, {"logprobs": True, "regex": "one two"}, gaps=True),
    Option("stop_regex", CHAT, {"stop_regex": "tw[aeo] H", **WORDS}),
    Option("seed", CHAT, {"seed": 7}),
    Option("seed, warm", CHAT, {"seed": 7, "temperature": 0.8, "ignore_eos": True}, drawn=True),
    Option("top_k 1, warm", CHAT, {"temperature": 0.8, "top_k": 1}),
    Option("penalties", CHAT, {"frequency_penalty": 1.5, "presence_penalty": 0.7}),
    Option("repetition", CHAT, {"repetition_penalty": 1.4}),
    Option("logit_bias", CHAT, {"logit_bias": {"300": 100.0, "301": -100.0}}),
    Option("max_completion_tokens", CHAT, {"max_completion_tokens": 5, "max_tokens": None}),
    Option("special tokens shown", CHAT, {"skip_special_tokens": False, "logit_bias": {"1": 4.0}}),
    Option("ebnf", CHAT, {"ebnf": 'root ::= "yes" | "no"', "n": 2}),
    Option("defaults", CHAT, {"temperature": None, "ignore_eos": True}, drawn=True),
    Option("n", TEXT, {"n": 2}),
    Option("min_tokens", TEXT, {"min_tokens": 6, "stop_token_ids": list(range(256, 400))}),
    Option("logprobs", TEXT, {"logprobs": 3}),
    Option("logprobs 0", TEXT, {"logprobs": 0}),
    Option("echo", TEXT, {"echo": True}),
    Option("echo of n with logprobs", TEXT, {"echo": True, "n": 2, "logprobs": 2}),
    Option("echo of text", TEXT, {"echo": True}, tail="Zürich 🎉, \t and so on"),
    Option("echo of special tokens", TEXT, {"echo": True}, tail="<|im_start|>user\nhi<|im_end|> so"),
    Option("echo of special tokens with logprobs", TEXT, {"echo": True, "logprobs": 1}, tail="<|im_end|>a"),
    Option("response_format", TEXT, {"response_format": JSON_SCHEMA, "max_tokens": 40}),
    Option("json_schema", TEXT, {"json_schema": json.dumps(SCHEMA), "max_tokens": 40}),
    Option("stop", TEXT, {"stop": ["HALT"], "logprobs": 1, **WORDS}),
    Option("seed", TEXT, {"seed": 7}),
    Option("seed, warm", TEXT, {"seed": 7, "temperature": 0.8, "ignore_eos": True}, drawn=True),
    Option("penalties", TEXT, {"frequency_penalty": 1.5, "presence_penalty": 0.7, "repetition_penalty": 1.2}),
    Option("logit_bias", TEXT, {"logit_bias": {"300": 100.0}}),
]


def folded(content: bytes) -> dict[str, Any]:
    """A stream as one object: texts and log probabilities joined, of anything else the last value."""
    events = sse_events(content)
    assert events[-1] == "[DONE]", events[-1]
    whole: dict[str, Any] = {"choices": {}}
    for event in events[:-1]:
        assert "error" not in event, event
        for choice in event["choices"]:
            if "delta" in choice:
                choice["message"] = choice.pop("delta")
            _join(whole["choices"].setdefault(choice["index"], {}), choice)
        whole |= {name: value for name, value in event.items() if name != "choices" and value is not None}
    whole["choices"] = [whole["choices"][index] for index in sorted(whole["choices"])]
    return whole


def _join(into: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        known = into.get(name)
        if isinstance(value, dict):
            _join(into.setdefault(name, {}), value)
        elif isinstance(value, list) or (isinstance(value, str) and name in ("text", "content")):
            into[name] = value if known is None else known + value
        elif value is not None:
            into[name] = value


def differences(ours: Any, theirs: Any, at: str = "") -> list[str]:
    """Where two answers differ; a field that is null is as one that is not there."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = sorted({*ours, *theirs})
        return [
            line for name in names for line in differences(ours.get(name), theirs.get(name), f"{at}.{name}")
        ]
    if isinstance(theirs, list) and isinstance(ours, list):
        if len(ours) != len(theirs):
            return [f"{at}: {len(ours)} entries, not {len(theirs)}"]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [line for n, (our, their) in pairs for line in differences(our, their, f"{at}[{n}]")]
    if isinstance(theirs, float) and isinstance(ours, float) and at.count("logprob"):
        return [] if abs(ours - theirs) < LOGPROB_TOLERANCE else [f"{at}: {ours} instead of {theirs}"]
    return [] if ours == theirs else [f"{at}: {ours!r} instead of {theirs!r}"]


def gaps(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[int, list[str]]:
    """How many log probabilities of a chat's one choice are not in our answer, and those that are wrong.

    What our answer lacks is taken out of theirs.
    """
    said = ours["choices"][0]["logprobs"]["content"]
    logprobs = theirs["choices"][0]["logprobs"]
    kept: list[Any] = []
    for entry in logprobs["content"]:
        if len(kept) < len(said) and not differences(said[len(kept)], entry, ".logprob"):
            kept.append(entry)
    missing = len(logprobs["content"]) - len(kept)
    logprobs["content"] = kept
    return missing, [] if len(kept) == len(said) else [f"log probabilities that are not theirs: {said}"]


OWN = ("id", "created", "session", "metadata", "object")
"""Not compared: names of the request; our extension; the engine's weights version."""


def compared(answer: dict[str, Any], drawn: bool = False) -> dict[str, Any]:
    """What of an answer must be equal; cached tokens differ as arms do."""
    shown = {name: value for name, value in answer.items() if name not in OWN}
    usage = dict(shown["usage"])
    usage.pop("prompt_tokens_details", None)
    shown["usage"] = usage
    if drawn:
        shown["choices"] = [
            {"index": choice["index"], "finish_reason": choice["finish_reason"]}
            for choice in answer["choices"]
        ]
    return shown
