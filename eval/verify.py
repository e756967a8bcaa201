"""Teacher-forced check of a replay's tokens: was every output token the argmax of the same checkpoint?

One float32 forward of transformers over prompt and output, from nothing: no KV is kept between forwards, so a
wrong page anywhere in the serving stack cannot hide. Rounds whose prompts extend each other whole are one
token sequence and share a forward (attention is causal: its logits at a round's output positions are those of
the round alone). Logits are computed at output positions only. Prompts are checked too: each must begin with
what its session really said.
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
MAX_POSITIONS = 2048
"""Output positions checked in one forward: bounds the memory for logits."""

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
    forwards: int = 0
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
    """Check every round of a verify log against the checkpoint. Memory: the last round of each session.

    `on_checked` gets the number of rounds checked so far, after each forward. Raises `VerifyError`.
    """
    checker = _Checker(Path(model_dir), tie_tolerance, threads)
    report = VerifyReport()
    chains: dict[str, _Chain] = {}

    def check(chain: _Chain) -> None:
        checker.check(chain, report)
        if on_checked is not None:
            on_checked(report.rounds_checked)

    for record in read_log(Path(log_path)):
        chain = chains.get(record.session)
        _check_prompt(record, chain, report)
        if chain is not None and not chain.is_extended_by(record):
            check(chain)
            chain = None
        if chain is None:
            chain = chains[record.session] = _Chain()
        chain.add(record)
        if chain.positions >= MAX_POSITIONS:
            check(chain)
    for chain in chains.values():
        if chain.unchecked:
            check(chain)
    return report


@dataclass(slots=True)
class _Chain:
    """Rounds of one session whose prompts extend each other whole: one token sequence."""

    ids: list[int] = field(default_factory=list)
    """Prompt and output of the last round."""
    last_round: int = 0
    unchecked: list[tuple[int, VerifyRecord]] = field(default_factory=list)
    """(prompt tokens, round without its prompt ids): where each output begins in `ids`."""

    @property
    def positions(self) -> int:
        return sum(len(record.output_ids) for _, record in self.unchecked)

    def is_extended_by(self, record: VerifyRecord) -> bool:
        said = len(self.ids)
        return len(record.prompt_ids) > said and record.prompt_ids[:said] == self.ids

    def add(self, record: VerifyRecord) -> None:
        self.ids = record.prompt_ids + record.output_ids
        self.last_round = record.round
        self.unchecked.append((len(record.prompt_ids), msgspec.structs.replace(record, prompt_ids=[])))


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


def _check_prompt(record: VerifyRecord, chain: _Chain | None, report: VerifyReport) -> None:
    """A round follows its predecessor and begins with what was kept of it; a first round keeps nothing."""
    number, before = (chain.last_round, chain.ids) if chain is not None else (0, [])
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
        self._threads = threads or max(1, (os.cpu_count() or 1) // 2)  # engines may still be up beside us
        transformers.utils.logging.disable_progress_bar()  # one line of ours says more
        try:
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=torch.float32, local_files_only=True
            ).eval()
        except Exception as error:  # the library's own kinds are many
            raise VerifyError(f"{model_dir}: the checkpoint cannot be loaded: {error}") from error

    def check(self, chain: _Chain, report: VerifyReport) -> None:
        """One forward over a chain; adds what it finds about its unchecked rounds to `report`."""
        positions = [
            start - 1 + index for start, record in chain.unchecked for index in range(len(record.output_ids))
        ]
        logits = self._logits(chain.ids, positions)
        first = 0
        for _, record in chain.unchecked:
            self._compare(record, logits[first : first + len(record.output_ids)], report)
            first += len(record.output_ids)
        report.forwards += 1
        chain.unchecked.clear()

    def _compare(self, record: VerifyRecord, logits: Any, report: VerifyReport) -> None:
        """Row i of `logits` is what the checkpoint says before output token i."""
        said = self._torch.tensor(record.output_ids).unsqueeze(1)
        top, best = logits.topk(2, dim=-1)
        gaps = top[:, 0] - logits.gather(1, said)[:, 0]
        wrong = (gaps > self._tie_tolerance).nonzero()[:, 0].tolist()
        report.rounds_checked += 1
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

    def _logits(self, token_ids: Sequence[int], positions: Sequence[int]) -> Any:
        """[positions, vocabulary] of one forward over `token_ids`."""
        torch = self._torch
        ids = torch.tensor([token_ids])
        vocabulary_tokens = self._model.config.vocab_size
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary_tokens:
            raise VerifyError(f"the log has ids outside the checkpoint's vocabulary of {vocabulary_tokens}")
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                answer = self._model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor(positions))
                return answer.logits[0]
        finally:
            torch.set_num_threads(before)
