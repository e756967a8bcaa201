"""Points that a latency model is fitted to: from a file, from AIConfigurator, or scaled to another GPU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import msgspec

from antiphon.eval.hardware import GPUS, ModelShape, shape_of
from antiphon.eval.least_squares import DecodePoint, PrefillPoint, fit_prefill

SCHEMA = "antiphon.points/1"
QUERY = Path(__file__).with_name("aiconfigurator_query.py")
PREFILL_GRID = tuple(
    (new, cached)
    for new in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    for cached in (0, 1024, 4096, 8192, 16384, 32768, 65536, 100_000)
)
"""72 points: new tokens, cached tokens."""
DECODE_GRID = tuple(
    (batch, length)
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    for length in (512, 2048, 4096, 8192, 16384, 32768, 65536)
)
"""63 points: batch, context of each of its requests."""


class PointsError(Exception):
    """There are no points: a file that cannot be read, a Python that does not answer; says what to do."""


class Points(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model on one engine of `gpus` GPUs, and what it took."""

    model: str
    system: str
    """A key of `hardware.GPUS`."""
    gpus: int
    source: str
    shape: ModelShape
    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]
    schema: str = SCHEMA


def read_points(path: Path) -> Points:
    """Raises `PointsError`."""
    try:
        points = msgspec.json.decode(path.read_bytes(), type=Points)
    except (OSError, msgspec.MsgspecError) as error:
        raise PointsError(f"{path}: not a file of points: {error}") from error
    if points.schema != SCHEMA:
        raise PointsError(f"{path}: schema {points.schema!r}, not {SCHEMA!r}")
    return points


def ask_aiconfigurator(
    python: Path, model: str, system: str, gpus: int, backend: str = "sglang", deadline_s: float = 300.0
) -> Points:
    """The grid, answered in another Python that has AIConfigurator. Raises `PointsError`."""
    asked = {
        "model": model, "system": system, "backend": backend, "tp": gpus,
        "prefill": PREFILL_GRID, "decode": DECODE_GRID,
    }  # fmt: skip
    try:
        done = subprocess.run(
            [str(python), "-I", str(QUERY)],
            input=json.dumps(asked), capture_output=True, text=True, timeout=deadline_s, check=False,
        )  # fmt: skip
    except OSError as error:
        raise PointsError(f"{python} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise PointsError(f"AIConfigurator gave no answer within {deadline_s:g} s") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise PointsError(
            f"AIConfigurator in {python} could not answer for {model} on {system}: {said[-1]}\n"
            f"it must have aiconfigurator-core installed (pip install aiconfigurator)"
        )
    answer = json.loads(done.stdout)
    prefill = tuple(PrefillPoint(*point) for point in answer["prefill"])
    decode = tuple(DecodePoint(b, b * length, seconds) for b, length, seconds in answer["decode"])
    known = f"{len(prefill)} prefill and {len(decode)} decode points"
    for count, words in ((answer["left_out"], "without data"), (answer["estimated"], "estimated")):
        known += f", {count} {words}" if count else ""
    source = f"{answer['database']}, {system}, {backend} {answer['backend_version']}, tp {gpus}: {known}"
    return Points(model, system, gpus, source, shape_of(answer["config"]), prefill, decode)


def scale_points(points: Points, system: str) -> Points:
    """The same points as another GPU's data sheet makes them; not measured, and labelled so.

    Prefill is arithmetic but for its fixed part (launches, one reading of the weights), which stays as it is:
    the rest goes by the ratio of FLOPs. A decode step reads weights and KV: it goes by the ratio of memory
    bandwidths; but where the batch's arithmetic takes the new GPU longer than reading the weights, the excess
    is added.
    """
    base, to, shape = GPUS[points.system], GPUS[system], points.shape
    fixed_s = fit_prefill(points.prefill)[0].fixed_s
    slower, reading = base.flops / to.flops, base.memory_bytes_per_s / to.memory_bytes_per_s
    prefill = tuple(
        PrefillPoint(n, p, min(s, fixed_s) + max(0.0, s - fixed_s) * slower) for n, p, s in points.prefill
    )
    request_s = 2 * shape.active_parameters / (points.gpus * to.flops)
    weights_s = shape.weight_bytes / (points.gpus * to.memory_bytes_per_s)
    decode = tuple(
        DecodePoint(batch, context, s * reading + max(0.0, batch * request_s - weights_s))
        for batch, context, s in points.decode
    )
    source = (
        f"scaled, not measured: {base.label} to {to.label} by the data sheets (prefill but its fixed part x "
        f"{slower:.2f}, decode x {reading:.2f} and arithmetic beyond reading the weights); {points.source}"
    )
    return msgspec.structs.replace(points, system=system, source=source, prefill=prefill, decode=decode)
