"""Generated sessions: sound, seeded, a short trace begins a longer one, and as long as what was published."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.traces.generate import DEFAULT_WINDOW_TOKENS, generate, take
from antiphon.traces.info import TraceReport
from antiphon.traces.profiles import Profile, Spread, load_profile, profile_names, sources
from antiphon.traces.schema import RoundTrace, SessionTrace, TraceError, session_fault

NAMES = ("claude-code", "swe-agent", "toolbench", "hotpotqa", "tau", "dureader")

PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "claude-code": {
        "rounds_per_session": (26, 84), "first_prompt": (19_584, 84_685), "output": (210, 811),
        "growth": (600, 3_701), "gap_s": (8.5, 108),
    },
    "swe-agent": {
        "rounds_per_session": (22, 30), "first_prompt": (1_424, 2_511), "output": (95, 177),
        "increment": (32, 834),
    },
    "toolbench": {
        "rounds_per_session": (24, 45), "first_prompt": (1_544, 2_112), "output": (93, 213),
        "increment": (25, 333),
    },
    "hotpotqa": {
        "rounds_per_session": (3, 6), "first_prompt": (1_684, 1_893), "output": (37, 54),
        "increment": (104, 452),
    },
    "tau": {
        "rounds_per_session": (11, 20), "first_prompt": (1_293, 1_310), "output": (48, 156),
        "increment": (36, 370),
    },
}  # fmt: skip
"""p50 and p90 of the recordings. `growth` is prompt less the prefix shared with the previous PROMPT."""

LOOSER = {("claude-code", "growth"): 0.30}
"""Growth: the recording's sessions are those that stayed within the window, ours run into it and compact."""


def fixed(value: float, **more: Any) -> dict[str, Any]:
    return {"basis": "guess", "source": "test", "points": [[0, value], [1, value]], **more}


def simple(**changes: Any) -> Profile:
    """Every session: 4 rounds, first prompt 1,000 + 100, 10 tokens from a tool after 2 s, 20 tokens out."""
    parts: dict[str, Any] = {
        "label": "x", "about": "y", "rounds": fixed(4), "shared": fixed(1000, variants=2, zipf=0),
        "first": fixed(100), "tool_tokens": fixed(10), "output": fixed(20), "tool_gap": fixed(2),
        "tools": {"basis": "guess", "source": "test", "weights": {"bash": 1}},
    }  # fmt: skip
    return msgspec.convert({**parts, **changes}, Profile)


def some(profile: Profile, sessions: int = 1, **options: Any) -> list[SessionTrace]:
    return list(take(generate("x", profile, **options), sessions=sessions))


def test_the_named_profiles() -> None:
    """The six that the command promises, each with a name for people and a source for every figure."""
    assert profile_names() == NAMES
    for name in NAMES:
        profile = load_profile(name)
        assert profile.label.endswith("-like") and profile.about
        assert all(len(source.source) > 5 for source in sources(profile))


def test_guesses_are_labelled() -> None:
    """Nobody published DuReader's lengths: every figure but the number of rounds says that it is a guess."""
    bases = {source.figure: source.basis for source in sources(load_profile("dureader"))}
    assert bases.pop("rounds") == "published"
    assert set(bases.values()) == {"guess"}


@pytest.mark.parametrize("window", [DEFAULT_WINDOW_TOKENS, 50_000])
@pytest.mark.parametrize("name", NAMES)
def test_sessions_are_sound_and_fit_the_window(name: str, window: int) -> None:
    """Each passes `session_fault`, has an id of its own, and no prompt and output exceed the window."""
    ids = set()
    for session in take(generate(name, load_profile(name), 3, window), rounds=8_000):
        assert session_fault(session) is None
        assert max(turn.total_tokens for turn in session.rounds) <= window
        ids.add(session.session_id)
    assert len(ids) == len(list(take(generate(name, load_profile(name), 3, window), rounds=8_000)))


@pytest.mark.parametrize("name", NAMES)
def test_a_short_trace_begins_a_longer_one(name: str) -> None:
    """Session i is the same however many are asked for; another seed gives other sessions."""
    profile = load_profile(name)
    long = list(take(generate(name, profile, 7), sessions=120))
    assert len(long) == 120
    assert list(take(generate(name, profile, 7), sessions=40)) == long[:40]
    by_rounds = list(take(generate(name, profile, 7), rounds=100))
    assert by_rounds == long[: len(by_rounds)]
    assert sum(len(session.rounds) for session in by_rounds[:-1]) < 100
    assert sum(len(session.rounds) for session in by_rounds) >= 100
    other = list(take(generate(name, profile, 8), sessions=40))
    assert [session.rounds for session in other] != [session.rounds for session in long[:40]]
    assert not {session.session_id for session in other} & {session.session_id for session in long}


