"""The teacher-forced check: passes what the checkpoint says, reports anything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from antiphon.engines import cpu_shims
from antiphon.engines.tiny_model import write_tiny_model
from antiphon.eval import verify
from antiphon.eval.verify import VerifyError, VerifyReport, verify_rounds
from antiphon.traces.prompts import Vocabulary, prompt_ids
from antiphon.traces.results import VerifyRecord
from antiphon.traces.schema import RoundTrace, SessionTrace

torch = pytest.importorskip("torch")
SESSIONS = [
    SessionTrace(
        name,
        (
            RoundTrace(120 + extra, 8),
            RoundTrace(200 + extra, 8, kept_tokens=128 + extra),
            RoundTrace(90 + extra, 6, kept_tokens=60),
            RoundTrace(150 + extra, 1, kept_tokens=90 + extra),
        ),
        shared_prefix="system",
        shared_tokens=32,
    )
    for name, extra in (("a", 0), ("b", 37))
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def truth(model_dir: Path) -> list[VerifyRecord]:
    """Two interleaved sessions as plain greedy generation of transformers answers them."""
    cpu_shims.define_torchvision_operators()
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    said: dict[str, list[int]] = {session.session_id: [] for session in SESSIONS}
    records = []
    for index in range(4):
        for session in SESSIONS:
            prompt = prompt_ids(session, index, said[session.session_id], Vocabulary(32, 500), 0)
            turn = session.rounds[index]
            output = greedy(model, prompt, turn.output_tokens)
            said[session.session_id] = prompt + output
            records.append(
                VerifyRecord(session.session_id, index + 1, turn.kept_tokens, prompt, output, arm="local")
            )
    return records


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Token by token with a KV cache: another way through the model than the check's own."""
    output: list[int] = []
    ids, cache = torch.tensor([prompt]), None
    with torch.inference_mode():
        for _ in range(count):
            answer = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = answer.past_key_values, answer.logits[:, -1].argmax(-1, keepdim=True)
            output.append(int(ids))
    return output


def check(model_dir: Path, tmp_path: Path, records: Sequence[VerifyRecord], **options: Any) -> VerifyReport:
    log = tmp_path / "verify.jsonl"
    log.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    return verify_rounds(model_dir, log, **options)


def changed(records: Sequence[VerifyRecord], index: int, **fields: Any) -> Iterator[VerifyRecord]:
    for number, record in enumerate(records):
        yield msgspec.structs.replace(record, **fields) if number == index else record


def test_greedy_tokens_pass(model_dir: Path, truth: list[VerifyRecord], tmp_path: Path) -> None:
    """What the checkpoint itself says is right; rounds that extend each other share a forward."""
    seen: list[int] = []
    report = check(model_dir, tmp_path, truth, on_checked=seen.append, tie_tolerance=0.0)
    assert report == VerifyReport(rounds_checked=8, forwards=6, tokens_checked=46)
    assert report.ok
    assert seen == sorted(seen)
    assert (len(seen), seen[-1]) == (6, 8)


def test_one_wrong_token_is_reported(model_dir: Path, truth: list[VerifyRecord], tmp_path: Path) -> None:
    """A flipped token is found: its round, its position, what was expected, and nothing else."""
    said = truth[3].output_ids
    wrong = [*said[:-1], said[-1] ^ 1]
    # The next round of that session would notice that its prompt has the true token: leave it out.
    records = [
        record for record in changed(truth, 3, output_ids=wrong) if (record.session, record.round) < ("b", 3)
    ]
    report = check(model_dir, tmp_path, records)
    assert not report.ok
    assert (report.mismatched_rounds, report.mismatched_tokens, report.broken_prompts) == (1, 1, [])
    (mismatch,) = report.mismatches
    assert (mismatch.session, mismatch.round, mismatch.position) == ("b", 2, len(said) - 1)
    assert (mismatch.said, mismatch.expected) == (said[-1] ^ 1, said[-1])
    assert mismatch.gap >= mismatch.top_gap > 0
    assert "session b, round 2, output token 7" in str(mismatch)


def test_a_wrong_token_early_in_a_session_is_reported(
    model_dir: Path, truth: list[VerifyRecord], tmp_path: Path
) -> None:
    """Both faults of a first round whose logged output is not what the next prompt repeats are named."""
    wrong = [truth[1].output_ids[0] ^ 1, *truth[1].output_ids[1:]]
    report = check(model_dir, tmp_path, list(changed(truth[:4], 1, output_ids=wrong)))
    assert (report.mismatches[0].session, report.mismatches[0].round, report.mismatches[0].position) == (
        "b",
        1,
        0,
    )
    assert report.mismatched_rounds == 1
    assert report.broken_prompts == ["session b, round 2: does not begin with the 165 tokens that it keeps"]


