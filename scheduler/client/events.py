"""What happens between rounds, told to the gateway: a tool starts or ends, a user is waited for.

Events are hints. One that does not arrive costs a moment and never fails a program: after a failure the
gateway is left alone for a while.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from antiphon.client.wire import Answer, Call, Outcome, session_path

log = logging.getLogger(__name__)

DEADLINE_S = 1.0
PAUSE_S = 30.0
EVENTS = ("tool_start", "tool_end", "user_wait", "resume_soon")


class Events:
    """Makes the calls and remembers whether they are worth making."""

    def __init__(self) -> None:
        self._quiet_until_s = 0.0

    def call(self, session_id: str, kind: str, fields: dict[str, Any]) -> Call | None:
        """None while the gateway is left alone. Raises ValueError for a kind that does not exist."""
        if kind not in EVENTS:
            raise ValueError(f"an event is one of {', '.join(EVENTS)}; got {kind!r}")
        if time.monotonic() < self._quiet_until_s:
            return None
        said = {name: value for name, value in fields.items() if value is not None}
        return Call("POST", session_path(session_id, "events"), {"type": kind, **said}, deadline_s=DEADLINE_S)

    def told(self, call: Call, outcome: Outcome) -> bool:
        """Whether the gateway took it."""
        if isinstance(outcome, Answer) and outcome.ok:
            return True
        what = outcome.error() if isinstance(outcome, Answer) else outcome
        log.debug("event not taken: %s: %s", call.path, what)
        if not isinstance(outcome, Answer) or outcome.status != 404 or outcome.error().code == "not_found":
            # A session that is unknown says nothing of others; anything else does.
            self._quiet_until_s = time.monotonic() + PAUSE_S
        return False
