"""`antiphon calibrate --url URL`: measures a live engine and fits a latency profile to it.

Prefill over new and cached tokens, decode steps over batch and context, loading from the page store, and,
with a second engine, pulling KV between the two. Every point is measured once, then all of them again while
time is left; a point counts with its median. What was not measured is that of a base profile, and says so.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
from rich.console import Console

from antiphon.engines.base import EngineError, EngineRecord
from antiphon.eval.calibration import Calibration, Measured, fit_measured, summary
from antiphon.eval.least_squares import DecodePoint, FitFailed
from antiphon.eval.probe import EngineInfo, Probe, ProbeError
from antiphon.policies.latency import load_latency_model
from antiphon.scheduler.config import Config, LedgerConfig
from antiphon.scheduler.fleet_key import KEY_FILE, KEY_VARIABLE, load_or_create_fleet_key
from antiphon.scheduler.ledger import Ledger, LedgerUnavailable
from antiphon.traces.output import check_writable, whole_file

WHOLE_PROMPT_UNIT_TOKENS = 512
"""Lengths of the points are multiples of the chunk; of this, where there are no chunks."""
NEW = (1 / 32, 1 / 8, 1 / 2, 1, 2, 4)
CACHED = (0, 1, 2, 4)
BATCHES = (1, 2, 4, 8, 16)
CONTEXTS = (1 / 8, 1, 4)
PULLS = (1 / 8, 1, 4)
"""All in units of a chunk."""
DECODE_TOKENS = 32
POOL_SHARE = 0.5
"""Of the device, that one point may fill."""
MAX_REPEATS = 5
CROWDED_SAMPLES = 7
PAUSE_S = 0.05
"""Before a prefill: on a CPU a pass after a pause takes some percent longer, and traffic has pauses."""


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """What `antiphon calibrate` can be told."""

    url: str
    """Of an engine; or of a gateway, with `engine`."""
    engine: str | None = None
    """Engine id, where `url` is a gateway's."""
    ledger: str | None = None
    """Redis URL: needed for what goes over the engines' directories (pulls)."""
    peer: str | None = None
    """Engine id in that ledger: KV is pulled from the measured engine into this one."""
    fleet: str = "default"
    state_dir: str = ""
    """Where the fleet key is, "" = the usual place; the environment's key wins."""
    base: str = "tiny-cpu"
    """Profile for what is not measured."""
    output: Path | None = None
    name: str = ""
    """Of the profile; "" = of the output file, or `calibrated`."""
    budget_s: float = 75.0
    """Points are measured again while this is not over; the first time all are measured anyway."""
    most_tokens: int = 4096
    """Longest prompt to try."""


OnStep = Callable[[str], None]


async def calibrate(options: CalibrateOptions, on_step: OnStep = lambda words: None) -> Calibration:
    """Measure and fit; the engine should be idle but for this. Raises `ProbeError` or `FitFailed`."""
    async with sampling(options) as sampler:
        began = time.monotonic()
        for repeat in range(MAX_REPEATS):
            spent_s = time.monotonic() - began
            if repeat and spent_s * (repeat + 1) / repeat > options.budget_s:
                break
            on_step(f"round {repeat + 1} of measurements, {spent_s:.0f} s in")
            await sampler.round()
        return sampler.fit()


@asynccontextmanager
async def sampling(options: CalibrateOptions) -> AsyncIterator[Sampler]:
    """The engine, ready to be measured in rounds. Raises `ProbeError`."""
    state_dir = Config(ledger=LedgerConfig(state_dir=options.state_dir)).state_dir()
    # An engine of ours asks for a key that is made from the fleet's: where there is one, it is brought.
    known = options.ledger is not None or KEY_VARIABLE in os.environ or (state_dir / KEY_FILE).exists()
    key = load_or_create_fleet_key(state_dir) if known else b""
    record, peer_record = await _records(options)
    try:
        async with AsyncExitStack() as stack:
            probe = await stack.enter_async_context(Probe(record, key))
            peer = None
            if peer_record is not None:
                peer = await stack.enter_async_context(Probe(peer_record, key))
            sampler = Sampler(probe, peer, options)
            await sampler.warm_up()
            yield sampler
    except EngineError as error:
        raise ProbeError(str(error)) from error


