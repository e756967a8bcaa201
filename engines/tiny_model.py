"""`antiphon tiny-model`: a small random float32 checkpoint, the same bytes for the same seed anywhere.

Only the standard library writes it: no torch, no numpy, no libm, so nothing can round differently.

The model is random but pleasant to test with. Every token that it prefers is a space and some letters, and
the tokenizer splits text at such spaces: what it says, turned to text and back, gives the same ids, so a
plain chat client that resends its history extends its prefix. Other tokens have almost flat output rows: a
grammar can still pick among them. Argmax gaps are wide (weights have standard deviation 0.2).
"""

from __future__ import annotations

import json
import os
import random
import sys
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
CONTEXT_TOKENS = 8192
VOCABULARY_TOKENS = 512
LAYERS, HIDDEN, INTERMEDIATE = 4, 128, 256
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
WEIGHT_STD = 0.2
QUIET_STD = 0.002
"""Of output rows of tokens that should not be said by themselves."""

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
SPACE = "Ġ"
"""How byte-level BPE spells a space."""

_MARK = "antiphon_tiny_model"
_FORMAT = 1
_TEMPLATE = Path(__file__).parent / "data" / "chatml.jinja"

_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they
which one you were all her she there would their we him been has when who will no more if out so up said
what its about than into them can only other time new some could these two may first then do any like my
now over such our man me even most made after also did many off before must well back through years where
much your way down should because long each just state those people too how little good world make very
year still see own work men day
"""


class TinyModelError(Exception):
    """The checkpoint cannot be written there."""


def write_tiny_model(directory: str | Path, *, architecture: str = "llama", seed: int = 0) -> Path:
    """Write checkpoint, tokenizer and chat template into `directory` and return it.

    A directory that already holds this model is left as it is; one that holds anything else raises
    `TinyModelError`, as does an unknown architecture.
    """
    directory = Path(directory)
    if architecture not in ARCHITECTURES:
        raise TinyModelError(
            f"unknown architecture {architecture!r}; choose one of {', '.join(ARCHITECTURES)}"
        )
    mark = {"format": _FORMAT, "architecture": architecture, "seed": seed}
    if _holds(directory, mark):
        return directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        vocabulary, merges = build_vocabulary()
        weights = directory / "model.safetensors"
        _replace(weights, safetensors_bytes(_tensors(architecture, seed, vocabulary)))
        for name, content in _tokenizer_files(vocabulary, merges).items():
            _replace(directory / name, _json(content))
        # Last, since it carries the mark: a run that was cut short is not taken for a whole checkpoint.
        _replace(directory / "config.json", _json(_config(architecture, vocabulary) | {_MARK: mark}))
    except OSError as error:
        raise TinyModelError(f"cannot write the tiny model to {directory}: {error}") from error
    return directory


def _holds(directory: Path, mark: Mapping[str, Any]) -> bool:
    """Whether `directory` has just this model; raises `TinyModelError` if it has something else."""
    if directory.exists() and not directory.is_dir():
        raise TinyModelError(f"{directory} is a file; give a directory")
    ours = {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    found = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    if "config.json" not in found:
        if found - ours:
            raise TinyModelError(f"{directory} is not empty and holds no tiny model; give an empty directory")
        return False
    try:
        held = json.loads((directory / "config.json").read_bytes()).get(_MARK)
    except (ValueError, AttributeError):
        held = None
    if held != mark:
        what = f"the tiny model {held}" if held else "another model"
        raise TinyModelError(f"{directory} holds {what}, not {dict(mark)}; give an empty directory")
    return ours <= found


def build_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id and the BPE merges: bytes, then beginnings of common words after a space, then specials.

    Every merge adds one letter to a token that starts with a space, so each such token encodes to itself.
    """
    vocabulary = {character: index for index, character in enumerate(_byte_characters())}
    merges: list[tuple[str, str]] = []
    room = VOCABULARY_TOKENS - len(SPECIAL_TOKENS)
    for word in _WORDS.split():
        for end in range(len(word)):
            left, right = SPACE + word[:end], word[end]
            if left + right not in vocabulary and len(vocabulary) < room:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    if len(vocabulary) < room:
        raise AssertionError(f"the word list fills {len(vocabulary)} of {room} tokens: add words")
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    return vocabulary, merges


