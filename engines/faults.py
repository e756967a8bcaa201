"""Faults on command: what a simulated engine can be told to do wrong, by POST /antiphon/faults.

Only with fault injection switched on. The body is one JSON object; "fault" names it:

    {"fault": "refuse", "count": 2}               the next 2 requests get HTTP 503
    {"fault": "hang", "count": 1, "seconds": 5}   the next one, a prefill too, waits before it is computed;
                                                  without seconds, until it is aborted or they are cleared
    {"fault": "break_stream", "after_tokens": 3}  the next stream's connection is cut after 3 tokens
    {"fault": "abort", "count": 1}                the next request ends as SGLang's do when a KV load fails:
                                                  finish_reason abort, status 503
    {"fault": "slow", "factor": 10}               every step takes 10 times as long
    {"fault": "drop_directory"}                   the directory closes its port and its connections
    {"fault": "delay_prefetch", "seconds": 1}     the next prefetch into this engine waits first
    {"fault": "die", "point": "prefill"}          the process exits at once when it gets there:
                                                  now | prefill | first_token | decode (after_tokens) |
                                                  reserve (as a source) | prefetch (as a puller, pages read)
    {"fault": "clear"}                            all of the above is undone
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Literal

import msgspec

DIE_STATUS = 70
"""Exit status of an engine that died on command."""

DiePoint = Literal["now", "prefill", "first_token", "decode", "reserve", "prefetch"]


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="fault"):
    """Any fault."""


class _Counted(Fault, frozen=True):
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


class Refuse(_Counted, frozen=True, tag="refuse"):
    pass


class Hang(_Counted, frozen=True, tag="hang"):
    seconds: float | None = None


class BreakStream(_Counted, frozen=True, tag="break_stream"):
    after_tokens: int = 0


class AbortRequest(_Counted, frozen=True, tag="abort"):
    message: str = "External KV cache load failed"


class Slow(Fault, frozen=True, tag="slow"):
    factor: float

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"factor must be positive, got {self.factor}")


class DropDirectory(Fault, frozen=True, tag="drop_directory"):
    pass


class DelayPrefetch(_Counted, frozen=True, tag="delay_prefetch"):
    seconds: float = 1.0


class Die(Fault, frozen=True, tag="die"):
    point: DiePoint = "now"
    after_tokens: int = 1


class Clear(Fault, frozen=True, tag="clear"):
    pass


AnyFault = Refuse | Hang | BreakStream | AbortRequest | Slow | DropDirectory | DelayPrefetch | Die | Clear

_decoder: msgspec.json.Decoder[AnyFault] = msgspec.json.Decoder(AnyFault)


def parse_fault(body: bytes) -> AnyFault:
    """One fault from JSON; raises ValueError naming what is wrong."""
    try:
        return _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a fault: {error}") from error


def exit_now() -> None:
    os._exit(DIE_STATUS)


class Faults:
    """The faults that are armed. Thread-safe: directory threads ask too."""

    def __init__(self, die: Callable[[], None] = exit_now) -> None:
        self._die = die
        self._lock = threading.Lock()
        self._queues: dict[type[Fault], list[Fault]] = {}
        self._die_at: Die | None = None
        self.slow_factor = 1.0
        self.cleared = threading.Event()
        """Set while no fault is armed: ends delays early."""

    def arm(self, fault: AnyFault) -> None:
        """Add a fault (`Clear`: drop all). `DropDirectory` is the engine's own business."""
        with self._lock:
            match fault:
                case Clear():
                    self._queues.clear()
                    self._die_at = None
                    self.slow_factor = 1.0
                    self.cleared.set()
                    return
                case Slow():
                    self.slow_factor = fault.factor
                case Die():
                    self._die_at = fault
                case DropDirectory():
                    pass
                case _:
                    self._queues.setdefault(type(fault), []).extend([fault] * fault.count)
            self.cleared.clear()
        self.reach("now")

    def armed(self, kind: type[Fault]) -> int:
        """How many of a counted kind are still to come."""
        with self._lock:
            return len(self._queues.get(kind, ()))

    def take_refusal(self) -> bool:
        return self._take(Refuse) is not None

    def take_hang(self) -> Hang | None:
        fault = self._take(Hang)
        return fault if isinstance(fault, Hang) else None

    def take_break(self) -> BreakStream | None:
        fault = self._take(BreakStream)
        return fault if isinstance(fault, BreakStream) else None

    def take_abort(self) -> AbortRequest | None:
        fault = self._take(AbortRequest)
        return fault if isinstance(fault, AbortRequest) else None

    def delay_prefetch(self) -> None:
        """Block the calling thread if a prefetch is to be late."""
        fault = self._take(DelayPrefetch)
        if isinstance(fault, DelayPrefetch):
            self.cleared.wait(fault.seconds)

    def reach(self, point: DiePoint, tokens: int = 0) -> None:
        """Die here if that is the order. `tokens` = output so far, for the point "decode"."""
        with self._lock:
            armed = self._die_at
            due = armed is not None and armed.point == point
            if due and armed is not None and point == "decode":
                due = tokens >= armed.after_tokens
            if due:
                self._die_at = None
        if due:
            self._die()

    def _take(self, kind: type[Fault]) -> Fault | None:
        with self._lock:
            queue = self._queues.get(kind)
            return queue.pop(0) if queue else None
