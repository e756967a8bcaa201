"""Online correction in simulated fleets: wrong profiles are found out, right ones are left alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from antiphon.engines.cluster import ClusterError, load_cluster, resolve_engines
from antiphon.policies.base import Corrections
from antiphon.policies.fcfs import Fcfs
from antiphon.policies.latency import LatencyModel
from antiphon.policies.registry import make_policy
from antiphon.scheduler.cli import app
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.simulated_sessions import split_children
from antiphon.scheduler.simulation import RoundEnd, Simulation, Targets
from antiphon.traces.arrivals import Arrivals, Start, schedule
from tests.simulation_helpers import PROFILE, agent_sessions, cluster_file


def scaled(prefill: float, decode: float = 1.0, transfer: float = 1.0) -> LatencyModel:
    """The test profile with costs multiplied."""
    model = msgspec.json.decode(PROFILE, type=LatencyModel)
    replace = msgspec.structs.replace
    costs = {name: getattr(model.prefill, name) * prefill for name in model.prefill.__struct_fields__}
    steps = {
        name: getattr(model.decode, name) * decode
        for name in ("fixed_s", "per_request_s", "per_context_token_s")
    }
    link = replace(
        model.transfer,
        fixed_s=model.transfer.fixed_s * transfer,
        bytes_per_s=model.transfer.bytes_per_s / transfer,
    )
    return replace(
        model, prefill=type(model.prefill)(**costs), decode=replace(model.decode, **steps), transfer=link
    )


def fleet_that_believes(folder: Path, told: LatencyModel) -> Path:
    path = cluster_file(folder)
    (folder / "believed.json").write_bytes(msgspec.json.encode(told))
    path.write_text(
        path.read_text().replace(
            'profile = "profile.json"', 'profile = "profile.json"\nbelieved = "believed.json"'
        )
    )
    return path


PREFILLS_ELSEWHERE = {"ampd": {"alpha": 0.8, "beta": 0.8}}
"""Parameters with which enough rounds are prefilled by each engine of that pool to learn from."""


class Run:
    """One simulated run: every round, what was learnt, and what had been learnt when each round ended."""

    def __init__(
        self,
        path: Path,
        policy: str,
        *,
        sessions: int = 60,
        rate: float = 2.0,
        corrections: bool = True,
    ) -> None:
        cluster = load_cluster(path)
        specs = resolve_engines(cluster, path.parent)
        config = CoreConfig(publish=False, corrections=corrections)
        made = make_policy(policy, PREFILLS_ELSEWHERE.get(policy, {}))
        self.core = Scheduler(made, Fcfs(), specs[0].latency, config)
        self.ends: list[RoundEnd] = []
        self.history: list[dict[str, Corrections]] = []
        targets = Targets(cluster.slo.ttft_s, cluster.slo.itl_s)
        simulation = Simulation(self.core, cluster, specs, targets, self._ended)
        tops, children = split_children(agent_sessions(sessions, 5))
        simulation.run(iter(schedule(tops, Arrivals(Start.POISSON, rate, 3))), children)

    def _ended(self, end: RoundEnd) -> None:
        self.ends.append(end)
        self.history.append(self.learnt)

    @property
    def learnt(self) -> dict[str, Corrections]:
        return {engine_id: book.corrections for engine_id, book in self.core.books.fleet.books.items()}

    def rounds_until(self, engine_id: str, truth: float) -> int:
        """Rounds prefilled there before its factor for prefill was within 10 % of the truth, for good."""
        there = [end.receipt.prefill_engine == engine_id for end in self.ends]
        off = [n for n, c in enumerate(self.history) if abs(c[engine_id].prefill / truth - 1) > 0.1]
        return sum(there[: off[-1] + 1])


@pytest.mark.parametrize("policy", ["ampd", "local"])
@pytest.mark.parametrize("truth", [1.5, 1 / 1.5])
def test_a_wrong_prefill_model_is_found_out(tmp_path: Path, policy: str, truth: float) -> None:
    """Within 10 % of the truth after 12 rounds of an engine that prefills; the other terms stay at 1."""
    run = Run(fleet_that_believes(tmp_path, scaled(1 / truth)), policy)
    busy = [name for name in run.learnt if policy == "local" or name.startswith("prefill")]
    assert len(busy) >= 2
    for name in busy:
        assert run.learnt[name].prefill == pytest.approx(truth, rel=0.1), name
        assert run.rounds_until(name, truth) <= 12
    for name, c in run.learnt.items():
        assert c.decode == pytest.approx(1.0, abs=0.1) and c.transfer == pytest.approx(1.0, abs=0.1), name


@pytest.mark.parametrize("truth", [1.5, 1 / 1.5])
def test_wrong_decode_and_transfer_models_are_found_out(tmp_path: Path, truth: float) -> None:
    """Within 10 %, on homes and on all links, while prefill stays at 1."""
    run = Run(fleet_that_believes(tmp_path, scaled(1.0, 1 / truth, 1 / truth)), "ampd")
    for name, c in run.learnt.items():
        if name.startswith("decode"):
            assert c.decode == pytest.approx(truth, rel=0.1), name
        assert c.transfer == pytest.approx(truth, rel=0.1), name
        assert c.prefill == pytest.approx(1.0, abs=0.1), name


@pytest.mark.parametrize("policy", ["ampd", "local", "remote"])
@pytest.mark.parametrize("rate", [0.5, 3.0, 12.0])
def test_a_right_model_is_left_alone(tmp_path: Path, policy: str, rate: float) -> None:
    """Idle, loaded and swamped: every factor stays within 10 % of 1."""
    run = Run(cluster_file(tmp_path), policy, sessions=40, rate=rate)
    for name, c in run.learnt.items():
        for factor in (c.prefill, c.decode, c.transfer):
            assert 0.9 <= factor <= 1.1, (name, c)


def test_a_right_model_costs_nothing(tmp_path: Path) -> None:
    """As many rounds meet their targets with correction as without, but for two in a hundred."""

    def attained(corrections: bool) -> int:
        run = Run(cluster_file(tmp_path), "mooncake", rate=3.0, corrections=corrections)
        receipts = [end.receipt for end in run.ends]
        return sum(r.ttft_s is not None and r.ttft_s <= 0.6 and (r.itl_s or 0.0) <= 0.03 for r in receipts)

    without = attained(False)
    assert without > 100 and attained(True) >= 0.98 * without


def test_predictions_get_better(tmp_path: Path) -> None:
    """The error of predicted TTFT, as a log, is at most half of what it is without correction."""
    path = fleet_that_believes(tmp_path, scaled(0.55))

    def error(corrections: bool) -> float:
        receipts = [end.receipt for end in Run(path, "local", rate=0.5, corrections=corrections).ends]
        logs = [math.log(receipt.ttft_s / receipt.predicted_ttft_s) for receipt in receipts if receipt.ttft_s]
        return sum(map(abs, logs)) / len(logs)

    assert error(True) < error(False) / 2


def test_the_command_can_do_without(tmp_path: Path) -> None:
    """`--no-correction` leaves the predictions as wrong as they were."""
    path, trace = fleet_that_believes(tmp_path, scaled(0.55)), tmp_path / "trace.jsonl"
    trace.write_bytes(msgspec.json.Encoder().encode_lines(agent_sessions(20, 1)))

    def ttft_s(*more: str) -> float:
        out = tmp_path / "out.json"
        command = ["simulate", str(trace), "--cluster", str(path), "--policy", "mooncake", "--load", "0.9"]
        done = CliRunner().invoke(app, [*command, "--json", str(out), *more], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        mean: float = json.loads(out.read_bytes())["ttft_s"]["mean"]
        return mean

    assert ttft_s() != ttft_s("--no-correction")


def test_a_believed_profile_is_only_told(tmp_path: Path) -> None:
    """The engine runs by `profile`; a name that nobody knows is an error of the cluster file."""
    path = fleet_that_believes(tmp_path, scaled(3.0))
    specs = resolve_engines(load_cluster(path), tmp_path)
    truth = msgspec.json.decode(PROFILE, type=LatencyModel)
    assert all(spec.latency == truth and spec.believed == scaled(3.0) for spec in specs)
    (tmp_path / "believed.json").unlink()
    with pytest.raises(ClusterError, match=r"believed\.json"):
        load_cluster(path)
