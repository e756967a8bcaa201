"""The bench of append: its conversations are as long as they say, and its verdict follows from its rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from antiphon.eval import bench_append
from antiphon.eval.bench_append import conversation, cpu_ns, tokenisation_us, verdict
from antiphon.scheduler.gateway.prompts import PromptTokenizer, TemplateOptions


@pytest.mark.parametrize("tokens", [1_000, 10_000])
def test_conversations_have_the_length_that_they_are_asked_for(tiny_model_dir: Path, tokens: int) -> None:
    messages = conversation(tokens, seed=1)
    assert messages[-1]["role"] == "user" and len(messages) % 2
    ids = PromptTokenizer(tiny_model_dir).encode_chat(messages, TemplateOptions())
    assert 0.9 * tokens < len(ids) < 1.2 * tokens


def test_tokenising_an_append_is_that_of_what_is_new(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures come from prompts that are equal by both ways: it raises otherwise."""
    monkeypatch.setattr(bench_append, "HISTORIES", (1_000, 20_000))
    found = tokenisation_us(tiny_model_dir, rounds=3)
    assert found["full, 20,000 tokens"] > 3 * found["append, 20,000 tokens"]


def row(mode: str, tokens: int, gateway_ms: float, ledger_us: float, handing_ms: float) -> dict[str, Any]:
    return {
        "mode": mode, "history_tokens": tokens, "gateway_cpu_ms": gateway_ms, "ledger_us": ledger_us,
        "engine_handing_ms": handing_ms,
    }  # fmt: skip


def test_the_verdict_takes_handing_bytes_to_the_engine_out() -> None:
    first, last = bench_append.HISTORIES[0], bench_append.HISTORIES[-1]
    rows = [row("append", first, 10.0, 400.0, 1.0), row("append", last, 12.5, 420.0, 3.0)]
    assert verdict([*rows, row("full", first, 1.0, 1.0, 1.0)]) == {
        "target": 1.1, "gateway_ratio": 1.25, "gateway_ratio_without_handing": 1.05, "ledger_ratio": 1.05,
        "met": True,
    }  # fmt: skip
    assert not verdict([rows[0], row("append", last, 12.5, 480.0, 3.0)])["met"]
    assert not verdict([rows[0], row("append", last, 14.0, 400.0, 3.0)])["met"]


def test_cpu_of_a_process_grows_with_its_work() -> None:
    before = cpu_ns(os.getpid())
    while cpu_ns(os.getpid()) - before < 2_000_000:
        sum(range(1000))
