"""`make demo`: real engines serve a small agent trace through the scheduler, and every token is checked.

    1. a tiny model is written, Valkey, one prefill and one decode engine start
    2. one prefill without load is measured; the TTFT target is a multiple of it
    3. the gateway starts with policy `ampd`; the trace is replayed; receipts are printed as they come
    4. every output token is compared with a teacher-forced forward of transformers on the same checkpoint
    5. build/demo/result.json is written and everything is stopped

`make serve` (`--serve`) does steps 1 to 3 without the replay and leaves the stack up until Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import shutil
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

import msgspec
from rich.console import Console

from antiphon.engines.http import HttpEngine
from antiphon.engines.launch_options import LaunchError, check_port_free, find_free_ports
from antiphon.engines.page_hash import namespace_seed, page_hashes
from antiphon.engines.tiny_model import write_tiny_model
from antiphon.eval.stack import EngineSpec, Stack, StackError, fetch_json
from antiphon.eval.verify import VerifyReport, verify_rounds
from antiphon.traces.display import result_table
from antiphon.traces.plan import ORDINARY_IDS
from antiphon.traces.prompts import prompt_ids
from antiphon.traces.readers import read_trace
from antiphon.traces.replay import ReplayOptions, replay
from antiphon.traces.results import RunResult, result_object, write_rounds

ARMS_NEEDED = ("local", "remote_pull")
CONCURRENCIES = (4, 8, 16)
"""Live sessions, tried in turn until both arms occurred."""
REPEATS = 3
"""The bundled trace is sent so often, each time as new sessions: AMPD's first tier looks back 10 s, so it
closes and opens again only in a run of some length."""
SLO_FACTOR = 5.0
"""TTFT target = this times one unloaded prefill. A remote round has two requests and a transfer, about two of
them: slack while few sessions are live, none when they queue."""
DEMO_SETTINGS = "[policy.ampd]\nalpha = 0.8\nbeta = 0.8\n"
"""So that its first tier is open while few sessions are live, and every arm is seen: not what serves best."""
DEMO_PAGE_TOKENS = 16
"""The launcher's page size on a CPU."""
RECEIPT_POLL_S = 0.3
BUNDLED_TRACE = Path(str(resources.files("antiphon.traces") / "data" / "demo.jsonl"))


class DemoError(Exception):
    """The demo did not show what it must; the message says what."""


@dataclass(frozen=True)
class DemoOptions:
    directory: Path = Path("build/demo")
    trace: Path | None = None
    """None = the bundled one."""
    serve: bool = False
    port: int = 0
    policy: str = "ampd"
    fault_injection: bool = False
    """For the test that corrupts a page: the check must then report it."""


@asynccontextmanager
async def running_stack(options: DemoOptions, console: Console) -> AsyncIterator[tuple[Stack, Path]]:
    """Model, Valkey and both engines; the gateway is the caller's, since it needs the measured target."""
    with lock_directory(options.directory):
        shutil.rmtree(options.directory, ignore_errors=True)
        model = options.directory / "model"
        console.print(f"model: tiny float32 Llama in {model}")
        write_tiny_model(model)
        extra = ("--fault-injection",) if options.fault_injection else ()
        async with Stack(options.directory) as stack:
            started = time.monotonic()
            console.print(
                "starting one prefill and one decode engine (SGLang on this CPU, about a minute) ..."
            )
            ports = free_ports(2)
            specs = [
                EngineSpec("p0", "prefill", ports[0], extra),
                EngineSpec("d0", "decode", ports[1], extra),
            ]
            await stack.start_engines(model, specs)
            console.print(f"engines up after {time.monotonic() - started:.0f} s: p0 (prefill), d0 (decode)")
            yield stack, model


def lock_directory(directory: Path) -> IO[bytes]:
    """Held until it is closed: the directory of a running stack must not be deleted by another run."""
    path = directory.with_name(f"{directory.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise DemoError(
            f"{directory} is in use by another `make demo` or `make serve`: stop it, or give --directory"
        ) from None
    return lock


async def measure_prefill_s(stack: Stack, prompt: list[int]) -> float:
    """Seconds of one whole prefill without load: the best of three, each under a salt of its own.

    Each prompt is then pulled by the other engine, both ways: first connections are slow, and one slow first
    sample would close AMPD's first tier for 10 s.
    """
    pair = [HttpEngine(stack.engines[name], stack.fleet_key) for name in ("p0", "d0")]
    try:
        for engine in pair:
            await engine.connect(30.0)
        best = float("inf")
        for engine, other in (pair, pair[::-1], pair):
            rid, salt = uuid.uuid4().hex, uuid.uuid4().hex
            began = time.perf_counter()
            await engine.prefill(prompt, rid, session_id="measure", cache_salt=salt, deadline_s=60.0)
            best = min(best, time.perf_counter() - began)
            seed, source = namespace_seed(cache_salt=salt), engine.record
            hashes = page_hashes(prompt, DEMO_PAGE_TOKENS, seed)
            await other.prefetch(source.kv_addresses, source.incarnation, seed, hashes, deadline_s=10.0)
        return best
    finally:
        for engine in pair:
            await engine.close()


