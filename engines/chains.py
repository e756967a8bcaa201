"""Names of KV without hashes: branches and chains, for simulated time.

The KV of a prompt is a chain of whole pages. In simulated time nobody hashes tokens: two chains share exactly
the pages that their branches share. A session that only grows is one branch; where a round keeps less than
what was there (a compaction, unsent thinking), a new branch forks off. Sessions with one system prompt fork
off the branch of that prompt.
"""

from __future__ import annotations

from typing import NamedTuple


class Branch:
    """Content from page `fork_pages` on; below that it is its parent's. Compared by identity.

    `fork_pages` is an absolute depth, at least the parent's own; a root has no parent and forks at 0.
    """

    __slots__ = ("fork_pages", "number", "parent")

    def __init__(self, number: int, parent: Branch | None = None, fork_pages: int = 0) -> None:
        # A fork at or below the parent's own fork has nothing of the parent: it hangs on what is below.
        while parent is not None and fork_pages <= parent.fork_pages:
            parent = parent.parent
        self.number: int = number
        """Unique in a simulation: ties and names, never content."""
        self.parent: Branch | None = parent
        self.fork_pages: int = fork_pages if parent is not None else 0

    def __repr__(self) -> str:
        return f"Branch({self.number})"


class Chain(NamedTuple):
    """The first `pages` whole pages along a branch (absolute depth, so at least its `fork_pages`)."""

    branch: Branch
    pages: int
