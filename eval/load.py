"""How much work a session is: what `--load RHO` turns into a rate, and what no policy could beat.

Engine-seconds of a round are what it costs engines that are never idle and never late:

    prefill of what the previous round did not leave, alone on a prefill engine, chunk by chunk
    + output tokens x step(B) / B on a decode engine, B = the largest batch of such rounds whose step is
      within the ITL target and whose KV fits the device

so a session rate of RHO x engines / (engine-seconds per session) asks for the share RHO of the fleet's time.
Prefill pool and decode pool are counted as one fleet: a fleet that is split badly is full below RHO = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from antiphon.engines.cluster import Cluster, ClusterError, EngineSpec
from antiphon.engines.simulated_loop import MAX_PREFILL_TOKENS
from antiphon.scheduler.simulated_sessions import split_children
from antiphon.traces.schema import RoundTrace, SessionTrace, TraceError


@dataclass(frozen=True, slots=True)
class Workbench:
    """The fleet, idle. For engine-seconds the first engine of each pool stands for its pool."""

    cluster: Cluster
    prefill: EngineSpec
    decode: EngineSpec
    engines: int
    kinds: tuple[EngineSpec, ...]
    """One engine of each group."""

    @classmethod
    def of(cls, cluster: Cluster, specs: Sequence[EngineSpec]) -> Workbench:
        """A fleet without prefill engines prefills where it decodes."""
        decode = next(spec for spec in specs if spec.group.pool == "decode")
        prefill = next((spec for spec in specs if spec.group.pool == "prefill"), decode)
        kinds = {(spec.group, spec.latency.name): spec for spec in reversed(specs)}
        return cls(cluster, prefill, decode, len(specs), tuple(reversed(kinds.values())))

    def round_seconds(self, turn: RoundTrace, cached_tokens: int, slo_itl_s: float) -> float:
        """Engine-seconds of one round."""
        prefill_s = self.idle_prefill_s(self.prefill, turn, cached_tokens)
        context = turn.prompt_tokens + turn.output_tokens / 2
        batch = self.batch_within(slo_itl_s, context)
        step_s = self.decode.latency.decode_step_s(batch, round(batch * context))
        return prefill_s + max(0, turn.output_tokens - 1) * step_s / batch

    def idle_prefill_s(self, engine: EngineSpec, turn: RoundTrace, cached_tokens: int) -> float:
        """The passes of one prompt on an engine that does nothing else."""
        page = self.cluster.page_tokens
        chunk = (engine.group.chunk_tokens or MAX_PREFILL_TOKENS) // page * page or page
        at, seconds = min(cached_tokens, turn.prompt_tokens - 1), 0.0
        while at < turn.prompt_tokens:
            take = min(chunk, turn.prompt_tokens - at)
            seconds += engine.latency.prefill_s(take, at)
            at += take
        return seconds

    def batch_within(self, slo_itl_s: float, context_tokens: float) -> int:
        """The largest batch of rounds of this context that meets the ITL target and fits; at least 1."""
        cost, group = self.decode.latency.decode, self.decode.group
        each_s = cost.per_request_s + context_tokens * cost.per_context_token_s
        by_room = group.device_tokens / context_tokens
        most = min(by_room, group.max_running_requests)
        if each_s > 0:
            most = min(most, (slo_itl_s - cost.fixed_s - cost.experts_s) / each_s)
        return max(1, int(most))

    def session_seconds(self, session: SessionTrace, slo_itl_s: float) -> float:
        """Engine-seconds of a whole session whose history is always found."""
        return sum(self.round_seconds(t, c, slo_itl_s) for t, c in with_cached(session))

    def seconds_per_arrival(self, sessions: Sequence[SessionTrace], slo_itl_s: float) -> float:
        """Engine-seconds of a session that arrives by itself, with those of the sub-agents it starts.

        Raises `TraceError` when none does, `ClusterError` when work takes no time.
        """
        arriving = len(split_children(sessions)[0])
        if not arriving:
            raise TraceError("no session arrives by itself: each waits for another one as its parent")
        work_s = sum(self.session_seconds(session, slo_itl_s) for session in sessions)
        if work_s <= 0:
            raise ClusterError(f"cluster {self.cluster.name!r}: by its profiles no work takes any time")
        return work_s / arriving

    def session_rate(self, rho: float, sessions: Sequence[SessionTrace], slo_itl_s: float) -> float:
        """Arrivals per second that ask for the share `rho` of the fleet."""
        return rho * self.engines / self.seconds_per_arrival(sessions, slo_itl_s)

    def unloaded_ttft_s(self, turn: RoundTrace, cached_tokens: int) -> float:
        """The first token's least time in an idle fleet, over every kind of engine as home and for prefill.

        Wherever it is prefilled, all that the previous round left is there already. No policy is faster.
        """
        return self.cluster.claim_s + min(self._ways(turn, cached_tokens))

    def _ways(self, turn: RoundTrace, cached_tokens: int) -> Iterable[float]:
        new = max(1, turn.prompt_tokens - cached_tokens)
        for home in self.kinds:
            yield home.group.request_fixed_s + self.idle_prefill_s(home, turn, cached_tokens)
            for engine in self.kinds:
                if engine.group.pool == "prefill" and home.group.pool == "decode":
                    push_s = min(engine.latency.transfer_s(new), home.latency.transfer_s(new))
                    prefill_s = self.idle_prefill_s(engine, turn, cached_tokens)
                    yield engine.group.request_fixed_s + prefill_s + push_s + home.group.request_fixed_s

    def attainable(self, sessions: Sequence[SessionTrace], targets: Iterable[float]) -> float:
        """Share of all rounds whose unloaded TTFT is within its session's target. `targets`: per session.

        A round over the model's window is not; what a run did to the others plays no part.
        """
        good = total = 0
        for session, target_s in zip(sessions, targets, strict=True):
            for turn, cached_tokens in with_cached(session):
                total += 1
                fits = turn.total_tokens <= self.cluster.window_tokens
                good += fits and self.unloaded_ttft_s(turn, cached_tokens) <= target_s
        return good / max(1, total)


def with_cached(session: SessionTrace) -> Iterable[tuple[RoundTrace, int]]:
    """Each round with the tokens of its prompt that were there before it."""
    for index, turn in enumerate(session.rounds):
        yield turn, (turn.kept_tokens if index else session.shared_tokens)
