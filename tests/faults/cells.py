"""The matrix: which fault of which component, while a watched round is in which phase. Pure."""

from __future__ import annotations

import fnmatch
import hashlib
from dataclasses import dataclass

COMPONENTS = ("redis", "gateway", "prefill", "decode")
FAULTS = ("kill", "stop", "restart", "slow", "cut")
LINK_FAULTS = ("slow", "cut", "corrupt")
PHASES = ("idle", "prefill", "transfer", "decode")

REAL_PHASE = {"prefill": "transfer", "decode": "decode", "link": "transfer"}
"""Component -> the phase in which it is tried on real engines too."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One field of the matrix."""

    component: str
    fault: str
    phase: str

    @property
    def name(self) -> str:
        return f"{self.component}.{self.fault}.{self.phase}"

    @property
    def variants(self) -> tuple[str, ...]:
        """A ledger that is restarted comes back with its data, or with none."""
        if (self.component, self.fault) == ("redis", "restart"):
            return ("aof", "empty")
        return ("",)


def matrix() -> tuple[Cell, ...]:
    """All cells, component by component."""
    rows = [(component, fault) for component in COMPONENTS for fault in FAULTS]
    rows += [("link", fault) for fault in LINK_FAULTS]
    return tuple(Cell(component, fault, phase) for component, fault in rows for phase in PHASES)


def real_cells() -> tuple[Cell, ...]:
    """Those that run on real engines too."""
    return tuple(cell for cell in matrix() if REAL_PHASE.get(cell.component) == cell.phase)


def chosen(cells: tuple[Cell, ...], patterns: str) -> tuple[Cell, ...]:
    """Cells whose names match one of the patterns (commas between them); ValueError if none does."""
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    found = tuple(cell for cell in cells if any(fnmatch.fnmatch(cell.name, each) for each in wanted))
    if wanted and not found:
        raise ValueError(
            f"no cell is called {patterns!r}: names are COMPONENT.FAULT.PHASE, as redis.kill.idle"
        )
    return found if wanted else cells


def seed_of(name: str, seed: int) -> int:
    """The seed of one run, so that it can be repeated without those before it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4])