def run_calibrate(options: CalibrateOptions, console: Console | None = None) -> int:
    """The command: 0 = the profile is written (or printed), 2 = the engine could not be measured."""
    console = console or Console()
    try:
        if options.output is not None:
            check_writable(options.output)  # measuring takes minutes
        found = asyncio.run(calibrate(options, lambda words: console.print(words, highlight=False)))
        text = msgspec.json.format(msgspec.json.encode(found.profile), indent=2).decode()
        if options.output is not None:
            with whole_file(options.output) as file:
                file.write(text.encode() + b"\n")
    except (ProbeError, FitFailed, OSError, ValueError) as error:
        console.print(f"antiphon calibrate: {error}", style="red", markup=False, highlight=False)
        return 2
    console.print(summary(found), markup=False, highlight=False, soft_wrap=True)
    if options.output is None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(f"profile: {options.output}", markup=False, highlight=False)
    return 0


# ---------------------------------------------------------------- which engine


async def _records(options: CalibrateOptions) -> tuple[EngineRecord, EngineRecord | None]:
    """The engine to measure and the one that pulls from it, with all that is known of them."""
    if not options.url.startswith(("http://", "https://")):
        raise ProbeError(f"--url {options.url!r} is no URL: give it as http://HOST:PORT")
    if options.ledger is None:
        if options.peer is not None:
            raise ProbeError("--peer needs --ledger: engines are told apart and proven there")
        url = options.url if options.engine is None else await _url_at_gateway(options)
        return EngineRecord("engine", url.rstrip("/"), "decode", ""), None
    ledger = Ledger(options.ledger, fleet=options.fleet)
    try:
        known = await ledger.engines()
    except LedgerUnavailable as error:
        raise ProbeError(f"the ledger is away: {error}") from error
    finally:
        await ledger.close()
    by_id = {record.engine_id: record for record in known}
    wanted = next((r for r in known if r.url.rstrip("/") == options.url.rstrip("/")), None)
    wanted = by_id.get(options.engine or "", wanted)
    missing = options.peer if options.peer not in (None, *by_id) else None
    if wanted is None or missing:
        raise ProbeError(
            f"the ledger has no engine {missing or options.engine or options.url!r}; "
            f"there are {', '.join(sorted(by_id)) or 'none'}"
        )
    return wanted, by_id[options.peer] if options.peer else None


async def _url_at_gateway(options: CalibrateOptions) -> str:
    try:
        timeout = aiohttp.ClientTimeout(total=10.0)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"{options.url.rstrip('/')}/v1/engines") as answer,
        ):
            listed = (await answer.json(content_type=None))["data"]
        return next(str(item["url"]) for item in listed if item["engine_id"] == options.engine)
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
        raise ProbeError(f"{options.url} lists no engines ({error!r}): is it a gateway?") from error
    except StopIteration:
        raise ProbeError(f"the gateway at {options.url} knows no engine {options.engine!r}") from None


# ---------------------------------------------------------------- measuring


def _unit(info: EngineInfo) -> int:
    return info.chunk_tokens or WHOLE_PROMPT_UNIT_TOKENS


def _whole_pages(tokens: float, info: EngineInfo) -> int:
    return max(1, round(tokens / info.page_tokens)) * info.page_tokens if tokens else 0


def prefill_grid(info: EngineInfo, most_tokens: int) -> list[tuple[int, int]]:
    """(new, cached) of every point: cheap ones first."""
    unit = _unit(info)
    longest = min(most_tokens, int(info.device_tokens * POOL_SHARE), info.window_tokens - 1)
    grid = {
        (_whole_pages(new * unit, info), _whole_pages(cached * unit, info))
        for new in NEW
        for cached in CACHED
    }
    return sorted((g for g in grid if sum(g) <= longest), key=lambda point: (sum(point), point))


def decode_grid(info: EngineInfo, most_tokens: int) -> Iterator[tuple[int, int]]:
    """(batch, prompt tokens of each) of every point."""
    for batch in (b for b in BATCHES if b <= info.max_running_requests):
        for share in CONTEXTS:
            context = _whole_pages(share * _unit(info), info)
            whole = context + DECODE_TOKENS + info.page_tokens
            if (
                whole <= min(most_tokens, info.window_tokens)
                and batch * whole <= info.device_tokens * POOL_SHARE
            ):
                yield batch, context


