"""The part of the matrix that runs on real SGLang engines, on a tiny model with real NIXL.

Their right answers are not a function that we can compute: every answer is compared, token by token, with a
teacher-forced forward of transformers on the same checkpoint (`eval/verify.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from antiphon.eval.stack import CPU_ENGINE_FLAGS
from antiphon.eval.verify import verify_rounds
from antiphon.traces.results import VerifyRecord
from tests.faults.fleet import SETTINGS, Fleet
from tests.faults.results import Scale, TrialResult

START_DEADLINE_S = 300.0

SCALE = Scale(
    first_tokens=200,
    new_tokens={"idle": 200, "prefill": 600, "transfer": 300, "decode": 200},
    output_tokens={"idle": 16, "prefill": 16, "transfer": 16, "decode": 150},
    background=2,
    pause_s=5.0,
    deadline_s=45.0,
    attempt_s=10.0,
    kinds=("text",),
    checks_answers=False,
)


def fleet(directory: Path, model: Path) -> Fleet:
    """One prefill and two decode engines; checksums on, so that a corrupt page is found."""
    return Fleet(
        directory,
        model,
        engine_options=("--checksum",),
        engine_flags=CPU_ENGINE_FLAGS,
        simulated=False,
        start_deadline_s=START_DEADLINE_S,
        settings=SETTINGS,
    )


def check_answers(model: Path, results: Sequence[TrialResult], directory: Path) -> None:
    """Fill in `wrong` of the results on real engines.

    Prompts of a session extend each other, so one forward checks all of its rounds.
    """
    log = directory / "verify.jsonl"
    records: list[VerifyRecord] = []
    owner: dict[str, TrialResult] = {}
    for result in results:
        numbers: Counter[str] = Counter()
        for each in sorted(result.unchecked, key=lambda each: (each.session, each.number)):
            owner[each.session] = result
            numbers[each.session] += 1
            prompt, output = list(each.expected[0]), list(each.answer or ())
            records.append(VerifyRecord(each.session, numbers[each.session], 0, prompt, output))
    if not records:
        return
    log.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    report = verify_rounds(model, log)
    for mismatch in report.mismatches:
        owner[mismatch.session].verdict.wrong.append(str(mismatch))
    print(
        f"{report.rounds_checked} answers of real engines checked: {report.mismatched_rounds} wrong",
        flush=True,
    )
