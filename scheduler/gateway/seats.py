"""How many requests are under way, within a bound; a retry sits on its first try's seat where none is free.

The first try ends when its retry has its round. Until then both are there, and one seat is counted for them;
a second retry gets that seat only when the first of the three has gone. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Seat:
    """Of one request."""

    name: str = ""
    """Of its call, once known."""
    counts: bool = True
    """It is not lent out."""
    lender: Seat | None = None
    """Who sat here before, if the seat was not free."""
    left: bool = False


class Seats:
    """For one event loop."""

    def __init__(self) -> None:
        self.taken = 0
        self._named: dict[str, list[Seat]] = {}

    def take(self, bound: int, name: str = "", *, again: bool = False) -> Seat | None:
        """A seat among `bound` (0 = any number), or if it is asked for `again` that of the same name."""
        lender = None
        if 0 < bound <= self.taken:
            lender = self._lender(name) if again else None
            if lender is None:
                return None
            lender.counts = False
        else:
            self.taken += 1
        seat = Seat(lender=lender)
        self.call(seat, name)
        return seat

    def call(self, seat: Seat, name: str) -> None:
        """The call that this seat's request is a try of is known now."""
        if name:
            seat.name = name
            self._named.setdefault(name, []).append(seat)

    def lends(self, name: str) -> bool:
        """Whether a retry by this name would get a seat that is not free."""
        return self._lender(name) is not None

    def leave(self, seat: Seat) -> None:
        """Its request is over; whoever sat there before and has not gone has the seat again."""
        seat.left = True
        if seat.lender is not None and not seat.lender.left:
            seat.lender.counts = True
        elif seat.counts:
            self.taken -= 1
        seat.lender = None
        if seat.name:
            same = self._named[seat.name]
            same.remove(seat)
            if not same:
                del self._named[seat.name]

    def _lender(self, name: str) -> Seat | None:
        for seat in reversed(self._named.get(name, ())):
            if seat.counts and (seat.lender is None or seat.lender.left):
                return seat
        return None
