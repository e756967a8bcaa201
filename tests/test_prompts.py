"""Prompts to ids: equal to transformers on the tiny model, and clear about what it cannot do."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antiphon.scheduler.errors import ApiError, UserError
from antiphon.scheduler.gateway import prompts
from antiphon.scheduler.gateway.prompts import PromptTokenizer, TemplateOptions, TokenizerSource

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Find <things> & more",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
        },
    }
]
CALL = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": {"query": "now"}}}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello there"}],
    [{"role": "system", "content": "be good"}, {"role": "user", "content": "äöü 你好 🙂\n\n  x"}],
    [
        {"role": "user", "content": "look it up"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"a": [1, 2]}'},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": "<|im_end|> thanks"},
    ],
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PromptTokenizer:
    return PromptTokenizer(tiny_model_dir)


def reference_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer of a directory."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers", exc_type=ImportError)
    from antiphon.engines.cpu_shims import define_torchvision_operators

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        define_torchvision_operators()  # transformers imports torchvision
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path) -> Any:
    return reference_tokenizer(tiny_model_dir)


def reference_ids(reference: Any, chat: list[dict[str, Any]], **options: Any) -> tuple[int, ...]:
    ids = reference.apply_chat_template(
        chat, tokenize=True, return_dict=False, add_generation_prompt=True, **options
    )
    return tuple(ids)


@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_chat_ids_equal_transformers(
    tokenizer: PromptTokenizer, reference: Any, chat: list[dict[str, Any]], tools: Any
) -> None:
    """The chat template and the tokenizer give the ids that transformers gives."""
    assert tokenizer.encode_chat(chat, TemplateOptions(tools)) == reference_ids(reference, chat, tools=tools)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_any_text_equals_transformers(tokenizer: PromptTokenizer, reference: Any, texts: list[str]) -> None:
    """Any Unicode text, in a chat or bare, gives the ids that transformers gives."""
    chat = [
        {"role": "user" if index % 2 == 0 else "assistant", "content": t} for index, t in enumerate(texts)
    ]
    assert tokenizer.encode_chat(chat, TemplateOptions()) == reference_ids(reference, chat)
    assert tokenizer.encode_text(texts[0]) == tuple(reference(texts[0])["input_ids"])


def test_a_conversation_extends_its_own_prefix(tokenizer: PromptTokenizer) -> None:
    """A round's prompt begins with the previous round's, so its KV can be used again."""
    first = tokenizer.encode_chat(CHATS[2][:1], TemplateOptions())
    later = tokenizer.encode_chat(CHATS[2], TemplateOptions())
    assert later[: len(first)] == first


def test_messages_in_every_openai_form(tokenizer: PromptTokenizer) -> None:
    """Text parts, null content and tool arguments as JSON text mean the same as their plain forms."""
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]
    plain = tokenizer.render([{"role": "user", "content": "hello there"}], TemplateOptions())
    assert tokenizer.render([{"role": "user", "content": parts, "name": None}], TemplateOptions()) == plain
    as_text = {**CALL, "function": {"name": "search", "arguments": '{"query": "now"}'}}
    chat = [{"role": "assistant", "content": None, "tool_calls": [as_text]}]
    parsed = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert tokenizer.render(chat, TemplateOptions()) == tokenizer.render(parsed, TemplateOptions())


def test_broken_tool_arguments_stay_text(tokenizer: PromptTokenizer) -> None:
    """A model's malformed arguments do not end the conversation."""
    call = {**CALL, "function": {"name": "search", "arguments": '{"query": '}}
    chat: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "user", "content": "again"},
    ]
    assert "again" in tokenizer.render(chat, TemplateOptions())


def test_continuing_the_last_message(tokenizer: PromptTokenizer) -> None:
    """With `continue_final_message` the prompt ends with the beginning of the answer."""
    chat = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one two"}]
    options = TemplateOptions(continue_final_message=True)
    opened = tokenizer.render(chat[:1], TemplateOptions())
    assert tokenizer.render(chat, options) == opened + "one two"
    with pytest.raises(ApiError):
        tokenizer.render(chat[:1], options)


def test_the_models_own_limits(tokenizer: PromptTokenizer) -> None:
    """Window and vocabulary come from the model's config.json."""
    assert (tokenizer.context_tokens, tokenizer.vocabulary_tokens) == (8192, 512)


