"""Metrics and logs: what a receipt counts as, and that every name is in the documentation."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from antiphon.engines.prompt import Prompt
from antiphon.policies.base import Arm, Candidate, Placement
from antiphon.policies.pools import PoolShares
from antiphon.scheduler.logs import JsonFormatter, request_id_var
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.outcomes import Outcome, Try
from antiphon.scheduler.receipt_log import ReceiptLog, receipt_json
from antiphon.scheduler.rounds import RoundRequest
from tests.gateway_helpers import make_receipt

REQUEST = RoundRequest("r1", "s1", "default", "/v1/x", Prompt(range(100)), {}, 5, 1.0, 1.0)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"antiphon_{name}", labels)


def test_a_receipt_is_counted() -> None:
    """Arm and outcome, tokens by kind, bytes by direction, times and the model's error."""
    metrics = Metrics()
    metrics.observe_receipt(
        make_receipt(
            REQUEST,
            arm=Arm.REMOTE_PULL,
            cached_tokens=40,
            pulled_tokens=30,
            bytes_decode_to_prefill=1000,
            bytes_prefill_to_decode=2000,
            bytes_home_to_home=3000,
            predicted_ttft_s=0.05,
            ttft_s=0.1,
            degraded=True,
        )
    )
    assert value(metrics, "rounds_total", arm="remote_pull", outcome="completed") == 1
    kinds = {
        kind: value(metrics, "tokens_total", kind=kind)
        for kind in ("prompt", "cached", "pulled", "completion")
    }
    assert kinds == {"prompt": 100, "cached": 40, "pulled": 30, "completion": 3}
    assert value(metrics, "kv_transfer_bytes_total", direction="decode_to_prefill") == 1000
    assert value(metrics, "kv_transfer_bytes_total", direction="prefill_to_decode") == 2000
    assert value(metrics, "kv_transfer_bytes_total", direction="home_to_home") == 3000
    assert value(metrics, "round_ttft_seconds_sum", arm="remote_pull") == pytest.approx(0.1)
    assert value(metrics, "round_ttft_actual_to_predicted_ratio_sum", arm="remote_pull") == pytest.approx(2.0)
    assert value(metrics, "round_phase_seconds_sum", phase="prefill") == pytest.approx(0.05)
    assert value(metrics, "round_itl_seconds_count") == 1
    assert value(metrics, "degraded_rounds_total") == 1


def test_a_refused_round_has_no_times() -> None:
    """What never started is counted by outcome only; its failed tries by arm."""
    metrics = Metrics()
    candidate = Candidate(Arm.LOCAL, "e0", 0.0, 0.1, 0.0, 0.0)
    placement = Placement(Arm.LOCAL, "e0", "e0", "why", candidate)
    refused = make_receipt(
        REQUEST, arm=None, outcome=Outcome.REFUSED, completion_tokens=0, ttft_s=None, itl_s=None,
        tries=(Try(placement, "unreachable"), Try(placement, "refused")),
    )  # fmt: skip
    metrics.observe_receipt(refused)
    assert value(metrics, "rounds_total", arm="none", outcome="refused") == 1
    assert value(metrics, "failed_tries_total", arm="local") == 2
    assert value(metrics, "round_ttft_seconds_count", arm="none") is None
    assert value(metrics, "tokens_total", kind="prompt") is None


def test_every_metric_is_documented() -> None:
    """docs/metrics.md lists exactly the names that a replica exports."""
    metrics = Metrics()
    metrics.watch_engines(lambda: 2)
    metrics.watch_breakers(lambda: {"engine": (1, 2), "link": (0, 3)})
    metrics.watch_records(lambda: {"unsigned": 2})
    metrics.watch_doubles(lambda: {"repeated": 1})
    metrics.watch_load(lambda: 3, lambda: 4096)
    metrics.watch_answers(lambda: 1024)
    metrics.watch_pools(lambda: {"prefill": 1, "decode": 2}, lambda: PoolShares(0.5, 0.25, 0.1))
    exported = {
        family.name
        for family in text_string_to_metric_families(metrics.render().decode())
        if not family.name.startswith("antiphon_process_") and not family.name.endswith("_created")
    }
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    documented = {
        name.removesuffix("_total") for name in re.findall(r"^\| `(antiphon_\w+)`", text, re.MULTILINE)
    }
    assert exported == documented


def test_breakers_are_read_at_each_scrape() -> None:
    """Two kinds, whatever the number of engines."""
    metrics, counts = Metrics(), {"engine": (1, 2), "link": (0, 3)}
    metrics.watch_breakers(lambda: counts)
    assert value(metrics, "breakers_not_closed", of="engine") == 1
    counts["engine"] = (0, 2)
    assert value(metrics, "breakers_not_closed", of="engine") == 0
    assert value(metrics, "breaker_openings_total", of="link") == 3


def test_receipts_as_json() -> None:
    """Enums by value, predictions with their sum, and nothing that JSON cannot carry."""
    shown = json.loads(json.dumps(receipt_json(make_receipt(REQUEST))))
    assert (shown["arm"], shown["outcome"]) == ("local", "completed")
    placement = shown["tries"][0]["placement"]
    assert placement["predicted"]["ttft_s"] == pytest.approx(0.03)
    assert placement["considered"][0]["ttft_s"] == pytest.approx(0.03)


def test_the_receipt_log_keeps_the_newest() -> None:
    """Newest first, bounded, by session."""
    log = ReceiptLog(capacity=3)
    for index in range(5):
        log.add(make_receipt(REQUEST, round_number=index, session_id=f"s{index % 2}", round_id=f"r{index}"))
    assert [item["round_number"] for item in log.newest(10)] == [4, 3, 2]
    assert [item["round_number"] for item in log.newest(1)] == [4]
    assert [item["round_number"] for item in log.newest(10, "s1")] == [3]
    log.settle("r4", "fenced")
    log.settle("r0", "yes")  # it is not kept any more
    assert [item["recorded"] for item in log.newest(10)] == ["fenced", "pending", "pending"]


def test_log_lines_are_json_with_the_request_id() -> None:
    """One object per line: message, extra fields, request id, exception."""
    formatter = JsonFormatter()
    token = request_id_var.set("r-7")
    try:
        raise ValueError("why\nso")
    except ValueError as error:
        record = logging.LogRecord(
            "antiphon.x", logging.ERROR, "f", 1, "it %s", ("broke",), (ValueError, error, None)
        )
    record.path, record.odd = "/v1/x", object()
    text = formatter.format(record)
    request_id_var.reset(token)
    line = json.loads(text)
    assert "\n" not in text
    assert (line["message"], line["level"], line["logger"]) == ("it broke", "error", "antiphon.x")
    assert (line["request_id"], line["path"]) == ("r-7", "/v1/x")
    assert "ValueError: why" in line["exception"] and "object" in line["odd"]
    assert "request_id" not in json.loads(formatter.format(record))
