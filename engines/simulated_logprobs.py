"""Log probabilities of a simulated engine, in the two shapes of OpenAI's API: made of the token ids. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from antiphon.engines.scripts import detokenize


def chat_logprobs(token_ids: Sequence[int], top: int) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/chat/completions."""
    return {
        "content": [
            {**_entry(token_id, 0), "top_logprobs": [_entry(token_id + rank, rank) for rank in range(top)]}
            for token_id in token_ids
        ]
    }


def completion_logprobs(echoed: Sequence[int], token_ids: Sequence[int], top: int) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/completions; the first token of an echoed prompt has none."""
    everything = [*echoed, *token_ids]
    first = 1 if echoed else 0
    known = everything[first:]
    tops = [{_text(t + rank): _logprob(t + rank, rank) for rank in range(top)} or None for t in known]
    return {
        "tokens": [_text(token_id) for token_id in everything],
        "token_logprobs": [None] * first + [_logprob(token_id, 0) for token_id in known],
        "top_logprobs": [None] * first + tops,
        "text_offset": [-1] * len(everything),
    }


def _entry(token_id: int, rank: int) -> dict[str, Any]:
    text = _text(token_id)
    return {"token": text, "bytes": list(text.encode()), "logprob": _logprob(token_id, rank)}


def _logprob(token_id: int, rank: int) -> float:
    """Between -1 and 0, one less with every rank."""
    return -(token_id % 97 + 1) / 98 - rank


def _text(token_id: int) -> str:
    return detokenize((token_id,))
