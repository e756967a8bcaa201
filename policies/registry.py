"""Names of policies and orderings, as configuration gives them: the only list.

A policy is named by a string and built from a mapping of parameters; what the mapping leaves out has the
default of the policy's parameters class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from antiphon.policies.ampd import Ampd, AmpdParameters
from antiphon.policies.base import Ordering, Policy
from antiphon.policies.fcfs import Fcfs, FcfsParameters
from antiphon.policies.local import Local, LocalParameters
from antiphon.policies.remote import Remote, RemoteParameters


class Entry(NamedTuple):
    build: Any
    """parameters -> policy or ordering"""
    parameters: type


POLICIES: Mapping[str, Entry] = MappingProxyType(
    {
        "ampd": Entry(Ampd, AmpdParameters),
        "local": Entry(Local, LocalParameters),
        "remote": Entry(Remote, RemoteParameters),
    }
)

ORDERINGS: Mapping[str, Entry] = MappingProxyType({"fcfs": Entry(Fcfs, FcfsParameters)})


def make_policy(name: str, parameters: Mapping[str, object] | None = None) -> Policy:
    """The policy `name`; ValueError names an unknown policy or parameter, or a value that it refuses."""
    policy: Policy = _make("policy", POLICIES, name, parameters or {})
    return policy


def make_ordering(name: str, parameters: Mapping[str, object] | None = None) -> Ordering:
    """The ordering `name`; errors as `make_policy`."""
    ordering: Ordering = _make("ordering", ORDERINGS, name, parameters or {})
    return ordering


def _make(kind: str, entries: Mapping[str, Entry], name: str, parameters: Mapping[str, object]) -> Any:
    entry = entries.get(name)
    if entry is None:
        raise ValueError(f"unknown {kind} {name!r}: known are {', '.join(sorted(entries))}")
    known = [field.name for field in fields(entry.parameters)]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(
            f"{kind} {name!r} has no parameter {', '.join(map(repr, unknown))}:"
            f" it takes {', '.join(known) or 'none'}"
        )
    try:
        return entry.build(msgspec.convert(dict(parameters), entry.parameters))
    except msgspec.ValidationError as error:
        raise ValueError(f"{kind} {name!r}: {error}") from error
