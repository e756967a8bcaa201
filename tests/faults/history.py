"""What clients saw and what the ledger recorded, and what must never be among it. Pure.

A logical round is what a client wants answered once: at most two attempts, the second one at another replica
with the same idempotency key.

    lost      unanswered after the retry, and not refused in time with an error that says when to come back
    doubled   the ledger has two completions of one logical round
    wrong     the answer is not what the model says to the prompt that the client sent
    hung      the client's deadline passed
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

End = Literal["answered", "refused", "error", "broken", "deadline"]
"""Of an attempt. broken: its stream, or its connection; error: a status that says nothing of coming back."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request and what came of it."""

    replica: int
    end: End
    elapsed_s: float
    status: int = 0
    detail: str = ""


@dataclass(slots=True)
class LogicalRound:
    """What one session's client asked at one time."""

    session: str
    number: int
    deadline_s: float
    expected: Sequence[tuple[int, ...]]
    """Prompts that the client's request may have become; more than one where text is split into tokens."""
    attempts: list[Attempt] = field(default_factory=list)
    answer: tuple[int, ...] | None = None
    prompt_tokens: int = 0
    """As the answer's usage says."""
    elapsed_s: float = 0.0
    """To its answer, or to where the client gave up."""

    @property
    def name(self) -> str:
        return f"{self.session}/{self.number}"

    @property
    def refused(self) -> bool:
        return self.answer is None and bool(self.attempts) and self.attempts[-1].end == "refused"

    @property
    def hung(self) -> bool:
        return self.elapsed_s > self.deadline_s

    @property
    def lost(self) -> bool:
        return self.answer is None and not (self.refused and not self.hung)


@dataclass(slots=True)
class Verdict:
    """Of the rounds of one run."""

    rounds: int = 0
    answered: int = 0
    refused: int = 0
    retried: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    worst_s: float = 0.0

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.hung)


def judge(
    rounds: Iterable[LogicalRound],
    receipts: Iterable[Mapping[str, Any]],
    answers_to: Mapping[str, frozenset[tuple[int, ...]]],
) -> Verdict:
    """`receipts`: those of the ledger, each once; `answers_to`: name of a round -> right answers to it."""
    rounds = list(rounds)
    verdict = Verdict(rounds=len(rounds))
    for each in rounds:
        verdict.worst_s = max(verdict.worst_s, each.elapsed_s)
        verdict.retried += len(each.attempts) > 1
        verdict.answered += each.answer is not None
        verdict.refused += each.refused
        told = ", ".join(
            f"gw{a.replica} {a.end} {a.status} {a.elapsed_s:.1f}s {a.detail}" for a in each.attempts
        )
        if each.lost:
            verdict.lost.append(f"{each.name}: {told}")
        if each.hung:
            verdict.hung.append(f"{each.name}: {each.elapsed_s:.1f} s of {each.deadline_s:g}; {told}")
        if each.answer is not None and each.answer not in answers_to[each.name]:
            lengths = ", ".join(str(len(prompt)) for prompt in each.expected)
            prompt = f"prompt of {each.prompt_tokens} tokens, sent as {lengths}"
            verdict.wrong.append(f"{each.name}: {len(each.answer)} tokens; {prompt}; {told}")
    verdict.doubled = doubled(rounds, receipts)
    return verdict


def doubled(rounds: Iterable[LogicalRound], receipts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Rounds that were completed more than once, in their session or in a fork of it.

    Within a session every round's prompt is longer than the last one's: its length tells which it was.
    """
    completed: Counter[tuple[str, int]] = Counter()
    for receipt in receipts:
        if receipt["outcome"] == "completed":
            completed[family(receipt["session_id"]), receipt["prompt_tokens"]] += 1
    found = []
    for each in rounds:
        lengths = {len(prompt) for prompt in each.expected}
        times = sum(completed[each.session, length] for length in lengths)
        if times > 1:
            found.append(f"{each.name}: {times} completions")
    return found


def family(session_id: str) -> str:
    """A session's id, or that of the session that it is an implicit fork of."""
    return session_id.partition("~")[0]