async def run_demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """All five steps; the result as written. Raises `DemoError` or `StackError`."""
    began = time.monotonic()
    async with running_stack(options, console) as (stack, model):
        trace = write_trace(options.directory / "trace.jsonl", options.trace or BUNDLED_TRACE)
        prefill_s, slo_s = await _start_gateway(stack, trace, options, console)
        result, log = await _replay_until_both_arms(stack, trace, options, slo_s, console)
        console.print(result_table(result))
    console.print("checking every output token with transformers ...")
    report = await asyncio.to_thread(verify_rounds, model, log)
    written = _write_result(options.directory / "result.json", result, report, prefill_s, slo_s, began)
    judge(result, report)
    console.print(
        f"{report.rounds_checked} rounds, {report.tokens_checked} tokens checked: all equal. "
        f"result: {options.directory / 'result.json'} ({written['wall_s_total']:.0f} s in all)"
    )
    return written


async def _start_gateway(
    stack: Stack, trace: Path, options: DemoOptions, console: Console
) -> tuple[float, float]:
    """(unloaded prefill, TTFT target) in seconds; the gateway runs with that target."""
    session = next(iter(read_trace(trace)))
    prefill_s = await measure_prefill_s(stack, prompt_ids(session, 0, [], ORDINARY_IDS, 0))
    slo_s = round(SLO_FACTOR * prefill_s, 3)
    console.print(
        f"one prefill of {session.rounds[0].prompt_tokens} tokens without load: {prefill_s:.3f} s; "
        f"TTFT target: {slo_s:.3f} s"
    )
    (port,) = free_ports(1) if not options.port else (options.port,)
    settings = stack.directory / "antiphon.toml"
    settings.write_text(DEMO_SETTINGS, encoding="utf-8")
    url = await stack.start_gateway(
        *("--config", str(settings), "--policy", options.policy),
        *("--slo-ttft", f"{slo_s:.3f}", "--slo-itl", "0.5"),
        port=port,
        engines=2,
    )
    console.print(f"gateway: {url} (policy {options.policy})")
    return prefill_s, slo_s


async def _replay_until_both_arms(
    stack: Stack, trace: Path, options: DemoOptions, slo_s: float, console: Console
) -> tuple[RunResult, Path]:
    """Replay at one concurrency after another until both arms occurred; each run has sessions of its own."""
    seen: list[str] = []
    for concurrency in CONCURRENCIES:
        log = options.directory / f"rounds-{concurrency}.jsonl"
        console.print(f"replaying {trace.name}, at most {concurrency} live sessions")
        printed: set[str] = set()
        watcher = asyncio.create_task(_watch_receipts(stack.gateway_url, console, printed))
        try:
            result = await replay(
                ReplayOptions(
                    trace,
                    stack.gateway_url,
                    concurrency=concurrency,
                    seed=concurrency,  # other tokens than the run before: nothing of it is cached
                    slo_ttft_s=slo_s,
                    verify_log=log,
                ),
                lambda record: None,
            )
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])
        await _print_receipts(stack.gateway_url, console, printed)
        if all(result.arms.get(arm) for arm in ARMS_NEEDED):
            return result, log
        seen.append(f"{concurrency} sessions: {result.arms}")
    raise DemoError(f"not every arm of {', '.join(ARMS_NEEDED)} occurred: {'; '.join(seen)}")


async def _watch_receipts(url: str, console: Console, printed: set[str]) -> None:
    """Print receipts as they come, until cancelled."""
    while True:
        await _print_receipts(url, console, printed)
        await asyncio.sleep(RECEIPT_POLL_S)


async def _print_receipts(url: str, console: Console, printed: set[str]) -> None:
    """A line for each of the newest receipts that is not in `printed` yet, oldest first."""
    _, listed = await fetch_json(f"{url}/v1/receipts?limit=100")
    for receipt in reversed(listed.get("data", ())):
        if receipt["round_id"] not in printed:
            printed.add(receipt["round_id"])
            console.print(_receipt_line(receipt), highlight=False, markup=False, soft_wrap=True)


