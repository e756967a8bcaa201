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

from antiphon.policies.adaptive import Adaptive, AdaptiveParameters
from antiphon.policies.ampd import Ampd, AmpdParameters
from antiphon.policies.ampd_reorder import AmpdReorder, AmpdReorderParameters
from antiphon.policies.base import Ordering, Policy
from antiphon.policies.deflect import Deflect, DeflectParameters
from antiphon.policies.edf import Edf, EdfParameters
from antiphon.policies.fcfs import Fcfs, FcfsParameters
from antiphon.policies.first_remote import FirstRemote, FirstRemoteParameters
from antiphon.policies.isl_bounding import IslBounding, IslBoundingParameters
from antiphon.policies.local import Local, LocalParameters
from antiphon.policies.mooncake import Mooncake, MooncakeParameters
from antiphon.policies.ppd import Ppd, PpdParameters
from antiphon.policies.remote import Remote, RemoteParameters
from antiphon.policies.remote_pull_always import RemotePullAlways, RemotePullAlwaysParameters
from antiphon.policies.sjf import Sjf, SjfParameters
from antiphon.policies.threshold import Threshold, ThresholdParameters
from antiphon.policies.threshold_queue import ThresholdQueue, ThresholdQueueParameters


class Entry(NamedTuple):
    build: Any
    """parameters -> policy or ordering"""
    parameters: type


POLICIES: Mapping[str, Entry] = MappingProxyType(
    {
        "adaptive": Entry(Adaptive, AdaptiveParameters),
        "ampd": Entry(Ampd, AmpdParameters),
        "deflect": Entry(Deflect, DeflectParameters),
        "first_remote": Entry(FirstRemote, FirstRemoteParameters),
        "isl_bounding": Entry(IslBounding, IslBoundingParameters),
        "local": Entry(Local, LocalParameters),
        "mooncake": Entry(Mooncake, MooncakeParameters),
        "ppd": Entry(Ppd, PpdParameters),
        "remote": Entry(Remote, RemoteParameters),
        "remote_pull_always": Entry(RemotePullAlways, RemotePullAlwaysParameters),
        "threshold": Entry(Threshold, ThresholdParameters),
        "threshold_queue": Entry(ThresholdQueue, ThresholdQueueParameters),
    }
)

ORDERINGS: Mapping[str, Entry] = MappingProxyType(
    {
        "ampd_reorder": Entry(AmpdReorder, AmpdReorderParameters),
        "edf": Entry(Edf, EdfParameters),
        "fcfs": Entry(Fcfs, FcfsParameters),
        "sjf": Entry(Sjf, SjfParameters),
    }
)


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
