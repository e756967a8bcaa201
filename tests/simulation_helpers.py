"""Small clusters and traces for tests of the simulator."""

from __future__ import annotations

import random
from pathlib import Path

from antiphon.traces.schema import RoundTrace, SessionTrace

PROFILE = """{
  "name": "test", "source": "made up for tests",
  "prefill": {"fixed_s": 0.01, "per_token_s": 1e-4, "per_token_cached_s": 1e-9, "per_token_squared_s": 1e-9},
  "decode": {"fixed_s": 0.008, "per_request_s": 0.0005, "per_context_token_s": 1e-7},
  "transfer": {"fixed_s": 0.002, "bytes_per_s": 1e9, "kv_bytes_per_token": 50000},
  "load": {"fixed_s": 0.001, "bytes_per_s": 4e9}
}
"""

CLUSTER = """
name = "test"
page_tokens = 16
window_tokens = 32768
claim_s = 0.0004
slo = {{ttft_s = 0.6, itl_s = 0.03}}

[[engines]]
count = {prefill}
pool = "prefill"
profile = "profile.json"
device_tokens = 40000
store_tokens = 160000
link_bytes_per_s = {link}
chunk_tokens = 512
decode_interval = {interval}
request_fixed_s = 0.001

[[engines]]
count = {decode}
pool = "decode"
profile = "profile.json"
device_tokens = {device}
store_tokens = 160000
link_bytes_per_s = {link}
chunk_tokens = 512
decode_interval = {interval}
request_fixed_s = 0.001
price_per_gpu_hour = 2.0
"""


def cluster_file(
    folder: Path,
    *,
    prefill: int = 2,
    decode: int = 2,
    link: float = 1e9,
    interval: int = 1,
    device: int = 40_000,
    more: str = "",
) -> Path:
    """A cluster of small engines; without prefill engines it has one pool."""
    (folder / "profile.json").write_text(PROFILE)
    text = CLUSTER.format(prefill=max(1, prefill), decode=decode, link=link, interval=interval, device=device)
    if not prefill:
        first, last = text.index("[[engines]]"), text.rindex("[[engines]]")
        text = text[:first] + text[last:]
    path = folder / "cluster.toml"
    path.write_text(text + more)
    return path


def agent_sessions(count: int, seed: int, *, shared_tokens: int = 320) -> list[SessionTrace]:
    """Agents that grow, sometimes compact, sometimes leave their thinking out; half share a prefix."""
    chance = random.Random(seed)
    sessions = []
    for number in range(count):
        rounds: list[RoundTrace] = []
        there = 0
        for _ in range(chance.randint(1, 8)):
            kept = there
            if rounds and chance.random() < 0.15:
                kept = rounds[-1].prompt_tokens
            elif rounds and chance.random() < 0.1:
                kept = chance.randint(0, there)
            new = chance.randint(400, 3000) if not rounds else chance.randint(20, 900)
            output = chance.randint(1, 120)
            gap_s = chance.uniform(0.0, 2.0)
            rounds.append(RoundTrace(kept + new, output, kept if rounds else 0, gap_s if rounds else 0.0))
            there = kept + new + output
        shared = number % 2 * shared_tokens
        prefix = "system" if shared else ""
        sessions.append(SessionTrace(f"s{number}", tuple(rounds), shared_prefix=prefix, shared_tokens=shared))
    return sessions
