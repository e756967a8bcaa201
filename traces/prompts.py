"""Token ids from token counts: every round's prompt extends what its session really has said so far. Pure.

A prompt is the kept prefix of (previous prompt + the ids that the engine really answered) and fresh filler.
Filler is a function of seed, session and round alone, so a second run with the same seed sends the same ids.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.traces.schema import SessionTrace


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Ids in [low, high) that filler may use: choose it free of special tokens."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(f"vocabulary range [{self.low}, {self.high}) is empty or negative")


def prompt_ids(
    session: SessionTrace, index: int, said: Sequence[int], vocabulary: Vocabulary, seed: int
) -> list[int]:
    """The prompt of round `index` (from 0), exactly `prompt_tokens` long.

    `said` is the previous round's prompt and output ids; empty for the first round. An answer shorter than
    recorded is made up for with filler.
    """
    turn = session.rounds[index]
    kept = list(said[: turn.kept_tokens]) if index else shared_ids(session, vocabulary, seed)
    missing = turn.prompt_tokens - len(kept)
    return kept + filler_ids(f"{seed}/session/{session.session_id}/{index}", missing, vocabulary)


def shared_ids(session: SessionTrace, vocabulary: Vocabulary, seed: int) -> list[int]:
    """The first `shared_tokens` ids, equal (as far as both go) for every session of one `shared_prefix`."""
    return filler_ids(f"{seed}/shared/{session.shared_prefix}", session.shared_tokens, vocabulary)


def filler_ids(name: str, count: int, vocabulary: Vocabulary) -> list[int]:
    """`count` ids drawn by a hash of `name`; the first n of a longer draw are the draw of n."""
    words = array("I", hashlib.shake_256(name.encode()).digest(4 * count))
    if sys.byteorder == "big":
        words.byteswap()
    low, span = vocabulary.low, vocabulary.high - vocabulary.low
    return [low + word % span for word in words]
