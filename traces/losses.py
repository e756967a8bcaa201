"""What a format that is written cannot say of the sessions at hand, counted as they go by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from antiphon.traces.schema import SessionTrace
from antiphon.traces.writers import BLOCK_TOKENS, MOONCAKE_BLOCK_TOKENS

Loss = tuple[str, Callable[[SessionTrace], int]]
"""In words, after a number; and how many of a session are lost."""


def _targets(session: SessionTrace) -> int:
    return session.slo_ttft_s is not None or session.slo_itl_s is not None


def _tools(session: SessionTrace) -> int:
    return sum(bool(turn.tool) for turn in session.rounds)


def _unaligned(block_tokens: int) -> Callable[[SessionTrace], int]:
    return lambda session: sum(turn.kept_tokens % block_tokens > 0 for turn in session.rounds)


_UNTIMED: Loss = (
    "sessions without an arrival, written as time 0",
    lambda session: session.start_s is None and session.parent is None,
)
_NO_TARGETS: Loss = ("sessions' SLOs", _targets)
_NO_TOOLS: Loss = ("rounds' tool names", _tools)
_NO_PARENTS: Loss = ("sub-agents' parents", lambda session: session.parent is not None)
_MOONCAKE: Sequence[Loss] = (_UNTIMED, _NO_TARGETS, _NO_TOOLS, _NO_PARENTS)
_FINE_BLOCKS: Loss = (f"rounds' kept tokens, cut to blocks of {BLOCK_TOKENS}", _unaligned(BLOCK_TOKENS))

LOSSES: Mapping[str, Sequence[Loss]] = {
    "mooncake": (
        ("sessions' bounds: rows are not tied together", lambda session: len(session.rounds) > 1),
        *_MOONCAKE,
        (
            f"rounds' kept tokens, cut to blocks of {MOONCAKE_BLOCK_TOKENS}",
            _unaligned(MOONCAKE_BLOCK_TOKENS),
        ),
    ),
    "mooncake-sessions": (*_MOONCAKE, _FINE_BLOCKS),
    "agentic-mooncake": (
        _UNTIMED, _NO_TARGETS, _FINE_BLOCKS,
        (
            "sub-agents' parents: they start with the first round",
            lambda session: session.parent is not None and session.after_round == 0,
        ),
    ),
}  # fmt: skip
"""By the writer's name; a format that is not here keeps everything."""


class Losses:
    """Hands a stream on and counts what the format `name` loses of it."""

    def __init__(self, name: str, sessions: Iterable[SessionTrace]) -> None:
        self._sessions = sessions
        self._counts: dict[str, int] = {}
        self._losses = LOSSES.get(name, ())

    def __iter__(self) -> Iterator[SessionTrace]:
        for session in self._sessions:
            for words, count in self._losses:
                self._counts[words] = self._counts.get(words, 0) + count(session)
            yield session

    def describe(self) -> list[str]:
        """One line for each kind of loss that happened."""
        return [f"{count} {words}" for words, count in self._counts.items() if count]
