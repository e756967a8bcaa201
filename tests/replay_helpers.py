"""Small traces for replay tests."""

from __future__ import annotations

from pathlib import Path

import msgspec

from antiphon.traces.schema import RoundTrace, SessionTrace

DEADLINE_S = 60.0
"""For a whole replay."""


def trace_of(tmp_path: Path, *sessions: SessionTrace) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(session) + b"\n" for session in sessions))
    return path


def chat(name: str, rounds: int = 3, gap_s: float = 0.0) -> SessionTrace:
    """A session that keeps everything: 40 new tokens and 5 of output a round."""
    turns = [RoundTrace(40, 5)]
    for _ in range(rounds - 1):
        kept = turns[-1].total_tokens
        turns.append(RoundTrace(kept + 40, 5, kept_tokens=kept, gap_s=gap_s))
    return SessionTrace(name, tuple(turns))
