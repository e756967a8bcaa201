"""One request of a closed-form engine, and what is reported of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from antiphon.engines.chains import Chain
from antiphon.engines.held import Held
from antiphon.policies.latency import PrefillCost

NEVER = float("inf")
_NOT_YET = float("nan")


class Milestone(Enum):
    FIRST_TOKEN = auto()
    FINISHED = auto()
    """The last token, or the end of a prefill-only request."""
    REFUSED = auto()
    """It can never run; `message` says why."""


class Stage(Enum):
    NEW = auto()
    PENDING = auto()
    """On its way to the batch loop, or waiting there."""
    PREFILL = auto()
    """Admitted: part of a prefill pass, or between two of them."""
    RUNNING = auto()
    OVER = auto()


# By name: on Python 3.11 a look-up through an Enum's class costs as much as a call.
FIRST_TOKEN, FINISHED, REFUSED = Milestone
NEW, PENDING, PREFILL, RUNNING, OVER = Stage


@dataclass(slots=True)
class EngineTotals:
    """Counters since the start."""

    prefill_tokens_computed: int = 0
    prefill_tokens_reused: int = 0
    """Prompt tokens found on the device or in the store, at first admission."""
    prefill_busy_s: float = 0.0
    """With loading from the store."""
    decode_busy_s: float = 0.0
    prefill_passes: int = 0
    decode_steps: int = 0
    output_tokens: int = 0
    retractions: int = 0
    finished: int = 0
    refused: int = 0
    aborted: int = 0

    @property
    def busy_s(self) -> float:
        return self.prefill_busy_s + self.decode_busy_s


class EngineRequest:
    """A prefill (`output_tokens` 0) or an answer. Times are NaN until they have come."""

    __slots__ = (
        "aborted", "admitted_s", "branch", "cached_device_tokens", "cached_host_tokens", "chain", "computed",
        "due", "emitted", "end_chain", "end_pages", "end_step", "finished_s", "first_token_s", "last_token_s",
        "limit", "load_s", "message", "output_tokens", "prompt_tokens", "retractions", "seq", "stage", "tag",
        "tip", "tree_pages", "visible_s",
    )  # fmt: skip

    def __init__(
        self,
        tag: Any,
        chain: Chain,
        prompt_tokens: int,
        output_tokens: int,
        end_chain: Chain | None = None,
    ) -> None:
        """`tag`: the driver's own. `chain`: whole pages of the prompt. `end_chain`: whole pages with KV when
        the answer is over, on the same branch or one that contains the chain; None = only the prompt's stay.
        """
        self.tag = tag
        self.chain = chain
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.end_chain = end_chain
        self.cached_device_tokens = 0
        """Of the prompt, found on the device when it was first admitted."""
        self.cached_host_tokens = 0
        """Of the prompt, found in the store when it was first admitted."""
        self.admitted_s = self.first_token_s = self.finished_s = _NOT_YET
        self.retractions = 0
        self.message = ""
        # What follows is the engine's.
        end = chain if end_chain is None or not output_tokens else end_chain
        self.branch, self.end_pages = end
        self.stage = NEW
        self.aborted = False
        self.visible_s = NEVER
        self.limit = output_tokens
        """Output tokens, cut where the pool ends."""
        self.emitted = 0
        """Output tokens so far; while it runs: when it joined the batch, as `computed`."""
        self.computed = 0
        """Tokens with KV."""
        self.tip: Held | None = None
        self.tree_pages = 0
        """It locks `tip` of the device's tree so deep; further pages are private."""
        self.load_s = 0.0
        """Loading from the store, to be paid by its next prefill pass."""
        self.seq = 0
        """Its place in the running batch."""
        self.end_step = 0
        """The engine's step count when it is finished."""
        self.due = 0
        self.last_token_s = 0.0

    def after_prefill_s(self, seconds: float, cost: PrefillCost, take: int) -> float:
        """`seconds` plus those of its next `take` tokens in a pass, which pay what it owes for loading."""
        cached_s, squared_s = cost.per_token_cached_s, cost.per_token_squared_s
        seconds += take * (cost.per_token_s + self.computed * cached_s + take * squared_s)
        if cost.cached_token_s or cost.cached_squared_s:
            seconds += self.computed * (cost.cached_token_s + self.computed * cost.cached_squared_s)
        seconds += self.load_s
        self.load_s = 0.0
        return seconds

    def __repr__(self) -> str:
        return f"EngineRequest({self.tag!r}, {self.stage.name}, {self.emitted}/{self.limit})"
