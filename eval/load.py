"""How much work a session is: what `--load RHO` turns into a rate, and what no policy could beat.

Engine-seconds of a round are what it costs engines that are never idle and never late:

    prefill of what the previous round did not leave, alone on a prefill engine
    + output tokens x step(B) / B on a decode engine, B = the largest batch of such rounds whose step is
      within the ITL target and whose KV fits the device

so a session rate of RHO x engines / (engine-seconds per session) asks for the share RHO of the fleet's time.
Prefill pool and decode pool are counted as one fleet: a fleet that is split badly is full below RHO = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from antiphon.engines.cluster import Cluster, EngineSpec
from antiphon.traces.schema import RoundTrace, SessionTrace


@dataclass(frozen=True, slots=True)
class Workbench:
    """The first engine of each pool stands for its pool."""

    cluster: Cluster
    prefill: EngineSpec
    decode: EngineSpec
    engines: int

    @classmethod
    def of(cls, cluster: Cluster, specs: Sequence[EngineSpec]) -> Workbench:
        """A fleet without prefill engines prefills where it decodes."""
        decode = next(spec for spec in specs if spec.group.pool == "decode")
        prefill = next((spec for spec in specs if spec.group.pool == "prefill"), decode)
        return cls(cluster, prefill, decode, len(specs))

    def round_seconds(self, turn: RoundTrace, cached_tokens: int, slo_itl_s: float) -> float:
        """Engine-seconds of one round."""
        prefill_s = self.prefill.latency.prefill_s(max(1, turn.prompt_tokens - cached_tokens), cached_tokens)
        context = turn.prompt_tokens + turn.output_tokens / 2
        batch = self.batch_within(slo_itl_s, context)
        step_s = self.decode.latency.decode_step_s(batch, round(batch * context))
        return prefill_s + max(0, turn.output_tokens - 1) * step_s / batch

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

    def session_rate(self, rho: float, sessions: Sequence[SessionTrace], slo_itl_s: float) -> float:
        """Arrivals per second that ask for the share `rho` of the fleet; parents count with sub-agents."""
        work_s = sum(self.session_seconds(session, slo_itl_s) for session in sessions)
        ids = {session.session_id for session in sessions}
        arriving = sum(session.parent not in ids for session in sessions)
        return rho * self.engines * arriving / work_s

    def unloaded_ttft_s(self, turn: RoundTrace, cached_tokens: int) -> float:
        """The first token's least time in an idle fleet: at the home, or prefilled elsewhere and pushed.

        Wherever it is prefilled, all that the previous round left is there already.
        """
        new = max(1, turn.prompt_tokens - cached_tokens)
        here, there = self.decode, self.prefill
        local_s = here.group.request_fixed_s + here.latency.prefill_s(new, cached_tokens)
        remote_s = (
            there.group.request_fixed_s
            + there.latency.prefill_s(new, cached_tokens)
            + max(there.latency.transfer_s(new), here.latency.transfer_s(new))
            + here.group.request_fixed_s
        )
        return self.cluster.claim_s + min(local_s, remote_s)


def with_cached(session: SessionTrace) -> Iterable[tuple[RoundTrace, int]]:
    """Each round with the tokens of its prompt that were there before it."""
    for index, turn in enumerate(session.rounds):
        yield turn, (turn.kept_tokens if index else session.shared_tokens)
