"""The tiny checkpoint: same bytes for the same seed, readable by everybody, honest errors."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer

from antiphon.engines import tiny_model
from antiphon.engines.tiny_model import TinyModelError, write_tiny_model

HASH_OF_SEED_0 = {
    "llama": "e93f61083ed7547b889c80fd13521a1721521dec2ceee826eabae48a1d1840b5",
    "qwen3": "6f5ef68148e2c54b030bdad4f3be2a1502a388843b9b75f610c268fb9bbe2470",
}
"""Of all files: a change of the checkpoint changes what everybody expects, so it must be meant."""


def directory_hash(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def render(directory: Path, messages: list[dict[str, object]], **variables: object) -> str:
    template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    return str(jinja2.Environment().from_string(template).render(messages=messages, **variables))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_same_bytes_in_every_process(tmp_path: Path, architecture: str) -> None:
    """One seed gives one set of bytes, here, in another process, and on every machine that ran this test."""
    here = write_tiny_model(tmp_path / "here", architecture=architecture)
    code = (
        f"from antiphon.engines.tiny_model import *; write_tiny_model('there', architecture={architecture!r})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    assert directory_hash(here) == directory_hash(tmp_path / "there") == HASH_OF_SEED_0[architecture]


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    """The seed reaches the weights."""
    first, second = (write_tiny_model(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()


def test_weights_are_valid_safetensors(tmp_path: Path) -> None:
    """The file that we write by hand is what the safetensors library reads: names, shapes and spread."""
    from safetensors import safe_open

    directory = write_tiny_model(tmp_path / "model")
    with safe_open(directory / "model.safetensors", framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert tensors["model.layers.3.mlp.down_proj.weight"].shape == (
        tiny_model.HIDDEN,
        tiny_model.INTERMEDIATE,
    )
    assert abs(tensors["model.embed_tokens.weight"].std() - tiny_model.WEIGHT_STD) < 0.002
    assert (tensors["model.norm.weight"] == 1).all()


def test_spoken_tokens_survive_text(tmp_path: Path) -> None:
    """Any sequence of tokens that the model likes to say is the same after decoding and encoding again."""
    tokenizer = Tokenizer.from_file(str(write_tiny_model(tmp_path / "model") / "tokenizer.json"))
    vocabulary, _ = tiny_model.build_vocabulary()
    assert len(vocabulary) == tokenizer.get_vocab_size() == tiny_model.VOCABULARY_TOKENS
    spoken = [index for token, index in vocabulary.items() if token.startswith("Ġ") and token != "Ġ"]
    prompt = tokenizer.encode("<|im_start|>assistant\n").ids
    generator = random.Random(1)
    for _ in range(100):
        ids = prompt + [generator.choice(spoken) for _ in range(40)]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert tokenizer.encode(text).ids == ids


def test_any_text_survives_the_tokenizer(tmp_path: Path) -> None:
    """The tokenizer loses nothing: every byte has a token."""
    tokenizer = Tokenizer.from_file(str(write_tiny_model(tmp_path / "model") / "tokenizer.json"))
    text = "".join(chr(code) for code in range(0x250)) + " naïve 日本語 🙂\r\n\t there"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_template_extends_its_own_prefix(tmp_path: Path) -> None:
    """A conversation's next prompt starts with its last prompt and the answer, so KV can be reused."""
    directory = write_tiny_model(tmp_path / "model")
    messages: list[dict[str, object]] = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    prompt = render(directory, messages, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    messages += [{"role": "assistant", "content": " there is"}, {"role": "user", "content": "go on"}]
    assert render(directory, messages, add_generation_prompt=True).startswith(
        prompt + " there is<|im_end|>\n"
    )


def test_template_renders_tools(tmp_path: Path) -> None:
    """Tool definitions, calls and results reach the prompt, with or without a system message."""
    directory = write_tiny_model(tmp_path / "model")
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "a cat"},
        {"role": "tool", "content": "a dog"},
    ]
    tools = [{"type": "function", "function": {"name": "look"}}]
    text = render(directory, messages, tools=tools, add_generation_prompt=True)
    assert text.count("<|im_start|>system") == 1 and text.startswith("<|im_start|>system\nBe brief.")
    assert (
        '"name": "look"' in text and text.count('<tool_call>\n{"name": "look", "arguments": {"at": 1}}') == 2
    )
    assert text.count("<|im_start|>user\n<tool_response>") == 1 and "a cat" in text and "a dog" in text
    assert render(directory, messages[1:], tools=tools).startswith("<|im_start|>system\n# Tools")


def test_refuses_a_directory_with_something_else(tmp_path: Path) -> None:
    """Nothing foreign is overwritten: other files, another model, another seed, a file in the way."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    with pytest.raises(TinyModelError, match="not empty"):
        write_tiny_model(tmp_path / "notes")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TinyModelError, match="another model"):
        write_tiny_model(tmp_path / "other")
    write_tiny_model(tmp_path / "model")
    with pytest.raises(TinyModelError, match="'seed': 0"):
        write_tiny_model(tmp_path / "model", seed=1)
    with pytest.raises(TinyModelError, match="is a file"):
        write_tiny_model(tmp_path / "notes" / "todo.txt")
    with pytest.raises(TinyModelError, match="llama, qwen3"):
        write_tiny_model(tmp_path / "new", architecture="gpt")
    assert (tmp_path / "notes" / "todo.txt").read_text() == "mine"


def test_repeats_and_repairs(tmp_path: Path) -> None:
    """Writing again changes nothing; a checkpoint that was cut short is completed."""
    directory = write_tiny_model(tmp_path / "model")
    whole, stamp = directory_hash(directory), (directory / "config.json").stat().st_mtime_ns
    write_tiny_model(directory)
    assert (directory / "config.json").stat().st_mtime_ns == stamp
    (directory / "config.json").unlink()
    (directory / "tokenizer.json").unlink()
    write_tiny_model(directory)
    assert directory_hash(directory) == whole
