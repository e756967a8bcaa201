"""Calls that a client may make again, and what names them.

A call is what one client wants once; its tries are requests, each with a round id of its own, that are all
the same round of the same session. It is named by its idempotency key, or else by what it asks (its chain).
What is kept of a call: `answers.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from antiphon.engines.prompt import Prompt

DIGEST_PAGE_TOKENS = 1024
CALL_MEMORY_S = 600.0
"""How long an ended round, its call and its answer are remembered."""


@dataclass(frozen=True, slots=True)
class Call:
    """Goes with a round; what the ledger keeps of it is in data/claim.lua."""

    digest: str
    """Names it, within all tenants."""
    asks: str = ""
    """Digest of what it asks, where `digest` does not say it: the same name with another one is refused."""
    again: bool = False
    """A try of it may have been made before."""
    unnamed: bool = False
    """It names no session, so that two clients may ask the same."""
    exactly: str = ""
    """Digest of all that decides its answer, form included; "" = its answer is not kept."""
    number: int = 0
    """Of its round, where a try of it has ended before."""

    @property
    def word(self) -> str:
        """For the scripts."""
        return "again" if self.again else "first"


def digest_of(parts: Iterable[bytes]) -> str:
    """Of parts in order; where one ends is part of it."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def prompt_digest(prompt: Prompt) -> bytes:
    """Of its ids; takes time for what is new in its conversation."""
    pages = prompt.hashes(DIGEST_PAGE_TOKENS)
    return (pages[-1] if pages else b"") + prompt.tail(len(pages) * DIGEST_PAGE_TOKENS).tobytes()
