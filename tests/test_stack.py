"""The whole stack on real parts: gateway process, real SGLang engines, NIXL, Valkey, HTTP clients."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from antiphon.engines import wire
from antiphon.engines.directory_client import AsyncDirectoryClient
from antiphon.engines.page_hash import page_hashes
from antiphon.eval.demo import DemoError, free_ports, judge
from antiphon.eval.stack import EngineSpec, Stack, fetch_json
from antiphon.eval.verify import verify_rounds
from antiphon.policies.base import Arm
from antiphon.traces.replay import ReplayOptions, replay
from antiphon.traces.results import RoundRecord, RunResult, VerifyRecord
from antiphon.traces.schema import RoundTrace, SessionTrace
from tests.conftest import SglangPair

WEKA = Path(os.environ.get("ANTIPHON_TRACES") or Path(__file__).parents[1] / "../shared/traces") / "weka"


@asynccontextmanager
async def gateway(
    pair: SglangPair, valkey_url: str, directory: Path, model: Path, *arguments: str
) -> AsyncIterator[str]:
    """`antiphon serve` over the shared engines, in a fleet of its own; its URL."""
    lines = []
    for record in (pair.prefill, pair.decode):
        addresses = ", ".join(f'"{address}"' for address in record.kv_addresses)
        lines.append(
            f'[[engines]]\nengine_id = "{record.engine_id}"\nurl = "{record.url}"\n'
            f'pool = "{record.pool}"\nkv_addresses = [{addresses}]\n'
        )
    config = directory / f"antiphon-{len(arguments)}.toml"
    config.write_text("\n".join(lines))
    async with Stack(directory, valkey_url, fleet=directory.name.replace("_", "-")) as stack:
        (port,) = free_ports(1)
        yield await stack.start_gateway(
            "--config", str(config), "--model", str(model), *arguments, port=port, engines=2
        )


def trace_of(path: Path, sessions: int, rounds: int, first: int = 300, more: int = 90, out: int = 20) -> Path:
    """A trace of equal sessions; every round extends the one before."""
    with path.open("wb") as file:
        for n in range(sessions):
            turns: list[RoundTrace] = []
            prompt = first + 16 * n
            for r in range(rounds):
                kept = turns[-1].prompt_tokens + out if r else 0
                prompt = kept + more if r else prompt
                turns.append(RoundTrace(prompt, out, kept, 0.05 if r else 0.0))
            file.write(msgspec.json.encode(SessionTrace(f"s{n}", tuple(turns))) + b"\n")
    return path


async def post(url: str, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as http, http.post(url, json=body, headers=headers) as answer:
        return answer.status, await answer.json()


ROUND_BODY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


async def _round(
    url: str, model: str, session: str, prompt: list[int], out: int, **more: Any
) -> tuple[list[int], str]:
    """One completion round of a session: (output ids, arm)."""
    body = ROUND_BODY | more | {"model": model, "prompt": prompt, "max_tokens": out, "session_id": session}
    status, answer = await post(f"{url}/v1/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["token_ids"], answer["session"]["arm"]


def test_mixed_arms_give_the_checkpoints_tokens(
    sglang_pair: SglangPair, valkey_url: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """8 sessions of 6 rounds take turns between two replicas, one local, one remote: every token is right."""
    records: list[VerifyRecord] = []

    async def session(urls: list[str], n: int) -> None:
        prompt, kept = [(n * 37 + i * 11) % 400 + 40 for i in range(280 + 16 * n)], 0
        for turn in range(6):
            salt = {"cache_salt": f"tenant-{n}"} if n % 2 else {}
            url = urls[(turn + n) % 2]
            output, arm = await _round(url, tiny_model_dir.name, f"mixed-{n}", prompt, 20, **salt)
            records.append(VerifyRecord(f"mixed-{n}", turn + 1, kept, prompt, output, arm))
            kept = len(prompt) + len(output)
            prompt = [*prompt, *output, *[(turn * 53 + n * 7 + i) % 400 + 40 for i in range(90)]]

    async def run() -> list[dict[str, Any]]:
        both = [("--policy", "local"), ("--policy", "ampd", "--slo-ttft", "100")]
        async with AsyncExitStack() as stack:
            # pools do not count for `local`: the decode engine is the home that `ampd` settled
            urls = [
                await stack.enter_async_context(
                    gateway(sglang_pair, valkey_url, tmp_path, tiny_model_dir, *arguments)
                )
                for arguments in both
            ]
            async with asyncio.TaskGroup() as tasks:
                for n in range(8):
                    tasks.create_task(session(urls, n))
            return [r for url in urls for r in (await fetch_json(f"{url}/v1/receipts"))[1]["data"]]

    receipts = asyncio.run(run())
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    arms = Counter(receipt["arm"] for receipt in receipts)
    print(f"arms {dict(arms)}")
    assert len(receipts) == 48 and arms["local"] >= 16 and arms["remote_pull"] >= 8, arms
    assert sum(receipt["bytes_decode_to_prefill"] for receipt in receipts) > 0
    assert sum(receipt["bytes_prefill_to_decode"] for receipt in receipts) > 0
    report = verify_rounds(tiny_model_dir, log)
    assert report.rounds_checked == 48 and report.ok, report.mismatches


def test_real_agent_sessions(
    sglang_pair: SglangPair, valkey_url: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Claude Code sessions, lengths divided by 16, through the live stack: every round is completed."""
    trace = WEKA / "rounds.jsonl.gz"
    if not trace.exists():
        pytest.skip("no weka trace: set ANTIPHON_TRACES to the folder of the shared traces")

    async def run() -> RunResult:
        async with gateway(
            sglang_pair, valkey_url, tmp_path, tiny_model_dir, "--policy", "ampd", "--slo-ttft", "0.4"
        ) as url:
            return await replay(
                ReplayOptions(trace, url, concurrency=3, max_sessions=1, divide=16, max_gap_s=0.2),
                lambda record: None,
            )

    result = asyncio.run(run())
    assert result.rounds_total > 30 and result.rounds_completed == result.rounds_total


