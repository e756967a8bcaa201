"""The shims for CPU-only machines: SGLang's page hash without a compiler, kernels that are not there."""

from __future__ import annotations

import importlib.util
import os
import shutil
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.engines import cpu_shims
from antiphon.engines.cpu_shims import PageHash
from antiphon.engines.page_hash import page_hashes

PRIOR = bytes(range(32))
VECTORS: list[tuple[array[int], int, int, bool, bytes | None, int | None, str | list[str]]] = [
    (
        array("I", range(35)),
        35,
        1,
        False,
        None,
        16,
        [
            "5d85718ec594b982c252d0279e5966ffca33a5eaf2a455038d3ab331fde70cea",
            "4681c0107c38f402cd1bc30b0b09a65202dba31f98269d9d7f63f5e0dea6901a",
            "bbaf8e0231468b8edcbdb6df94400ce550798d34dbf78386185814abf239524b",
        ],
    ),
    (
        array("q", range(35)),
        35,
        1,
        False,
        PRIOR,
        16,
        [
            "5d3128ecb23511bb8fc8b33f3dfa0703c04dbbef88c7b142d3810cc6ec9d9e56",
            "f16e4edb031447ea793edb3058fda698dfafdef4807df9a00665075bcf463012",
            "899e2a1d530ec3c4c57209d9764284fabb28e8e80cf6cd782d84125311375b5a",
        ],
    ),
    (
        array("I", range(35)),
        35,
        1,
        False,
        None,
        None,
        "22ee8f5c534e45dc2453b4dc02a9736566b246b42d25e75bb5bd5df3779c43fd",
    ),
    (
        array("q", range(9)),
        8,
        2,
        True,
        None,
        4,
        [
            "920cac7cd1509ca7892cd8c228d89d76948b24a6f5d74b3f1ee5104630ac803f",
            "54ec4f852ead617d9c01055b7978c427d2ff6aa1b44a1613047281d344eb0628",
        ],
    ),
    (
        array("I", range(9)),
        8,
        2,
        True,
        PRIOR,
        None,
        "8b40f5154a217c991f9331416e23cce0a22abd217d404f9ab9b579006bbdc0ea",
    ),
    (
        array("q", [1, 2**40, 3, 4, 5]),
        5,
        1,
        False,
        None,
        2,
        [
            "74daf9411e6c0c32d9ac28842ed1f75e6bec4330ef5877c1e9c95f0c0d611cf0",
            "21d970c080b904d2cc0c46d451b1bd7307876bb853503becdce99eb3a66f105b",
            "a820306eaf195598266ad65c420b842e48014d30a4c30f1239f0aff2b8d109c7",
        ],
    ),
    (
        array("q", [1, 2**40, 3, 4, 5]),
        4,
        2,
        True,
        None,
        3,
        [
            "b96ba64ad1f258bf72f8de97e8630761484df7e648c2f5709a78533357db5e10",
            "ec1c572ac2c5f14d112fdb651f938788ebe293bbbd0458d0830bafa3b01484a1",
        ],
    ),
    (
        array("q", range(12)),
        4,
        3,
        False,
        None,
        3,
        [
            "921c803abfa6ac88f44f7ab19198e5c137d1c7183e8e6912757a6263e8dee0a5",
            "4a75b572862627f067674516c72174707e50e12650779acda3a315d78ff7b729",
        ],
    ),
    (array("I"), 0, 1, False, None, 16, []),
    (array("I"), 0, 1, False, None, None, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
]
"""Arguments and answers of SGLang 0.5.23's compiled `hicache_hash_cpp`."""


@pytest.mark.parametrize("vector", VECTORS)
def test_vectors(vector: Any) -> None:
    """Digests of the compiled extension, noted once: narrow, wide, bigrams, pages, partial page, prior."""
    *arguments, expected = vector
    assert PageHash.get_hash(*arguments) == expected


@given(st.lists(st.integers(0, 2**32 - 1), max_size=80), st.integers(1, 20), st.none() | st.just(PRIOR))
def test_same_as_the_schedulers_hash(ids: list[int], page: int, prior: bytes | None) -> None:
    """What the engine computes for whole pages is what the scheduler computes before it decides."""
    whole = len(ids) // page
    digests = PageHash.get_hash(array("q", ids), len(ids), 1, False, prior, page)
    assert digests[:whole] == [digest.hex() for digest in page_hashes(ids, page, prior or b"")]
    assert len(digests) == -(-len(ids) // page)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((array("I", [1]), 2, 1, False, None, 16), ValueError),
        ((array("I", [1, 2]), 2, 2, True, None, 16), ValueError),
        ((array("I", [1]), 1, 1, False, b"short", 16), ValueError),
        ((array("I", [1]), 1, 1, False, None, 0), ValueError),
        ((array("H", [1]), 1, 1, False, None, 16), ValueError),
        ((array("q", [-1]), 1, 1, False, None, 16), IndexError),
    ],
)
def test_refusals(arguments: Any, error: type[Exception]) -> None:
    """What the extension refuses, the twin refuses."""
    with pytest.raises(error):
        PageHash.get_hash(*arguments)


