"""What a driver keeps of a core's commands, and what it may rely on.

AssertionError: the core broke a promise. One call of a round at a time, on an engine that lives, under a rid
of its own; no more prefills on an engine than the limit; one end of each round, which fits what happened;
reservations as last published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.messages import (
    Abort,
    Broke,
    Claim,
    ClientGone,
    Command,
    Complete,
    EngineDown,
    EngineFailed,
    EngineUp,
    Event,
    FirstToken,
    Generate,
    GoesOn,
    Prefetch,
    Prefill,
    Refuse,
    Rehome,
    Reserved,
    RoundArrived,
    RoundFinished,
    Totals,
)
from antiphon.scheduler.outcomes import Outcome

NOBODY = Totals()


class ModelDriver:
    """Follows event by event. `live`: the engines that are up, written by whoever makes the events."""

    def __init__(self, live: dict[str, EngineUp], config: CoreConfig) -> None:
        self.live = live
        self.config = config
        self.calls: dict[str, Command] = {}
        """Round id -> the one call under way."""
        self.streaming: set[str] = set()
        self.in_flight: set[str] = set()
        """Arrived, not ended."""
        self.outcomes: Counter[Outcome] = Counter()
        self.reserved: dict[str, Totals] = {}
        """As last published; engines with nothing left out."""
        self.ended: list[str] = []
        """By the last event."""
        self._claimed: set[str] = set()
        self._broken: set[str] = set()
        """Their answers broke, and may go on on another engine."""
        self._rids: set[str] = set()
        self._cut_off: set[str] = set()
        """Refused or broken by the last event."""

    def follow(self, event: Event, commands: Sequence[Command]) -> None:
        """The core took `event` and answered with `commands`."""
        self.ended = []
        self._cut_off.clear()
        self._take(event)
        for command in commands:
            self._follow(event, command)
        assert not self._cut_off, f"refused or broken, and not completed: {sorted(self._cut_off)}"

    def _take(self, event: Event) -> None:
        if isinstance(event, RoundArrived):
            self.in_flight.add(event.round_id)
        elif isinstance(event, FirstToken):
            self.streaming.add(event.round_id)
            self._broken.discard(event.round_id)
        elif not isinstance(event, ClientGone):  # the call of a client that is gone is aborted by the core
            self.calls.pop(getattr(event, "round_id", ""), None)
        if isinstance(event, EngineFailed) and isinstance(event.goes_on, GoesOn):
            self._broken.add(event.round_id)
        elif isinstance(event, EngineDown):
            self._broken.update(name for name, on in event.goes_on.items() if isinstance(on, GoesOn))

    def _follow(self, event: Event, command: Command) -> None:
        match command:
            case Claim() | Prefetch() | Prefill() | Generate():
                self._start(command)
            case Abort(round_id=round_id):
                self.calls.pop(round_id, None)
            case Refuse(round_id=round_id):
                assert round_id not in self.streaming, f"{round_id} is refused after its first token"
                self._cut_off.add(round_id)
            case Broke(round_id=round_id):
                assert round_id in self.streaming, f"{round_id} breaks before its first token"
                self._cut_off.add(round_id)
            case Complete():
                self._complete(event, command)
            case Rehome(round_id=round_id, from_home=before, to_home=home):
                assert round_id in self.in_flight and before != home, f"{command} moves nothing"
                assert home in self.live, f"{command}: a session moves to an engine that is gone"
            case Reserved(engine_id=engine_id, totals=totals):
                assert self.reserved.get(engine_id, NOBODY) != totals, f"{command} says nothing new"
                self.reserved.pop(engine_id, None)
                if totals != NOBODY:
                    self.reserved[engine_id] = totals

    def _start(self, command: Claim | Prefetch | Prefill | Generate) -> None:
        round_id = command.round_id
        assert round_id in self.in_flight, f"{command} for a round that is over"
        assert round_id not in self.calls, f"two calls at once: {self.calls[round_id]} and {command}"
        broke = round_id in self._broken
        assert round_id not in self.streaming or broke, f"{command} after the first token"
        self.calls[round_id] = command
        if isinstance(command, Claim):
            assert round_id not in self._claimed, f"{round_id} is claimed twice"
            self._claimed.add(round_id)
            return
        assert command.engine_id in self.live, f"{command} on an engine that is gone"
        if isinstance(command, Prefetch):
            assert command.pages > 0 and command.first_page == 0 and command.deadline_s > 0, f"{command}"
            assert command.source_id != command.engine_id, f"{command} from itself"
            return
        assert command.rid not in self._rids, f"{command}: a rid that was used before"
        assert command.rid.startswith(round_id), f"{command}: a rid of another round"
        self._rids.add(command.rid)
        latest_s = self.config.first_token_deadline_s + 1e-6
        assert 0 < command.deadline_s <= latest_s, f"{command}: a deadline beyond that of the round"
        if isinstance(command, Prefill):
            busy = [call for call in self.calls.values() if isinstance(call, Prefill)]
            here = sum(call.engine_id == command.engine_id for call in busy)
            assert here <= self.config.prefill_in_flight, f"{command} is one too many"

    def _complete(self, event: Event, command: Complete) -> None:
        round_id, receipt = command.round_id, command.receipt
        assert round_id in self.in_flight, f"{round_id} ends and was not in flight"
        assert round_id not in self.calls, f"{round_id} ends with {self.calls[round_id]} under way"
        own = getattr(event, "round_id", None) == round_id
        if command.outcome is Outcome.COMPLETED:
            assert own and isinstance(event, RoundFinished), f"{round_id} is completed by {event}"
        elif command.outcome is Outcome.CANCELLED:
            assert own and isinstance(event, ClientGone), f"{round_id} is cancelled by {event}"
        else:
            assert round_id in self._cut_off, f"{round_id} {command.outcome.value}, and its client not told"
        self._cut_off.discard(round_id)
        self._check_receipt(command)
        assert (receipt.ttft_s is not None) == (round_id in self.streaming), f"{round_id}: {receipt}"
        self.in_flight.remove(round_id)
        self.streaming.discard(round_id)
        self._broken.discard(round_id)
        self._claimed.discard(round_id)
        self.outcomes[command.outcome] += 1
        self.ended.append(round_id)

    def _check_receipt(self, command: Complete) -> None:
        receipt = command.receipt
        assert receipt.round_id == command.round_id and receipt.outcome is command.outcome, f"{receipt}"
        assert len(receipt.tries) <= self.config.max_tries, f"{command.round_id}: {len(receipt.tries)} tries"
        assert 0 <= receipt.cached_tokens <= receipt.prompt_tokens, f"cached: {receipt}"
        seconds = receipt.queue_s, receipt.pull_s, receipt.prefill_s, receipt.push_s, receipt.ttft_s or 0.0
        assert min(seconds) >= 0.0, f"{command.round_id}: {seconds}"
        for held in command.holdings:
            up = self.live.get(held.engine_id)
            assert up is not None and up.incarnation == held.incarnation, (
                f"{held.engine_id} is not that any more"
            )
        if command.outcome is Outcome.COMPLETED:
            assert command.home in self.live and not receipt.tries[-1].failure, f"{receipt}"
