"""Cores of several sizes in mid-life, each ready to make one decision after the other.

A core has half prefill and half decode engines, sessions with their homes and what these hold of their
prompts, rounds that decode everywhere, and prefills that wait everywhere: so many that no place is safe for
the next round and a policy has to weigh them all. (A calm one has them on one engine only.)

One sample is what the core does to decide on a round: it arrives, is claimed, placed and reserved; later a
prefill ends, and of those that wait the ordering chooses the next, which starts. What follows a sample puts
the core back to where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter_ns

from antiphon.policies.base import Arm, Candidate, ClusterView, Placement, Policy, Reject, RoundView
from antiphon.policies.latency import LatencyModel
from antiphon.policies.registry import POLICIES, make_ordering, make_policy
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.fleet import EngineBook
from antiphon.scheduler.messages import (
    Claimed,
    ClientGone,
    EngineUp,
    FirstToken,
    PrefillDone,
    RoundArrived,
)
from antiphon.scheduler.states import new_round

ORDERING = "ampd_reorder"
PAGE_TOKENS = 64
SHARED_PAGES, HELD_PAGES, PROMPT_PAGES = 96, 120, 128
"""Of a session's prompt: shared with others; held by its home; in all."""
PROMPT_TOKENS = PROMPT_PAGES * PAGE_TOKENS
KINDS = 16
"""Shared prefixes."""
DECODING = 8
"""Rounds that decode on every decode engine."""
WAITING = 8
"""Rounds that wait on the first prefill engine; 2 on the others of a fleet that is not calm."""
WORK_S = 0.25
"""Of each."""
ENGINE_STEP_S = 1.0
"""Between two decisions, on the core's clock, times the engines: a calm fleet stays calm."""
TENANT = "t"


def default_policy() -> str:
    """`adaptive`, as `antiphon serve`; `ampd` where that is not registered."""
    return "adaptive" if "adaptive" in POLICIES else "ampd"


def engine_name(pool: str, number: int) -> str:
    return f"{pool}-{number:03}"


def hashes_of(session: int, pages: int) -> tuple[bytes, ...]:
    """The chain of a session's prompt: equal where it is shared. Names, not digests: made by the million."""
    shared = (
        b"shared" + bytes((session % KINDS,)) + page.to_bytes(25, "big") for page in range(SHARED_PAGES)
    )
    own = (session.to_bytes(16, "big") + page.to_bytes(16, "big") for page in range(SHARED_PAGES, pages))
    return (*shared, *own)


@dataclass(slots=True)
class _Steered:
    """The policy, but for rounds whose place the bench knows."""

    policy: Policy
    placed: Placement | None = None

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        return self.placed if self.placed is not None else self.policy.place(round, cluster)


class _Timed(Scheduler):
    """Measures its own starts: what an event does besides is no decision."""

    dispatch_ns = 0

    def _dispatch(self, book: EngineBook, now: float) -> None:
        began_ns = perf_counter_ns()
        super()._dispatch(book, now)
        self.dispatch_ns += perf_counter_ns() - began_ns