def _receipt_line(receipt: dict[str, Any]) -> str:
    ttft = f"{receipt['ttft_s']:.3f} s" if receipt["ttft_s"] is not None else receipt["outcome"]
    cached = f"{receipt['cached_tokens']:>4}/{receipt['prompt_tokens']:<4}"
    session = receipt["session_id"].rpartition("/")[2]  # without the replay's own prefix
    return (
        f"  {session:>8} round {receipt['round_number']:>2}  {receipt['arm'] or '-':16} "
        f"TTFT {ttft:>8}  cached {cached} {receipt['reason']}"
    )


def write_trace(path: Path, source: Path) -> Path:
    """The sessions of `source`, REPEATS times, under new ids."""
    sessions = list(read_trace(source))
    with path.open("wb") as file:
        for repeat in range(REPEATS):
            for session in sessions:
                renamed = msgspec.structs.replace(session, session_id=f"{session.session_id}.{repeat + 1}")
                file.write(msgspec.json.encode(renamed) + b"\n")
    return path


def _write_result(
    path: Path, result: RunResult, report: VerifyReport, prefill_s: float, slo_s: float, began: float
) -> dict[str, Any]:
    written = result_object(result)
    written |= {
        "mismatched_rounds": report.mismatched_rounds,
        "rounds_checked": report.rounds_checked,
        "tokens_checked": report.tokens_checked,
        "near_ties": report.near_ties,
        "broken_prompts": len(report.broken_prompts),
        "unloaded_prefill_s": prefill_s,
        "slo_ttft_s": slo_s,
        "wall_s_total": time.monotonic() - began,
    }
    path.write_text(json.dumps(written, indent=1) + "\n")
    write_rounds(result.rounds, path.with_suffix(".rounds.jsonl"))
    return written


def judge(result: RunResult, report: VerifyReport) -> None:
    """Raise `DemoError` unless the run showed everything that it must."""
    wrong: list[str] = []
    if result.rounds_completed != result.rounds_total:
        wrong.append(f"{result.rounds_completed} of {result.rounds_total} rounds were completed")
    if not result.bytes_decode_to_prefill or not result.bytes_prefill_to_decode:
        wrong.append(
            f"no KV moved one way: {result.bytes_decode_to_prefill} bytes d->p, "
            f"{result.bytes_prefill_to_decode} bytes p->d"
        )
    if report.rounds_checked != result.rounds_completed:
        wrong.append(f"only {report.rounds_checked} of {result.rounds_completed} rounds were checked")
    if not report.ok:
        first = (
            report.mismatches[0] if report.mismatches else next(iter(report.broken_prompts), "none checked")
        )
        wrong.append(f"{report.mismatched_rounds} rounds have wrong tokens, first: {first}")
    if wrong:
        raise DemoError("; ".join(wrong))


async def run_serve(options: DemoOptions, console: Console) -> None:
    """The same stack, up until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    check_port_free("127.0.0.1", options.port, "--port")
    async with running_stack(options, console) as (stack, model):
        await _start_gateway(stack, BUNDLED_TRACE, options, console)
        body = json.dumps(
            {"model": model.name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16}
        )
        console.print("try:", highlight=False)
        console.print(
            f"curl -s {stack.gateway_url}/v1/chat/completions -H 'X-Session-ID: run-1' -d '{body}'",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        for command in ("status", "receipts"):
            console.print(f"antiphon {command} --url {stack.gateway_url}", markup=False, highlight=False)
        console.print(f"antiphon doctor --state-dir {stack.state_dir}", markup=False, highlight=False)
        console.print("Ctrl-C stops everything.")
        await stop.wait()


def free_ports(count: int) -> list[int]:
    """Neighbouring ports of 127.0.0.1 that nobody listens on now."""
    first = find_free_ports("127.0.0.1", count)
    return list(range(first, first + count))


def main(arguments: list[str] | None = None) -> int:
    """0 = everything was shown, 1 = something was not (said on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m antiphon.eval.demo", description=__doc__)
    parser.add_argument("--serve", action="store_true", help="leave the stack up instead of replaying")
    parser.add_argument("--port", type=int, default=0, help="of the gateway; 0 = any free one")
    parser.add_argument("--directory", type=Path, default=DemoOptions.directory)
    given = parser.parse_args(arguments)
    console = Console()
    options = DemoOptions(directory=given.directory, serve=given.serve, port=given.port or 8000 * given.serve)
    try:
        if options.serve:
            asyncio.run(run_serve(options, console))
        else:
            asyncio.run(run_demo(options, console))
    except (DemoError, StackError, LaunchError) as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
