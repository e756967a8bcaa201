"""From measured points to a latency profile: the fit, and how it is told."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from antiphon.eval.least_squares import (
    DecodePoint,
    FitFailed,
    fit_decode,
    fit_error,
    relative_least_squares,
)
from antiphon.eval.probe import EngineInfo, Probe
from antiphon.policies.latency import FitError, LatencyModel, LoadCost, PrefillCost, TransferCost

DIGITS = 6


class Measured(NamedTuple):
    """Points, as medians."""

    prefill: dict[tuple[int, int], float]
    """(new tokens, cached tokens) -> seconds."""
    decode: list[DecodePoint]
    load: dict[int, float]
    """Cached tokens -> seconds more than when they are on the device."""
    pull: dict[int, tuple[float, int]]
    """Tokens -> (seconds, bytes)."""
    ping_s: float


class Calibration(NamedTuple):
    """What was found."""

    profile: LatencyModel
    request_fixed_s: float
    """Of every request beside its passes: HTTP, tokenizer manager, scheduling. Belongs to a cluster file."""
    info: EngineInfo
    store_tokens: int
    """Of the page store; 0 = none, or not known."""
    measured: Measured
    load_error: FitError | None
    transfer_error: FitError | None
    notes: tuple[str, ...]


def fit_measured(probe: Probe, measured: Measured, base: LatencyModel, name: str) -> Calibration:
    """Coefficients from the points; `base` for what has none. Raises `FitFailed`."""
    info, notes = probe.info, list[str]()
    request_s, prefill, prefill_error = fit_prefill_requests(measured, info.chunk_tokens)
    decode, decode_error = fit_decode(measured.decode)
    hello = probe.engine.hello
    transfer, transfer_error = base.transfer, None
    if hello is not None:
        kv_bytes = hello.page_bytes // hello.page_size_tokens * hello.world_size
        transfer = msgspec.structs.replace(transfer, kv_bytes_per_token=kv_bytes)
    else:
        notes.append(f"KV bytes per token are those of {base.name}: no --ledger to ask the engine by")
    if measured.pull:
        rows = [(1.0, float(size)) for _, size in measured.pull.values()]
        seconds = [taken for taken, _ in measured.pull.values()]
        fixed_s, byte_s = relative_least_squares(rows, seconds)
        transfer_error = fit_error(rows, seconds, (fixed_s, byte_s))
        rate = 1 / byte_s if byte_s else base.transfer.bytes_per_s
        transfer = TransferCost(fixed_s, rate, transfer.kv_bytes_per_token)
    else:
        notes.append(f"transfers are those of {base.name}: no --peer to pull with")
    load, load_error = _fit_load(measured, transfer.kv_bytes_per_token)
    if load is None:
        notes.append("loading from the page store was not to be told from noise, or there is no page store")
    said = [f"antiphon calibrate, {info.model}", f"{datetime.now(UTC).date().isoformat()}", *notes]
    profile = LatencyModel(
        name=name,
        source="; ".join(said),
        prefill=prefill,
        decode=decode,
        transfer=transfer,
        load=load,
        model=info.model,
        gpu=base.gpu,
        gpus=hello.world_size if hello is not None else 1,
        prefill_error=prefill_error,
        decode_error=decode_error,
    )
    rounded = msgspec.convert(_rounded(msgspec.to_builtins(profile)), LatencyModel)
    store_tokens = hello.store_pages * hello.page_size_tokens if hello is not None else 0
    return Calibration(
        rounded, request_s, info, store_tokens, measured, load_error, transfer_error, tuple(notes)
    )


def fit_prefill_requests(measured: Measured, chunk_tokens: int) -> tuple[float, PrefillCost, FitError]:
    """(seconds of a request beside its passes, of its passes). Raises `FitFailed`.

    A prompt runs in chunks, each a pass over all that came before it. Only prompts of several chunks tell
    what a request costs from what a pass costs; without chunks a request costs what a ping does.
    """
    rows = [_prefill_row(new, cached, chunk_tokens) for new, cached in measured.prefill]
    seconds = [*measured.prefill.values()]
    least_s = min(measured.ping_s, min(seconds, default=0.0) / 2)  # a ping may have met with a busy moment
    if chunk_tokens == 0:
        rows = [row[1:] for row in rows]
    found = relative_least_squares(rows, [taken - least_s for taken in seconds])
    error = fit_error([(*row, least_s) for row in rows], seconds, [*found, 1.0])
    if chunk_tokens == 0:
        return least_s, PrefillCost(*found), error
    return least_s + found[0], PrefillCost(*found[1:]), error


def _prefill_row(new: int, cached: int, chunk_tokens: int) -> tuple[float, ...]:
    """(1, passes, sum N, sum N P, sum N^2, sum P, sum P^2) over the passes of one prompt."""
    sums = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    while new > 0:
        take = min(new, chunk_tokens or new)
        terms = (0, 1, take, take * cached, take * take, cached, cached * cached)
        sums = [total + term for total, term in zip(sums, terms, strict=True)]
        new, cached = new - take, cached + take
    return tuple(sums)


def _fit_load(measured: Measured, kv_bytes_per_token: int) -> tuple[LoadCost | None, FitError | None]:
    points = [(tokens * kv_bytes_per_token, taken) for tokens, taken in measured.load.items() if taken > 0]
    rows = [(1.0, float(size)) for size, _ in points]
    try:
        fixed_s, byte_s = relative_least_squares(rows, [taken for _, taken in points])
    except FitFailed:
        return None, None
    if not byte_s:
        return None, None
    error = fit_error(rows, [taken for _, taken in points], (fixed_s, byte_s))
    return LoadCost(fixed_s, 1 / byte_s), error


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


# ---------------------------------------------------------------- saying


def summary(found: Calibration) -> str:
    """The formulas in milliseconds with their errors, and what a cluster file needs."""
    p, d, t = found.profile.prefill, found.profile.decode, found.profile.transfer
    load, info = found.profile.load, found.info

    def of(error: FitError | None) -> str:
        return f"  (mean error {error.mean:.1%}, p95 {error.p95:.1%}, {error.points} points)" if error else ""

    terms = [
        (p.per_token_s, "N"), (p.per_token_cached_s, "N P"), (p.per_token_squared_s, "N^2"),
        (p.cached_token_s, "P"), (p.cached_squared_s, "P^2"),
    ]  # fmt: skip
    prefill = "".join(f" + {cost * 1e3:.3g} {name}" for cost, name in terms if cost)
    lines = [
        f"prefill ms = {p.fixed_s * 1e3:.3g}{prefill}{of(found.profile.prefill_error)}",
        f"decode ms  = {d.fixed_s * 1e3:.3g} + {d.per_request_s * 1e3:.3g} B"
        f" + {d.per_context_token_s * 1e3:.3g} T{of(found.profile.decode_error)}",
        f"pull ms    = {t.fixed_s * 1e3:.3g}, then {t.bytes_per_s / 1e6:.4g} MB/s{of(found.transfer_error)}",
    ]
    if load is not None:
        rate = load.bytes_per_s / 1e6
        lines.append(f"load ms    = {load.fixed_s * 1e3:.3g}, then {rate:.4g} MB/s{of(found.load_error)}")
    return "\n".join(
        [
            *lines,
            *(f"note: {note}" for note in found.notes),
            "for the engine's group in a cluster file:",
            f"  device_tokens = {info.device_tokens}",
            *([f"  store_tokens = {found.store_tokens}"] if found.store_tokens else []),
            f"  chunk_tokens = {info.chunk_tokens}",
            f"  decode_interval = {info.decode_interval}",
            f"  max_running_requests = {info.max_running_requests}",
            f"  request_fixed_s = {found.request_fixed_s:.4f}",
            f"  link_bytes_per_s = {t.bytes_per_s:.4g}",
        ]
    )
