"""What a tier of KV holds of one branch, and of those that it grew from: a stretch of a chain."""

from __future__ import annotations

from antiphon.engines.chains import Branch


class Held:
    """Pages `fork` to `held` (absolute depths) along `branch`. The pages below are those of `parent`.

    The stretch may begin before the branch does: what goes on where another ended takes its place, so that a
    session that forks every round is still one stretch. The other branch is then an alias, up to its end.
    """

    __slots__ = (
        "aliases", "branch", "fork", "held", "kids", "locked", "locks", "older", "parent", "queued", "used",
    )  # fmt: skip

    def __init__(self, branch: Branch, parent: Held | None, fork: int) -> None:
        self.branch = branch
        self.parent = parent
        self.fork = self.held = self.locked = fork
        self.locks: dict[int, int] = {}
        """Depth -> locks up to there. A stretch with any lock holds one on its parent, up to the fork."""
        self.kids: dict[int, int] = {}
        """Fork -> stretches that fork off there."""
        self.aliases: list[tuple[int, Branch]] = []
        """(depth, branch) in order of depth: other branches that go this way, and how far."""
        self.used = 0
        """When its pages were last used, from the fork on up to the first of `older`."""
        self.older: list[tuple[int, int]] | None = None
        """(depth, last use) of deeper pages, used longer ago the deeper they are."""
        self.queued = False
        """It has an entry in the eviction heap."""

    def __lt__(self, other: Held) -> bool:
        return self.branch.number < other.branch.number

    def mark(self, depth: int, use: int) -> None:
        """The pages up to `depth` were used just now, those behind it were not."""
        tail = self._older_behind(depth)
        self.older = [(depth, tail[0]), *tail[1]]
        self.used = use

    def go_on_as(self, branch: Branch) -> list[Branch]:
        """What comes behind `held` is another branch's; returns those that went on there till now."""
        others = [self.branch]
        while self.aliases and self.aliases[-1][0] > self.held:
            others.append(self.aliases.pop()[1])
        self.branch = branch
        return others

    def split(self, depth: int) -> Held:
        """Give up what lies behind `depth`, which nobody locks or forks off from; returns it as a kid."""
        tail = Held(self.branch, self, depth)
        tail.held, self.held = self.held, depth
        tail.used, older = self._older_behind(depth)
        tail.older = older or None
        if self.older:
            self.older = [entry for entry in self.older if entry[0] < depth]
        while self.aliases and self.aliases[-1][0] > depth:
            tail.aliases.insert(0, self.aliases.pop())
        self.kids[depth] = self.kids.get(depth, 0) + 1
        return tail

    def _older_behind(self, depth: int) -> tuple[int, list[tuple[int, int]]]:
        """Last use of the page at `depth`, and the entries of `older` that are deeper."""
        use = self.used
        deeper = []
        for entry in self.older or ():
            if entry[0] > depth:
                deeper.append(entry)
            else:
                use = entry[1]
        return use, deeper
