"""Where a session's home probably is, when the ledger cannot say and we do not know. Pure.

Replicas that cannot ask the ledger should not send one session to different engines: they all choose the
engine that is believed to hold most of the prompt, else the one that a hash of session and engine names
(rendezvous hashing: an engine that comes or goes moves only its own sessions).
"""

from __future__ import annotations

import hashlib

from antiphon.policies.base import ClusterView, EngineView, RoundView, possible_homes
from antiphon.scheduler.store_use import SessionKey


def likely_home(session: SessionKey, view: RoundView, cluster: ClusterView) -> tuple[str, str] | None:
    """(engine id, why); None if no engine can be the round's home. Engines in `view.excluded` are none."""
    usable = possible_homes(view, cluster)
    if not usable:
        return None
    most = max(usable, key=lambda engine: view.held(engine.engine_id))
    held = view.held(most.engine_id)
    if held:
        return most.engine_id, f"no home is known: {most.engine_id} holds {held} tokens of the prompt"
    chosen = max(usable, key=lambda engine: _weight(session, engine))
    return chosen.engine_id, f"no home is known: the session's hash names {chosen.engine_id}"


def _weight(session: SessionKey, engine: EngineView) -> bytes:
    name = "\0".join((*session, engine.engine_id))
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
