"""A day whose mix of sessions shifts: reviews in the morning, reasoning in the afternoon, little at night."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from importlib import resources
from itertools import pairwise
from random import Random

import msgspec

from antiphon.traces.generate import generate
from antiphon.traces.profiles import Profile, load_profile
from antiphon.traces.schema import SessionTrace

HOURS = 24

SHAPES: Mapping[str, tuple[tuple[float, float], ...]] = {
    "review": ((0, 0.05), (6, 0.05), (8, 0.8), (9, 1.0), (12, 1.0), (13.5, 0.15), (18, 0.1), (24, 0.05)),
    "reasoning": ((0, 0.05), (9, 0.08), (12, 0.1), (13.5, 0.8), (14, 1.0), (19, 1.0), (21, 0.15), (24, 0.05)),
    "agents": ((0, 0.3), (6, 0.3), (8, 1.0), (20, 1.0), (23, 0.3), (24, 0.3)),
}
"""Kind -> (hour, share of its peak rate), straight lines between."""

TARGETS: Mapping[str, tuple[float, float]] = {
    "review": (4.0, 0.05),
    "reasoning": (2.0, 0.025),
    "agents": (1.0, 0.05),
}
"""Kind -> (TTFT, ITL) in seconds."""


def profiles() -> dict[str, Profile]:
    text = resources.files("antiphon.eval").joinpath("data/drift.toml").read_text()
    own = {name: msgspec.convert(table, Profile) for name, table in tomllib.loads(text).items()}
    return {**own, "agents": load_profile("swe-agent")}


def day(peaks: Mapping[str, float], seed: int, hour_s: float, window_tokens: int) -> list[SessionTrace]:
    """Sessions in order of their start. `peaks`: kind -> sessions per second at its height.

    Starts are a Poisson process whose rate follows the shape; an hour of the day takes `hour_s`, the
    sessions' own gaps and lengths stay as they are.
    """
    sessions: list[SessionTrace] = []
    for kind, profile in profiles().items():
        stream = generate(kind, profile, seed, window_tokens)
        draw = Random(f"drift/{kind}/{seed}").random
        ttft_s, itl_s = TARGETS[kind]
        at_s, peak = 0.0, peaks[kind]
        while peak > 0:
            at_s -= math.log(1.0 - draw()) / peak
            if at_s >= HOURS * hour_s:
                break
            if draw() < share(kind, at_s / hour_s):
                told = {"start_s": at_s, "slo_ttft_s": ttft_s, "slo_itl_s": itl_s}
                sessions.append(msgspec.structs.replace(next(stream), **told))
    sessions.sort(key=lambda session: session.start_s or 0.0)
    return sessions


def share(kind: str, hour: float) -> float:
    """Of the kind's peak rate, at this hour."""
    points = SHAPES[kind]
    for (from_hour, low), (to_hour, high) in pairwise(points):
        if from_hour <= hour <= to_hour:
            return low + (high - low) * (hour - from_hour) / (to_hour - from_hour)
    return points[-1][1]
