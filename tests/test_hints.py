"""Hints: one meaning for each, in whoever's spelling; ours are checked, others are taken if they can be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.scheduler.hints import (
    NO_HINTS,
    BadHint,
    Hints,
    SessionFields,
    Slos,
    read_hints,
    read_session,
    targets,
)

DEFAULT = Slos(2.0, 0.1)


def read(session: dict[str, Any] | None = None, headers: dict[str, str] | None = None, **more: Any) -> Hints:
    fields, warnings = read_session(session)
    return read_hints(headers or {}, fields, warnings=warnings, **more)


def in_header(text: str) -> Hints:
    return read(headers={"x-session-hints": text})


def test_nothing_said_is_nothing_known() -> None:
    """No hints, the default targets."""
    assert read() is NO_HINTS
    assert read({"id": None, "slo": {}}, {"x-session-hints": ""}, nvext={}, priority=None) is NO_HINTS
    assert targets(NO_HINTS, DEFAULT) == DEFAULT


def test_the_whole_session_object() -> None:
    """Every field of the documentation, in seconds where it is a time."""
    hints = read({
        "id": "s", "parent_id": "p", "final": True, "ttl_s": 600, "expected_gap_s": 3.5, "priority": -2,
        "expected_output_tokens": 50, "expected_rounds": 9, "append": True, "must_exist": True,
        "next_round": {
            "expected_input_tokens": 900, "expected_output_tokens": 200, "remaining_rounds": 4,
            "same_tools": True,
        },
        "slo": {"ttft_ms": 800, "tpot_ms": 40, "deadline_ms": 30000, "class": "interactive"},
    })  # fmt: skip
    assert hints == Hints(
        ttft_s=0.8, itl_s=0.04, deadline_s=30.0, slo_class="interactive", priority=-2, ttl_s=600, final=True,
        expected_gap_s=3.5, expected_output_tokens=50, next_input_tokens=900, next_output_tokens=200,
        remaining_rounds=4, expected_rounds=9, same_tools=True, append=True, must_exist=True,
    )  # fmt: skip
    assert hints.warnings == ()
    assert read_session({"id": "s", "parent_id": "p"})[0] == SessionFields("s", "p")


@pytest.mark.parametrize(
    ("session", "param"),
    [
        ({"slo": {"ttft_ms": "fast"}}, "session.slo.ttft_ms"),
        ({"slo": {"ttft_ms": 0}}, "session.slo.ttft_ms"),
        ({"slo": {"tpot_ms": True}}, "session.slo.tpot_ms"),
        ({"slo": []}, "session.slo"),
        ({"slo": {"class": 1}}, "session.slo.class"),
        ({"id": 7}, "session.id"),
        ({"final": "yes"}, "session.final"),
        ({"ttl_s": 0}, "session.ttl_s"),
        ({"ttl_s": 86401}, "session.ttl_s"),
        ({"expected_gap_s": -1}, "session.expected_gap_s"),
        ({"priority": 1.5}, "session.priority"),
        ({"priority": 2**40}, "session.priority"),
        ({"next_round": {"remaining_rounds": -1}}, "session.next_round.remaining_rounds"),
    ],
    ids=str,
)
def test_a_wrong_type_is_told_with_its_place(session: dict[str, Any], param: str) -> None:
    """The client's mistake, not ours to guess at."""
    with pytest.raises(BadHint) as caught:
        read(session)
    assert caught.value.param == param


def test_an_unknown_key_is_a_warning() -> None:
    """What a later version may know is ignored here, and said."""
    hints = read({"mood": 1, "slo": {"ttft_ms": 100, "colour": 2}}, {"x-session-hints": "taste=3, ttl_s=5"})
    assert (hints.ttft_s, hints.ttl_s) == (0.1, 5.0)
    assert [text.split("`")[1] for text in hints.warnings] == ["session.mood", "session.slo.colour", "taste"]


def test_the_body_wins_over_ours_over_nvext_over_others() -> None:
    """One fact, four places."""
    headers = {"x-session-hints": "ttft_ms=2, priority=2", "x-llm-d-slo-ttft-ms": "4", "x-smg-priority": "4"}
    nvext = {"agent_hints": {"priority": 3, "osl": 3}}
    body = {"slo": {"ttft_ms": 1}, "priority": 1}
    assert (read(body, headers, nvext=nvext).ttft_s, read(body, headers).ttft_from) == (0.001, "body")
    assert (read(None, headers, nvext=nvext).ttft_s, read(None, headers).ttft_from) == (0.002, "header")
    assert read(body, headers, nvext=nvext).priority == 1
    assert read(None, headers, nvext=nvext).priority == 2
    del headers["x-session-hints"]
    assert read(None, headers, nvext=nvext).priority == 3
    assert read(None, headers, priority=9).priority == 9
    assert read(None, headers).priority == 4
    assert read(None, headers).ttft_s == 0.004


def test_targets_come_from_where_they_are_named() -> None:
    """Each alone; what is not named is the default's."""

    def found(hints: str, session: dict[str, Any] | None = None) -> tuple[object, ...]:
        slos = targets(read(session, {"x-session-hints": hints}), DEFAULT)
        return slos.ttft_s, slos.itl_s, slos.ttft_from, slos.itl_from

    assert found("ttft_ms=800, tpot_ms=40") == (0.8, 0.04, "header", "header")
    assert found("osl=200,,ttft_ms=1;x=2 ,ttft_ms=250.5,flag") == (0.2505, 0.1, "header", "default")
    body = {"slo": {"ttft_ms": 500}}
    assert found("ttft_ms=800, tpot_ms=40", body) == (0.5, 0.04, "body", "header")
    assert found("") == (2.0, 0.1, "default", "default")


