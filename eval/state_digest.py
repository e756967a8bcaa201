"""A digest of everything that an object holds, however deep: equal while nothing in it has changed.

Only for comparing one object with itself within one process: what has no fixed order or no value of its own
(functions, types) is named, not compared. Order counts in dictionaries, as an LRU is one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from enum import Enum
from hashlib import blake2b
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from msgspec import Struct

_VALUES = (str, bytes, int, float, bool, type(None))
_NAMED = (type, FunctionType, MethodType, BuiltinFunctionType)


def state_digest(thing: object, leave_out: frozenset[str] = frozenset()) -> bytes:
    """Digest of an object's whole state; attributes named in `leave_out` do not count, wherever they are."""
    digest = blake2b(digest_size=16)
    known: dict[int, int] = {}
    todo: list[object] = [thing]
    while todo:
        at = todo.pop()
        if isinstance(at, _VALUES):
            digest.update(f"{at!r};".encode())
            continue
        if isinstance(at, _NAMED):
            digest.update(f"{at.__qualname__};".encode())
            continue
        number = known.setdefault(id(at), len(known))
        digest.update(f"#{number} {type(at).__qualname__}(".encode())
        if number == len(known) - 1 and not isinstance(at, Enum):  # not seen before
            todo.extend(_parts(at, leave_out))
        elif isinstance(at, Enum):
            digest.update(at.name.encode())
    return digest.digest()


def _parts(thing: object, leave_out: frozenset[str]) -> Iterator[object]:
    if isinstance(thing, Mapping):
        for key, value in thing.items():
            yield key
            yield value
    elif isinstance(thing, Set):
        yield from sorted(thing, key=repr)
    elif isinstance(thing, Sequence | deque):
        yield len(thing)
        yield from thing
    else:
        for name in _attributes(thing):
            if name not in leave_out:
                yield name
                yield getattr(thing, name, None)


def _attributes(thing: Any) -> list[str]:
    if isinstance(thing, Struct):
        return list(thing.__struct_fields__)
    names = dict.fromkeys(getattr(thing, "__dict__", {}))
    for base in type(thing).__mro__:
        slots = base.__dict__.get("__slots__", ())
        names.update(dict.fromkeys((slots,) if isinstance(slots, str) else slots))
    return [name for name in names if name not in ("__dict__", "__weakref__")]
