"""[repool]: whether engines change pool as the load drifts, and how readily."""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.policies.pools import PoolRule

RULES = ("balance", "arrow")


@dataclass(frozen=True, slots=True)
class RepoolConfig:
    enabled: bool = False
    rule: str = "balance"
    """balance: the fullest pool as little full as can be. arrow: Arrow's thresholds on queue and ITL."""
    period_s: float = 10.0
    """Between two looks at the load."""
    window_s: float = 120.0
    """Over which work is averaged; after a flip it begins anew."""
    margin: float = 0.1
    """A flip must make the fullest pool less full by so much of its engines' time."""
    floor: float = 0.4
    """Nothing is flipped while no pool is so full."""
    sustain: int = 3
    """Looks in a row that must want the same direction."""
    cool_down_s: float = 120.0
    """After a flip, before the next one begins."""
    drain_limit_s: float = 120.0
    """An engine that leaves the decode pool changes it after so long, whoever still has its home there."""
    memory_s: float = 600.0
    """The most work that a pool has had for so long is what it must still be able to do without an engine."""
    horizon_s: float = 900.0
    """Over which the seconds that a flip costs are spread."""
    least_prefill: int = 1
    least_decode: int = 1
    expand: float = 1.0
    """Arrow's: above this load of the decode pool it gets an engine."""
    shrink: float = 0.5
    """Arrow's: below this load a pool gives one away."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        for name in ("period_s", "window_s", "drain_limit_s", "memory_s", "horizon_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("margin", "floor", "cool_down_s", "expand", "shrink"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name, why in (
            ("sustain", "it is a number of looks"),
            ("least_prefill", "a pool is never emptied"),
            ("least_decode", "a pool is never emptied"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}: {why}")
        if self.window_s < self.period_s:
            raise ValueError(
                f"window_s ({self.window_s}) must be at least period_s ({self.period_s}): "
                "rates are of the work between two looks"
            )

    @property
    def pool_rule(self) -> PoolRule:
        return PoolRule(
            self.margin, self.floor, self.horizon_s, self.least_prefill, self.least_decode,
            self.expand, self.shrink,
        )  # fmt: skip