def test_equal_to_the_compiled_extension() -> None:
    """Where SGLang can compile its extension, twin and extension agree on anything, refusals included."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    if (
        shutil.which("g++") is None
        or shutil.which("ninja") is None
        or not Path("/usr/include/openssl").exists()
    ):
        pytest.skip("no compiler, ninja or OpenSSL headers to build SGLang's extension with")
    cache = Path(__file__).parents[1] / "build" / "torch_extensions"
    cache.mkdir(parents=True, exist_ok=True)
    cpu_shims.define_torchvision_operators()
    cpu_shims.provide_sgl_kernel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
        patch.setenv("MAX_JOBS", "1")
        compiled = _load_extension()

    def outcome(module: Any, arguments: tuple[Any, ...]) -> Any:
        try:
            return module.get_hash(*arguments)
        except (ValueError, IndexError) as error:
            return type(error)

    ids = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 2**63 + 5), max_size=40)

    @settings(max_examples=300, deadline=None)
    @given(ids, st.integers(0, 3), st.integers(0, 3), st.booleans(), st.none() | st.just(PRIOR), st.data())
    def agree(
        ids: list[int], spare: int, width: int, bigram: bool, prior: bytes | None, data: st.DataObject
    ) -> None:
        width = 2 if bigram else max(width, 1)
        kind = "Q" if any(value > 0xFFFFFFFF for value in ids) else data.draw(st.sampled_from("IQ"))
        units = len(ids) - 1 if bigram else len(ids) // width
        page = data.draw(st.none() | st.integers(0, 20))
        arguments = (array(kind, ids), max(units - spare, 0), width, bigram, prior, page)
        assert outcome(PageHash, arguments) == outcome(compiled, arguments)

    agree()


def _load_extension() -> Any:
    from sglang.srt.mem_cache.cpp_utils import native_hash

    loader = native_hash._load_native_hash_module
    if loader is PageHash:
        spec = importlib.util.find_spec(native_hash.__name__)
        assert spec is not None and spec.loader is not None
        fresh = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(fresh)
        loader = fresh._load_native_hash_module
    return loader()


def test_absent_kernels_say_so() -> None:
    """A kernel that no CPU has raises with what to do; names that SGLang only tries are really absent."""
    pytest.importorskip("torch", reason="torch is not installed")
    if importlib.util.find_spec("sgl_kernel") is not None and "sgl_kernel" not in __import__("sys").modules:
        pytest.skip("the real kernel wheel is installed")
    cpu_shims.provide_sgl_kernel()
    import sgl_kernel

    with pytest.raises(NotImplementedError, match="speculative"):
        sgl_kernel.verify_tree_greedy_cpu()
    assert not hasattr(sgl_kernel, "fp8_scaled_mm")


def test_slots_reach_the_pool() -> None:
    """The one kernel with a body writes each request's new slots into its row, from start to end."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pool = torch.zeros((3, 8), dtype=torch.int32)
    slots = torch.tensor([11, 12, 13, 21])
    rows, starts, ends = torch.tensor([2, 0]), torch.tensor([1, 4]), torch.tensor([4, 5])
    cpu_shims._assign_req_to_token_pool(rows, pool, starts, ends, slots, 8)
    assert pool[2].tolist() == [0, 11, 12, 13, 0, 0, 0, 0] and pool[0].tolist() == [0, 0, 0, 0, 21, 0, 0, 0]


def test_nothing_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher applies the shims for a CPU only: whether there is a GPU is torch's word."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu_shims.has_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not cpu_shims.has_gpu() and "SGLANG_USE_CPU_ENGINE" not in os.environ
