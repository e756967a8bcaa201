"""`antiphon replay` against a real HTTP server: what it sends, when, and what it makes of answers."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from antiphon.traces.plan import wire_session_id
from antiphon.traces.readers import read_trace
from antiphon.traces.replay import ReplayError, ReplayOptions, replay
from antiphon.traces.results import RoundRecord, RunResult, VerifyRecord
from antiphon.traces.schema import RoundTrace, SessionTrace, TraceError
from tests.fake_gateway import Asked, FakeGateway, answer_ids
from tests.replay_helpers import DEADLINE_S, chat, trace_of

DEMO = Path(str(files("antiphon.traces") / "data" / "demo.jsonl"))


def run(options: ReplayOptions, **more: Any) -> tuple[RunResult, list[RoundRecord]]:
    seen: list[RoundRecord] = []

    async def bounded() -> RunResult:
        async with asyncio.timeout(DEADLINE_S):
            return await replay(options, seen.append, **more)

    return asyncio.run(bounded()), seen


def by_session(asked: list[Asked]) -> dict[str, list[Asked]]:
    sessions: dict[str, list[Asked]] = defaultdict(list)
    for request in asked:
        sessions[request.session_id].append(request)
    return sessions


def test_demo_trace_is_sent_whole_and_adds_up() -> None:
    """Every round of the demo trace completes, and the result is the sum of what the gateway said."""
    with FakeGateway(receipts_late_by=2) as gateway:
        result, seen = run(ReplayOptions(DEMO, gateway.url, concurrency=4, max_gap_s=0.01))
    assert (result.rounds_total, result.rounds_completed) == (44, 44)
    assert (result.rounds_failed, result.rounds_not_sent) == (0, 0)
    assert result.sessions_completed == 8
    assert result.arms == {"local": 22, "remote_pull": 22}
    assert (result.bytes_decode_to_prefill, result.bytes_prefill_to_decode) == (220, 220)
    assert result.prompt_tokens_total == sum(len(asked.body["prompt"]) for asked in gateway.asked)
    assert result.cached_tokens_total == sum(len(asked.body["prompt"]) // 2 for asked in gateway.asked)
    assert result.output_tokens_total == sum(asked.body["max_tokens"] for asked in gateway.asked)
    assert (result.policy, result.receipts_missing, result.interrupted) == ("ampd", 0, False)
    assert sorted(map(id, seen)) == sorted(map(id, result.rounds))
    record = seen[0]
    assert (record.reason, record.home, record.predicted_ttft_s, record.session_round) == (
        "scripted",
        "d0",
        0.25,
        1,
    )
    assert record.ttft_s is not None
    assert record.e2e_s is not None
    assert 0 < record.ttft_s <= record.e2e_s


def test_every_prompt_extends_what_its_session_really_said(tmp_path: Path) -> None:
    """On the wire each prompt begins with what is kept of the previous one and the true answer to it."""
    log = tmp_path / "new" / "verify.jsonl"
    with FakeGateway() as gateway:
        run(ReplayOptions(DEMO, gateway.url, max_gap_s=0.0, run_id="run", verify_log=log))
    sent = by_session(gateway.asked)
    logged = {(line.session, line.round): line for line in map(decode_line, log.read_bytes().splitlines())}
    for session in read_trace(DEMO):
        before: list[int] = []
        for index, turn in enumerate(session.rounds):
            body = sent[f"run/{session.session_id}"][index].body
            prompt = body["prompt"]
            assert len(prompt) == turn.prompt_tokens
            assert prompt[: turn.kept_tokens] == before[: turn.kept_tokens]
            before = prompt + answer_ids(prompt, turn.output_tokens)
            line = logged[session.session_id, index + 1]
            assert line.prompt_ids + line.output_ids == before
            assert line.kept_tokens == turn.kept_tokens
    shared = {tuple(requests[0].body["prompt"][:320]) for requests in sent.values()}
    assert len(shared) == 5  # four sessions share their system prompt, four are alone


def decode_line(line: bytes) -> VerifyRecord:
    return msgspec.json.decode(line, type=VerifyRecord)


def test_request_asks_for_what_the_check_needs(tmp_path: Path) -> None:
    """A round is a greedy, streamed completion of exact length with usage and token ids, in its session."""
    with FakeGateway() as gateway:
        run(ReplayOptions(trace_of(tmp_path, chat("a", 1)), gateway.url, run_id="r"))
    body = gateway.asked[0].body
    body.pop("prompt")
    assert body == {
        "model": "tiny", "max_tokens": 5, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, "return_token_ids": True, "session_id": "r/a",
    }  # fmt: skip


def test_rounds_wait_for_the_answer_and_the_capped_gap(tmp_path: Path) -> None:
    """A later round comes when the last answer has ended plus its gap, but not more than the cap."""
    trace = trace_of(tmp_path, chat("short", 3, gap_s=0.15), chat("long", 3, gap_s=50.0))
    with FakeGateway(token_delay_s=0.01) as gateway:
        result, _ = run(ReplayOptions(trace, gateway.url, max_gap_s=0.3, run_id="r"))
    assert result.trace.capped_gaps == 2
    for name, gap_s in (("short", 0.15), ("long", 0.3)):
        requests = by_session(gateway.asked)[f"r/{name}"]
        waits = [after.began_s - before.ended_s for before, after in pairwise(requests)]
        assert all(gap_s - 0.02 < wait < gap_s + 2.0 for wait in waits)


def test_live_sessions_are_bounded(tmp_path: Path) -> None:
    """With at most one live session, the next begins when the last round of the one before has ended."""
    trace = trace_of(tmp_path, *(chat(str(number), 2) for number in range(4)))
    with FakeGateway() as gateway:
        run(ReplayOptions(trace, gateway.url, concurrency=1, run_id="r"))
    assert [asked.session_id for asked in gateway.asked] == [f"r/{number // 2}" for number in range(8)]


def test_sessions_arrive_as_recorded(tmp_path: Path) -> None:
    """As recorded, a session starts in its own time though the one before is still busy."""
    first = msgspec.structs.replace(chat("late", 1), start_s=10.3)
    second = msgspec.structs.replace(chat("early", 2, gap_s=1.0), start_s=10.0)
    with FakeGateway() as gateway:
        run(ReplayOptions(trace_of(tmp_path, first, second), gateway.url, as_recorded=True, run_id="r"))
    assert [asked.session_id for asked in gateway.asked] == ["r/early", "r/late", "r/early"]
    assert 0.25 < gateway.asked[1].began_s - gateway.asked[0].began_s < 0.9


BROKEN = ["503", "500", "disconnect", "error_event", "nonsense", "no_done", "no_finish"]


@pytest.mark.parametrize("fault", BROKEN)
def test_a_failed_round_is_tried_once_more(tmp_path: Path, fault: str) -> None:
    """A refusal, a lost connection or a broken stream is tried again, and the session goes on."""
    with FakeGateway(faults={1: fault}) as gateway:
        result, _ = run(ReplayOptions(trace_of(tmp_path, chat("a")), gateway.url))
    assert (result.rounds_completed, result.rounds_retried) == (3, 1)
    assert [record.tries for record in result.rounds] == [1, 2, 1]
    assert result.rounds[1].message
    assert gateway.asked[1].body == gateway.asked[2].body
    if fault == "503":
        assert gateway.asked[2].began_s - gateway.asked[1].ended_s >= 0.14, "retry-after-ms was not kept"


MESSAGES = {
    "400": "scripted 400", "503": "scripted 503", "disconnect": "", "error_event": "the engine died",
    "nonsense": "no completion chunk", "no_done": "before [DONE]", "no_finish": "before a finish reason",
    "no_usage": "no usage", "no_tokens": "no token ids", "lost_token": "usage says 40 + 6 tokens",
}  # fmt: skip
FINAL = {"400", "no_usage", "no_tokens", "lost_token"}
"""Failures that another try would only repeat."""


@pytest.mark.parametrize("fault", MESSAGES)
def test_a_round_that_fails_for_good_ends_its_session(tmp_path: Path, fault: str) -> None:
    """Its status and message are recorded, its session's rest counts as not sent, other sessions go on."""
    trace = trace_of(tmp_path, chat("a"), chat("b"))
    tries = 1 if fault in FINAL else 2
    with FakeGateway(faults=dict.fromkeys(range(tries), fault)) as gateway:
        result, seen = run(ReplayOptions(trace, gateway.url, concurrency=1))
    assert (result.rounds_completed, result.rounds_failed, result.rounds_not_sent) == (3, 1, 2)
    assert (result.sessions_completed, len(gateway.asked)) == (1, 3 + tries)
    failed = seen[0]
    assert (failed.session, failed.round, failed.completed, failed.tries) == ("a", 1, False, tries)
    assert failed.http_status == (int(fault) if fault.isdecimal() else 200 if fault in FINAL else 0)
    assert MESSAGES[fault] in failed.message
    assert failed.message


