"""SGLang's chained page hashes, in hashlib: the name of a KV page everywhere in Antiphon.

A page's hash is sha256(previous page's digest + the page's token ids, 4-byte little-endian each). The
first page's "previous digest" is a namespace seed when the request has an extra key or a cache salt, else
nothing. The engine computes the same in C++ (`mem_cache/cpp_utils/hash_binding.cpp`, SGLang 0.5.23); the
scheduler computes them here, before it decides. Hashes of KV *events* are seeded differently: never mix.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

ROOT = b""
"""Parent of a first page without a namespace."""

HASH_BYTES = 32


def namespace_seed(extra_key: str | None = None, cache_salt: str | None = None) -> bytes:
    """Digest that stands before the first page; empty when neither key nor salt is set.

    Absent, empty and joined parts differ: presence byte, then the UTF-8 length in 8 bytes, then the text
    (SGLang `mem_cache/utils.py`, `storage_namespace_seed`). An empty salt counts as none, an empty extra key
    does not (`RadixKey`).
    """
    cache_salt = cache_salt or None
    if extra_key is None and cache_salt is None:
        return ROOT
    digest = hashlib.sha256(b"sglang-cache-namespace-v1")
    for part in (extra_key, cache_salt):
        if part is None:
            digest.update(b"\x00")
        else:
            encoded = part.encode()
            digest.update(b"\x01" + len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def page_hashes(token_ids: Sequence[int], page_size_tokens: int, prior: bytes = ROOT) -> tuple[bytes, ...]:
    """Hashes of every whole page of `token_ids`, first page first; a partial last page has none.

    `prior` is the digest before the first token: `namespace_seed(...)` at the head of a prompt, or the last
    known page's hash when a chain is extended.
    """
    if page_size_tokens < 1:
        raise ValueError(f"page_size_tokens must be at least 1, got {page_size_tokens}")
    whole = len(token_ids) // page_size_tokens * page_size_tokens
    raw = memoryview(_little_endian(token_ids[:whole])).cast("B")
    step = 4 * page_size_tokens
    hashes = []
    for start in range(0, 4 * whole, step):
        digest = hashlib.sha256(prior)
        digest.update(raw[start : start + step])
        prior = digest.digest()
        hashes.append(prior)
    return tuple(hashes)


def _little_endian(token_ids: Sequence[int]) -> array[int]:
    ids = array("I", token_ids)
    if ids.itemsize != 4:  # pragma: no cover - every CPython platform we run on has 4-byte unsigned ints
        raise RuntimeError("array('I') is not 4 bytes wide on this platform")
    return ids