def test_forwards_are_bounded(
    model_dir: Path, truth: list[VerifyRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for few positions a chain takes more forwards and finds the same."""
    whole = check(model_dir, tmp_path, [*truth[:3], msgspec.structs.replace(truth[3], output_ids=[40] * 8)])
    monkeypatch.setattr(verify, "MAX_POSITIONS", 1)
    pieces = check(model_dir, tmp_path, [*truth[:3], msgspec.structs.replace(truth[3], output_ids=[40] * 8)])
    assert (whole.forwards, pieces.forwards) == (2, 4)
    assert (whole.rounds_checked, whole.mismatched_tokens) == (
        pieces.rounds_checked,
        pieces.mismatched_tokens,
    )
    assert whole.mismatched_tokens >= 7


def test_wrong_history_is_reported(model_dir: Path, truth: list[VerifyRecord], tmp_path: Path) -> None:
    """Tokens decoded over another prompt's KV do not pass: that is what a wrong page looks like."""
    other = truth[2]
    prompt = [*other.prompt_ids[:64], *[100] * 16, *other.prompt_ids[80:]]
    report = check(
        model_dir, tmp_path, [truth[0], truth[1], msgspec.structs.replace(other, prompt_ids=prompt)]
    )
    assert report.mismatched_rounds == 1
    assert report.broken_prompts == ["session a, round 2: does not begin with the 128 tokens that it keeps"]


def test_rounds_must_follow_each_other(model_dir: Path, truth: list[VerifyRecord], tmp_path: Path) -> None:
    """A round that is missing or came twice is named."""
    report = check(model_dir, tmp_path, [truth[0], truth[0], truth[5]])
    assert report.broken_prompts == [
        "session a, round 1: follows round 1",
        "session b, round 3: follows round 0",
    ]
    assert not report.ok


def test_near_ties_are_counted_apart(model_dir: Path, truth: list[VerifyRecord], tmp_path: Path) -> None:
    """A token within the tolerance of the argmax counts as equal, and is counted as a near tie."""
    flipped = list(changed(truth[:1], 0, output_ids=[*truth[0].output_ids[:-1], truth[0].output_ids[-1] ^ 1]))
    report = check(model_dir, tmp_path, flipped, tie_tolerance=1e6)
    assert report.ok
    assert report.near_ties == 1


def test_mismatches_kept_are_bounded(model_dir: Path, truth: list[VerifyRecord], tmp_path: Path) -> None:
    """Every wrong token is counted, only the first few are kept."""
    nonsense = [msgspec.structs.replace(record, output_ids=[33] * 8) for record in truth]
    report = check(model_dir, tmp_path, nonsense)
    assert report.mismatched_rounds == 8
    assert report.mismatched_tokens > 50
    assert len(report.mismatches) == 20


def test_an_empty_log_is_no_proof(model_dir: Path, tmp_path: Path) -> None:
    """Nothing checked is not ok."""
    assert not check(model_dir, tmp_path, []).ok


@pytest.mark.parametrize(
    "line", [b"{", b'{"session":"a","round":1,"kept_tokens":0,"prompt_ids":[],"output_ids":[1]}']
)
def test_bad_log_lines_are_named(model_dir: Path, tmp_path: Path, line: bytes) -> None:
    """A line that is no round raises with file and line."""
    log = tmp_path / "verify.jsonl"
    log.write_bytes(line + b"\n")
    with pytest.raises(VerifyError, match=r"verify\.jsonl, line 1"):
        verify_rounds(model_dir, log)


def test_foreign_ids_are_refused(model_dir: Path, truth: list[VerifyRecord], tmp_path: Path) -> None:
    """Ids outside the vocabulary mean that log and checkpoint do not belong together."""
    for field in ("prompt_ids", "output_ids"):
        with pytest.raises(VerifyError, match="vocabulary of 512"):
            check(model_dir, tmp_path, list(changed(truth[:1], 0, **{field: [5, 512]})))


def test_missing_files_are_named(model_dir: Path, tmp_path: Path) -> None:
    """No checkpoint, a broken one, no log: each says which."""
    with pytest.raises(VerifyError, match="no checkpoint"):
        verify_rounds(tmp_path, tmp_path / "log")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(VerifyError, match="cannot be loaded"):
        verify_rounds(tmp_path, tmp_path / "log")
    with pytest.raises(VerifyError, match="nowhere"):
        verify_rounds(model_dir, tmp_path / "nowhere")
