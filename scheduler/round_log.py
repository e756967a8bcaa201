"""`antiphon serve --record DIR`: every round that ended as a line of lengths and times, and its receipt.

Nothing that was said is written: no text, no token ids, no page hashes. Session ids are hashed with the
folder's own salt. One thread hashes, compares and writes, so that a slow disk delays no round; what cannot
be written is counted, and logged once. The reader is `traces/recording.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from antiphon.scheduler.known_prefixes import KnownPrefixes, SaidRound
from antiphon.scheduler.outcomes import Outcome, Receipt
from antiphon.scheduler.receipt_log import receipt_json
from antiphon.scheduler.recorded_facts import ReplicaFacts
from antiphon.scheduler.rounds import RoundRequest
from antiphon.traces.schema import RECORDED_ROUND_SCHEMA, RecordedRound

log = logging.getLogger(__name__)

MARKER = "recording.json"
RECORDING_SCHEMA = "antiphon.recording/1"
MAX_WAITING = 10_000
"""Rounds that may wait for a disk that hangs; later ones are lost, and counted."""
CLOSE_DEADLINE_S = 5.0


class EndedRound(NamedTuple):
    """What the driver knows of a round when it has ended. Page hashes are those of `engines/page_hash.py`."""

    request: RoundRequest
    receipt: Receipt
    parent_id: str | None
    output_ids: list[int]
    prompt_hashes: tuple[bytes, ...]
    final_hashes: tuple[bytes, ...]
    """Of prompt and output; () = not known."""
    page_tokens: int
    arrived_s: float
    """Unix time, as `ended_s`."""
    ended_s: float


class RoundLog:
    """One replica's side of a recording. `add` and `describe` never wait and never raise."""

    def __init__(
        self,
        directory: Path,
        replica: str,
        *,
        plain_ids: bool = False,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Opens the files of `replica` in `directory`, which is made. Raises ValueError if that fails."""
        self.lost = 0
        """Rounds that are not in the recording, or not whole."""
        self._on_lost = on_lost
        self._plain_ids = plain_ids
        self._known = KnownPrefixes()
        self._facts_path = directory / f"replica-{replica}.json"
        self._work: queue.SimpleQueue[EndedRound | bytes | None] = queue.SimpleQueue()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._salt = _salt(directory)
            self._rounds = _AppendOnly(directory / f"rounds-{replica}.jsonl")
            self._receipts = _AppendOnly(directory / f"receipts-{replica}.jsonl")
        except OSError as error:
            raise ValueError(f"cannot record in {directory}: {error}") from error
        self._thread = threading.Thread(target=self._run, name="round log", daemon=True)
        self._thread.start()

    def add(self, ended: EndedRound) -> None:
        """Write a round down, some time soon."""
        if self._work.qsize() < MAX_WAITING:
            self._work.put(ended)
        else:
            self._lose("the disk is too slow")

    def describe(self, facts: ReplicaFacts) -> None:
        """Replace what the recording says of this replica."""
        self._work.put(msgspec.json.encode(facts))

    def close(self, deadline_s: float = CLOSE_DEADLINE_S) -> None:
        """Write what waits and close; whatever a disk does not take by the deadline is lost."""
        self._work.put(None)
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            log.warning("the recording is cut off: the disk did not take it in %g s", deadline_s)

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            try:
                if isinstance(item, EndedRound):
                    self._write(item)
                else:
                    _replace(self._facts_path, item)
            except OSError as error:
                self._lose(str(error))
            except Exception:
                log.exception("a round is not recorded, by a bug")
                self._lose("a bug")
        self._rounds.close()
        self._receipts.close()

    def _write(self, ended: EndedRound) -> None:
        request, receipt = ended.request, ended.receipt
        receipt_line = receipt_json(receipt) | {"session_id": self._name(request.tenant, receipt.session_id)}
        for attempt in receipt_line["tries"]:
            # An engine's message may quote what it was sent: its name and the kind of failure are enough.
            attempt["failure"] = ": ".join(attempt["failure"].split(": ")[:2])
        said = SaidRound(
            session=(request.tenant, receipt.session_id),
            name=receipt_line["session_id"],
            number=receipt.round_number,
            request=request,
            output_ids=ended.output_ids,
            prompt_hashes=ended.prompt_hashes,
            final_hashes=ended.final_hashes,
            page_tokens=ended.page_tokens,
            completed=receipt.outcome is Outcome.COMPLETED,
        )
        found = self._known.take(said)
        line = RecordedRound(
            schema=RECORDED_ROUND_SCHEMA,
            session=said.name,
            round=receipt.round_number,
            round_id=receipt.round_id,
            arrived_s=round(ended.arrived_s, 6),
            ended_s=round(ended.ended_s, 6),
            prompt_tokens=receipt.prompt_tokens,
            output_tokens=receipt.completion_tokens,
            kept_tokens=found.kept_tokens,
            outcome=receipt.outcome.value,
            tool=request.tool,
            parent=self._name(request.tenant, ended.parent_id) if ended.parent_id else None,
            shared_with=found.shared_with,
            shared_tokens=found.shared_tokens,
            slo_ttft_s=request.slo_ttft_s,
            slo_itl_s=request.slo_itl_s,
        )
        self._rounds.append(msgspec.json.encode(line))
        self._receipts.append(msgspec.json.encode(receipt_line))

    def _name(self, tenant: str, session_id: str) -> str:
        if self._plain_ids:
            return session_id if tenant == "default" else f"{tenant}/{session_id}"
        return hmac.digest(self._salt, f"{tenant}\0{session_id}".encode(), hashlib.sha256)[:12].hex()

    def _lose(self, why: str) -> None:
        if not self.lost:
            log.error("a round is not recorded: %s; further ones are only counted", why)
        self.lost += 1
        self._on_lost()


class _AppendOnly:
    """A file of lines. A line that could not be written whole is taken back, so that later ones are sound."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._end = self._file.tell()

    def append(self, line: bytes) -> None:
        """Raises OSError, and leaves the file as it was, if the line does not fit."""
        whole = line + b"\n"
        try:
            if self._file.write(whole) != len(whole):
                raise OSError(f"{self._file.name}: the disk is full")
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end += len(whole)

    def close(self) -> None:
        self._file.close()


class _Marker(msgspec.Struct, frozen=True):
    schema: str
    salt: str


def _salt(directory: Path) -> bytes:
    """The folder's salt, made by the first replica that records there and readable by its owner only."""
    path = directory / MARKER
    made = msgspec.json.encode(_Marker(RECORDING_SCHEMA, secrets.token_hex(32)))
    draft = directory / f".{MARKER}.{secrets.token_hex(4)}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(made)
    try:
        os.link(draft, path)  # fails if it is there: then another's holds
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    try:
        return bytes.fromhex(msgspec.json.decode(path.read_bytes(), type=_Marker).salt)
    except (msgspec.MsgspecError, ValueError) as error:
        raise OSError(f"{path} is not ours: {error}") from error


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_bytes(content)
    draft.replace(path)
