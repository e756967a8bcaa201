"""Whether a call that failed is made again, and when, as plans: generators that say what is to be done."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass

from antiphon.client.errors import OVERLOADED, Unreachable, retry_after_s
from antiphon.client.wire import RETRY_COUNT, Answer, Call, Outcome

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 8.0
MAX_WISHED_DELAY_S = 120.0
"""A server that asks for more is not waited for."""
RETRIED = (408, 500, 502, 503, 504, 429)


@dataclass(frozen=True, slots=True)
class Send:
    call: Call


@dataclass(frozen=True, slots=True)
class Wait:
    delay_s: float


Plan = Generator[Send | Wait, Outcome | None, Answer]
"""Yields what is to be done; takes the outcome of each `Send`; returns the last answer."""


def delay_s(outcome: Outcome, tried: int) -> float | None:
    """Before the next try, after `tried` of them; None = there must be none."""
    wished = None
    if isinstance(outcome, Answer):
        told = outcome.headers.get("x-should-retry")
        if told == "false" or (told != "true" and outcome.status not in RETRIED):
            return None
        wished = retry_after_s(outcome.headers)
    if wished is not None:
        return wished if wished <= MAX_WISHED_DELAY_S else None
    return min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** (tried - 1)) * random.uniform(0.75, 1.0)


def never_ran(outcome: Outcome) -> bool:
    """The server refused it at its door: nothing of it has happened."""
    return isinstance(outcome, Answer) and outcome.status in OVERLOADED


def plan_call(
    call: Call,
    max_retries: int,
    *,
    again: Call | None = None,
    repeatable: bool = True,
    hopeless: Callable[[Answer], bool] = lambda _: False,
) -> Plan:
    """`again` replaces the call as soon as a try may have run; without it, one that is not `repeatable` is
    then not tried any more. An answer that is `hopeless` is returned at once.

    Raises `Unreachable` when the last try found nobody.
    """
    for tried in range(1, max_retries + 2):
        headers = {**call.headers, RETRY_COUNT: str(tried - 1)} if tried > 1 else call.headers
        outcome = yield Send(Call(call.method, call.path, call.body, headers, call.stream))
        assert outcome is not None
        if isinstance(outcome, Answer) and (outcome.ok or hopeless(outcome)):
            return outcome
        may_retry = tried <= max_retries and (repeatable or again is not None or never_ran(outcome))
        wait_s = delay_s(outcome, tried) if may_retry else None
        if wait_s is None:
            if isinstance(outcome, Unreachable):
                raise outcome
            return outcome
        if again is not None and not never_ran(outcome):
            call = again
        yield Wait(wait_s)
    raise AssertionError("the last try returns or raises")
