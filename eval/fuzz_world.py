"""What surrounds a core that is fuzzed: engines that come and go, sessions that grow, other replicas.

It makes the events; whether they are legal now is the episode's business. All chance is one seeded generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from random import Random

from msgspec.structs import replace

from antiphon.engines.base import FailureKind
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.messages import (
    Claimed,
    ClaimLost,
    ClientGone,
    Command,
    EngineDown,
    EngineDraining,
    EngineFailed,
    EngineSuspect,
    EngineUp,
    Event,
    FirstToken,
    GoesOn,
    Holding,
    LoadReported,
    Prefetch,
    PrefetchDone,
    PrefillDone,
    RoundArrived,
    RoundFinished,
    SessionEnded,
    SessionMoved,
    SessionsAged,
    Totals,
)

PAGE = 16
TRUNKS = 3
"""System prompts that sessions share."""

ROUND_EVENTS: tuple[type, ...] = (
    Claimed, ClaimLost, PrefetchDone, PrefillDone, FirstToken, RoundFinished, EngineFailed, ClientGone,
)  # fmt: skip

FAILURES = [kind.value for kind in FailureKind if kind is not FailureKind.BAD_REQUEST]


def chain(name: str, pages: int, before: Sequence[bytes] = ()) -> tuple[bytes, ...]:
    """`before` and so many pages more, with content that the name stands for."""
    hashes = list(before)
    for _ in range(pages):
        hashes.append(sha256((hashes[-1] if hashes else b"") + name.encode()).digest())
    return tuple(hashes)


@dataclass(slots=True)
class Talk:
    """A session as its client knows it."""

    session_id: str
    tenant: str
    hashes: tuple[bytes, ...]
    rounds: int = 0


@dataclass(slots=True)
class World:
    """`engines`: names that engines may have; "p..." usually prefill, "d..." usually decode."""

    rng: Random
    engines: Sequence[str]
    profiles: Sequence[LatencyModel]
    live: dict[str, EngineUp] = field(default_factory=dict)
    talks: list[Talk] = field(default_factory=list)
    rounds: dict[str, tuple[RoundArrived, Talk]] = field(default_factory=dict)
    """Those in flight: whoever sees one end takes it out."""
    kept: dict[str, int] = field(default_factory=dict)
    """Tokens of answers that broke."""
    number: int = 0
    fence: int = 0

    # ------------------------------------------------------------ engines

    def engine_up(self) -> EngineUp:
        """One comes, comes again under a new incarnation, or says hello again, perhaps with other words."""
        rng = self.rng
        name = rng.choice(self.engines)
        before = self.live.get(name)
        if before is not None and rng.random() < 0.5:
            incarnation = before.incarnation
        else:
            self.number += 1
            incarnation = f"{name}-{self.number}"
        pool = ("prefill" if name[0] == "p" else "decode") if rng.random() < 0.9 else "decode"
        self.live[name] = up = EngineUp(
            name,
            incarnation,
            pool,
            rng.random() < 0.9,
            PAGE,
            rng.choice([400, 4096, 100_000]),
            2048,
            rng.choice([0, 64, 512]),
            rng.choice([0, 0, 4]),
            rng.choice([None, *self.profiles]),
        )
        return up

    def flip(self) -> EngineUp | SessionsAged:
        """One that lives changes pool, whatever is there; or who is idle counts no more."""
        rng = self.rng
        if not self.live or rng.random() < 0.3:
            return SessionsAged()
        name = rng.choice(sorted(self.live))
        before = self.live[name]
        pool = "decode" if before.pool == "prefill" else "prefill"
        self.live[name] = up = replace(before, pool=pool)
        return up

    def engine_down(self) -> EngineDown:
        """One that lives, or the news is late and a newer one lives, or nobody knows it."""
        rng = self.rng
        name = rng.choice([*self.engines, "nobody"])
        up = self.live.get(name)
        if up is None or rng.random() < 0.2:
            return EngineDown(name, "long ago", "stale")
        del self.live[name]
        goes_on = {round_id: self.goes_on(round_id) for round_id in self.rounds if rng.random() < 0.5}
        return EngineDown(name, up.incarnation, "killed", goes_on)

    def standing(self) -> EngineSuspect | EngineDraining:
        """An engine is to be stopped or misses a probe, or that is over; it may be gone already."""
        rng = self.rng
        name, on = rng.choice([*self.engines, "nobody"]), rng.random() < 0.5
        if rng.random() < 0.5:
            return EngineDraining(name, on)
        up = self.live.get(name)
        return EngineSuspect(name, up.incarnation if up and rng.random() < 0.8 else "long ago", on)

    def load_report(self) -> LoadReported:
        return LoadReported(self.rng.choice([*self.engines, "nobody"]), self.rng.randrange(0, 120_000))

    # ------------------------------------------------------------ rounds

    def arrival(self) -> RoundArrived:
        """A new round of an old session, which goes on, is compacted or starts anew; or of a new session."""
        rng = self.rng
        self.number += 1
        if not self.talks or rng.random() < 0.15:
            trunk = chain(f"trunk {rng.randrange(TRUNKS)}", rng.choice([0, 2, 40]))
            self.talks.append(Talk(f"s{self.number}", rng.choice(["", "t"]), trunk))
            if len(self.talks) > 12:
                del self.talks[0]
        talk = rng.choice(self.talks)
        if rng.random() < 0.1:
            talk.hashes = talk.hashes[: rng.randrange(0, len(talk.hashes) + 1)]
        talk.hashes = chain(f"{talk.session_id} {self.number}", rng.choice([0, 1, 3, 20]), talk.hashes)[:200]
        round_id = f"{self.number:08d}"
        tokens = len(talk.hashes) * PAGE + rng.randrange(0 if talk.hashes else 1, PAGE)
        targets = rng.choice([0.05, 1.0, 30.0]), rng.choice([0.01, 0.1])
        output = rng.choice([1, 16, 2000])
        arrived = RoundArrived(
            round_id, talk.session_id, talk.tenant, tokens, talk.hashes, PAGE, output, *targets,
            *self._hints(),
        )  # fmt: skip
        self.rounds[round_id] = arrived, talk
        return arrived

    def _hints(self) -> tuple[int | None, int | None, int | None]:
        """What a client says of the answer's length, the next one's, and the rounds that are to come."""
        rng = self.rng
        if rng.random() < 0.7:
            return None, None, None
        return rng.choice([None, 0, 5]), rng.choice([None, 0, 5000]), rng.choice([None, 0, 0, 7])

    def session_ended(self) -> SessionEnded:
        """One that is at work, idle or unknown."""
        talk = self.rng.choice([*self.talks, Talk("nobody", "t", ())])
        return SessionEnded(talk.tenant, talk.session_id)

    def session_moved(self) -> SessionMoved:
        """A drain has brought what there is of one to another engine, or says so of nobody."""
        rng = self.rng
        talk = rng.choice([*self.talks, Talk("nobody", "t", ())])
        one, other = rng.choice([*self.engines, "nobody"]), rng.choice([*self.engines, "nobody"])
        kept = talk.hashes[: rng.randrange(0, len(talk.hashes) + 1)]
        return SessionMoved(talk.tenant, talk.session_id, one, other, kept, PAGE)

    def answer(self, kind: type, round_id: str, call: Command | None) -> Event:
        """The event `kind` of this round; `call` is what is under way, None if that cannot be answered so."""
        rng = self.rng
        engine_id = getattr(call, "engine_id", "nobody")
        if kind is Claimed:
            return self._claimed(round_id)
        if kind is ClaimLost:
            return ClaimLost(round_id, "the ledger is away")
        if kind is PrefetchDone:
            asked = call.pages if isinstance(call, Prefetch) else 3
            pages = asked if rng.random() < 0.6 else rng.randrange(0, asked + 1)
            pulled = rng.randrange(0, pages + 1)
            reason = "" if pages == asked else "late"
            blamed = bool(reason) and rng.random() < 0.5
            return PrefetchDone(
                round_id, engine_id, pages, pulled, pulled * 2048, rng.random(), reason, blamed
            )
        if kind is PrefillDone:
            return PrefillDone(round_id, self._cached(round_id))
        if kind is FirstToken:
            return FirstToken(round_id)
        if kind is RoundFinished:
            return self._finished(round_id)
        if kind is EngineFailed:
            failure = rng.choice([*FAILURES, *FAILURES, FailureKind.BAD_REQUEST.value])
            goes_on = self.goes_on(round_id) if rng.random() < 0.5 else ""
            return EngineFailed(round_id, engine_id, failure, "it failed", goes_on)
        return ClientGone(round_id)

    def goes_on(self, round_id: str) -> GoesOn | str:
        """How an answer goes on that has come to some length, if it can; never with less than before."""
        rng = self.rng
        arrived, _ = self.rounds.get(round_id, (None, None))
        if arrived is None or rng.random() < 0.2:
            return "it cannot"
        kept = min(self.kept.get(round_id, 0) + rng.choice([0, 0, 1, 40]), arrived.max_output_tokens - 1)
        self.kept[round_id] = kept
        tokens = arrived.prompt_tokens + kept
        hashes = chain(f"answer {round_id}", tokens // PAGE - len(arrived.hashes), arrived.hashes)
        excluded = frozenset(rng.sample(self.engines, rng.choice([0, 0, 1])))
        return GoesOn(tokens, hashes, arrived.max_output_tokens - kept, kept, excluded)

    def _finished(self, round_id: str) -> RoundFinished:
        rng = self.rng
        arrived, talk = self.rounds.get(round_id, (None, None))
        hashes = chain(f"answer {round_id}", rng.choice([0, 1, 5]), arrived.hashes if arrived else ())
        if talk is not None:
            talk.hashes, talk.rounds = hashes, talk.rounds + 1
        tokens, lagged = rng.choice([0, 1, 16, 80]), rng.random() < 0.1
        tokens += self.kept.get(round_id, 0)
        return RoundFinished(round_id, tokens, self._cached(round_id), hashes, lagged)

    def _cached(self, round_id: str) -> int:
        """Of a prompt, as an engine says: nothing, a page, all but its last token."""
        arrived, _ = self.rounds.get(round_id, (None, None))
        most = arrived.prompt_tokens - 1 if arrived is not None else 0
        return self.rng.choice([0, min(PAGE, most), most])

    def _claimed(self, round_id: str) -> Claimed:
        """The ledger's answer: perhaps of another replica's doings, and perhaps of engines long gone."""
        rng = self.rng
        self.fence += 1
        arrived, talk = self.rounds.get(round_id, (None, None))
        hashes = arrived.hashes if arrived else ()
        session_id = arrived.session_id if arrived else "s"
        number, parent = (talk.rounds if talk else 0) + 1, None
        if rng.random() < 0.15:
            number, parent, session_id = 1, session_id, f"{session_id}~{self.fence}"
        home = rng.choice([*self.engines, "nobody"]) if rng.random() < 0.5 else None
        holdings = tuple(self._holding(len(hashes) * PAGE) for _ in range(rng.choice([0, 0, 1, 3])))
        others = {}
        if rng.random() < 0.3:
            for name in rng.sample([*self.engines, "nobody"], 2):
                others[name] = Totals(
                    rng.random() * 3, rng.randrange(4), rng.randrange(9), rng.randrange(9000)
                )
        tip = None
        if hashes and rng.random() < 0.3:
            pages = rng.randrange(1, len(hashes) + 1)
            tip_hash = hashes[pages - 1] if rng.random() < 0.7 else b"\0" * 32
            tip = tip_hash, self._holding(pages * PAGE)
        told = Claimed(round_id, self.fence, session_id, number, parent, home, holdings, others, tip)
        if rng.random() < 0.2:  # the session was created with targets, or with an end
            return replace(told, slo_ttft_s=rng.choice([0.0, 2.0]), slo_itl_s=0.05, expected_rounds=2)
        return told

    def _holding(self, tokens: int) -> Holding:
        rng = self.rng
        name = rng.choice([*self.engines, "nobody"])
        up = self.live.get(name)
        incarnation = up.incarnation if up is not None and rng.random() < 0.8 else "long ago"
        return Holding(
            name, incarnation, rng.choice([tokens, tokens // 2, 512, rng.randrange(0, tokens + 99)])
        )
