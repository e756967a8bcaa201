"""The page of the profiles that ship: coefficients, errors, what is left out, where more GPUs lose.

python -m antiphon.eval.profile_tables > docs/latency-profiles.md
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

from antiphon.eval.hardware import GPUS, device_tokens, gpu_name
from antiphon.eval.known_models import KnownModel, profile_for, read_models
from antiphon.policies.latency import FitError, LatencyModel

DEGREES = (1, 2, 4, 8)
LEAST_TOKENS = 40_960
"""An engine whose weights leave less KV than this gets no profile."""
PROMPT_TOKENS = 8192
BATCH = 32
INTRO = """\
# Latency profiles that ship

Written by `eval/profile_tables.py` from `policies/data/*.json`; [latency-model.md](latency-model.md) has the
formulas, where the numbers come from and what they are worth.

Names end in the GPU and the number of GPUs of one engine. KV is what fits beside the weights in bf16, in
thousands of tokens. Errors are those against the points that the formula was fitted to: mean / 95th
percentile / largest. "8k" is a prefill of 8,192 tokens over none, "32 x 8k" a decode step of 32 requests of
8,192 tokens each, both by the formula. H20 is scaled from H100, not measured.
"""


class Entry(NamedTuple):
    """A profile and the engine that it is of."""

    gpu: str
    tp: int
    kv_tokens: int
    profile: LatencyModel

    @property
    def prompt_s(self) -> float:
        return self.profile.prefill_s(PROMPT_TOKENS, 0)

    @property
    def step_s(self) -> float:
        return self.profile.decode_step_s(BATCH, BATCH * PROMPT_TOKENS)


class Left(NamedTuple):
    """Engines of a model without a profile, and why."""

    too_small: list[str]
    no_data: list[str]


def entries_of(model: KnownModel) -> tuple[list[Entry], Left]:
    """In the order of GPUs and degrees."""
    found: list[Entry] = []
    left = Left([], [])
    for system, gpu in GPUS.items():
        name = gpu_name(system)
        for tp in DEGREES:
            profile = profile_for(model, name, tp)
            if kv_tokens(model, system, tp) < LEAST_TOKENS:
                left.too_small.append(f"{name}-tp{tp}")
            elif profile is None:
                left.no_data.append(f"{name}-tp{tp}")
            if profile is not None:
                found.append(Entry(name, tp, device_tokens(model, gpu, tp), profile))
    return found, left


def kv_tokens(model: KnownModel, system: str, tp: int) -> int:
    """0 where the weights do not fit."""
    try:
        return device_tokens(model, GPUS[system], tp)
    except ValueError:
        return 0


def slower_with_more(entries: Iterable[Entry]) -> list[str]:
    """Where the next larger degree on the same GPU takes longer, in words."""
    said = []
    known = list(entries)
    for fewer, more in pairwise(known):
        if fewer.gpu == more.gpu:
            for what, before_s, after_s in (
                ("8k", fewer.prompt_s, more.prompt_s),
                ("32 x 8k", fewer.step_s, more.step_s),
            ):
                if after_s >= before_s:
                    said.append(f"{more.gpu}-tp{more.tp} {what} ({_ms(after_s)} ms after {_ms(before_s)})")
    return said


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _error(error: FitError | None) -> str:
    shares = (error.mean, error.p95, error.max) if error is not None else ()
    return " / ".join(f"{100 * share:.1f}" for share in shares)


def row(entry: Entry, experts: bool) -> str:
    """One profile as a line of its model's table."""
    p, d = entry.profile.prefill, entry.profile.decode
    cells = [
        f"`{entry.profile.name}`",
        f"{entry.kv_tokens / 1e3:,.0f}",
        f"{p.fixed_s * 1e3:.3g}",
        f"{p.per_token_s * 1e6:.3g}",
        f"{p.per_token_cached_s * 1e9:.3g}",
        f"{p.per_token_squared_s * 1e9:.3g}",
        _error(entry.profile.prefill_error),
        f"{d.fixed_s * 1e3:.3g}",
        f"{d.per_request_s * 1e6:.3g}",
        f"{d.per_context_token_s * 1e9:.3g}",
        *([f"{d.experts_s * 1e3:.3g}"] if experts else []),
        _error(entry.profile.decode_error),
        _ms(entry.prompt_s),
        _ms(entry.step_s),
    ]
    return f"| {' | '.join(cells)} |"


def section(short: str, model: KnownModel) -> str:
    """A model's table, and what is to be said of it."""
    entries, left = entries_of(model)
    experts = model.expert_missed > 0
    heads = [
        "profile", "KV, k", "prefill: fixed, ms", "token, us", "N P, ns", "N^2, ns", "error, %",
        "decode: fixed, ms", "request, us", "context token, ns", *(["experts, ms"] if experts else []),
        "error, %", "8k, ms", "32 x 8k, ms",
    ]  # fmt: skip
    lines = [
        f"## {short}",
        "",
        f"{model.model}: {model.parameters / 1e9:.3g} billion parameters, {model.weight_bytes / 1e9:.3g} GB; "
        f"{model.kv_bytes_per_token(1):,} bytes of KV per token; window {model.window_tokens:,}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(row(entry, experts) for entry in entries),
    ]
    notes = (
        (f"Left out, less than {LEAST_TOKENS:,} tokens of KV", left.too_small),
        ("Left out, no data", left.no_data),
        ("More GPUs take longer", slower_with_more(entries)),
    )
    for words, which in notes:
        if which:
            lines += ["", f"{words}: {', '.join(which)}."]
    return "\n".join(lines) + "\n"


def page(models: Mapping[str, KnownModel]) -> str:
    """Markdown."""
    return "\n".join([INTRO, *(section(short, model) for short, model in models.items())])


if __name__ == "__main__":
    print(page(read_models()), end="")