def test_retries_are_an_option(tmp_path: Path) -> None:
    """With no retries the first failure is final."""
    with FakeGateway(faults={0: "503"}) as gateway:
        result, _ = run(ReplayOptions(trace_of(tmp_path, chat("a")), gateway.url, retries=0))
    assert (result.rounds_completed, result.rounds_failed, result.rounds_not_sent) == (0, 1, 2)


def test_an_answer_that_stalls_meets_its_deadline(tmp_path: Path) -> None:
    """A stream that stops in the middle fails after the round's deadline and is tried again."""
    with FakeGateway(faults={0: "stall"}) as gateway:
        result, _ = run(ReplayOptions(trace_of(tmp_path, chat("a")), gateway.url, timeout_s=0.5))
        gateway.wait_hung_up(1)
    assert result.rounds_completed == 3
    assert result.rounds[0].message == "no whole answer within 0.5 s"


def test_a_stop_keeps_what_is_known(tmp_path: Path) -> None:
    """When `stop` is set, the round in flight is given up, nothing more is sent and the figures remain."""
    with FakeGateway(faults={1: "stall"}) as gateway:

        async def stopped() -> RunResult:
            stop = asyncio.Event()
            waiting = asyncio.get_running_loop().run_in_executor(None, gateway.wait_stalled, 1)
            waiting.add_done_callback(lambda _: stop.set())
            options = ReplayOptions(trace_of(tmp_path, chat("a"), chat("b")), gateway.url, concurrency=1)
            async with asyncio.timeout(DEADLINE_S):
                return await replay(options, lambda _: None, stop=stop)

        result = asyncio.run(stopped())
        gateway.wait_hung_up(1)
    assert result.interrupted
    assert (result.rounds_completed, result.rounds_failed, result.rounds_not_sent) == (1, 1, 4)
    assert result.rounds[1].message == "given up: the replay was stopped"
    assert len(gateway.asked) == 2


