"""Hints in headers, for clients that cannot touch the body: ours, and those of other gateways. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

MIN_TTL_S, MAX_TTL_S = 1, 86_400
MAX_CLASS_CHARS = 64


class BadHint(ValueError):
    """A hint that is addressed to us and wrong; `param` is where it stands."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


_ITEM = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*")+')
_DECIMAL = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,9})?")
_INTEGER = re.compile(r"-?[0-9]{1,10}")


def _number(text: str, above: bool = False) -> float:
    """Raises ValueError but for a decimal as RFC 8941 has it, not below 0 (`above`: above 0)."""
    if not _DECIMAL.fullmatch(text) or float(text) < 0 or (above and not float(text) > 0):
        raise ValueError("a number above 0" if above else "a number, 0 or more")
    return float(text)


def _milliseconds(text: str) -> float:
    return _number(text, above=True) / 1000


def _count(text: str) -> int:
    if not _INTEGER.fullmatch(text) or not 0 <= int(text) < 2**31:
        raise ValueError("a whole number, 0 or more")
    return int(text)


def _rank(text: str) -> int:
    if not _INTEGER.fullmatch(text) or not -(2**31) <= int(text) < 2**31:
        raise ValueError("a whole number")
    return int(text)


def _ttl(text: str) -> float:
    if not _DECIMAL.fullmatch(text) or not MIN_TTL_S <= float(text) <= MAX_TTL_S:
        raise ValueError(f"a number of seconds, {MIN_TTL_S} to {MAX_TTL_S}")
    return float(text)


def _flag(text: str) -> bool:
    """As RFC 8941 has it, and as people write it."""
    word = text.strip().lower()
    if word in ("", "?1", "1", "true", "yes"):
        return True
    if word in ("?0", "0", "false", "no"):
        return False
    raise ValueError("true or false")


def _word(text: str) -> str:
    bare = text[1:-1] if len(text) >= 2 and text[0] == text[-1] == '"' else text
    if not 0 < len(bare) <= MAX_CLASS_CHARS:
        raise ValueError(f"1 to {MAX_CLASS_CHARS} characters")
    return bare


Reader = tuple[str, Callable[[str], Any]]

HINT_KEYS: dict[str, Reader] = {
    "ttft_ms": ("ttft_s", _milliseconds),
    "tpot_ms": ("itl_s", _milliseconds),
    "deadline_ms": ("deadline_s", _milliseconds),
    "class": ("slo_class", _word),
    "priority": ("priority", _rank),
    "ttl_s": ("ttl_s", _ttl),
    "final": ("final", _flag),
    "expected_gap_s": ("expected_gap_s", _number),
    "osl": ("expected_output_tokens", _count),
    "expected_output_tokens": ("expected_output_tokens", _count),
    "next_input_tokens": ("next_input_tokens", _count),
    "next_output_tokens": ("next_output_tokens", _count),
    "remaining_rounds": ("remaining_rounds", _count),
    "expected_rounds": ("expected_rounds", _count),
    "same_tools": ("same_tools", _flag),
    "must_exist": ("must_exist", _flag),
}
"""What `X-Session-Hints` may say -> what it means."""

OWN_HEADERS: dict[str, Reader] = {
    "x-session-ttl": ("ttl_s", _ttl),
    "x-session-final": ("final", _flag),
}


def ours(headers: Mapping[str, str], warnings: list[str]) -> dict[str, Any]:
    """What our own headers say, as fields of `Hints`; raises `BadHint`. `warnings` gets unknown keys."""
    found: dict[str, Any] = {}
    for key, value in _dictionary(headers.get("x-session-hints", "")):
        if key not in HINT_KEYS:
            warnings.append(f"unknown key `{key[:60]}` of X-Session-Hints was ignored")
            continue
        name, read = HINT_KEYS[key]
        found[name] = _read(read, value, f"X-Session-Hints.{key}")
    for header, (name, read) in OWN_HEADERS.items():
        if header in headers:
            shown = "-".join(map(str.capitalize, header.split("-"))).replace("Ttl", "TTL")
            found[name] = _read(read, headers[header].strip() or "?0", shown)
    return found


def _read(read: Callable[[str], T], text: str, param: str) -> T:
    try:
        return read(text)
    except ValueError as error:
        raise BadHint(param, f"`{param}` must be {error}, got {text[:20]!r}.") from error


def _dictionary(text: str) -> list[tuple[str, str]]:
    """An RFC 8941 dictionary without the parameters of its items, read with some patience.

    A bare key means true; of a key that comes twice the last counts, since it is read later.
    """
    items = (item.partition(";")[0].strip() for item in _ITEM.findall(text))
    pairs = (item.partition("=") for item in items if item)
    return [(key.strip(), value.strip() if equals else "?1") for key, equals, value in pairs]


PEER_HEADERS: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("x-llm-d-slo-ttft-ms", "ttft_s", _milliseconds),
    ("x-slo-ttft-ms", "ttft_s", _milliseconds),
    ("x-sgl-ttft-slo-ms", "ttft_s", _milliseconds),
    ("x-llm-d-slo-tpot-ms", "itl_s", _milliseconds),
    ("x-slo-tpot-ms", "itl_s", _milliseconds),
    ("x-sgl-tps-slo", "itl_s", lambda text: 1.0 / _number(text, above=True)),
    ("x-llm-d-inference-objective", "slo_class", _word),
    ("x-smg-priority", "priority", _rank),
    ("x-dynamo-session-final", "final", _flag),
    ("x-prefix-osl", "expected_output_tokens", _count),
    ("x-prefix-iat", "expected_gap_s", _milliseconds),
    ("x-prefix-total-requests", "expected_rounds", _count),
)
"""Header of another gateway, what it means, how it is read; the first one that can be read counts."""


def of_peers(headers: Mapping[str, str]) -> dict[str, Any]:
    """What headers of other gateways say, as fields of `Hints`."""
    found: dict[str, Any] = {}
    for header, name, read in PEER_HEADERS:
        if name not in found and header in headers:
            try:
                found[name] = read(headers[header].strip())
            except ValueError:
                continue  # it was not addressed to us
    return found
