"""Histories by served ids with tokenizers that show a space before a word, as SentencePiece's do.

Such a tokenizer puts a space before what begins a text, or drops it there, so ids say one thing by themselves
and another behind other ids. Whatever it is, the prompt says what the messages say.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from antiphon.scheduler.gateway.history import append
from antiphon.scheduler.gateway.prompts import PromptTokenizer
from tests.test_history import PLAIN, Chat, user

SPACE = "\u2581"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content.strip() }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture(params=["prepend", "always", "first", "rstrip"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> PromptTokenizer:
    """A word-piece vocabulary as Llama 2, Mistral and Phi-3 have it."""
    kind = request.param
    letters = [chr(code) for code in range(33, 127)]
    merges = [(SPACE, "t"), (SPACE + "t", "h"), ("h", "e"), ("i", "n"), ("/", "I")]
    pieces = ["<unk>", "<s>", "</s>", SPACE, "\n", *letters, *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    if kind == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        made.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        scheme = "first" if kind == "rstrip" else kind
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        made.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    for token in ("<s>", "</s>"):
        made.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=kind == "rstrip")])
    made.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": "</s>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return PromptTokenizer(tmp_path)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("reply", ["the thing", " the thing", "  the", "<s> the"])
def test_the_prompt_says_what_the_messages_say(tokenizer: PromptTokenizer, reply: str, ended: bool) -> None:
    """Full and appended: to the letter what the whole says when it is tokenised at once."""
    chat = Chat(tokenizer)
    output = [*tokenizer.encode_rendered(reply), *(tokenizer.eos_ids if ended else ())]
    for turn in range(5):
        new = user(f"think {turn} the")
        if chat.base.parts:
            prompt = append(tokenizer, chat.base, [new], PLAIN, same_options=True).prompt()
            whole = tokenizer.encode_chat([*chat.messages, new], PLAIN)
            assert tokenizer.decode(prompt) == tokenizer.decode(whole)
        prompt = chat.round([new], output, {"role": "assistant", "content": reply})
        assert tokenizer.decode(prompt) == tokenizer.decode(tokenizer.encode_chat(chat.messages[:-1], PLAIN))