def test_chat_over_http(
    sglang_pair: SglangPair, valkey_url: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Chat completions, streamed and not, give the same answer; headers and usage tell of the round."""

    async def run() -> None:
        async with gateway(sglang_pair, valkey_url, tmp_path, tiny_model_dir) as url:
            body = {
                "model": tiny_model_dir.name,
                "messages": [{"role": "user", "content": "hello there, what is this?" * 8}],
                "max_tokens": 12,
                "temperature": 0,
            }
            status, whole = await post(f"{url}/v1/chat/completions", body, **{"X-Session-ID": "chat-1"})
            assert status == 200, whole
            text = whole["choices"][0]["message"]["content"]
            async with aiohttp.ClientSession() as http:
                request = http.post(
                    f"{url}/v1/chat/completions",
                    json=body | {"stream": True, "stream_options": {"include_usage": True}},
                    headers={"X-Session-ID": "chat-1"},
                )
                async with request as answer:
                    assert answer.headers["X-Session-ID"] == "chat-1"
                    assert answer.headers["X-Session-Round"] == "2"
                    assert answer.headers["X-Antiphon-Arm"] in {arm.value for arm in Arm}
                    lines = [line[6:] async for line in answer.content if line.startswith(b"data: ")]
            assert lines[-1].strip() == b"[DONE]"
            events = [msgspec.json.decode(line) for line in lines[:-1]]
            streamed = "".join(
                choice["delta"].get("content") or "" for event in events for choice in event["choices"]
            )
            assert streamed == text
            usage = events[-1]["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] > 0, "the prompt was computed a round ago"
            assert not any("sglext" in event for event in events)

    asyncio.run(run())


# ---- with engines of its own, since they are harmed


async def _corrupted_rounds(stack: Stack, url: str, model: Path) -> list[VerifyRecord]:
    """Two rounds; between them a page that only the home's store holds is changed."""
    prompt = [40 + i % 300 for i in range(320)]
    records = []
    output, arm = await _round(url, model.name, "corrupt", prompt, 40)
    records.append(VerifyRecord("corrupt", 1, 0, prompt, output, arm))
    chain = page_hashes([*prompt, *output[:-1]], 16)
    directory = AsyncDirectoryClient(stack.engines["d0"].kv_addresses[0], stack.fleet_key, "test")
    done = await directory.ask(wire.Corrupt(chain[-1]), wire.Corrupted, deadline_s=5.0)
    await directory.close()
    assert done.found
    longer = [*prompt, *output, *[60 + i for i in range(64)]]
    output, arm = await _round(url, model.name, "corrupt", longer, 40)
    assert arm == "remote_pull"
    records.append(VerifyRecord("corrupt", 2, len(prompt) + 40, longer, output, arm))
    return records


@pytest.mark.engine
def test_corruption_is_seen_and_a_killed_engine_loses_no_round(
    tiny_model_dir: Path, tmp_path: Path, fleet_key_environment: None
) -> None:
    """With checksums off, a corrupted page is reported by the demo's check; then kill -9 of the prefill
    engine in the middle of a replay: every round still answers, with the right tokens."""
    killed_at: list[int] = []
    corrupted: list[VerifyRecord] = []

    async def run() -> RunResult:
        async with Stack(tmp_path) as stack:
            ports = free_ports(3)
            options = ("--fault-injection",)
            await stack.start_engines(
                tiny_model_dir,
                [
                    EngineSpec("p0", "prefill", ports[0], options),
                    EngineSpec("d0", "decode", ports[1], options),
                ],
            )
            url = await stack.start_gateway("--policy", "ampd", "--slo-ttft", "30", port=ports[2], engines=2)
            corrupted.extend(await _corrupted_rounds(stack, url, tiny_model_dir))
            done = 0

            def on_round(record: RoundRecord) -> None:
                nonlocal done
                done += 1
                if done == 10:
                    killed_at.append(stack.pid("p0"))
                    stack.kill("p0")

            return await replay(
                ReplayOptions(
                    trace_of(tmp_path / "trace.jsonl", 6, 5),
                    url,
                    concurrency=4,
                    retries=0,
                    verify_log=tmp_path / "log.jsonl",
                ),
                on_round,
            )

    result = asyncio.run(run())
    lines = [msgspec.json.encode(record) + b"\n" for record in corrupted]
    (tmp_path / "corrupted.jsonl").write_bytes(b"".join(lines))
    report = verify_rounds(tiny_model_dir, tmp_path / "corrupted.jsonl")
    assert report.rounds_checked == 2 and report.mismatched_rounds == 1
    assert report.mismatches[0].round == 2
    with pytest.raises(DemoError, match="wrong tokens"):
        judge(result, report)
    assert killed_at and result.rounds_completed == result.rounds_total == 30
    assert result.arms.get("local"), "rounds after the kill are recomputed at home"
    assert verify_rounds(tiny_model_dir, tmp_path / "log.jsonl").ok
