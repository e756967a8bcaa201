"""Which sessions begin alike, where a source names prompts by hashed blocks; and how long a block is.

A session can say one thing of others: "my first so many tokens are those of prefix X". The first prompts of
a trace form a tree, of which X is one path from the root. So some sharing cannot be told, and is lost: two
sessions on different paths seem to share nothing, though the paths may begin alike. The paths are chosen so
that the least is lost: a branch gets a path of its own if what is saved behind the fork is more than the
blocks before it, which are then there once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from antiphon.traces.schema import MAX_TOKENS, TraceError

MOONCAKE_BLOCK_TOKENS = 512
ROOT = 0


@dataclass(slots=True)
class _Tree:
    """Blocks behind blocks; node 0 is the root. Children have higher numbers than their parents."""

    parent: list[int] = field(default_factory=lambda: [ROOT])
    depth: list[int] = field(default_factory=lambda: [0])
    """Blocks from the root to here, this one included."""
    sessions: list[int] = field(default_factory=lambda: [0])
    """So many go through."""
    found: dict[tuple[int, int], int] = field(default_factory=dict)
    """By parent and block id."""

    def add(self, blocks: Sequence[int]) -> None:
        node = ROOT
        for block in blocks:
            child = self.found.setdefault((node, block), len(self.parent))
            if child == len(self.parent):
                self.parent.append(node)
                self.depth.append(self.depth[node] + 1)
                self.sessions.append(0)
            self.sessions[child] += 1
            node = child

    def paths(self) -> list[int]:
        """Per node the path that it lies on, called after the node where it forks off; 0 = on none."""
        size = len(self.parent)
        best, others, heaviest = [0] * size, [0] * size, [ROOT] * size
        saved = [0] * size
        for node in range(size - 1, ROOT, -1):
            if self.sessions[node] < 2:
                continue
            saved[node] = self.sessions[node] - 1 + best[node] + others[node]
            up = self.parent[node]
            lesser = saved[node]
            if saved[node] >= best[up]:
                lesser, best[up], heaviest[up] = best[up], saved[node], node
            others[up] += max(0, lesser - self.depth[up])
        path = [ROOT] * size
        for node in range(1, size):
            up = self.parent[node]
            if self.sessions[node] < 2 or (up != ROOT and path[up] == ROOT):
                continue
            if up != ROOT and heaviest[up] == node:
                path[node] = path[up]
            elif saved[node] > self.depth[up]:
                path[node] = node
        return path


def shared_beginnings(prompts: Sequence[Sequence[int]], block_tokens: int) -> list[tuple[str, int]]:
    """Per first prompt (the ids of its full blocks): the prefix that it begins with, and its tokens.

    `("", 0)` where nothing is shared. Time and memory grow with the number of blocks.
    """
    tree = _Tree()
    for blocks in prompts:
        tree.add(blocks)
    path = tree.paths()
    shared = []
    for blocks in prompts:
        end = ROOT
        for block in blocks:
            child = tree.found[end, block]
            if path[child] == ROOT:
                break
            end = child
        shared.append((f"blocks-{path[end]}", tree.depth[end] * block_tokens) if end else ("", 0))
    return shared


@dataclass(slots=True)
class BlockSize:
    """The tokens a block that fit all rows of a trace, told from lengths and numbers of ids.

    A source may name the last, not full, block or leave it out, but all of its rows do the same.
    """

    with_rest: range = range(1, MAX_TOKENS + 1)
    full_only: range = range(1, MAX_TOKENS + 1)

    def fits(self, tokens: int, ids: int) -> bool:
        """Take a row in; False, and left out, if no size fits it and those before it."""
        if ids == 0:
            return True
        most = (tokens - 1) // (ids - 1) if ids > 1 else MAX_TOKENS
        with_rest = _both(self.with_rest, range(-(-tokens // ids), most + 1))
        full_only = _both(self.full_only, range(tokens // (ids + 1) + 1, tokens // ids + 1))
        if not with_rest and not full_only:
            return False
        self.with_rest, self.full_only = with_rest, full_only
        return True

    def tokens(self) -> int:
        """512, as Mooncake has it, if that fits; else the smallest power of two; else the only one that does.

        Raises `TraceError` if several fit of which none is a power of two.
        """
        for fitting in (self.with_rest, self.full_only):
            for size in (MOONCAKE_BLOCK_TOKENS, *(1 << power for power in range(MAX_TOKENS.bit_length()))):
                if size in fitting:
                    return size
        fitting = self.with_rest or self.full_only
        if len(fitting) == 1:
            return fitting[0]
        raise TraceError(
            f"a block of hash_ids has {fitting[0]} to {fitting[-1]} tokens, none of them a power of two: "
            "the number of hash_ids does not go with input_length"
        )


def _both(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
