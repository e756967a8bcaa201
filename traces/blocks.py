"""What one request kept of the one before it, where a source names its prompts by hashed blocks."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

_LOW_64_BITS = 2**64 - 1


def compact(ids: Iterable[int]) -> array[int]:
    """The ids in 8 bytes each, for rows that must be held; of larger ones the low 64 bits."""
    return array("Q", [each & _LOW_64_BITS for each in ids])


def shared_tokens(before: Sequence[int], after: Sequence[int], block_tokens: int) -> int:
    """Tokens of the leading blocks that two prompts have in common. An id stands for all up to its end."""
    count = 0
    for ours, theirs in zip(before, after, strict=False):
        if ours != theirs:
            break
        count += 1
    return count * block_tokens


def count_fault(tokens: int, ids: int, block_tokens: int) -> str | None:
    """Why so many ids cannot name the blocks of a prompt, whose last, not full, one may be left out."""
    full, rest = divmod(tokens, block_tokens)
    if ids == full or (rest and ids == full + 1):
        return None
    return f"{ids} for {tokens} tokens: there are {full + bool(rest)} blocks of {block_tokens} tokens"


def kept_tokens(prompt: int, output: int, shared: int, block_tokens: int, next_prompt: int) -> int:
    """Tokens of a request's `prompt` and `output` that begin `next_prompt`, of which `shared` are known.

    Blocks know only of the prompt. If all of that was kept (but for a part of a block), then the output
    follows it, provided that it fits; an output that does not fit was not re-sent whole (unsent thinking),
    and then none of it is taken as kept.
    """
    there = prompt + output
    if shared < prompt // block_tokens * block_tokens:
        kept = shared
    elif next_prompt > there:
        kept = there
    else:
        kept = max(prompt, shared)
    return max(0, min(kept, there, next_prompt - 1))