def test_cancelling_the_replay_leaves_nothing_behind(tmp_path: Path) -> None:
    """A cancelled replay ends at once, with all of its tasks and connections."""
    with FakeGateway(faults={0: "stall", 1: "stall"}) as gateway:

        async def cancelled() -> set[asyncio.Task[Any]]:
            options = ReplayOptions(trace_of(tmp_path, chat("a"), chat("b")), gateway.url)
            task = asyncio.create_task(replay(options, lambda _: None))
            await asyncio.get_running_loop().run_in_executor(None, gateway.wait_stalled, 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                async with asyncio.timeout(5):
                    await task
            return asyncio.all_tasks() - {asyncio.current_task()}

        assert asyncio.run(cancelled()) == set()
        gateway.wait_hung_up(2)


def test_a_fault_of_the_caller_ends_the_run(tmp_path: Path) -> None:
    """An exception out of `on_round` is the caller's: it comes out as it is, and the sending stops."""

    def fail(_: RoundRecord) -> None:
        raise LookupError("mine")

    with FakeGateway() as gateway, pytest.raises(LookupError, match="mine"):
        asyncio.run(replay(ReplayOptions(trace_of(tmp_path, chat("a")), gateway.url), fail))
    assert len(gateway.asked) == 1


def test_large_prompts_are_read_back(tmp_path: Path) -> None:
    """An event that repeats a prompt of 60,000 tokens is read like any other."""
    trace = trace_of(tmp_path, SessionTrace("a", (RoundTrace(60_000, 3),)))
    with FakeGateway(model={"id": "tiny"}) as gateway:
        result, _ = run(ReplayOptions(trace, gateway.url))
    assert result.rounds_completed == 1


def test_window_of_the_model_is_kept(tmp_path: Path) -> None:
    """Rounds over the window that the gateway names are left out and counted, not sent; an option wins."""
    trace = trace_of(tmp_path, chat("a", 5))
    with FakeGateway(model={"id": "tiny", "max_model_len": 100}) as gateway:
        result, _ = run(ReplayOptions(trace, gateway.url))
        assert (result.rounds_total, result.trace.dropped_rounds, result.conditions.window_tokens) == (
            2,
            3,
            100,
        )
        wider, _ = run(ReplayOptions(trace, gateway.url, window_tokens=150))
        assert wider.rounds_total == 3


def test_slo_attainment_counts_what_was_to_be_sent(tmp_path: Path) -> None:
    """A round attains with TTFT and ITL within; failed and unsent ones do not; options win over the trace."""
    relaxed = msgspec.structs.replace(chat("a"), slo_ttft_s=30.0)
    trace = trace_of(tmp_path, relaxed, chat("b"))
    with FakeGateway(faults={3: "400"}) as gateway:
        result, _ = run(ReplayOptions(trace, gateway.url, concurrency=1))
        assert result.attainment == {"rounds": 0.5, "sessions": 0.5}
        strict, _ = run(ReplayOptions(trace, gateway.url, slo_ttft_s=0.0))
        assert strict.attainment == {"rounds": 0.0, "sessions": 0.0}
        none, _ = run(ReplayOptions(trace_of(tmp_path, chat("c")), gateway.url))
        assert none.attainment is None


def test_missing_receipts_are_counted_not_fatal(tmp_path: Path) -> None:
    """A gateway without receipts still gives a result; its rounds say that their bytes are not known."""
    with FakeGateway(receipts_status=404) as gateway:
        result, _ = run(ReplayOptions(trace_of(tmp_path, chat("a")), gateway.url))
    assert (result.rounds_completed, result.receipts_missing) == (3, 3)


def test_two_runs_do_not_share_sessions(tmp_path: Path) -> None:
    """Each run puts its own id before the session ids; equal seeds send equal prompts."""
    trace = trace_of(tmp_path, chat("a", 1))
    with FakeGateway() as gateway:
        for seed in (0, 0, 1):
            run(ReplayOptions(trace, gateway.url, seed=seed))
    assert len({asked.session_id for asked in gateway.asked}) == 3
    first, again, other = (asked.body["prompt"] for asked in gateway.asked)
    assert first == again != other


@pytest.mark.parametrize("session_id", ["x" * 300, "größe", "with space", ""])
def test_wire_ids_are_acceptable(session_id: str) -> None:
    """Whatever a trace calls its sessions, the id on the wire is at most 255 visible ASCII characters."""
    wire = wire_session_id("run", session_id)
    assert 1 <= len(wire) <= 255
    assert all("!" <= character <= "~" for character in wire)
    assert wire != wire_session_id("run", session_id + "x")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"session_rate": 1.0, "as_recorded": True}, "exclude each other"),
        ({"session_rate": 0.0}, "above 0"),
        ({"concurrency": 0}, "at least one"),
        ({"divide": 0}, "divide"),
        ({"timeout_s": 0.0}, "timeout"),
        ({"max_gap_s": -1.0}, "gap cap"),
        ({"retries": -1}, "retries"),
        ({"max_sessions": -1}, "at least 1"),
        ({"run_id": "a b"}, "visible ASCII"),
        ({"model": "huge"}, "does not serve 'huge'; it serves tiny"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: dict[str, Any], fault: str) -> None:
    """Options that contradict each other or make no sense are refused in words before anything is sent."""
    with FakeGateway() as gateway:
        with pytest.raises(ReplayError, match=fault):
            run(ReplayOptions(trace_of(tmp_path, chat("a")), gateway.url, **options))
        assert gateway.asked == []


def test_a_trace_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    """When nothing is left to send, that is an error, not an empty success."""
    with (
        FakeGateway(model={"id": "tiny", "max_model_len": 10}) as gateway,
        pytest.raises(TraceError, match="no session"),
    ):
        run(ReplayOptions(trace_of(tmp_path, chat("a")), gateway.url))