def _byte_characters() -> Iterator[str]:
    """The printable character that stands for each byte 0..255 in byte-level BPE (GPT-2's table)."""
    spare = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            yield chr(byte)
        else:
            yield chr(spare)
            spare += 1


def _tensors(
    architecture: str, seed: int, vocabulary: Mapping[str, int]
) -> dict[str, tuple[list[int], array[float]]]:
    """Name -> (shape, values) of every weight, drawn in one fixed order."""
    generator = random.Random(seed)
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    matrices: dict[str, tuple[int, int]] = {
        "self_attn.q_proj": (queries, HIDDEN), "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN), "self_attn.o_proj": (HIDDEN, queries),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }  # fmt: skip
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    if architecture == "qwen3":
        norms |= {"self_attn.q_norm": HEAD_DIM, "self_attn.k_norm": HEAD_DIM}
    tensors = {"model.embed_tokens.weight": _draw(generator, [VOCABULARY_TOKENS, HIDDEN])}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, shape in matrices.items():
            tensors[f"{prefix}{name}.weight"] = _draw(generator, list(shape))
        for name, width in norms.items():
            tensors[f"{prefix}{name}.weight"] = ([width], array("f", [1.0] * width))
    tensors["model.norm.weight"] = ([HIDDEN], array("f", [1.0] * HIDDEN))
    head_shape, head = _draw(generator, [VOCABULARY_TOKENS, HIDDEN])
    for token, index in vocabulary.items():
        if not _is_said(token):
            row = slice(index * HIDDEN, (index + 1) * HIDDEN)
            head[row] = array("f", [value * (QUIET_STD / WEIGHT_STD) for value in head[row]])
    tensors["lm_head.weight"] = (head_shape, head)
    return tensors


def _is_said(token: str) -> bool:
    return token == TURN_END or (token.startswith(SPACE) and token != SPACE)


def _draw(generator: random.Random, shape: list[int]) -> tuple[list[int], array[float]]:
    """Uniform values of standard deviation WEIGHT_STD: no libm, unlike a normal draw."""
    count = shape[0] * shape[1]
    raw = array("I", generator.randbytes(4 * count))
    if sys.byteorder == "big":
        raw.byteswap()
    half_width = WEIGHT_STD * 1.7320508075688772
    return shape, array("f", [(value / 2**31 - 1.0) * half_width for value in raw])


def safetensors_bytes(tensors: Mapping[str, tuple[list[int], array[float]]]) -> bytes:
    """The safetensors format: 8-byte header length, JSON header, little-endian data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name, (shape, values) in tensors.items():
        if sys.byteorder == "big":
            values.byteswap()
        blob = values.tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + b"".join(blobs)


def _config(architecture: str, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY_TOKENS,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "initializer_range": WEIGHT_STD,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": vocabulary[TURN_END],
        "pad_token_id": vocabulary[END_OF_TEXT],
    }


def _tokenizer_files(vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """The JSON files beside config.json, in the formats of `tokenizers` and `transformers`."""
    specials = {token: vocabulary[token] for token in SPECIAL_TOKENS}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: index for token, index in vocabulary.items() if token not in specials},
        "merges": [list(pair) for pair in merges],
    }  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for token, index in specials.items()],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": model,
    }  # fmt: skip
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(index): {"content": token, **flags} for token, index in specials.items()
        },
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": _TEMPLATE.read_text(encoding="utf-8"),
    }
    generation = {"eos_token_id": vocabulary[TURN_END], "pad_token_id": vocabulary[END_OF_TEXT]}
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": generation,
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _replace(path: Path, content: bytes) -> None:
    """Write whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