@pytest.mark.parametrize("name", PUBLISHED)
def test_generated_lengths_are_as_published(name: str) -> None:
    """p50 and p90 within 10 % (or 1.5 of small numbers) of the recordings that the profile is made from."""
    report, growth = TraceReport(), TraceReport().tallies.increment
    sessions = (session for session in generate(name, load_profile(name), 0) if session.parent is None)
    for session in take(sessions, sessions=4_000):
        report.add(session)
        for before, turn in itertools.pairwise(session.rounds):
            growth.add(turn.prompt_tokens - min(turn.kept_tokens, before.prompt_tokens))
    spreads = {**report.summary(name).spreads, "growth": growth.spread()}
    for quantity, (p50, p90) in PUBLISHED[name].items():
        spread = spreads[quantity]
        assert spread is not None
        within = LOOSER.get((name, quantity), 0.10)
        assert spread.p50 == pytest.approx(p50, rel=within, abs=1.5), (quantity, spread)
        assert spread.p90 == pytest.approx(p90, rel=within, abs=1.5), (quantity, spread)


def test_rounds_by_hand() -> None:
    """Without chance in it: each round re-sends all that was there and adds what the tool said."""
    (session,) = some(simple())
    assert session.shared_tokens == 1000 and session.shared_prefix.startswith("x-0-prefix-")
    assert session.rounds == (
        RoundTrace(1100, 20),
        RoundTrace(1130, 20, 1120, 2.0, "bash"),
        RoundTrace(1160, 20, 1150, 2.0, "bash"),
        RoundTrace(1190, 20, 1180, 2.0, "bash"),
    )


def test_unsent_thinking_by_hand() -> None:
    """Half of each answer is not sent back: it came first, so only the previous prompt is kept."""
    (session,) = some(simple(unsent=fixed(0.5, chance=1)))
    assert session.rounds[1] == RoundTrace(1120, 20, 1100, 2.0, "bash")
    assert session.rounds[2] == RoundTrace(1140, 20, 1120, 2.0, "bash")


def test_a_rewrite_by_hand() -> None:
    """Something in the middle changed: the same length, a quarter of the previous prompt is kept."""
    (session,) = some(simple(rewrite=fixed(0.25, chance=1)))
    assert session.rounds[1] == RoundTrace(1130, 20, 275, 2.0, "bash")


def test_compaction_by_hand() -> None:
    """Over 92 % of the window the prompt shrinks to half and a tool result; the shared prefix is kept."""
    (session,) = some(
        simple(compaction=fixed(0.5, over=0.92), shared=fixed(100, variants=1), first=fixed(1000)),
        window_tokens=1280,  # 92 %: 1,177; the third round would have 1,160 + 20
    )
    assert session.rounds[1] == RoundTrace(1130, 20, 1120, 2.0, "bash")
    assert session.rounds[2] == RoundTrace(565 + 10, 20, 100, 2.0, "bash")
    assert session.rounds[3] == RoundTrace(605, 20, 595, 2.0, "bash")


def test_without_compaction_a_session_ends_at_the_window() -> None:
    """The round that would exceed it is not there; a first prompt is cut to fit."""
    profile = simple(shared=None, first=fixed(1000))
    assert len(some(profile, window_tokens=1080)[0].rounds) == 3  # 1,020, 1,050, 1,080
    assert len(some(profile, window_tokens=1079)[0].rounds) == 2
    assert some(profile, window_tokens=100)[0].rounds == (RoundTrace(80, 20),)


def test_people_pause_longer_than_tools() -> None:
    """A round that a person begins has that person's words and pause, and no tool."""
    human = {"basis": "guess", "source": "test", "share": 0.3}
    profile = simple(human=human, human_tokens=fixed(50), human_gap=fixed(60), rounds=fixed(21))
    later = [turn for session in some(profile, 100) for turn in session.rounds[1:]]
    assert {(turn.tool, turn.new_tokens, turn.gap_s) for turn in later} == {("", 50, 60.0), ("bash", 10, 2.0)}
    assert sum(not turn.tool for turn in later) / len(later) == pytest.approx(0.3, abs=0.05)


def test_tools_come_by_weight() -> None:
    """A tool that is named three times as often is called three times as often."""
    tools = {"basis": "guess", "source": "test", "weights": {"a": 3, "b": 1}}
    names = Counter(turn.tool for session in some(simple(tools=tools), 800) for turn in session.rounds[1:])
    assert names["a"] / names["b"] == pytest.approx(3, rel=0.2)


def test_shared_prefixes_have_one_length_each() -> None:
    """Sessions with one prefix id share the same tokens; Zipf's law makes some prefixes common."""
    lengths: dict[str, set[int]] = {}
    uses: Counter[str] = Counter()
    for session in take(generate("claude-code", load_profile("claude-code"), 1), sessions=1000):
        if session.parent is None:
            lengths.setdefault(session.shared_prefix, set()).add(session.shared_tokens)
            uses[session.shared_prefix] += 1
    assert all(len(each) == 1 for each in lengths.values())
    assert 100 < len(lengths) < 400
    assert uses.most_common(1)[0][1] > 20


