"""Degraded rounds of sessions that a replica does not know: all replicas choose the same home."""

from __future__ import annotations

from collections.abc import Iterable

from antiphon.policies.local import Local
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.messages import ClaimLost, Generate
from tests.core_helpers import arrived, engine_up, scheduler

ENGINES = tuple(f"d{n}" for n in range(5))
SESSIONS = tuple(f"s{n}" for n in range(60))


def core_with(engines: Iterable[str] = ENGINES, *, busy: int = 0) -> Scheduler:
    """One replica; `busy` sessions are known to it and not to the others."""
    core = scheduler(Local())
    for engine_id in engines:
        core.receive(engine_up(engine_id, "decode"), 0.0)
    core.receive(engine_up("p0", "prefill"), 0.0)
    for number in range(busy):
        home(core, f"own{number}")
    return core


def home(core: Scheduler, session: str, first: int = 0) -> str:
    """Where a degraded round of the session runs."""
    event = arrived(f"{session}-round", session, 100, first)
    core.receive(event, 1.0)
    commands = core.receive(ClaimLost(event.round_id, "away"), 1.0)
    core.check_invariants()
    return next(command.engine_id for command in commands if isinstance(command, Generate))


def test_replicas_with_other_loads_choose_the_same_home() -> None:
    """And sessions are spread over the decode engines."""
    one, other = core_with(), core_with(busy=17)
    homes = {session: home(one, session) for session in SESSIONS}
    assert homes == {session: home(other, session) for session in SESSIONS}
    assert set(homes.values()) == set(ENGINES)
    assert all("the session's hash names" in " ".join(r.notes) for r in one.rounds.values())


def test_an_engine_that_goes_moves_only_its_own_sessions() -> None:
    before, after = core_with(), core_with(ENGINES[:-1])
    for session in SESSIONS:
        chosen = home(before, session)
        assert home(after, session) == chosen or chosen == ENGINES[-1]


def test_the_engine_that_holds_the_prompt_is_the_home() -> None:
    """As far as it is believed; a prefill engine is none while there are decode engines."""
    core = core_with()
    event = arrived("other", "other", 100, 7)
    for engine_id in ("d3", "p0"):
        core.books.residency.record(engine_id, "one", event.hashes, event.page_size_tokens)
    for session in SESSIONS:
        assert home(core, session, 7) == "d3"
