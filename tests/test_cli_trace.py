"""`antiphon trace`: what it prints and writes, its exit codes, and one clear line for a wrong word."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from antiphon.scheduler import cli
from antiphon.scheduler.errors import UserError
from antiphon.traces.losses import LOSSES
from antiphon.traces.output import whole_file
from antiphon.traces.readers import read_trace
from antiphon.traces.schema import SCHEMA, RoundTrace, SessionTrace
from antiphon.traces.writers import WRITERS

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "traces" / "data" / "demo.jsonl"
SCRIPT = Path(sys.executable).parent / "antiphon"


def run(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and output of one command, errors as `main` shows them."""
    result = CliRunner().invoke(cli.app, ["trace", *map(str, arguments)], env={"COLUMNS": "160"})
    if isinstance(result.exception, UserError):
        return 2, f"antiphon: {result.exception}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("command", ["info", "convert", "generate", "profiles"])
def test_every_command_has_help(command: str) -> None:
    """Each command says what it does."""
    code, shown = run(command, "--help")
    assert code == 0 and "Usage" in shown


def test_info_of_the_demo_trace() -> None:
    """For people: counts, distributions, pictures, reuse, tools, and what is lacking."""
    code, shown = run("info", DEMO)
    assert code == 0
    for words in (
        "8 sessions, 44 rounds",
        "p99",
        "500 - 1k",
        "infinite cache: 77.1%",
        "edit_file 25%",
        "no SLOs",
    ):
        assert words in shown, words


def test_info_as_json() -> None:
    """For programs: one object with a schema, spreads by name, and the lacks."""
    code, shown = run("info", DEMO, "--json")
    found = json.loads(shown)
    assert code == 0 and found["schema"] == "antiphon.trace-info/1"
    assert (found["sessions"], found["rounds"], found["bad_lines"]) == (8, 44, 0)
    assert found["spreads"]["rounds_per_session"]["p50"] == 5.5
    assert [lack["field"] for lack in found["lacks"]] == ["slo_ttft_s, slo_itl_s"]


def test_bad_lines_are_refused_or_counted(tmp_path: Path) -> None:
    """A bad line ends the command with file and line; with --skip-bad it is counted and shown."""
    file = tmp_path / "t.jsonl"
    file.write_bytes(DEMO.read_bytes() + b'{"schema": "antiphon.trace/1"}\n')
    code, shown = run("info", file)
    assert code == 2 and "t.jsonl" in shown and "line 9" in shown and len(shown.splitlines()) == 1
    code, shown = run("info", file, "--skip-bad")
    assert code == 0 and "skipped 1 bad lines" in shown and "line 9" in shown
    assert json.loads(run("info", file, "--skip-bad", "--json")[1])["bad_lines"] == 1


@pytest.mark.parametrize("name", ["t.jsonl", "deep/er/t.jsonl.gz"])
def test_generate_writes_the_same_bytes_for_a_seed(tmp_path: Path, name: str) -> None:
    """Equal seeds, equal bytes, gzipped or not; what was written can be read again."""
    first, again, other = (tmp_path / folder / name for folder in ("first", "again", "other"))
    for path, seed in ((first, "5"), (again, "5"), (other, "6")):
        code, shown = run("generate", "--profile", "tau", "--sessions", "20", "--seed", seed, "-o", path)
        assert code == 0 and "20 sessions" in shown and "tau-like" in shown
        assert "guessed, not measured: tool_gap, human_gap" in shown
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    assert len(list(read_trace(first))) == 20
    assert list(first.parent.iterdir()) == [first]


def test_a_short_file_begins_a_longer_one(tmp_path: Path) -> None:
    """20 sessions are the beginning of 50, byte for byte; --rounds counts whole sessions."""
    short, long, rounds = tmp_path / "short", tmp_path / "long", tmp_path / "rounds"
    run("generate", "--profile", "claude-code", "--sessions", "20", "-o", short)
    run("generate", "--profile", "claude-code", "--sessions", "50", "-o", long)
    run("generate", "--profile", "claude-code", "--rounds", "400", "-o", rounds)
    assert long.read_bytes().startswith(short.read_bytes())
    assert long.read_bytes().startswith(rounds.read_bytes())
    assert sum(len(session.rounds) for session in read_trace(rounds)) >= 400


