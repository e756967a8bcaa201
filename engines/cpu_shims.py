"""What SGLang 0.5.23 lacks on a machine without a GPU: three things, put in place before it is imported.

1. torchvision's binary of the default wheel needs CUDA; without it the import misses two operators.
2. SGLang imports some names from its kernel wheel `sgl_kernel`, which exists for GPUs only.
3. SGLang compiles its page-hash extension at the first request; the twin below needs no compiler.

`apply` must run in every process of the engine, before SGLang is imported there: the launcher calls it at the
top of its module, which spawned children import again. Nothing here is applied where there is a GPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from array import array
from itertools import chain, pairwise
from types import ModuleType
from typing import Any, NoReturn

_kept: list[Any] = []
"""torch forgets the operators of a library object that is garbage collected."""


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return bool(torch.cuda.is_available())


def apply() -> None:
    """Put all shims in place and tell SGLang that it runs on a CPU. Safe to call again."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    define_torchvision_operators()
    provide_sgl_kernel()
    replace_page_hash()


# ---------------------------------------------------------------- torchvision


def define_torchvision_operators() -> None:
    """Declare `nms` and `qnms` if torchvision's binary does not load: its import refers to both."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


# ---------------------------------------------------------------- sgl_kernel

_SGL_KERNEL_NAMES = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
)
"""What SGLang imports on a CPU at module level: speculative decoding, which the shim does not offer."""


def provide_sgl_kernel() -> None:
    """A stand-in for SGLang's kernel wheel, unless the real one is installed.

    Its names raise when called, but for `assign_req_to_token_pool_cpu`, which has a body in torch. Any other
    name is absent, so that SGLang's own guards see that the kernel is not there.
    """
    if "sgl_kernel" in sys.modules or importlib.util.find_spec("sgl_kernel") is not None:
        return
    module = ModuleType("sgl_kernel", "Stand-in of antiphon.engines.cpu_shims")
    module.__spec__ = importlib.util.spec_from_loader("sgl_kernel", loader=None)
    for name in _SGL_KERNEL_NAMES:
        setattr(module, name, _absent_kernel(name))
    module.assign_req_to_token_pool_cpu = _assign_req_to_token_pool  # type: ignore[attr-defined]
    sys.modules["sgl_kernel"] = module


def _absent_kernel(name: str) -> Any:
    def call(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} is not available without SGLang's kernel wheel; "
            f"start the engine without the option that needs it (speculative decoding)"
        )

    call.__name__ = name
    return call


def _assign_req_to_token_pool(
    req_pool_indices: Any,
    req_to_token: Any,
    start_offset: Any,
    end_offset: Any,
    out_cache_loc: Any,
    width: int,
) -> None:
    """Copy each request's new slots from `out_cache_loc`, one after the other, into its row of the pool."""
    taken = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start]
        taken += end - start


# ---------------------------------------------------------------- page hash


def replace_page_hash() -> None:
    """Give SGLang `PageHash` in place of the extension that it would compile."""
    from sglang.srt.mem_cache.cpp_utils import native_hash

    native_hash._load_native_hash_module = PageHash


class PageHash:
    """Twin of SGLang's `hicache_hash_cpp`, in hashlib: same arguments, same digests, same refusals."""

    @staticmethod
    def get_hash(
        raw_tokens: Any,
        logical_len: int,
        unit_width: int,
        is_bigram: bool,
        prior_digest: bytes | None,
        page_size: int | None = None,
    ) -> str | list[str]:
        """Hex digest of all tokens (`page_size` None) or of every page, a partial last one included.

        `raw_tokens` is a one-dimensional buffer of 4- or 8-byte unsigned ints: `logical_len` units of
        `unit_width` tokens, or for bigrams `logical_len` + 1 tokens of which neighbours form a unit.
        """
        tokens = _checked_tokens(raw_tokens, logical_len, unit_width, is_bigram)
        prior = b"" if prior_digest is None else bytes(prior_digest)
        if prior_digest is not None and len(prior) != 32:
            raise ValueError("prior_digest must be exactly 32 bytes")
        if page_size is None:
            return _hash_units(tokens, 0, logical_len, unit_width, is_bigram, prior).hex()
        if page_size < 1:
            raise ValueError("page_size must be positive")
        digests = []
        for start in range(0, logical_len, page_size):
            count = min(page_size, logical_len - start)
            prior = _hash_units(tokens, start, count, unit_width, is_bigram, prior)
            digests.append(prior.hex())
        return digests


def _checked_tokens(raw_tokens: Any, logical_len: int, unit_width: int, is_bigram: bool) -> memoryview:
    view = memoryview(raw_tokens)
    if view.ndim != 1:
        raise ValueError("raw_tokens must be a one-dimensional buffer")
    if view.itemsize not in (4, 8):
        raise ValueError("raw_tokens itemsize must be 4 or 8 bytes")
    needed = logical_len + 1 if is_bigram and logical_len > 0 else logical_len * unit_width
    if len(view) < needed:
        raise ValueError("raw_tokens is shorter than logical_len")
    return view.cast("B").cast("I" if view.itemsize == 4 else "Q")


def _hash_units(
    tokens: memoryview, start: int, count: int, unit_width: int, is_bigram: bool, prior: bytes
) -> bytes:
    """Digest of `count` units from unit `start`: 4 bytes a token, or 0xff and 8 bytes if one needs more."""
    if is_bigram:
        page = tokens[start : start + count + 1] if count else tokens[:0]
    else:
        page = tokens[start * unit_width : (start + count) * unit_width]
    values = page.tolist()
    wide = tokens.itemsize == 8 and bool(values) and max(values) > 0xFFFFFFFF
    if wide and max(values) > 0x7FFFFFFFFFFFFFFF:
        raise IndexError("token id must be a non-negative int64")
    if is_bigram:
        values = list(chain.from_iterable(pairwise(values)))
    digest = hashlib.sha256(prior)
    if wide:
        digest.update(b"\xff")
    digest.update(array("Q" if wide else "I", values).tobytes())
    return digest.digest()
