"""Who a request is from, where it is handled: set by the gate (tenants.py) and read by whoever needs it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from antiphon.scheduler.access_config import LimitsConfig
from antiphon.scheduler.gateway.identity import DEFAULT_TENANT


@dataclass(slots=True, eq=False)
class Caller:
    """One request's client."""

    tenant: str = DEFAULT_TENANT
    key: str = ""
    """Name of its API key; "" = no keys are asked for."""
    admin: bool = True
    """May see the engines, and all tenants' sessions and receipts."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    """For its answer: how much of its limits is left."""

    @property
    def sees_tenant(self) -> str | None:
        """Whose sessions and receipts it may see; None = everybody's."""
        return None if self.admin else self.tenant


caller_var: ContextVar[Caller | None] = ContextVar("antiphon_caller", default=None)
"""A context variable, so that no route can forget to pass it on: without it tenants would mix."""


def current_caller() -> Caller:
    """Whose request is being handled; outside of a request the one of a gateway without keys."""
    return caller_var.get() or Caller()
