"""Online correction of the latency model: what the predictions for one engine are multiplied by.

Per engine and term (prefill, decode, transfer) the core keeps a weighted mean of log(actual / predicted).
`predicted` is what the profile says WITHOUT correction: else a correction would be measured against itself.

    share      = min(1, predicted_s / full_s)       a short time is mostly noise: it counts for less
    evidence   = min(evidence + share, 1 / weight)  at first 1: the profile itself is one observation
    log_ratio += share / evidence * (log(actual / predicted) - log_ratio)
    factor     = exp(log_ratio) within [1 / clip, clip]; 1 before `least_samples` observations

Which times may be compared with a prediction at all: clean_times.py. Pure: no clock, no engines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from antiphon.policies.base import Corrections


@dataclass(frozen=True, slots=True)
class CorrectionConfig:
    """How fast and how far. All values are Antiphon's own."""

    weight: float = 0.1
    """Of a new observation, once there are 1 / weight of them."""
    least_samples: int = 4
    """Fewer observations say nothing: the factor stays 1."""
    least_s: float = 0.001
    """A shorter prediction cannot be measured."""
    least_prefill_s: float = 0.02
    """The same of a prefill: calling the engine takes milliseconds that no profile knows of."""
    full_s: float = 0.1
    """From here on an observation counts in full."""
    clip: float = 2.0
    """A factor stays within [1 / clip, clip]. One observation counts as at most the square of that."""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight must be above 0 and at most 1, got {self.weight}")
        if self.least_samples < 1:
            raise ValueError(f"least_samples must be at least 1, got {self.least_samples}")
        for name in ("least_s", "least_prefill_s", "full_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 1 <= self.clip < math.inf:
            raise ValueError(f"clip must be at least 1, got {self.clip}")


MOST_S = 1e6
"""A longer time is a clock that jumped."""
WORTH_TELLING = 0.005
"""A factor is changed by at least this share: each change costs a new view of the engine."""

NEARLY = 0.1
"""Log ratios that differ by less are nearly the same."""


@dataclass(slots=True)
class Term:
    """What has been learnt of one term on one engine."""

    config: CorrectionConfig
    least_s: float = 0.0
    """A shorter prediction cannot be measured."""
    log_ratio: float = 0.0
    evidence: float = 1.0
    samples: int = 0
    factor: float = 1.0
    """What predictions are multiplied by."""
    _most: float = field(init=False)
    """Of a single log ratio."""
    _most_evidence: float = field(init=False)

    def __post_init__(self) -> None:
        self._most = 2 * math.log(self.config.clip)
        self._most_evidence = 1 / self.config.weight
        self.least_s = self.least_s or self.config.least_s

    def usable(self, predicted_s: float, actual_s: float) -> bool:
        """Both are numbers, and the prediction is long enough to be measured."""
        return self.least_s <= predicted_s <= MOST_S and 0.0 < actual_s <= MOST_S

    def learn(self, predicted_s: float, actual_s: float) -> bool:
        """One observation: the uncorrected prediction, and what it was. Whether `factor` changed by it."""
        return self.usable(predicted_s, actual_s) and self.learn_log(predicted_s, log(actual_s, predicted_s))

    def learn_log(self, predicted_s: float, log_ratio: float) -> bool:
        """As `learn`, of what is `usable`."""
        config, most = self.config, self._most
        share = predicted_s / config.full_s if predicted_s < config.full_s else 1.0
        seen = most if log_ratio > most else -most if log_ratio < -most else log_ratio
        evidence = self.evidence + share
        self.evidence = evidence = evidence if evidence < self._most_evidence else self._most_evidence
        self.log_ratio += share / evidence * (seen - self.log_ratio)
        self.samples += 1
        if self.samples < config.least_samples:
            return False
        factor = math.exp(self.log_ratio)
        factor = config.clip if factor > config.clip else max(1 / config.clip, factor)
        if abs(factor - self.factor) < WORTH_TELLING * self.factor:
            return False
        self.factor = factor
        return True


@dataclass(slots=True)
class Corrector:
    """One engine's terms."""

    config: CorrectionConfig
    prefill: Term = field(init=False)
    decode: Term = field(init=False)
    transfer: Term = field(init=False)

    def __post_init__(self) -> None:
        self.prefill = Term(self.config, self.config.least_prefill_s)
        self.decode, self.transfer = Term(self.config), Term(self.config)

    def corrections(self) -> Corrections:
        return Corrections(self.prefill.factor, self.decode.factor, self.transfer.factor)


def learn_transfer(
    source: Term, source_s: float, puller: Term, puller_s: float, actual_s: float
) -> tuple[bool, bool]:
    """Both ends of a transfer, each with what its own profile predicts for the bytes that came.

    A transfer is as slow as its slower end. So what is faster than an end was thought to be is news of that
    end. What is slower than both were thought to be is news of the one that is thought to be slower; of both,
    where that is nearly the same: who is wrongly suspected is cleared by its transfers with others. Returns
    whose factor changed.
    """
    if not (source.usable(source_s, actual_s) and puller.usable(puller_s, actual_s)):
        return False, False
    from_source, from_puller = log(actual_s, source_s), log(actual_s, puller_s)
    source_gap, puller_gap = from_source - source.log_ratio, from_puller - puller.log_ratio
    least = min(source_gap, puller_gap)
    most = least + NEARLY if least >= 0 else 0.0
    return (
        source_gap <= most and source.learn_log(source_s, from_source),
        puller_gap <= most and puller.learn_log(puller_s, from_puller),
    )


def log(actual_s: float, predicted_s: float) -> float:
    """Of their ratio, which by itself could leave the range of floats."""
    return math.log(actual_s) - math.log(predicted_s)
