"""`Prompt`: the token ids of one prompt, as a view of a log that grows from round to round.

An engine wants the whole prompt each round, as JSON, and a scheduler its page hashes. Both are kept with the
log: extending a prompt serializes and hashes only what is new. A prompt never changes: when two are made of
the same one, the first grows the log in place and the second copies it.

For one event loop at a time. What is shared are an array, a bytearray and lists of digests.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import msgspec

from antiphon.engines.page_hash import ROOT, page_hashes

MAX_ID = 2**32 - 1
SERIALIZED_BYTES_PER_TOKEN = 6
"""About: digits and a comma."""
HASH_OBJECT_BYTES = 73
"""Of a page's digest in memory: 32 bytes as a `bytes` object, and its place in a list."""

HashKey = tuple[int, bytes]
"""(page_tokens, the digest before the first page)."""


class _Log:
    """What prompts of one conversation share. Only its end is ever added to."""

    __slots__ = ("hashes", "ids", "text")

    def __init__(self) -> None:
        self.ids: array[int] = array("I")
        self.text = bytearray(b"[")
        """The ids as JSON, without the closing bracket."""
        self.hashes: dict[HashKey, list[bytes]] = {}

    def add(self, ids: array[int]) -> None:
        if not ids:
            return
        if self.ids:
            self.text += b","
        self.text += msgspec.json.encode(ids.tolist())[1:-1]
        self.ids.extend(ids)

    def copied(self, tokens: int, text_end: int) -> _Log:
        copy = _Log()
        copy.ids, copy.text = self.ids[:tokens], self.text[:text_end]
        copy.hashes = {key: known[: tokens // key[0]] for key, known in self.hashes.items()}
        return copy


class Prompt(Sequence[int]):
    """Token ids; immutable, cheap to extend. Ids are 0 to 2^32 - 1: others raise OverflowError."""

    __slots__ = ("_log", "_text_end", "_tokens")

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self._log = _Log()
        self._log.add(_as_array(ids))
        self._tokens = len(self._log.ids)
        self._text_end = len(self._log.text)

    def extended(self, ids: Sequence[int]) -> Prompt:
        """This prompt and more; takes time for what is new, unless another one was made of it before."""
        more = _as_array(ids)
        if not more:
            return self
        log = self._log
        if len(log.ids) != self._tokens:
            log = log.copied(self._tokens, self._text_end)
        log.add(more)
        longer = object.__new__(Prompt)
        longer._log, longer._tokens, longer._text_end = log, len(log.ids), len(log.text)
        return longer

    @property
    def ids(self) -> Sequence[int]:
        """All ids, copied."""
        return self._log.ids[: self._tokens]

    def tail(self, start: int) -> array[int]:
        """The ids from `start` on, copied."""
        return self._log.ids[start : self._tokens]

    def json(self) -> bytes:
        """The ids as a JSON array."""
        with memoryview(self._log.text) as text:
            return b"".join((text[: self._text_end], b"]"))

    def hashes(self, page_tokens: int, seed: bytes = ROOT) -> tuple[bytes, ...]:
        """Of every whole page, first page first (`page_hash.page_hashes`)."""
        known = self._log.hashes.setdefault((page_tokens, seed), [])
        pages = self._tokens // page_tokens
        if len(known) < pages:
            rest = self._log.ids[len(known) * page_tokens : pages * page_tokens]
            known.extend(page_hashes(rest, page_tokens, known[-1] if known else seed))
        return tuple(known[:pages])

    @property
    def size_bytes(self) -> int:
        """About what the log takes in memory."""
        log = self._log
        return 4 * len(log.ids) + len(log.text) + sum(map(len, log.hashes.values())) * HASH_OBJECT_BYTES

    def __len__(self) -> int:
        return self._tokens

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> array[int]: ...
    def __getitem__(self, index: int | slice) -> int | array[int]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._tokens)
            return self._log.ids[start:stop:step] if step > 0 else self._log.ids[: self._tokens][index]
        if not -self._tokens <= index < self._tokens:
            raise IndexError(f"token {index} of {self._tokens}")
        return self._log.ids[index if index >= 0 else self._tokens + index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __repr__(self) -> str:
        return f"Prompt({self._tokens} tokens)"


def as_prompt(ids: Sequence[int]) -> Prompt:
    """The ids as they are, if they are a prompt already."""
    return ids if isinstance(ids, Prompt) else Prompt(ids)


def body_with(fields: Mapping[str, Any], name: str, ids: Sequence[int]) -> bytes:
    """A JSON object of the fields and, last, the ids; those of a prompt are only copied, once."""
    head = msgspec.json.encode(fields)[:-1] + (b"," if fields else b"") + b'"%s":' % name.encode()
    if not isinstance(ids, Prompt):
        return head + msgspec.json.encode(list(ids)) + b"}"
    with memoryview(ids._log.text) as text:
        return b"".join((head, text[: ids._text_end], b"]}"))


def _as_array(ids: Sequence[int]) -> array[int]:
    made = ids if isinstance(ids, array) and ids.typecode == "I" else array("I", ids)
    if made.itemsize != 4:  # pragma: no cover - every CPython platform we run on has 4-byte unsigned ints
        raise RuntimeError("array('I') is not 4 bytes wide on this platform")
    return made