def test_sub_agents_follow_their_parent() -> None:
    """They come after it and start within it; the gap before its next round covers their gaps."""
    parents: dict[str, SessionTrace] = {}
    children = []
    for session in take(generate("claude-code", load_profile("claude-code"), 2), sessions=1500):
        if session.parent is None:
            parents[session.session_id] = session
        else:
            children.append(session)
    assert 0.02 < len({child.parent for child in children}) / len(parents) < 0.05
    for child in children:
        parent = parents[child.parent or ""]
        assert 1 <= child.after_round < len(parent.rounds)
        waiting = parent.rounds[child.after_round]
        assert waiting.tool == "Task"
        assert waiting.gap_s >= round(sum(turn.gap_s for turn in child.rounds), 2)
        assert child.shared_prefix.startswith("claude-code-2-sub-prefix-")


def test_a_window_that_is_too_small_says_which_is_not() -> None:
    """Shared prefixes must leave room for an answer: the error names a window that does."""
    profile = load_profile("claude-code")
    with pytest.raises(
        TraceError, match=r"window of 20000 tokens is too small .* give at least (\d+)"
    ) as why:
        generate("claude-code", profile, 0, 20_000)
    enough = int(str(why.value).rpartition(" ")[2])
    assert enough < 40_000
    for session in take(generate("claude-code", profile, 0, enough), sessions=200):
        assert session_fault(session) is None


def test_memory_does_not_grow_with_the_trace() -> None:
    """A stream: five times the rounds take no more memory."""
    peaks = []
    for rounds in (4_000, 20_000):
        tracemalloc.start()
        for _ in take(generate("swe-agent", load_profile("swe-agent")), rounds=rounds):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1e6), min_size=2, max_size=8),
    st.lists(st.floats(0.01, 0.99), min_size=6, max_size=6, unique=True),
    st.lists(st.floats(0, 1), min_size=2, max_size=20),
)
def test_a_curve_rises_through_its_points(
    values: list[float], inner: list[float], asked: list[float]
) -> None:
    """A quantile function goes through every point, never falls, and stays between the ends."""
    values = sorted(values)
    shares = [0.0, *sorted(inner[: len(values) - 2]), 1.0]
    points = tuple(zip(shares, values, strict=True))
    curve = Spread(basis="guess", source="test", points=points).curve()
    for share, value in points:
        assert curve(share) == pytest.approx(value, rel=1e-6, abs=1e-6)
    got = [curve(share) for share in sorted(asked)]
    assert all(a <= b * (1 + 1e-9) + 1e-9 for a, b in itertools.pairwise(got))
    assert values[0] * (1 - 1e-9) - 1e-9 <= got[0] and got[-1] <= values[-1] * (1 + 1e-9) + 1e-9


def test_a_lognormal_is_cut() -> None:
    """Its median is exp(mu), its ends are low and high."""
    curve = Spread(basis="guess", source="test", mu=0.0, sigma=1.0, low=0.5, high=2.0).curve()
    assert curve(0.5) == pytest.approx(1.0)
    assert (curve(0.0), curve(0.01), curve(0.99), curve(1.0)) == (0.5, 0.5, 2.0, 2.0)


FIGURE = 'basis = "guess"\nsource = "mine"\n'
WRONG = {
    "not TOML": ("rounds = [", "cannot be read"),
    "a missing figure": ('label = "x"\nabout = "y"\n', "missing required field `rounds`"),
    "no basis": ("[rounds]\npoints = [[0, 1], [1, 2]]\n", "basis"),
    "an unknown field": (f"[rounds]\n{FIGURE}median = 3\n", "unknown field `median`"),
    "points that fall": (f"[rounds]\n{FIGURE}points = [[0, 5], [1, 2]]\n", "must begin at share 0"),
    "points that end early": (f"[rounds]\n{FIGURE}points = [[0, 1], [0.9, 2]]\n", "must begin at share 0"),
    "both forms": (f"[rounds]\n{FIGURE}points = [[0, 1], [1, 2]]\nmu = 1\nlow = 1\nhigh = 2\n", "not both"),
    "no cut": (f"[rounds]\n{FIGURE}mu = 1\nsigma = 1\n", "needs low and high"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_profile_is_refused(name: str, tmp_path: Path) -> None:
    """A profile file that cannot be meant says which file and what is wrong."""
    text, expected = WRONG[name]
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(TraceError) as caught:
        load_profile(str(file))
    assert expected in str(caught.value) and "mine.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"human": {"basis": "guess", "source": "x", "share": 0.5}}, "needs human_tokens and human_gap"),
        ({"unsent": fixed(2, chance=1)}, "unsent spreads over shares"),
        ({"compaction": fixed(0.5, over=0.2)}, ">= 0.5"),
    ],
)
def test_a_profile_that_contradicts_itself_is_refused(changes: dict[str, Any], expected: str) -> None:
    """Shares are at most 1; people need words and pauses; compaction needs room."""
    with pytest.raises(msgspec.ValidationError, match=expected):
        simple(**changes)


def test_an_unknown_name_lists_the_known() -> None:
    """And says that a file will do."""
    with pytest.raises(TraceError, match=r"'gaia'.*claude-code, swe-agent.*\.toml file"):
        load_profile("gaia")
    with pytest.raises(TraceError, match=r"absent\.toml: cannot be read"):
        load_profile("absent.toml")
