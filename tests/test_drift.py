"""`make drift`: the day whose mix shifts, runs on it, and what is shown of them."""

from __future__ import annotations

import pytest

from antiphon.eval.drift import ENGINES, Setting, cluster_of, online_settings, run, settings
from antiphon.eval.drift_day import HOURS, SHAPES, TARGETS, day, profiles, share
from antiphon.eval.drift_page import figure, flips, table
from antiphon.eval.drift_types import Days
from antiphon.traces.schema import SessionTrace, session_fault

SHORT = Days(hour_s=6.0, load=0.5)


def kind(session: SessionTrace) -> str:
    return session.session_id.partition("-")[0]


def test_a_day_is_the_same_for_the_same_seed_and_shifts() -> None:
    """Reviews come in the morning, reasoning in the afternoon; each with the targets of its kind."""
    peaks = dict.fromkeys(profiles(), 2.0)
    sessions = day(peaks, 1, 20.0, 131_072)
    assert sessions == day(peaks, 1, 20.0, 131_072) != day(peaks, 2, 20.0, 131_072)
    assert all(session_fault(session) is None for session in sessions)
    hours: dict[str, list[int]] = {name: [0] * HOURS for name in SHAPES}
    for session in sessions:
        assert session.start_s is not None
        assert (session.slo_ttft_s, session.slo_itl_s) == TARGETS[kind(session)]
        hours[kind(session)][int(session.start_s / 20.0)] += 1
    assert sum(hours["review"][8:12]) > 3 * sum(hours["review"][14:18])
    assert sum(hours["reasoning"][14:18]) > 3 * sum(hours["reasoning"][8:12])
    expected = 2.0 * 20.0 * sum(share("review", n / 100) for n in range(HOURS * 100)) / 100
    assert sum(hours["review"]) == pytest.approx(expected, rel=0.15)


def test_every_split_has_all_engines_and_one_in_each_pool() -> None:
    for setting in settings(["remote"], [1], SHORT):
        counts = {group.pool: group.count for group in cluster_of(setting.prefill).engines}
        assert sum(counts.values()) == ENGINES and counts["decode"] >= 1
        assert counts.get("prefill", 0) == setting.prefill


def test_runs_are_told_with_their_flips() -> None:
    found = [run(Setting("remote", prefill, 1, SHORT)) for prefill in (2, 4)]
    online = run(Setting("remote", 2, 1, SHORT, "neither"))
    assert online.rounds == found[0].rounds and online.flips and not found[0].flips
    text = table([*found, online], SHORT)
    assert f"| neither from 2p6d | {100 * online.attainment:.2f} ({len(online.flips)})" in text
    assert flips(online).count("\n") == len(online.flips) + 1
    assert figure([*found, online], SHORT).startswith(b"\x89PNG")
    starts = {s.prefill for s in online_settings(found, ["remote"], SHORT) if s.online == "online"}
    assert 4 in starts