@pytest.mark.parametrize("value", ["", "0", "-5", "nan", "inf", "1e3", "0.0", "fast", "9" * 20, "\uff11"])
def test_a_target_in_a_header_is_a_number_above_0(value: str) -> None:
    """Anything else is the client's mistake and is told, not ignored."""
    with pytest.raises(BadHint) as caught:
        in_header(f"a=1, ttft_ms={value}")
    assert caught.value.param == "X-Session-Hints.ttft_ms"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("expected_gap_s=3.5, osl=200, remaining_rounds=4, ttft_ms=800",
         Hints(expected_gap_s=3.5, expected_output_tokens=200, remaining_rounds=4, ttft_s=0.8)),
        ("final", Hints(final=True)),
        ("final=?1;why=x", Hints(final=True)),
        ("final=?0", Hints()),
        ("final=?1, final=?0", Hints()),
        ('class="a,b", priority=-3', Hints(slo_class="a,b", priority=-3)),
        ("class=batch;v=1, ttl_s=60", Hints(slo_class="batch", ttl_s=60.0)),
        ("same_tools, expected_rounds=0", Hints(same_tools=True, expected_rounds=0)),
    ],
)  # fmt: skip
def test_a_dictionary_in_a_header(text: str, expected: Hints) -> None:
    """RFC 8941: bare keys, parameters, strings with commas; the last of two counts."""
    assert in_header(text) == expected


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"x-session-ttl": "0"}, "X-Session-TTL"),
        ({"x-session-ttl": "86401"}, "X-Session-TTL"),
        ({"x-session-ttl": "ten"}, "X-Session-TTL"),
        ({"x-session-final": "maybe"}, "X-Session-Final"),
        ({"x-session-hints": "priority=high"}, "X-Session-Hints.priority"),
        ({"x-session-hints": "osl=1.5"}, "X-Session-Hints.osl"),
        ({"x-session-hints": "osl"}, "X-Session-Hints.osl"),
        ({"x-session-hints": "class="}, "X-Session-Hints.class"),
    ],
)
def test_our_headers_are_checked(headers: dict[str, str], param: str) -> None:
    """They are addressed to us."""
    with pytest.raises(BadHint) as caught:
        read(None, headers)
    assert caught.value.param == param


def test_final_in_a_header() -> None:
    """As RFC 8941 and as people write it; empty is no."""
    for text in ("true", "1", "?1", "Yes"):
        assert read(None, {"x-session-final": text}).final
    for text in ("false", "0", "?0", "no", ""):
        assert not read(None, {"x-session-final": text}).final


def test_other_gateways_headers() -> None:
    """Taken where they can be read, left where they cannot: they were not addressed to us."""
    headers = {
        "x-llm-d-slo-ttft-ms": "soon", "x-slo-ttft-ms": "700", "x-sgl-tps-slo": "25",
        "x-smg-priority": "high", "x-llm-d-inference-objective": "batch", "x-dynamo-session-final": "true",
        "x-prefix-osl": "LOW", "x-prefix-iat": "250", "x-prefix-total-requests": "10",
    }  # fmt: skip
    hints = read(None, headers)
    assert hints == Hints(
        ttft_s=0.7, itl_s=0.04, slo_class="batch", final=True, expected_gap_s=0.25, expected_rounds=10
    )
    assert hints.warnings == ()


def test_agent_hints_of_dynamo() -> None:
    """Their units are ours; a wrong type is told."""
    nvext = {
        "agent_hints": {"osl": 64, "iat": 1500, "total_requests": 12, "strict_priority": 3, "prefix_id": "x"}
    }
    assert read(nvext=nvext) == Hints(
        expected_output_tokens=64, expected_gap_s=1.5, expected_rounds=12, priority=3
    )
    assert read(nvext={"agent_hints": {"priority": 5, "strict_priority": 3}}).priority == 5
    assert read(nvext="x") == read(nvext={"other": 1}) == NO_HINTS
    for wrong, param in (({"osl": "many"}, "osl"), ({"iat": 0}, "iat"), ({"priority": 1e300}, "priority")):
        with pytest.raises(BadHint) as caught:
            read(nvext={"agent_hints": wrong})
        assert caught.value.param == f"nvext.agent_hints.{param}"


def test_a_session_ends_when_it_is_said() -> None:
    """By `final`, or when no round is left."""
    assert Hints(final=True).ends and Hints(remaining_rounds=0).ends
    assert not Hints(remaining_rounds=1).ends and not NO_HINTS.ends


@given(st.text(max_size=60))
def test_no_header_breaks_the_reader(text: str) -> None:
    """Hints or a clear refusal, whatever comes."""
    ours = ("x-session-hints", "x-session-ttl", "x-session-final")
    for header in (*ours, "x-llm-d-slo-ttft-ms", "x-sgl-tps-slo"):
        try:
            assert isinstance(read(None, {header: text}), Hints)
        except BadHint as error:
            assert error.param.lower().startswith(header) and header in ours


@given(
    st.dictionaries(
        st.sampled_from(["id", "final", "ttl_s", "slo", "next_round", "priority", "x"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
        | st.dictionaries(st.sampled_from(["ttft_ms", "class", "same_tools"]), st.integers() | st.text()),
    )
)  # fmt: skip
def test_no_session_object_breaks_the_reader(session: dict[str, Any]) -> None:
    """Hints or a refusal that names a place in it."""
    try:
        assert isinstance(read(session), Hints)
    except BadHint as error:
        assert error.param.startswith("session.")