@dataclass(slots=True)
class Deciding:
    """One core; `prepare`, `decide` (the sample) and `undo` are called in turn with the sample's number."""

    engines: int
    sessions: int
    latency: LatencyModel
    policy: str
    calm: bool = False
    core: _Timed = field(init=False)
    _steered: _Steered = field(init=False)
    _now: float = 0.0
    _sent: int = 0
    _next: RoundArrived = field(init=False)
    _claimed: Claimed = field(init=False)
    _ending: str = ""
    _view: RoundView = field(init=False)
    _cluster: ClusterView = field(init=False)

    def __post_init__(self) -> None:
        self._steered = _Steered(make_policy(self.policy))
        self.core = _Timed(self._steered, make_ordering(ORDERING), self.latency)
        for number in range(self.engines):
            pool = "decode" if number < self.engines // 2 else "prefill"
            name = engine_name(pool, number % (self.engines // 2))
            up = EngineUp(
                name,
                "i",
                pool,
                True,
                PAGE_TOKENS,
                2_000_000,
                self.latency.transfer.kv_bytes_per_token,
                2048,
                4,
            )
            self.core.receive(up, 0.0)
        for session in range(self.sessions):
            self._remember(session)
        for number in range(DECODING * self.engines // 2):
            self.core.receive(FirstToken(self._send(number, self._local(number))), 0.0)
        if not self.calm:
            for number in range(self.engines // 2):
                self._send(number, self._local(number, 3 * WORK_S))
                for _ in range(4):
                    self._wait(number, number)
        for number in range(WAITING + 2):
            self._wait(number)

    # ---- one sample

    def prepare(self, number: int) -> None:
        self._now += ENGINE_STEP_S / self.engines
        self._next, self._claimed = self._round(number * 7919)
        queue = self.core.books.fleet.books[engine_name("prefill", 0)]
        self._ending = min(queue.in_flight)

    def decide(self, number: int) -> int:
        """Nanoseconds."""
        core, now = self.core, self._now
        began_ns = perf_counter_ns()
        core.receive(self._next, now)
        core.receive(self._claimed, now)
        placed_ns = perf_counter_ns() - began_ns
        core.dispatch_ns = 0
        core.receive(PrefillDone(self._ending, 0), now)
        return placed_ns + core.dispatch_ns

    def undo(self, number: int) -> None:
        self.core.receive(ClientGone(self._ending), self._now)
        self.core.receive(ClientGone(self._next.round_id), self._now)
        self._wait(number)

    # ---- the policy alone

    def look(self, number: int) -> None:
        self._now += ENGINE_STEP_S / self.engines
        arrived, _ = self._round(number * 7919)
        books = self.core.books
        self._view = books.view(new_round(arrived, self._now, self._now + 60.0), self._now)
        self._cluster = books.cluster(self._now)

    def place(self, number: int) -> object:
        """The sample: the policy's own part."""
        return self._steered.policy.place(self._view, self._cluster)

    # ---- what makes it

    def _remember(self, session: int) -> None:
        """A session that has had rounds; straight into the books, as events would take minutes."""
        books, home = self.core.books, self._home(session)
        books.sessions.settle((TENANT, f"s{session}"), home, HELD_PAGES * PAGE_TOKENS, 1, 0.0)
        books.residency.record(home, "i", hashes_of(session, HELD_PAGES), PAGE_TOKENS)

    def _home(self, number: int) -> str:
        """That of the round's session, wherever the round is sent: sessions stay where their history is."""
        return engine_name("decode", number % self.sessions % (self.engines // 2))

    def _round(self, number: int) -> tuple[RoundArrived, Claimed]:
        self._sent += 1
        session = number % self.sessions
        round_id, session_id = f"r{self._sent}", f"s{session}"
        hashes = hashes_of(session, PROMPT_PAGES)
        arrived = RoundArrived(
            round_id, session_id, TENANT, PROMPT_TOKENS, hashes, PAGE_TOKENS, 256, 1.0, 0.1
        )
        return arrived, Claimed(round_id, 1, session_id, 2)

    def _send(self, number: int, placed: Placement) -> str:
        """A round whose place is given."""
        arrived, claimed = self._round(number)
        self._steered.placed = placed
        self.core.receive(arrived, self._now)
        self.core.receive(claimed, self._now)
        self._steered.placed = None
        return arrived.round_id

    def _local(self, number: int, prefill_s: float = 0.05) -> Placement:
        home = self._home(number)
        predicted = Candidate(Arm.LOCAL, home, 0.0, prefill_s, 0.0, 0.0)
        return Placement(Arm.LOCAL, home, home, "bench", predicted)

    def _wait(self, number: int, at: int = 0) -> None:
        """One more round waits at a prefill engine; the first two there start at once."""
        home, engine = self._home(number), engine_name("prefill", at)
        predicted = Candidate(Arm.REMOTE_RECOMPUTE, engine, 0.1, WORK_S * (1 + number % 7 / 7), 0.0, 0.01)
        self._send(number, Placement(Arm.REMOTE_RECOMPUTE, home, engine, "bench", predicted))
