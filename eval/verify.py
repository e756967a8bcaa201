"""Teacher-forced check of a replay's tokens: was every output token the argmax of the same checkpoint?

For each round one forward of transformers over prompt and output, float32, on its own: it shares no KV with
any other round, so a wrong page anywhere in the serving stack cannot hide. Logits are computed at output
positions only. Prompts are checked too: each must begin with what its session really said.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from antiphon.engines import cpu_shims
from antiphon.traces.results import VerifyRecord

TIE_TOLERANCE = 1e-4
"""Logits closer than this may change places between two correct float32 implementations of one model."""
MAX_MISMATCHES_KEPT = 20

OnChecked = Callable[[int], None]


class VerifyError(Exception):
    """The check cannot be made: a log that cannot be read, a checkpoint that cannot be loaded."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One output token that the checkpoint would not have said."""

    session: str
    round: int
    position: int
    """In the output, from 0."""
    said: int
    expected: int
    gap: float
    """Logit of the expected token minus that of the token that was said."""
    top_gap: float
    """Logit of the expected token minus the second best: how sure the checkpoint is."""
    arm: str = ""
    round_id: str = ""

    def __str__(self) -> str:
        return (
            f"session {self.session}, round {self.round}, output token {self.position}: said {self.said}, "
            f"expected {self.expected} (by {self.gap:.4g}, sure by {self.top_gap:.4g}; arm {self.arm or '?'})"
        )


@dataclass(slots=True)
class VerifyReport:
    """What was checked and what was wrong. `ok` is the verdict."""

    rounds_checked: int = 0
    tokens_checked: int = 0
    mismatched_rounds: int = 0
    mismatched_tokens: int = 0
    near_ties: int = 0
    """Tokens that were not the argmax but within `TIE_TOLERANCE` of it: counted as equal."""
    broken_prompts: list[str] = field(default_factory=list)
    """Prompts that do not begin with the kept prefix of what their session said, in words."""
    mismatches: list[Mismatch] = field(default_factory=list)
    """The first few."""

    @property
    def ok(self) -> bool:
        return bool(self.rounds_checked) and not self.mismatched_rounds and not self.broken_prompts


def verify_rounds(
    model_dir: str | Path,
    log_path: str | Path,
    on_checked: OnChecked | None = None,
    *,
    tie_tolerance: float = TIE_TOLERANCE,
    threads: int | None = None,
) -> VerifyReport:
    """Check every round of a verify log against the checkpoint. Memory is bounded by the longest round.

    `on_checked` gets the number of rounds checked so far, after each. Raises `VerifyError`.
    """
    checker = _Checker(Path(model_dir), tie_tolerance, threads)
    report = VerifyReport()
    said: dict[str, tuple[int, list[int]]] = {}
    for record in read_log(Path(log_path)):
        _check_prompt(record, said, report)
        said[record.session] = (record.round, record.prompt_ids + record.output_ids)
        checker.check(record, report)
        report.rounds_checked += 1
        if on_checked is not None:
            on_checked(report.rounds_checked)
    return report


def read_log(path: Path) -> Iterator[VerifyRecord]:
    """The rounds of a verify log, in the order of completion. Raises `VerifyError` with file and line."""
    decoder = msgspec.json.Decoder(VerifyRecord)
    try:
        with path.open("rb") as log:
            for number, line in enumerate(log, 1):
                try:
                    record = decoder.decode(line)
                except (msgspec.MsgspecError, RecursionError) as error:
                    raise VerifyError(f"{path}, line {number}: {error}") from error
                if not record.prompt_ids or not record.output_ids:
                    raise VerifyError(f"{path}, line {number}: a round without prompt or output ids")
                yield record
    except OSError as error:
        raise VerifyError(f"{path}: {error}") from error


def _check_prompt(record: VerifyRecord, said: dict[str, tuple[int, list[int]]], report: VerifyReport) -> None:
    """A round follows its predecessor and begins with what was kept of it; a first round keeps nothing."""
    number, before = said.get(record.session, (0, []))
    kept = record.kept_tokens
    if record.round != number + 1:
        fault = f"follows round {number}"
    elif len(before) < kept or record.prompt_ids[:kept] != before[:kept]:
        fault = f"does not begin with the {kept} tokens that it keeps"
    else:
        return
    report.broken_prompts.append(f"session {record.session}, round {record.round}: {fault}")


class _Checker:
    """The checkpoint, loaded once; torch is imported only here."""

    def __init__(self, model_dir: Path, tie_tolerance: float, threads: int | None) -> None:
        try:
            import torch

            cpu_shims.define_torchvision_operators()  # transformers imports torchvision
            import transformers
        except ImportError as error:
            raise VerifyError(f"checking tokens needs torch and transformers: {error}") from error
        if not (model_dir / "config.json").is_file():
            raise VerifyError(f"{model_dir} holds no checkpoint (no config.json)")
        self._torch: Any = torch
        self._tie_tolerance = tie_tolerance
        self._threads = threads or os.cpu_count() or 1
        transformers.utils.logging.disable_progress_bar()  # one line of ours says more
        try:
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=torch.float32, local_files_only=True
            ).eval()
        except Exception as error:  # the library's own kinds are many
            raise VerifyError(f"{model_dir}: the checkpoint cannot be loaded: {error}") from error

    def check(self, record: VerifyRecord, report: VerifyReport) -> None:
        """Adds what it finds about one round to `report`."""
        logits = self._output_logits(record.prompt_ids, record.output_ids)
        said = self._torch.tensor(record.output_ids).unsqueeze(1)
        top, best = logits.topk(2, dim=-1)
        gaps = top[:, 0] - logits.gather(1, said)[:, 0]
        wrong = (gaps > self._tie_tolerance).nonzero()[:, 0].tolist()
        report.tokens_checked += len(record.output_ids)
        report.near_ties += int(((best[:, 0] != said[:, 0]) & (gaps <= self._tie_tolerance)).sum())
        report.mismatched_rounds += bool(wrong)
        report.mismatched_tokens += len(wrong)
        for position in wrong[: MAX_MISMATCHES_KEPT - len(report.mismatches)]:
            report.mismatches.append(
                Mismatch(
                    session=record.session,
                    round=record.round,
                    position=position,
                    said=record.output_ids[position],
                    expected=int(best[position, 0]),
                    gap=float(gaps[position]),
                    top_gap=float(top[position, 0] - top[position, 1]),
                    arm=record.arm,
                    round_id=record.round_id,
                )
            )

    def _output_logits(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Any:
        """[output tokens, vocabulary]: row i is what the checkpoint says before output token i."""
        torch = self._torch
        # The last output token predicts nothing that we check.
        ids = torch.tensor([[*prompt_ids, *output_ids[:-1]]])
        vocabulary_tokens = self._model.config.vocab_size
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary_tokens > max(output_ids):
            raise VerifyError(f"the log has ids outside the checkpoint's vocabulary of {vocabulary_tokens}")
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                answer = self._model(input_ids=ids, use_cache=False, logits_to_keep=len(output_ids))
                return answer.logits[0]
        finally:
            torch.set_num_threads(before)
