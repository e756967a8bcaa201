"""Profiles of agent workloads as data: what a kind of agent sends, each figure with what it rests on.

`data/profiles.toml` holds the named ones; a TOML file of the same form holds one of the user's own.
"""

from __future__ import annotations

import math
import tomllib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from antiphon.traces.schema import TraceError

Basis = Literal["measured", "published", "guess"]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Value = Annotated[float, Meta(ge=0.0, le=1e8)]
Curve = Callable[[float], float]
"""A quantile function: share of values below, 0 to 1, to the value there."""

MAX_VARIANTS = 100_000
TINY = 1e-6


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A number or distribution that says what it rests on."""

    basis: Basis
    source: str


class Fixed(Figure, frozen=True, kw_only=True):
    share: Share


class Spread(Figure, frozen=True, kw_only=True):
    """A distribution: quantiles (share below, value), or a lognormal cut at `low` and `high`."""

    points: tuple[tuple[Share, Value], ...] = ()
    mu: float | None = None
    sigma: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.0
    low: Value = 0.0
    high: Value = 0.0

    def __post_init__(self) -> None:
        if self.points and self.mu is not None:
            raise ValueError("give points or mu and sigma, not both")
        if self.mu is not None:
            if not 0 < self.low <= self.high:
                raise ValueError("a lognormal needs low and high, with 0 < low <= high")
        elif (
            len(self.points) < 2 or (self.points[0][0], self.points[-1][0]) != (0, 1)
            or any(a[0] >= b[0] or a[1] > b[1] for a, b in zip(self.points, self.points[1:], strict=False))
        ):  # fmt: skip
            raise ValueError("points must begin at share 0, end at share 1 and rise")

    @property
    def most(self) -> float:
        return self.points[-1][1] if self.points else self.high

    def curve(self) -> Curve:
        """Between points on a logarithmic scale; from 0, or next to it, on a linear one."""
        if self.mu is not None:
            return _lognormal(self.mu, self.sigma, self.low, self.high)
        shares = [share for share, _ in self.points]
        pieces = [
            (share, low, math.log(high / low) if low > TINY else high - low, 1.0 / (next_share - share))
            for (share, low), (next_share, high) in zip(self.points, self.points[1:], strict=False)
        ]

        def at(share: float) -> float:
            begin, low, rise, per_share = pieces[min(bisect_right(shares, share), len(pieces)) - 1]
            way = (share - begin) * per_share
            return low * math.exp(rise * way) if low > TINY else low + rise * way

        return at


def _lognormal(mu: float, sigma: float, low: float, high: float) -> Curve:
    inverse = NormalDist().inv_cdf

    def at(share: float) -> float:
        if share <= 0.0 or share >= 1.0:
            return low if share <= 0.0 else high
        return min(high, max(low, math.exp(mu + sigma * inverse(share))))

    return at


class Prefix(Spread, frozen=True, kw_only=True):
    """What sessions share at their beginning: one of `variants`, by Zipf's law; the spread is of lengths."""

    variants: Annotated[int, Meta(ge=1, le=MAX_VARIANTS)]
    zipf: Annotated[float, Meta(ge=0.0, le=10.0)] = 1.0


class Sometimes(Spread, frozen=True, kw_only=True):
    """Happens with this chance; the spread is of how much."""

    chance: Share


class Compaction(Spread, frozen=True, kw_only=True):
    """Above `over` (a share of the window) a prompt shrinks to a share of the previous one, by the spread."""

    over: Annotated[float, Meta(ge=0.5, le=1.0)]


class Tools(Figure, frozen=True, kw_only=True):
    weights: Annotated[dict[str, Annotated[float, Meta(gt=0.0)]], Meta(min_length=1)]


class Thread(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One line of rounds: a session, or a sub-agent's. Tokens and seconds."""

    rounds: Spread
    first: Spread
    """First prompt after the shared prefix."""
    tool_tokens: Spread
    """What a tool adds to the previous prompt and output."""
    output: Spread
    tool_gap: Spread
    tools: Tools
    shared: Prefix | None = None
    human: Fixed | None = None
    """Share of later rounds that a person begins; None = only tools do."""
    human_tokens: Spread | None = None
    human_gap: Spread | None = None
    unsent: Sometimes | None = None
    """Share of the previous output that is not sent back (thinking): it came first, so none of it is kept."""
    rewrite: Sometimes | None = None
    """Share of the previous prompt that is kept when something in the middle of it changes."""
    compaction: Compaction | None = None

    def __post_init__(self) -> None:
        if self.human is not None and (self.human_tokens is None or self.human_gap is None):
            raise ValueError("a human share needs human_tokens and human_gap")
        for name in ("unsent", "rewrite", "compaction"):
            spread: Spread | None = getattr(self, name)
            if spread is not None and spread.most > 1:
                raise ValueError(f"{name} spreads over shares, 0 to 1, not to {spread.most:g}")


class SubAgents(Thread, frozen=True, kw_only=True):
    """Sessions that a session starts; `count` has the chance of any and the spread of how many."""

    tool: str
    count: Sometimes


class Profile(Thread, frozen=True, kw_only=True):
    label: str
    about: str
    sub_agents: SubAgents | None = None


class Source(NamedTuple):
    """One figure of a profile, in words."""

    figure: str
    basis: Basis
    source: str


def profile_names() -> tuple[str, ...]:
    return tuple(_named())


def load_profile(name: str) -> Profile:
    """The named profile, or the one in the TOML file `name`. Raises `TraceError`."""
    if not name.endswith(".toml"):
        content = _named().get(name)
        if content is None:
            known = ", ".join(profile_names())
            raise TraceError(f"unknown profile {name!r}: known are {known}; or give a .toml file")
    else:
        try:
            content = tomllib.loads(Path(name).read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise TraceError(f"profile {name}: cannot be read: {error}") from error
    try:
        return msgspec.convert(content, Profile)
    except msgspec.ValidationError as error:
        raise TraceError(f"profile {name}: {error}") from error


def sources(thread: Thread, prefix: str = "") -> Iterator[Source]:
    """Every figure of a profile, its sub-agents' included, in the order of the fields."""
    for name in thread.__struct_fields__:
        value = getattr(thread, name)
        if isinstance(value, Figure):
            yield Source(prefix + name, value.basis, value.source)
        elif isinstance(value, Thread):
            yield from sources(value, f"{prefix}{name}.")


def _named() -> Mapping[str, object]:
    text = resources.files("antiphon.traces").joinpath("data/profiles.toml").read_text()
    return tomllib.loads(text)
