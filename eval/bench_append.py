"""What a round costs the gateway and the ledger as the history grows: append against full history.

Processes of their own: `antiphon serve`, one simulated engine, the embedded Valkey. Sessions of 1,000, 10,000
and 100,000 tokens get the same small rounds, by both ways in turn. CPU is what the kernel says that all
threads of the gateway ran; the ledger's is what Valkey says that commands took. An engine wants all token ids
every round: handing it those bytes is measured apart, by calls of the engine alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import redis.asyncio
from rich.console import Console
from rich.table import Table

from antiphon.engines.base import EngineRecord, GenerateRequest
from antiphon.engines.http import HttpEngine
from antiphon.engines.prompt import Prompt
from antiphon.engines.stream import CHAT_PATH
from antiphon.engines.tiny_model import write_tiny_model
from antiphon.eval.stack import EngineSpec, Stack
from antiphon.scheduler.conversation import Conversation, Said
from antiphon.scheduler.gateway.history import append, go_on, options_key
from antiphon.scheduler.gateway.prompts import PromptTokenizer, TemplateOptions

HISTORIES = (1_000, 10_000, 100_000)
NEW_TOKENS, OUTPUT_TOKENS, MESSAGE_TOKENS = 64, 16, 120
WINDOW_TOKENS = 262_144
PROFILE = "qwen3-32b-h200-tp4"
TARGET_FLAT = 1.1
"""Of an append with the longest history to one with the shortest, in CPU."""
WARM_UP = 3
ROUND_DEADLINE_S = 120.0
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
)
MODES = ("append", "full")

Message = dict[str, Any]


@dataclass(slots=True)
class Cell:
    """One way to send, with one length of history."""

    mode: str
    history_tokens: int
    session_id: str
    messages: list[Message]
    prompt_tokens: int = 0
    received_bytes: list[int] = field(default_factory=list)
    gateway_ns: list[int] = field(default_factory=list)
    ledger_us: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.mode}, {self.history_tokens:,} tokens"


@dataclass(frozen=True, slots=True)
class Options:
    rounds: int = 30
    """Measured of every cell."""


def conversation(tokens: int, seed: int) -> list[Message]:
    """About so many tokens of the tiny model, in messages of MESSAGE_TOKENS; the last one is a user's."""
    chance = random.Random(seed)
    count = max(3, tokens // (MESSAGE_TOKENS + 6)) | 1
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": next(roles), "content": _words(chance, MESSAGE_TOKENS)} for _ in range(count)]


def _words(chance: random.Random, tokens: int) -> str:
    return "".join(f" {chance.choice(WORDS)}" for _ in range(tokens))


def cpu_ns(pid: int) -> int:
    """What all threads of a process have run so far."""
    tasks = Path(f"/proc/{pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir())


# ---------------------------------------------------------------- through the gateway


class _Client:
    """Sends rounds and reads what they cost."""

    def __init__(
        self, stack: Stack, model: str, http: aiohttp.ClientSession, ledger: redis.asyncio.Redis
    ) -> None:
        self._stack = stack
        self._model = model
        self._http = http
        self._ledger = ledger
        self._chance = random.Random(0)

    async def round(self, cell: Cell, *, measured: bool) -> None:
        new = {"role": "user", "content": _words(self._chance, NEW_TOKENS)}
        cell.messages.append(new)
        body: dict[str, Any] = {"model": self._model, "max_tokens": 2 * OUTPUT_TOKENS, "temperature": 0}
        if cell.mode == "append":
            path = f"/v1/sessions/{cell.session_id}/rounds"
            first = not cell.prompt_tokens  # the history comes whole once
            content = msgspec.json.encode({**body, "messages": cell.messages if first else [new]})
        else:
            path = "/v1/chat/completions"
            content = msgspec.json.encode({**body, "messages": cell.messages, "session_id": cell.session_id})
        pid = self._stack.pid("gateway")
        ledger_us, gateway_ns = await self._ledger_us(), cpu_ns(pid)
        async with self._http.post(path, data=content) as answer:
            found = await answer.json()
            if answer.status != 200:
                raise RuntimeError(f"{cell.name}: {answer.status} {found}")
        await self._recorded(cell)
        if measured:
            cell.gateway_ns.append(cpu_ns(pid) - gateway_ns)
            cell.ledger_us.append(await self._ledger_us() - ledger_us)
            cell.received_bytes.append(len(content))
        if found["session"]["id"] != cell.session_id or found["session"].get("warnings"):
            raise RuntimeError(f"{cell.name}: {found['session']}")
        cell.prompt_tokens = found["usage"]["prompt_tokens"]
        cell.messages.append(found["choices"][0]["message"])

    async def _recorded(self, cell: Cell) -> None:
        """Wait until the round is in the ledger: the session's next one would be a fork before."""
        key = f"{{antiphon:{self._stack.fleet}}}:sess:default:{cell.session_id}"
        deadline = time.monotonic() + ROUND_DEADLINE_S
        while await self._ledger.hexists(key, "lease_round"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{cell.name}: the round was not recorded")
            await asyncio.sleep(0.01)

    async def _ledger_us(self) -> int:
        """Time that the ledger spent on scripts and on commands of the gateway's, heartbeats included."""
        stats = await self._ledger.info("commandstats")
        outer = ("cmdstat_evalsha", "cmdstat_set", "cmdstat_get", "cmdstat_mget")
        return sum(int(stats[name]["usec"]) for name in outer if name in stats)


async def measure_rounds(stack: Stack, model: Path, options: Options) -> list[Cell]:
    """Every cell's rounds in turn, in another order each time."""
    run = uuid.uuid4().hex[:8]
    cells = [
        Cell(mode, tokens, f"{run}-{mode}-{tokens}", conversation(tokens, tokens)[:-1])
        for tokens in HISTORIES
        for mode in MODES
    ]
    timeout = aiohttp.ClientTimeout(total=ROUND_DEADLINE_S)
    ledger = redis.asyncio.Redis.from_url(stack.ledger_url, decode_responses=True)
    try:
        async with aiohttp.ClientSession(stack.gateway_url, timeout=timeout) as http:
            client = _Client(stack, model.name, http, ledger)
            order = random.Random(1)
            for number in range(WARM_UP + options.rounds):
                for cell in order.sample(cells, len(cells)):
                    await client.round(cell, measured=number >= WARM_UP)
    finally:
        await ledger.aclose()
    return cells


# ---------------------------------------------------------------- parts alone


def tokenisation_us(model: Path, rounds: int) -> dict[str, float]:
    """Of making a prompt's ids, in this process: p50 by cell."""
    tokenizer, options = PromptTokenizer(model), TemplateOptions()
    found = {}
    chance = random.Random(2)
    for tokens in HISTORIES:
        messages = conversation(tokens, tokens)
        base = Conversation("t", "s")
        for new, reply in ((messages[:-2], " so"), (messages[-1:], " so")):
            base = _after(tokenizer, base, new, reply, options)
        times: dict[str, list[int]] = {mode: [] for mode in MODES}
        for _ in range(rounds):
            new = [{"role": "user", "content": _words(chance, NEW_TOKENS)}]
            began = time.perf_counter_ns()
            plan = append(tokenizer, base, new, options, same_options=True)
            times["append"].append(time.perf_counter_ns() - began)
            began = time.perf_counter_ns()
            whole = go_on(tokenizer, base, [*base.messages, *new], options)
            times["full"].append(time.perf_counter_ns() - began)
            if not plan.spliced or plan.ids != whole.ids:
                raise RuntimeError("append made another prompt than the full history")
        for mode in MODES:
            found[f"{mode}, {tokens:,} tokens"] = statistics.median(times[mode]) / 1000
    return found


def _after(
    tokenizer: PromptTokenizer,
    base: Conversation,
    new: Sequence[Message],
    text: str,
    options: TemplateOptions,
) -> Conversation:
    plan = go_on(tokenizer, base, [*base.messages, *new], options)
    prompt = plan.prompt()
    output = [*tokenizer.encode_rendered(text), *sorted(tokenizer.eos_ids)[:1]]
    said = Said(
        prompt, prompt.extended(output), plan.kept_tokens, len(base.messages), new,
        {"role": "assistant", "content": text}, True, options_key(None, options), tokenizer.fingerprint, "m",
        1, plan.text,
    )  # fmt: skip
    return base.add(said.entry(base), said)


async def handing_over(record: EngineRecord, fleet_key: bytes, rounds: int) -> dict[int, tuple[int, float]]:
    """History -> (bytes of the body, CPU in ms) of asking the engine itself, with a prompt that has grown."""
    engine = HttpEngine(record, fleet_key)
    costs: dict[int, list[int]] = {tokens: [] for tokens in HISTORIES}
    prompts = {tokens: Prompt([1 + i % 400 for i in range(tokens)]) for tokens in HISTORIES}
    sizes = {}
    try:
        for number in range(WARM_UP + rounds):
            for tokens in HISTORIES:
                prompts[tokens] = prompts[tokens].extended([number % 400] * NEW_TOKENS)
                request = GenerateRequest(
                    CHAT_PATH, prompts[tokens], uuid.uuid4().hex, "bench", {"max_tokens": OUTPUT_TOKENS}
                )
                began = time.process_time_ns()
                async with aclosing(engine.generate(request, deadline_s=ROUND_DEADLINE_S)) as chunks:
                    async for _ in chunks:
                        pass
                if number >= WARM_UP:
                    costs[tokens].append(time.process_time_ns() - began)
                sizes[tokens] = len(prompts[tokens].json())
    finally:
        await engine.close()
    return {tokens: (sizes[tokens], statistics.median(costs[tokens]) / 1e6) for tokens in HISTORIES}


# ---------------------------------------------------------------- the run


def bench_model(directory: Path) -> Path:
    """The tiny model's tokenizer, with a window for long histories."""
    made = write_tiny_model(directory)
    config = made / "config.json"
    settings = json.loads(config.read_bytes()) | {"max_position_embeddings": WINDOW_TOKENS}
    config.write_text(json.dumps(settings))
    return made


def write_script(path: Path, model: Path, answers: int) -> None:
    """Answers whose ids are those of their text: hashed ones are no text of this tokenizer."""
    tokenizer = PromptTokenizer(model)
    text = _words(random.Random(3), OUTPUT_TOKENS)
    ids = [*tokenizer.encode_rendered(text), *sorted(tokenizer.eos_ids)[:1]]
    path.write_bytes((msgspec.json.encode({"text": text, "token_ids": ids}) + b"\n") * answers)


async def _measured(options: Options) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = await asyncio.to_thread(bench_model, Path(folder) / "tiny")
        async with Stack(Path(folder)) as stack:
            sizes = ("--context-length", str(WINDOW_TOKENS), "--max-total-tokens", str(4 * WINDOW_TOKENS))
            port, engine_port = _free_ports()
            script = Path(folder) / "script.jsonl"
            await asyncio.to_thread(
                write_script, script, model, 2 * len(HISTORIES) * (WARM_UP + options.rounds)
            )
            simulated = ("--simulated", "--profile", PROFILE, "--script", str(script))
            engine = EngineSpec("d0", "decode", engine_port, simulated, sizes)
            await stack.start_engines(model, [engine])
            await stack.start_gateway("--model", str(model), "--policy", "local", port=port)
            cells = await measure_rounds(stack, model, options)
            handing = await handing_over(stack.engines["d0"], stack.fleet_key, options.rounds)
        tokenisation = await asyncio.to_thread(tokenisation_us, model, options.rounds)
    return result_of(cells, tokenisation, handing)


def _free_ports() -> Iterator[int]:
    from antiphon.eval.demo import free_ports

    return iter(free_ports(2))


def measure_append(options: Options | None = None) -> dict[str, Any]:
    """Run it all; JSON-ready."""
    return asyncio.run(_measured(options or Options()))


def result_of(
    cells: Sequence[Cell], tokenisation: dict[str, float], handing: dict[int, tuple[int, float]]
) -> dict[str, Any]:
    rows = [
        {
            "name": cell.name,
            "mode": cell.mode,
            "history_tokens": cell.history_tokens,
            "prompt_tokens": cell.prompt_tokens,
            "rounds": len(cell.gateway_ns),
            "received_bytes": round(statistics.median(cell.received_bytes)),
            "tokenisation_us": round(tokenisation[cell.name], 1),
            "gateway_cpu_ms": round(statistics.median(cell.gateway_ns) / 1e6, 3),
            "ledger_us": round(statistics.median(cell.ledger_us), 1),
            "engine_bytes": handing[cell.history_tokens][0],
            "engine_handing_ms": round(handing[cell.history_tokens][1], 3),
        }
        for cell in cells
    ]
    return {"rows": rows, "append": verdict(rows)}


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The longest history against the shortest: gateway with and without handing the bytes over, ledger."""
    own = {row["history_tokens"]: row for row in rows if row["mode"] == "append"}
    short, long = own[HISTORIES[0]], own[HISTORIES[-1]]
    more_handing_ms = long["engine_handing_ms"] - short["engine_handing_ms"]
    gateway = long["gateway_cpu_ms"] / short["gateway_cpu_ms"]
    without = (long["gateway_cpu_ms"] - more_handing_ms) / short["gateway_cpu_ms"]
    ledger = long["ledger_us"] / short["ledger_us"]
    return {
        "target": TARGET_FLAT,
        "gateway_ratio": round(gateway, 4),
        "gateway_ratio_without_handing": round(without, 4),
        "ledger_ratio": round(ledger, 4),
        "met": without <= TARGET_FLAT and ledger <= TARGET_FLAT,
    }


def print_append(result: dict[str, Any], console: Console) -> None:
    table = Table(title="A round by append and by full history; medians; the bytes to the engine apart")
    for heading in ("round", "received B", "tokenise us", "gateway CPU ms", "ledger us", "to engine B", "ms"):
        table.add_column(heading, justify="left" if heading == "round" else "right")
    for row in result["rows"]:
        table.add_row(
            row["name"], f"{row['received_bytes']:,}", f"{row['tokenisation_us']:,.0f}",
            f"{row['gateway_cpu_ms']:.2f}", f"{row['ledger_us']:.0f}", f"{row['engine_bytes']:,}",
            f"{row['engine_handing_ms']:.2f}",
        )  # fmt: skip
    console.print(table)
    found = result["append"]
    console.print(
        f"append, {HISTORIES[-1]:,} tokens against {HISTORIES[0]:,}: gateway {found['gateway_ratio']:.2f},"
        f" without handing bytes to the engine {found['gateway_ratio_without_handing']:.2f}, ledger"
        f" {found['ledger_ratio']:.2f}; target at most {found['target']}:"
        f" {'met' if found['met'] else 'MISSED'}"
    )


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="antiphon.eval.bench_append", description=__doc__)
    parser.add_argument("--rounds", type=int, default=Options().rounds)
    print_append(measure_append(Options(parser.parse_args().rounds)), Console(width=120))
