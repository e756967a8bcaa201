"""`make fuzz`: random events, legal and illegal, through the sans-IO core, with every policy and ordering.

Events come in episodes, each with a core, a fleet and knobs of its own; the seed of a run and an episode's
number say all of it. A run fails when a check fails, or when an event that some phase takes never came in
that phase: what was not tried was not tested. A failure names the seed, shows the last events, and says how
to run just that episode again.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count

from antiphon.eval.fuzz_episode import DEEP, DRAWN, Episode, Found, Pair, Plan
from antiphon.eval.fuzz_world import ROUND_EVENTS
from antiphon.policies.registry import ORDERINGS, POLICIES
from antiphon.scheduler.messages import (
    EngineDown,
    EngineDraining,
    EngineSuspect,
    EngineUp,
    LoadReported,
    RoundArrived,
    SessionEnded,
    SessionMoved,
    SessionsAged,
    Tick,
)
from antiphon.scheduler.states import ACCEPTS, Phase

EPISODE_EVENTS = 4000
"""At most: a run has at least one episode for every policy, and three."""

TWINS = 7
"""One episode in so many has a twin core."""

DRAWS = 3

LONG_RUN_EVENTS = 100_000

FLEET_EVENTS = (
    RoundArrived,
    EngineUp,
    EngineDown,
    EngineSuspect,
    EngineDraining,
    LoadReported,
    SessionEnded,
    SessionMoved,
    SessionsAged,
    Tick,
)


def plans(events: int, seed: int, policies: Sequence[str], first: int = 0) -> Iterator[Plan]:
    """Episodes from number `first` on, without end. Policies take turns, and so do orderings; one episode in
    DRAWS draws its arms, if that is among the policies, as few others come by every arm."""
    orderings = [DRAWN, *sorted(ORDERINGS)]
    size = max(50, min(EPISODE_EVENTS, events // (3 * len(policies))))
    for number in count(first):
        turn, drawn = divmod(number, DRAWS)
        policy = policies[(number - turn) % len(policies)] if drawn or DRAWN not in policies else DRAWN
        ordering = orderings[(number + number // len(policies)) % len(orderings)]
        yield Plan(f"{seed}/{number}", policy, ordering, size, number % TWINS == 0)


def required_pairs() -> tuple[set[Pair], set[Pair]]:
    """(legal, illegal): what a run with all policies must have tried."""
    alive = [phase for phase in Phase if phase is not Phase.ENDED]
    legal = {(phase.value, kind.__name__) for phase in alive for kind in ACCEPTS[phase]}
    legal |= {("-", kind.__name__) for kind in FLEET_EVENTS}
    kinds = {*ROUND_EVENTS}
    illegal = {(phase.value, kind.__name__) for phase in alive for kind in kinds - ACCEPTS[phase]}
    illegal |= {("unknown", kind.__name__) for kind in kinds}
    return legal, illegal | {(phase.value, RoundArrived.__name__) for phase in alive}


def missing_pairs(found: Found) -> list[str]:
    """Pairs that never came, in words; a short run need not come by the illegal ones."""
    legal, illegal = required_pairs()
    if found.events < LONG_RUN_EVENTS:
        illegal = set()
    gone = [f"{event} while {phase}" for phase, event in sorted(legal - found.legal.keys())]
    return gone + [
        f"illegal {event} while {phase}" for phase, event in sorted(illegal - found.illegal.keys())
    ]


def fuzz(events: int, seed: int, policies: Sequence[str], first: int, episodes: int | None) -> Found | None:
    """Run episodes until `events` have passed, or so many `episodes`; None: one failed, and was shown."""
    total = Found()
    for number, plan in enumerate(plans(events, seed, policies, first), first):
        if total.events >= events or (episodes is not None and number >= first + episodes):
            break
        episode = Episode(plan)
        try:
            total.add(episode.run())
        except Exception:
            show_failure(plan, episode, again_command(events, seed, policies, number))
            return None
    return total


def again_command(events: int, seed: int, policies: Sequence[str], number: int) -> str:
    command = f"python -m antiphon.eval.fuzz --events {events} --seed {seed} --first {number} --episodes 1"
    return command if len(policies) > 1 else f"{command} --policy {policies[0]}"


def show_failure(plan: Plan, episode: Episode, again: str) -> None:
    """What happened last, and how to see it again."""
    traceback.print_exc(file=sys.stdout)
    print(f"\nthe last events of {episode.found.events}, that which failed among them:")
    for line in episode.last_events():
        print(f"  {line}")
    print(f"\n{plan}\nagain: {again}")


def show(found: Found, seed: int, seconds: float) -> None:
    print(f"seed {seed}: {found.events:,} events in {seconds:.1f} s, {found.events / seconds:,.0f} events/s")
    print(f"  invariants after every event; residency and views after every {DEEP}th")
    print(f"  illegal: {found.illegal.total():,}, all refused; explained: {found.explained:,}, all came true")
    print(f"  the whole core was compared, before and after, {found.digests:,} times")
    print(f"  outcomes: {words(found.outcomes)}")
    print(f"  arms: {words(found.arms)}")
    legal, illegal = required_pairs()
    print(
        f"  (phase, event) pairs: legal {len(legal & found.legal.keys())} of {len(legal)},"
        f" illegal {len(illegal & found.illegal.keys())} of {len(illegal)}"
    )
    for pair, number in sorted(found.legal.items(), key=lambda item: item[1])[:5]:
        print(f"    rarest: {pair[1]} while {pair[0]}: {number:,}")
    print(f"  commands: {found.commands.hex()}")


def words(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    names = [DRAWN, *sorted(POLICIES)]
    parser = argparse.ArgumentParser(prog="antiphon.eval.fuzz", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--policy", choices=names, help="only this one; pairs that it cannot reach do not fail"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first episode")
    parser.add_argument("--episodes", type=int, help="stop after so many")
    options = parser.parse_args(arguments)
    policies = [options.policy] if options.policy else names
    begun = time.monotonic()
    found = fuzz(options.events, options.seed, policies, options.first, options.episodes)
    if found is None:
        return 1
    show(found, options.seed, max(1e-9, time.monotonic() - begun))
    missing = missing_pairs(found) if options.policy is None and options.episodes is None else []
    for pair in missing:
        print(f"never tried: {pair}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