def changed(source: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of the model's small files with one of them changed; a value of None removes the key."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
    content = json.loads((target / file).read_text()) | changes
    (target / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return target


def test_special_tokens_around_a_bare_prompt(tiny_model_dir: Path, tmp_path: Path) -> None:
    """tokenizer.json alone says what stands around a bare prompt; a chat has what its template writes."""
    around = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [510], "tokens": ["<|im_start|>"]}},
    }
    directory = changed(tiny_model_dir, tmp_path / "m", "tokenizer.json", post_processor=around)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {"add_bos_token": False, "add_eos_token": True, "bos_token": "<|im_start|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, plain = PromptTokenizer(directory), PromptTokenizer(tiny_model_dir)
    assert tokenizer.encode_text("hello") == (510, *plain.encode_text("hello"))
    chat = CHATS[0]
    assert tokenizer.encode_chat(chat, TemplateOptions()) == plain.encode_chat(chat, TemplateOptions())
    assert tokenizer.encode_text("hello") == tuple(reference_tokenizer(directory)("hello")["input_ids"])


TEMPLATE_FAULTS = {
    "raises": "{{ raise_exception('no such role') }}",
    "undefined": "{{ messages[0].absent.deeper }}",
    "type": "{{ messages[0].content + 5 }}",
    "sandbox": "{{ ''.__class__.__mro__ }}",
    "loop": "{% for i in range(10**9) %}x{% endfor %}",
}


@pytest.mark.parametrize("source", TEMPLATE_FAULTS.values(), ids=TEMPLATE_FAULTS)
def test_a_template_that_refuses_is_a_400(tiny_model_dir: Path, tmp_path: Path, source: str) -> None:
    """Whatever a template raises over a client's messages is the client's error, in the template's words."""
    directory = changed(tiny_model_dir, tmp_path / "m", "tokenizer_config.json", chat_template=source)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ApiError) as caught:
        PromptTokenizer(directory).encode_chat(CHATS[0], TemplateOptions())
    assert (caught.value.status, caught.value.code) == (400, "chat_template_error")


def test_templates_by_name_and_their_helpers(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A list of templates has one for tools; `tojson` does not escape, `generation` blocks pass through."""
    default = "{% generation %}{{ messages[0].content }}{% endgeneration %}|{{ x }}|{{ eos_token }}"
    named = [
        {"name": "default", "template": default},
        {
            "name": "tool_use",
            "template": "{{ tools | tojson }}{% for m in messages %}{% break %}{% endfor %}",
        },
    ]
    directory = changed(
        tiny_model_dir,
        tmp_path / "m",
        "tokenizer_config.json",
        chat_template=named,
        eos_token={"content": "E"},
    )
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = PromptTokenizer(directory)
    chat = [{"role": "user", "content": "<hi>"}]
    assert tokenizer.render(chat, TemplateOptions(kwargs={"x": 1, "messages": []})) == "<hi>|1|E"
    assert "Find <things> & more" in tokenizer.render(chat, TemplateOptions(TOOLS))


def test_a_model_without_a_template_serves_bare_prompts(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Chat is refused with the way out; text still works."""
    directory = changed(tiny_model_dir, tmp_path / "m", "tokenizer_config.json", chat_template=None)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = PromptTokenizer(directory)
    assert tokenizer.encode_text("hello")
    with pytest.raises(ApiError, match="/v1/completions"):
        tokenizer.encode_chat(CHATS[0], TemplateOptions())


def test_unusable_directories_are_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Missing and broken files are the operator's error, with the file's name."""
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        PromptTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        PromptTokenizer(tmp_path)
    broken = changed(tiny_model_dir, tmp_path / "m", "tokenizer_config.json", chat_template="{% if %}")
    (broken / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="does not compile"):
        PromptTokenizer(broken)
    for content in ("[", "[]"):
        (broken / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer_config\.json"):
            PromptTokenizer(broken)
    for unknown in ("no/such-model", "a b c/d/e"):
        with pytest.raises(UserError, match="no directory"):
            prompts.model_directory(unknown)


def test_the_tokenizer_is_loaded_once_when_known(tiny_model_dir: Path) -> None:
    """Before a model is known the answer is a 503; then one load serves all that wait."""
    known: list[str] = []

    async def scenario() -> None:
        source = TokenizerSource(lambda: known[0] if known else None)
        with pytest.raises(ApiError) as caught:
            await source.get()
        assert caught.value.status == 503
        known.append(str(tiny_model_dir))
        first, *others = await asyncio.gather(*(source.get() for _ in range(8)))
        assert all(other is first for other in others)

    asyncio.run(scenario())


def test_long_prompts_are_encoded_in_a_thread() -> None:
    """Only short prompts are encoded on the event loop."""

    def where() -> tuple[int, ...]:
        return (threading.get_ident(),)

    async def scenario() -> None:
        here = threading.get_ident()
        assert await prompts.encode_off_loop(where, prompts.INLINE_CHARS) == (here,)
        assert await prompts.encode_off_loop(where, prompts.INLINE_CHARS + 1) != (here,)
        assert prompts.content_chars([{"content": [{"type": "text", "text": "x"}]}, {"content": "yy"}]) > 2

    asyncio.run(scenario())


def test_another_template_makes_another_fingerprint(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Two models may share a tokenizer: what one's template began must not go on as the other's."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_dir, copy)
    ours = PromptTokenizer(tiny_model_dir).fingerprint
    assert PromptTokenizer(copy).fingerprint == ours
    path = copy / "tokenizer_config.json"
    changed = json.loads(path.read_text()) | {"chat_template": "{{ messages[0].content }}"}
    path.write_text(json.dumps(changed))
    assert PromptTokenizer(copy).fingerprint != ours