def test_generate_from_a_profile_of_ones_own(tmp_path: Path) -> None:
    """A TOML file is a profile; its name begins the session ids."""
    figure = '{ basis = "guess", source = "mine", points = [[0, 3], [1, 3]] }'
    file = tmp_path / "mine.toml"
    names = ("rounds", "first", "tool_tokens", "output", "tool_gap")
    figures = "".join(f"{name} = {figure}\n" for name in names)
    tools = 'tools = { basis = "guess", source = "mine", weights = { bash = 1 } }\n'
    file.write_text('label = "Mine"\nabout = "-"\n' + tools + figures)
    code, shown = run("generate", "--profile", file, "--sessions", "2", "-o", tmp_path / "t.jsonl")
    assert code == 0 and "Mine" in shown
    assert [session.session_id for session in read_trace(tmp_path / "t.jsonl")] == ["mine-0-0", "mine-0-1"]


def test_profiles_say_what_they_rest_on() -> None:
    """The list, and every figure of one with its basis and source."""
    code, shown = run("profiles")
    assert code == 0 and "DuReader-like" in shown and "SWE-agent-like" in shown
    code, shown = run("profiles", "dureader")
    assert code == 0 and shown.count("guess") >= 5 and "AMPD" in shown


def test_convert_to_the_own_form(tmp_path: Path) -> None:
    """What is cut is said: sessions, gaps, rounds over the window; the rest is the same."""
    out = tmp_path / "out.jsonl.gz"
    code, shown = run("convert", DEMO, out, "--to", SCHEMA, "--max-sessions", "3", "--max-gap", "0.2")
    assert code == 0 and "3 sessions, 16 rounds" in shown and "gaps capped at 0.2 s: 6 were longer" in shown
    assert "left out" not in shown
    original = list(read_trace(DEMO))[:3]
    assert [session.session_id for session in read_trace(out)] == [session.session_id for session in original]
    assert max(turn.gap_s for session in read_trace(out) for turn in session.rounds) == 0.2
    assert gzip.decompress(out.read_bytes()).count(b"\n") == 3


def test_convert_fits_a_window_and_divides(tmp_path: Path) -> None:
    """Rounds that do not fit, and all after them, are counted; so are sessions that vanish."""
    out = tmp_path / "out.jsonl"
    code, shown = run("convert", DEMO, out, "--to", SCHEMA, "--divide", "2", "--window", "400")
    whole = list(read_trace(DEMO))
    left = list(read_trace(out))
    assert code == 0 and max(turn.total_tokens for session in left for turn in session.rounds) <= 400
    lost = sum(len(s.rounds) for s in whole) - sum(len(s.rounds) for s in left)
    assert f"left out: {lost} rounds over the window of 400 tokens" in shown
    assert f"{len(whole) - len(left)} sessions whole" in shown


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_every_format_can_be_written_and_read(tmp_path: Path, name: str) -> None:
    """Each format that is offered holds the demo trace's rounds, as our own readers see it."""
    out = tmp_path / "out.jsonl"
    code, shown = run("convert", DEMO, out, "--to", name)
    assert code == 0 and "8 sessions, 44 rounds" in shown
    again = list(read_trace(out))
    assert sum(len(session.rounds) for session in again) == 44
    lengths = [[turn.prompt_tokens for turn in s.rounds] for s in again]
    same = lengths == [[turn.prompt_tokens for turn in s.rounds] for s in read_trace(DEMO)]
    assert same or name == "mooncake"


def test_convert_says_what_is_lost(tmp_path: Path) -> None:
    """What the trace has and the format cannot hold is counted; our own form loses nothing."""
    trace, out = tmp_path / "t.jsonl", tmp_path / "out.jsonl"
    rounds = (RoundTrace(640, 64), RoundTrace(800, 1, 704, 1.0, "bash"), RoundTrace(900, 1, 801))
    parent = SessionTrace("a", rounds, slo_ttft_s=1.0)
    child = SessionTrace("b", rounds[:1], parent="a", after_round=0)
    with whole_file(trace) as file:
        WRITERS[SCHEMA]((parent, child), file)
    assert "cannot say it" not in run("convert", trace, out, "--to", SCHEMA)[1]
    lost = {
        name: re.findall(r"cannot say it: (\d+ [^,:\n]*)", run("convert", trace, out, "--to", name)[1])
        for name in ("mooncake", "mooncake-sessions", "agentic-mooncake")
    }
    common = ["1 sessions without an arrival", "1 sessions' SLOs"]
    assert lost == {
        "mooncake": [
            "1 sessions' bounds", *common, "1 rounds' tool names", "1 sub-agents' parents",
            "2 rounds' kept tokens",
        ],
        "mooncake-sessions": [
            *common, "1 rounds' tool names", "1 sub-agents' parents", "1 rounds' kept tokens",
        ],
        "agentic-mooncake": [*common, "1 rounds' kept tokens", "1 sub-agents' parents"],
    }  # fmt: skip
    assert set(LOSSES) == set(WRITERS) - {SCHEMA, "antiphon"}


