"""`antiphon trace`: look at a trace, convert it, generate one. Imports inside, as cli.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from antiphon.scheduler.errors import UserError

app = typer.Typer(
    name="trace",
    help="Look at a session trace, convert it, or generate one.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Trace = Annotated[Path, typer.Argument(help="A file, a folder, or a .tar, .gz or .xz of them.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out lines that cannot be read; count them.")]
ShareSystem = Annotated[
    bool, typer.Option("--share-system", help="Weka: sessions share tools and system prompt.")
]
Form = Annotated[str, typer.Option(help="Mooncake with delays: auto, cumulative or delta.")]
IGNORED_SHOWN = 3
PROFILES = "claude-code, swe-agent, toolbench, hotpotqa, tau or dureader (-like), or your own FILE.toml"


@app.command()
def info(
    trace: Trace,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables and plots.")] = False,
    skip_bad: SkipBad = False,
    share_system: ShareSystem = False,
    form: Form = "auto",
) -> None:
    """What a trace holds (distributions, reuse, windows) and what it lacks for a simulation."""
    from rich.console import Console

    from antiphon.traces.info import TraceReport
    from antiphon.traces.plots import show_info

    with _user_errors():
        source = _read(trace, skip_bad, share_system, form)
        report = TraceReport()
        report.add_all(source.sessions)
    summary = report.summary(str(trace), source.bad.count, tuple(source.ignored))
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(summary), indent=2).decode())
        return
    console = Console()
    # A pipe has no width of its own.
    show_info(summary, report.tallies, Console(width=None if console.is_terminal else 120))
    _say_skipped(source)


@app.command()
def convert(
    trace: Trace,
    out: Annotated[Path, typer.Argument(help="Where to; gzipped if it ends in .gz.")],
    to: Annotated[str, typer.Option(help="Format to write; a wrong one lists those there are.")],
    max_sessions: Annotated[int | None, typer.Option(min=1, help="Only the first so many sessions.")] = None,
    max_gap_s: Annotated[float | None, typer.Option("--max-gap", min=0, help="Cap of gaps, seconds.")] = None,
    divide: Annotated[int, typer.Option(min=1, help="Divide all lengths by this.")] = 1,
    window: Annotated[
        int | None, typer.Option(min=1, help="Cut sessions before a round of more tokens, prompt + output.")
    ] = None,
    skip_bad: SkipBad = False,
    share_system: ShareSystem = False,
    form: Form = "auto",
) -> None:
    """Write a trace in another format, shortened if asked; says what is left out."""
    from antiphon.traces.losses import Losses
    from antiphon.traces.shape import LeftOut, Shape, shape_each

    left_out = LeftOut()
    with _user_errors():
        source = _read(trace, skip_bad, share_system, form)
        shaped = shape_each(source.sessions, Shape(max_sessions, divide, max_gap_s, window), left_out)
        losses = Losses(to, shaped)
        count = _Count(losses)
        _write(count, out, to)
    typer.echo(f"{out}: {count}, as {to}")
    if left_out.capped_gaps:
        typer.echo(f"gaps capped at {max_gap_s:g} s: {left_out.capped_gaps} were longer")
    if left_out.dropped_rounds:
        typer.echo(
            f"left out: {left_out.dropped_rounds} rounds over the window of {window} tokens or after such a "
            f"round; {left_out.dropped_sessions} sessions whole"
        )
    for line in losses.describe():
        typer.echo(f"lost, for {to} cannot say it: {line}")
    _say_skipped(source)


@app.command()
def generate(
    profile: Annotated[str, typer.Option(help=PROFILES)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to; gzipped if it ends in .gz.")],
    sessions: Annotated[int | None, typer.Option(min=1, help="So many, sub-agents included.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Whole sessions until so many rounds.")] = None,
    seed: int = 0,
    window: Annotated[int, typer.Option(min=1, help="No prompt and output exceed it, tokens.")] = 131_072,
) -> None:
    """Make seeded agent sessions: the same bytes for the same seed, a short trace begins a longer one."""
    from antiphon.traces.generate import generate as endless
    from antiphon.traces.generate import take
    from antiphon.traces.profiles import load_profile, sources
    from antiphon.traces.schema import SCHEMA

    if (sessions is None) == (rounds is None):
        raise UserError("say how much: --sessions N or --rounds N, one of them")
    with _user_errors():
        chosen = load_profile(profile)
        count = _Count(take(endless(Path(profile).stem, chosen, seed, window), sessions, rounds))
        _write(count, out, SCHEMA)
    typer.echo(f"{out}: {count}; {chosen.label}, seed {seed}, window {window}")
    guesses = [source.figure for source in sources(chosen) if source.basis == "guess"]
    if guesses:
        typer.echo(f"guessed, not measured: {', '.join(guesses)} (`antiphon trace profiles {profile}`)")


@app.command()
def profiles(name: Annotated[str | None, typer.Argument(help=PROFILES)] = None) -> None:
    """The profiles of `generate`; with a name, what each of its figures rests on."""
    from rich.console import Console
    from rich.table import Table

    from antiphon.traces.profiles import load_profile, profile_names, sources

    table = Table(show_lines=name is not None)
    if name is None:
        for column in ("profile", "", "what it is like"):
            table.add_column(column)
        for each in profile_names():
            chosen = load_profile(each)
            table.add_row(each, chosen.label, chosen.about)
    else:
        for column in ("figure", "basis", "source"):
            table.add_column(column)
        with _user_errors():
            for source in sources(load_profile(name)):
                table.add_row(*source)
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


# ---------------------------------------------------------------- helpers


class _Count:
    """Hands a stream on and counts what goes by."""

    def __init__(self, sessions: Iterable[Any]) -> None:
        self._stream = sessions
        self.sessions = self.rounds = self.prompt_tokens = 0

    def __iter__(self) -> Iterator[Any]:
        for session in self._stream:
            self.sessions += 1
            self.rounds += len(session.rounds)
            self.prompt_tokens += sum(turn.prompt_tokens for turn in session.rounds)
            yield session

    def __str__(self) -> str:
        return f"{self.sessions:,} sessions, {self.rounds:,} rounds, {self.prompt_tokens:,} prompt tokens"


@contextmanager
def _user_errors() -> Iterator[None]:
    from antiphon.traces.schema import TraceError

    try:
        yield
    except TraceError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{error.filename or 'output'}: {error.strerror or error}") from error


class _Source(NamedTuple):
    """A trace as a stream, and what is left out of it, known when the stream has ended."""

    sessions: Iterator[Any]
    bad: Any
    ignored: list[str]
    """A line on each file of a folder or archive that is no trace."""


def _read(trace: Path, skip_bad: bool, share_system: bool, form: Any) -> _Source:
    from antiphon.traces.readers import BadLines, ReadOptions, read_trace

    bad = BadLines()
    ignored: list[str] = []
    options = ReadOptions(share_system=share_system, form=form)
    sessions = read_trace(trace, bad if skip_bad else None, options=options, ignored=ignored)
    return _Source(sessions, bad, ignored)


def _write(sessions: Iterable[Any], out: Path, name: str) -> None:
    from antiphon.traces.output import whole_file
    from antiphon.traces.writers import WRITERS

    write = WRITERS.get(name)
    if write is None:
        raise UserError(f"--to {name!r}: known are {', '.join(WRITERS)}")
    with whole_file(out) as file:
        write(sessions, file)


def _say_skipped(source: _Source) -> None:
    if source.bad.count:
        typer.echo(f"skipped {source.bad.count} bad lines, such as: {'; '.join(source.bad.first)}")
    if source.ignored:
        more = f" and {len(source.ignored) - IGNORED_SHOWN} more" * (len(source.ignored) > IGNORED_SHOWN)
        typer.echo(f"not read: {'; '.join(source.ignored[:IGNORED_SHOWN])}{more}")
