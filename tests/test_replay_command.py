"""The command `antiphon replay`: exit codes, what it shows, what it writes."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from pathlib import Path

import pytest
from rich.console import Console

from antiphon.traces.replay import ReplayOptions, run_replay
from antiphon.traces.results import read_rounds
from tests.fake_gateway import FakeGateway
from tests.replay_helpers import DEADLINE_S, chat, trace_of


def command(options: ReplayOptions, terminal: bool = False) -> tuple[int, str]:
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=120)
    code = run_replay(options, console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_command_shows_progress_and_writes_the_result(tmp_path: Path, terminal: bool) -> None:
    """A whole run: exit code 0, what was capped, progress and table in words, the result file."""
    out, rounds = tmp_path / "new" / "result.json", tmp_path / "rounds.jsonl"
    with FakeGateway() as gateway:
        trace = trace_of(tmp_path, chat("a", gap_s=9.0))
        options = ReplayOptions(trace, gateway.url, max_gap_s=0.05, json_path=out, rounds_path=rounds)
        code, shown = command(options, terminal)
    assert code == 0
    assert "gaps capped at 0.05 s: 2 were longer" in shown
    assert ("1 of 3 rounds: local 1" in shown) != terminal
    assert ("3/3" in shown) == terminal
    assert "trace.jsonl under ampd" in shown
    result = json.loads(out.read_bytes())
    assert result["schema"] == "antiphon.result/1"
    assert result["rounds_total"] == result["rounds_completed"] == 3
    assert [record.round for record in read_rounds(rounds)] == [1, 2, 3]
    assert "rounds" not in result
    assert len(result["trace"]["sha256"]) == 64
    assert list(out.parent.iterdir()) == [out]


def test_command_says_what_failed(tmp_path: Path) -> None:
    """A round that failed for good gives exit code 1, a line, and a result file all the same."""
    out = tmp_path / "result.json"
    with FakeGateway(faults={0: "400"}) as gateway:
        code, shown = command(ReplayOptions(trace_of(tmp_path, chat("a")), gateway.url, json_path=out))
    assert code == 1
    assert "failed: session a, round 1, try 1: 400, scripted 400" in shown
    assert "rounds failed, not sent" in shown
    assert json.loads(out.read_bytes())["rounds_not_sent"] == 2


def test_command_says_why_it_cannot_start(tmp_path: Path) -> None:
    """No gateway, no model, no trace, a place that cannot be written: exit code 2 and the reason."""
    trace = trace_of(tmp_path, chat("a"))
    with FakeGateway(model={}) as gateway:
        cases = [
            (ReplayOptions(trace, gateway.url), "lists no model"),
            (ReplayOptions(trace, gateway.url + "/elsewhere"), "status 404"),
        ]
        for options, reason in cases:
            code, shown = command(options)
            assert (code, reason in shown) == (2, True), shown
        url = gateway.url
    with FakeGateway() as gateway:
        cases = [
            (ReplayOptions(trace, url), "is the gateway up?"),
            (ReplayOptions(tmp_path / "absent", gateway.url), "absent: cannot be read"),
            (ReplayOptions(trace, gateway.url, verify_log=tmp_path), "Is a directory"),
            (ReplayOptions(trace, gateway.url, json_path=trace / "result.json"), "trace.jsonl"),
        ]
        for options, reason in cases:
            code, shown = command(options)
            assert (code, reason in shown.replace("\n", "")) == (2, True), shown


def test_command_skips_bad_lines_when_told(tmp_path: Path) -> None:
    """Bad lines are refused, or skipped, counted and shown."""
    trace = trace_of(tmp_path, chat("a", 1))
    trace.write_bytes(b"{\n" + trace.read_bytes())
    with FakeGateway() as gateway:
        assert command(ReplayOptions(trace, gateway.url))[0] == 2
        code, shown = command(ReplayOptions(trace, gateway.url, skip_bad=True))
    assert code == 0
    assert "skipped 1 bad lines" in shown


def test_interrupt_keeps_the_figures(tmp_path: Path) -> None:
    """Ctrl-C ends the sending, writes the result of what was done, and exits with 130."""
    out = tmp_path / "result.json"

    def interrupt() -> None:
        gateway.wait_stalled(1)
        os.kill(os.getpid(), signal.SIGINT)

    with FakeGateway(faults={1: "stall"}) as gateway:
        watcher = threading.Thread(target=interrupt)
        watcher.start()
        code, shown = command(ReplayOptions(trace_of(tmp_path, chat("a")), gateway.url, json_path=out))
        watcher.join(DEADLINE_S)
    assert code == 130
    result = json.loads(out.read_bytes())
    assert (result["interrupted"], result["rounds_completed"], result["rounds_not_sent"]) == (True, 1, 1)
    assert "rounds completed" in shown