def test_a_folder_and_an_archive_are_traces(tmp_path: Path) -> None:
    """What in them is no trace is left out, and said."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(DEMO.read_bytes())
    (folder / "notes.txt").write_text("no trace")
    archive = tmp_path / "a.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(folder, "folder")
    for path in (folder, archive):
        code, shown = run("info", path)
        assert code == 0 and "8 sessions, 44 rounds" in shown
        assert "not read: " in shown and "notes.txt" in shown
        assert len(json.loads(run("info", path, "--json")[1])["ignored"]) == 1


def test_a_session_in_two_forms_is_an_error_that_names_both(tmp_path: Path) -> None:
    """One session twice in a folder: neither is taken silently."""
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(DEMO.read_bytes())
    code, shown = run("info", tmp_path)
    assert code == 2 and "a.jsonl" in shown and "b.jsonl" in shown and len(shown.splitlines()) == 1


WRONG: dict[str, tuple[list[str], str]] = {
    "no trace": (["info", "absent.jsonl"], "absent.jsonl"),
    "form": (
        ["info", "{demo}", "--form", "sideways"],
        "--form 'sideways': known are auto",
    ),
    "format": (["convert", "{demo}", "out", "--to", "csv"], "--to 'csv': known are"),
    "profile": (["generate", "--profile", "gaia", "--sessions", "1", "-o", "o"], "unknown profile 'gaia'"),
    "how much": (["generate", "--profile", "tau", "-o", "o"], "--sessions N or --rounds N"),
    "too much": (
        ["generate", "--profile", "tau", "--sessions", "1", "--rounds", "1", "-o", "o"],
        "--sessions N or --rounds N",
    ),
    "window": (
        ["generate", "--profile", "claude-code", "--sessions", "1", "--window", "9000", "-o", "o"],
        "is too small for prefixes of",
    ),
    "no place": (["generate", "--profile", "tau", "--sessions", "1", "-o", "/proc/none/o"], "/proc/none"),
    "a folder": (["generate", "--profile", "tau", "--sessions", "1", "-o", "."], "directory"),
    "profile file": (["profiles", "absent.toml"], "absent.toml: cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_word_gives_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What, where and what to do; exit status 2; no traceback, and nothing half-written."""
    monkeypatch.chdir(tmp_path)
    arguments, expected = WRONG[name]
    code, shown = run(*(word.replace("{demo}", str(DEMO)) for word in arguments))
    assert code == 2 and expected in shown, shown
    assert "Traceback" not in shown and len(shown.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_trace_that_ends_badly_leaves_no_file(tmp_path: Path) -> None:
    """A conversion that meets a bad line writes nothing, and keeps what was there."""
    trace, out = tmp_path / "t.jsonl", tmp_path / "out.jsonl"
    trace.write_bytes(DEMO.read_bytes() + b"{\n")
    out.write_text("before")
    assert run("convert", trace, out, "--to", SCHEMA)[0] == 2
    assert out.read_text() == "before" and sorted(tmp_path.iterdir()) == sorted([trace, out])


def test_the_script_itself(tmp_path: Path) -> None:
    """The console script generates, tells, and ends with 2 and one line where it cannot."""

    def script(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPT), "trace", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    out = str(tmp_path / "t.jsonl.gz")
    done = script("generate", "--profile", "hotpotqa", "--sessions", "5", "-o", out)
    assert (done.returncode, done.stderr) == (0, "") and "5 sessions" in done.stdout
    told = script("info", out)
    assert told.returncode == 0 and "5 sessions" in told.stdout and "search" in told.stdout
    wrong = script("info", str(tmp_path / "absent"))
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and not wrong.stdout


def test_a_round_trip_keeps_every_field(tmp_path: Path) -> None:
    """Reading what was converted to our own form gives the same sessions."""
    out = tmp_path / "out.jsonl"
    assert run("convert", DEMO, out, "--to", SCHEMA)[0] == 0
    assert list(read_trace(out)) == list(read_trace(DEMO))
    assert isinstance(next(read_trace(out)), SessionTrace)
    assert isinstance(next(read_trace(out)).rounds[0], RoundTrace)