class Sampler:
    """Takes every point once per round, and keeps what it took."""

    def __init__(self, probe: Probe, peer: Probe | None, options: CalibrateOptions) -> None:
        self._probe = probe
        self._peer = peer
        self._options = options
        self._prefill: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        self._decode: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
        self._load: defaultdict[int, list[float]] = defaultdict(list)
        self._pull: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
        self._pings: list[float] = []
        self.typical: Callable[[Iterable[float]], float] = statistics.median
        """Which of a point's times counts."""

    def clear(self) -> None:
        """Forget all times: a new beginning."""
        self._prefill.clear()
        self._decode.clear()
        self._pings.clear()
        if self._peer is not None:  # else there will be no more pulls, and the old ones hold
            self._pull.clear()
            self._load.clear()

    async def warm_up(self) -> None:
        """First requests, and first connections, are slow."""
        first = self._probe.fresh(2 * self._probe.info.page_tokens)
        await self._probe.prefill(first)
        if self._peer is not None:
            await self._peer.pull_s(self._probe.record, first)

    def drop_peer(self) -> None:
        """No more pulls: the peer is going away."""
        self._peer = None

    async def round(self) -> None:
        """Every point once."""
        info, most = self._probe.info, self._options.most_tokens
        self._pings.append(await self._probe.ping_s())
        await self._prefills(prefill_grid(info, most))
        for batch, context in decode_grid(info, most):
            self._decode[batch, context].append(await self._decode_point(batch, context))
        for tokens in (_whole_pages(share * _unit(info), info) for share in PULLS):
            if tokens < min(most, info.window_tokens):
                await self._load_and_pull(tokens)

    async def crowded_slowdown(self) -> float:
        """Time of a prefill while the peer answers a request, over its time alone: > 1 on shared cores."""
        probe, peer = self._probe, self._peer
        if peer is None:
            raise ProbeError("without a peer nothing crowds the engine")
        tokens = _unit(probe.info)
        ratios = []
        for _ in range(CROWDED_SAMPLES):
            alone = await probe.prefill(probe.fresh(tokens))
            crowd = asyncio.create_task(peer.answer(peer.fresh(tokens), DECODE_TOKENS))
            crowded = await probe.prefill(probe.fresh(tokens))
            await crowd
            ratios.append(crowded.seconds / alone.seconds)
        return statistics.median(ratios)

    def measured(self) -> Measured:
        """What stands for each point so far."""
        of, middle = self.typical, statistics.median
        return Measured(
            prefill={point: of(taken) for point, taken in self._prefill.items()},
            decode=[
                DecodePoint(batch, round(middle(c for _, c in taken)), of(s for s, _ in taken))
                for (batch, _), taken in self._decode.items()
            ],
            load={tokens: of(taken) for tokens, taken in self._load.items()},
            pull={tokens: (of(s for s, _ in taken), taken[0][1]) for tokens, taken in self._pull.items()},
            ping_s=of(self._pings),
        )

    def fit(self) -> Calibration:
        """The profile of what was measured so far. Raises `FitFailed`."""
        options = self._options
        name = options.name or (options.output.stem if options.output is not None else "calibrated")
        return fit_measured(self._probe, self.measured(), load_latency_model(options.base), name)

    async def _prefills(self, grid: Sequence[tuple[int, int]]) -> None:
        probe, prefixes = self._probe, dict[int, list[int]]()
        for new, cached in grid:
            if cached not in prefixes:
                prefixes[cached] = probe.fresh(cached)
                if cached:
                    await probe.prefill(prefixes[cached])
            await asyncio.sleep(PAUSE_S)
            done = await probe.prefill([*prefixes[cached], *probe.fresh(new)])
            if done.cached_tokens == cached:  # else it was evicted meanwhile, and this is another point
                self._prefill[new, cached].append(done.seconds)

    async def _decode_point(self, batch: int, context: int) -> tuple[float, float]:
        prompts = [self._probe.fresh(context) for _ in range(batch)]
        for prompt in prompts:
            await self._probe.prefill(prompt)
        return await self._probe.decode_step_s(prompts, DECODE_TOKENS + batch)

    async def _load_and_pull(self, tokens: int) -> None:
        """Prefill over history that is only in the page store, less the same over history on the device."""
        probe = self._probe
        ids = probe.fresh(tokens)
        await probe.prefill(ids)
        if self._peer is not None:
            self._pull[tokens].append(await self._peer.pull_s(probe.record, ids))
        if await probe.flush():
            cold = await probe.prefill([*ids, *probe.fresh(probe.info.page_tokens)])
            warm = await probe.prefill([*ids, *probe.fresh(probe.info.page_tokens)])
            if cold.cached_tokens == warm.cached_tokens == tokens:
                self._load[tokens].append(max(0.0, cold.seconds - warm.seconds))
