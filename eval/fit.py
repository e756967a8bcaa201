"""Fits a latency profile to points: the coefficients of `policies/latency.py`, and how far off they are.

    python -m antiphon.eval.fit --model Qwen/Qwen3-32B --system h200_sxm --tp 4 --python PYTHON -o OUT.json

The points come from AIConfigurator's database, asked in a Python of its own (`--python`), or from a file
(`--points`, as `--save-points` writes it). Transfer and host copies are not in that database: they are the
specification's rates and our own fixed costs, and the profile's `source` says so.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import msgspec

from antiphon.eval.fit_points import Points, PointsError, ask_aiconfigurator, read_points, scale_points
from antiphon.eval.hardware import GPUS
from antiphon.eval.known_models import profile_name
from antiphon.eval.least_squares import FitFailed, fit_decode, fit_prefill
from antiphon.policies.latency import FitError, LatencyModel, LoadCost, TransferCost

PULL_FIXED_S = 0.002
"""A prefetch call without its bytes; ours. Measured on loopback between two busy CPU cores it is 0.004."""
LOAD_FIXED_S = 0.001
"""Look-up and launch of the copies of one request; ours, an assumption."""
DIGITS = 6


def fit(points: Points, name: str, date: str) -> LatencyModel:
    """The profile of these points. Raises `FitFailed`."""
    gpu = GPUS[points.system]
    prefill, prefill_error = fit_prefill(points.prefill)
    decode, decode_error = fit_decode(points.decode, points.shape.expert_missed)
    links = (
        f"transfer and load by specification: one {gpu.nic_bytes_per_s * 8 / 1e9:.0f} Gb/s network card per "
        f"engine, {gpu.host_bytes_per_s / 1e9:.0f} GB/s from host memory per GPU; their fixed parts are ours"
    )
    model = LatencyModel(
        name=name,
        source=f"{points.source}; fitted {date}; {links}",
        prefill=prefill,
        decode=decode,
        transfer=TransferCost(
            PULL_FIXED_S, gpu.nic_bytes_per_s, points.shape.kv_bytes_per_token(points.gpus)
        ),
        load=LoadCost(LOAD_FIXED_S, gpu.host_bytes_per_s * points.gpus),
        model=points.model,
        gpu=gpu.label,
        gpus=points.gpus,
        prefill_error=prefill_error,
        decode_error=decode_error,
    )
    return msgspec.convert(_rounded(msgspec.to_builtins(model)), LatencyModel)


def _rounded(value: object) -> object:
    """Six digits of every float: more would only pretend."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def summary(model: LatencyModel) -> str:
    """Formulas in milliseconds with their errors, a line each."""
    p = [cost * 1e3 for cost in msgspec.structs.astuple(model.prefill)]
    d = model.decode

    def error(found: FitError | None) -> str:
        if found is None:
            return ""
        return f"({found.points} points: mean {found.mean:.1%}, p95 {found.p95:.1%}, max {found.max:.1%})"

    experts = f" + {d.experts_s * 1e3:.4g} (1 - {d.expert_missed:.4g}^B)" if d.experts_s else ""
    return (
        f"{model.name}: {model.gpus} x {model.gpu}\n"
        f"  prefill ms = {p[0]:.4g} + {p[1]:.4g} N + {p[2]:.3g} N P + {p[3]:.3g} N^2"
        f"  {error(model.prefill_error)}\n"
        f"  decode  ms = {d.fixed_s * 1e3:.4g} + {d.per_request_s * 1e3:.4g} B"
        f" + {d.per_context_token_s * 1e3:.4g} T{experts}  {error(model.decode_error)}"
    )


def points_of(options: argparse.Namespace) -> Points:
    """As the arguments say; raises `PointsError`."""
    if options.points is not None:
        points = read_points(options.points)
        wanted = options.system or points.system
    elif options.model is None or options.python is None or options.system is None:
        raise PointsError("give --points FILE, or --model, --system and --python of an AIConfigurator")
    else:
        wanted = options.system
        measured = GPUS[wanted].scaled_from or wanted
        points = ask_aiconfigurator(options.python, options.model, measured, options.tp, options.backend)
    return points if wanted == points.system else scale_points(points, wanted)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="antiphon.eval.fit", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="as AIConfigurator names it, such as Qwen/Qwen3-32B")
    parser.add_argument("--system", choices=sorted(GPUS), help="with --points: scale them to this GPU")
    parser.add_argument("--tp", type=int, default=4, help="GPUs of one engine")
    parser.add_argument("--backend", default="sglang")
    parser.add_argument("--python", type=Path, help="the Python of an environment that has AIConfigurator")
    parser.add_argument("--points", type=Path, help="fit these points; AIConfigurator is not needed")
    parser.add_argument("--save-points", type=Path, help="write the points there, for --points")
    parser.add_argument("--name", help="of the profile; by default MODEL-GPU-tpN")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        points = points_of(options)
        name = options.name or profile_name(points.model, points.system, points.gpus)
        model = fit(points, name, datetime.date.today().isoformat())
        if options.save_points is not None:
            options.save_points.write_bytes(msgspec.json.encode(points) + b"\n")
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(model), indent=2) + b"\n")
    except (PointsError, FitFailed, OSError) as error:
        print(f"fit: {error}", file=sys.stderr)
        return 1
    print(summary(model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
