"""Page hashes: ours equal SGLang's, with and without a namespace, and chains can be extended."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from array import array
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.engines.page_hash import ROOT, namespace_seed, page_hashes

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=70)


@pytest.fixture(scope="module")
def sglang_utils() -> ModuleType:
    """SGLang's own module, with the hash that it has on a CPU."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    from antiphon.engines import cpu_shims

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpu_shims.apply()
        from sglang.srt.mem_cache import radix_cache, utils

        utils.RadixKey = radix_cache.RadixKey
    module: ModuleType = utils
    return module


def test_a_known_vector() -> None:
    """sha256 over 4-byte little-endian ids, the digest before put in front: written out once by hand."""
    first = hashlib.sha256(bytes([1, 0, 0, 0, 2, 1, 0, 0])).digest()
    second = hashlib.sha256(first + bytes([3, 0, 0, 0, 255, 255, 255, 255])).digest()
    assert page_hashes([1, 258, 3, 2**32 - 1, 9], 2) == (first, second)


@pytest.mark.parametrize(
    ("extra_key", "cache_salt"),
    [(None, None), ("adapter", None), (None, "tenant-a"), ("adapter", "tenant-a"), (None, ""), ("", None)],
)
def test_equal_to_sglang(sglang_utils: ModuleType, extra_key: str | None, cache_salt: str | None) -> None:
    """The scheduler's names of pages are the engine's, with every kind of namespace."""
    tokens = list(range(3, 3 + 50))
    key = sglang_utils.RadixKey(array("q", tokens), extra_key, cache_salt=cache_salt)
    theirs = [bytes.fromhex(h) for h in sglang_utils.get_storage_hash_str(key[:48], None, page_size=16)]
    assert list(page_hashes(tokens, 16, namespace_seed(extra_key, cache_salt))) == theirs


def test_namespaces_differ() -> None:
    """Absent, empty and joined parts give different seeds: no tenant reaches another's pages by spelling."""
    parts = [(None, None), ("", None), ("ab", None), ("a", "b"), (None, "ab"), ("", "ab"), ("ab", "a")]
    seeds = [namespace_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts) and seeds[0] == ROOT
    assert namespace_seed("a", "") == namespace_seed("a"), "an empty salt is none"


@given(tokens=TOKENS, page=st.integers(1, 9), cut=st.integers(0, 8))
def test_a_chain_can_be_extended(tokens: list[int], page: int, cut: int) -> None:
    """Hashing a prompt in two pieces, the first of whole pages, equals hashing it at once."""
    whole = page_hashes(tokens, page)
    head = page_hashes(tokens[: cut * page], page)
    tail = page_hashes(tokens[cut * page :], page, head[-1] if head else ROOT)
    assert head + tail == whole and len(whole) == len(tokens) // page


@given(tokens=st.lists(st.integers(0, 1000), min_size=8, max_size=8), position=st.integers(0, 7))
def test_every_token_counts(tokens: list[int], position: int) -> None:
    """Changing one token changes its page's hash and all after it, none before."""
    changed = list(tokens)
    changed[position] += 1
    before, after = page_hashes(tokens, 2), page_hashes(changed, 2)
    assert [a == b for a, b in zip(before, after, strict=True)] == [p < position // 2 for p in range(4)]


def test_bad_arguments_are_refused() -> None:
    """A page of no tokens, and ids that do not fit in 4 bytes, are errors."""
    with pytest.raises(ValueError, match="page_size_tokens"):
        page_hashes([1], 0)
    for bad in (-1, 2**32):
        with pytest.raises(OverflowError):
            page_hashes([bad], 1)
