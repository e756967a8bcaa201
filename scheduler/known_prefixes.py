"""How much of a prompt was there before: in the session's last round, or in another session's first prompt.

Page hashes are chained, so equal hashes of one page mean that everything up to its end is equal. They are
kept in memory, shortened, and never written. For one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from antiphon.engines.page_hash import page_hashes
from antiphon.scheduler.rounds import RoundRequest, seed_of

DIGEST_BYTES = 8
"""Of a page's hash: 10^9 pages collide with a chance of some percent, and a collision costs one length."""
MAX_DIGEST_BYTES = 256 * 1024 * 1024
"""Of all sessions: the longest unseen are forgotten first."""
MAX_FIRST_PAGES = 131_072
"""Pages of first prompts that are remembered."""


class SaidRound(NamedTuple):
    """A round that ended, as far as prefixes go."""

    session: tuple[str, str]
    """(tenant, session id)."""
    name: str
    """As it is written down."""
    number: int
    request: RoundRequest
    output_ids: Sequence[int]
    prompt_hashes: tuple[bytes, ...]
    """() = nobody hashed it yet."""
    final_hashes: tuple[bytes, ...]
    page_tokens: int
    completed: bool


class Found(NamedTuple):
    """`kept_tokens` None = the session's previous round was not seen here."""

    kept_tokens: int | None
    shared_with: str | None = None
    shared_tokens: int = 0


class _Known(NamedTuple):
    """The end of a session's last completed round: its whole pages, and the tokens behind them."""

    number: int
    page_tokens: int
    digests: bytes
    tail: tuple[int, ...]


class KnownPrefixes:
    """What the sessions of one replica said last."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[tuple[str, str], _Known] = OrderedDict()
        self._digest_bytes = 0
        self._first_pages: OrderedDict[bytes, str] = OrderedDict()

    def take(self, said: SaidRound) -> Found:
        """Compare the round with what is known, then remember it.

        `kept_tokens` is exact while a session only grows; where it diverges, it is cut to whole pages.
        """
        ids, size = said.request.prompt, said.page_tokens
        hashes = said.prompt_hashes or page_hashes(ids, size, seed_of(said.request))
        digests = _shortened(hashes)
        known = self._sessions.get(said.session)
        if said.number <= 1 and known is None:
            found = self._find_shared(said.name, digests, size)
        elif known is None or known.page_tokens != size or known.number != said.number - 1:
            found = Found(None)
        else:
            found = Found(_kept_tokens(known, digests, ids))
        self._remember(said, known)
        return found

    def _remember(self, said: SaidRound, known: _Known | None) -> None:
        if not said.completed:
            if known is not None:  # what was there still is; only the count goes on
                self._sessions[said.session] = known._replace(number=said.number)
            return
        size, prompt = said.page_tokens, said.request.prompt
        final = said.final_hashes or page_hashes([*prompt, *said.output_ids], size, seed_of(said.request))
        digests = _shortened(final)
        tail = (*prompt[len(final) * size :], *said.output_ids[max(0, len(final) * size - len(prompt)) :])
        if known is not None:
            self._digest_bytes -= len(known.digests)
        self._sessions[said.session] = _Known(said.number, size, digests, tail)
        self._sessions.move_to_end(said.session)
        self._digest_bytes += len(digests)
        while self._digest_bytes > MAX_DIGEST_BYTES:
            self._digest_bytes -= len(self._sessions.popitem(last=False)[1].digests)

    def _find_shared(self, name: str, digests: bytes, page_tokens: int) -> Found:
        """The session whose first prompt shares most pages with this one; its pages are then known too."""
        pages = [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]
        shared, holder = 0, None
        for page in pages:
            if page not in self._first_pages:
                break
            shared, holder = shared + 1, self._first_pages[page]
        for page in pages:
            self._first_pages.setdefault(page, name)
            self._first_pages.move_to_end(page)
        while len(self._first_pages) > MAX_FIRST_PAGES:
            self._first_pages.popitem(last=False)
        return Found(0, holder, shared * page_tokens)


def _shortened(hashes: Sequence[bytes]) -> bytes:
    return b"".join(page_hash[:DIGEST_BYTES] for page_hash in hashes)


def _kept_tokens(known: _Known, digests: bytes, prompt_ids: Sequence[int]) -> int:
    """Tokens that begin both what is known and the prompt."""
    low, high = 0, min(len(known.digests), len(digests)) // DIGEST_BYTES
    while low < high:  # equal pages come first, since each hash covers all before it
        middle = (low + high + 1) // 2
        at = (middle - 1) * DIGEST_BYTES
        equal = known.digests[at : at + DIGEST_BYTES] == digests[at : at + DIGEST_BYTES]
        low, high = (middle, high) if equal else (low, middle - 1)
    kept = low * known.page_tokens
    if low * DIGEST_BYTES == len(known.digests):
        for ours, theirs in zip(known.tail, prompt_ids[kept:], strict=False):
            if ours != theirs:
                break
            kept += 1
    return kept
