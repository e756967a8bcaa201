"""Prompts that go on with served ids: the text is that of the messages, the ids are kept where it can be."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antiphon.engines.prompt import Prompt
from antiphon.engines.tiny_model import TURN_END
from antiphon.scheduler.conversation import Conversation, Message, Said
from antiphon.scheduler.gateway.history import Plan, append, go_on, options_key, same_messages
from antiphon.scheduler.gateway.message_chain import reply_message
from antiphon.scheduler.gateway.prompts import PromptTokenizer, TemplateOptions

PLAIN = TemplateOptions()
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PromptTokenizer:
    return PromptTokenizer(tiny_model_dir)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def split(tokenizer: PromptTokenizer, text: str) -> tuple[int, ...]:
    """The text as ids that no tokenizer would give: byte by byte."""
    ids = tuple(i for char in text for i in tokenizer.encode_rendered(char))
    assert tokenizer.decode(ids) == text
    return ids


def heard(
    tokenizer: PromptTokenizer,
    base: Conversation,
    plan: Plan,
    messages: Sequence[Message],
    output: Sequence[int],
    reply: Message,
    options: TemplateOptions = PLAIN,
) -> Conversation:
    """After a round with all these messages, as a log that is written and read again has it."""
    kept = same_messages(base.messages, messages)
    prompt = plan.prompt()
    said = Said(
        prompt, prompt.extended(output), plan.kept_tokens, kept, messages[kept:], reply_message(reply),
        not reply.get("reasoning_content"), options_key(options.tools, options), tokenizer.fingerprint, "m",
        base.round + 1, plan.text,
    )  # fmt: skip
    added, read = base.add(said.entry(base), said), base.add(said.entry(base))
    assert list(added.prompt) == list(read.prompt) and added.messages == read.messages
    return read


class Chat:
    """A client's conversation and the gateway's, side by side."""

    def __init__(self, tokenizer: PromptTokenizer, options: TemplateOptions = PLAIN) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.base = Conversation("t", "s")
        self.messages: list[Message] = []
        self.plan: Plan | None = None

    def round(self, new: Sequence[Message], output: Sequence[int], reply: Message) -> Prompt:
        """The client sends all its messages; the model answers."""
        self.messages += new
        self.plan = go_on(self.tokenizer, self.base, self.messages, self.options)
        self.base = heard(self.tokenizer, self.base, self.plan, self.messages, output, reply, self.options)
        self.messages.append(reply_message(reply))
        return self.plan.prompt()

    def say(self, new: Sequence[Message], text: str, ids: Sequence[int] | None = None) -> Prompt:
        ended = split(self.tokenizer, text) if ids is None else ids
        return self.round(new, [*ended, *self.tokenizer.eos_ids], {"role": "assistant", "content": text})

    def text(self) -> str:
        return self.tokenizer.render(self.messages, self.options)


def test_generated_ids_are_kept(tokenizer: PromptTokenizer) -> None:
    """An answer whose text tokenises differently is not tokenised again: the prompt begins with its ids."""
    chat = Chat(tokenizer)
    chat.say([user("hello")], " the other thing")
    served = list(chat.base.prompt)
    prompt = chat.say([user("and then?")], " more")
    assert list(prompt)[: len(served)] == served
    assert list(prompt) != list(tokenizer.encode_chat(chat.messages[:-1], PLAIN)), "else it shows nothing"
    assert tokenizer.decode(prompt) == tokenizer.render(chat.messages[:-1], PLAIN)
    assert (
        chat.plan is not None
        and chat.plan.text is not None
        and chat.plan.text.startswith("\n<|im_start|>user")
    )


def test_an_answer_that_was_cut_off_is_closed(tokenizer: PromptTokenizer) -> None:
    """Stopped by length: the end of the turn was not generated, so it is added."""
    chat = Chat(tokenizer)
    chat.round([user("hello")], split(tokenizer, " the"), {"role": "assistant", "content": " the"})
    prompt = chat.say([user("go on")], "x")
    assert chat.plan is not None and chat.plan.text is not None and chat.plan.text.startswith(TURN_END)
    assert tokenizer.decode(prompt) == tokenizer.render(chat.messages[:-1], PLAIN)


def test_a_half_character_is_not_kept(tokenizer: PromptTokenizer) -> None:
    """Cut off within a character: the text is the client's, and the ids before the answer are kept."""
    chat = Chat(tokenizer)
    half = tokenizer.encode_rendered("ä")[:1]
    chat.round([user("hello")], half, {"role": "assistant", "content": "\ufffd"})
    asked = chat.base.parts[-2].end
    prompt = chat.say([user("go on")], "x")
    assert chat.plan is not None and chat.plan.kept_tokens == asked
    assert tokenizer.decode(prompt) == tokenizer.render(chat.messages[:-1], PLAIN)


@pytest.mark.parametrize("ended", [True, False])
def test_tool_calls_are_the_same_however_they_are_spaced(tokenizer: PromptTokenizer, ended: bool) -> None:
    """The model wrote its call's JSON in its own way: those ids stay, now and in later rounds."""
    options = TemplateOptions(TOOLS)
    chat = Chat(tokenizer, options)
    written = '<tool_call>\n{"name":"search","arguments":{"q":1,  "k":[2]}}\n</tool_call>'
    call = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": '{"q":1,  "k":[2]}'}}
    reply = {"role": "assistant", "content": None, "tool_calls": [call]}
    output = [*split(tokenizer, written), *(tokenizer.eos_ids if ended else ())]
    chat.round([user("look")], output, reply)
    served = list(chat.base.prompt)
    respaced = {**call, "function": {"name": "search", "arguments": '{"q": 1, "k": [2]}'}}
    chat.messages[-1] = {**reply, "tool_calls": [respaced]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "found"}
    prompt = chat.say([result], " the")
    assert list(prompt)[: len(served)] == served
    assert chat.plan is not None and chat.plan.text is not None
    assert chat.plan.text == ("" if ended else TURN_END) + (
        "\n<|im_start|>user\n<tool_response>\nfound\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    served = list(chat.base.prompt)
    assert list(chat.say([user("more")], " the"))[: len(served)] == served
    other = {**call, "function": {"name": "search", "arguments": '{"q": 2}'}}
    chat.messages[1] = {**reply, "tool_calls": [other]}
    prompt = chat.say([user("another past")], "x")
    assert tokenizer.decode(prompt) == tokenizer.render(chat.messages[:-1], options), (
        "other calls: all is theirs"
    )


def test_reasoning_is_not_taken_for_a_call(tokenizer: PromptTokenizer) -> None:
    """What was thought is not in the history that clients send: only the prompt's ids are kept."""
    chat = Chat(tokenizer)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    reply = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hmm"}
    chat.round([user("look")], split(tokenizer, "<think>hmm</think>"), reply)
    asked = chat.base.parts[-2].end
    prompt = chat.say([user("go on")], "x")
    assert chat.plan is not None and chat.plan.kept_tokens == asked
    assert tokenizer.decode(prompt) == tokenizer.render(chat.messages[:-1], PLAIN)


def test_another_tokenizers_ids_are_not_used(tokenizer: PromptTokenizer) -> None:
    chat = Chat(tokenizer)
    chat.say([user("hello")], " the")
    chat.base = replace(chat.base, tokenizer=b"another")
    chat.messages.append(user("x"))
    assert go_on(tokenizer, chat.base, chat.messages, PLAIN).kept is None


def test_a_changed_past_keeps_what_is_before_it(tokenizer: PromptTokenizer) -> None:
    """Edited and compacted histories: ids up to the change, and the conversation goes on from there."""
    chat = Chat(tokenizer)
    for turn in range(4):
        chat.say([user(f"question {turn}")], f" answer {turn}")
    ends = [part.end for part in chat.base.parts]
    chat.messages[4] = user("another question")
    chat.say([user("x")], " y")
    assert chat.plan is not None and chat.plan.kept_tokens == ends[3]
    served = list(chat.base.prompt)
    assert list(chat.say([user("z")], " y"))[: len(served)] == served
    chat.messages[:] = [user("summary of all")]
    prompt = chat.say([], " y")
    assert chat.plan.kept is None and tokenizer.decode(prompt) == tokenizer.render(chat.messages[:-1], PLAIN)


# ---------------------------------------------------------------- append


def appended(chat: Chat, new: Sequence[Message], *, same: bool = True) -> Plan:
    return append(chat.tokenizer, chat.base, new, chat.options, same_options=same)


def test_append_gives_the_prompt_of_the_whole_history(tokenizer: PromptTokenizer) -> None:
    """Spliced as soon as there are a few messages; the ids are those that all messages would give."""
    chat = Chat(tokenizer, TemplateOptions(TOOLS))
    spliced = 0
    for turn in range(8):
        new = [user(f"question {turn}"), user("and more")][: 1 + turn % 2]
        if turn:
            plan = appended(chat, new)
            whole = go_on(tokenizer, chat.base, [*chat.messages, *new], chat.options)
            assert list(plan.prompt()) == list(whole.prompt()) and plan.text == whole.text
            spliced += plan.spliced
        chat.say(new, f" answer {turn}")
    assert spliced >= 5


def test_what_is_appended_may_change_how_the_last_message_looks(tokenizer: PromptTokenizer) -> None:
    """Results of tools share a turn in this template: one more result is no splice, and no wrong prompt."""
    chat = Chat(tokenizer)
    for turn in range(3):
        chat.say([user(f"question {turn}")], " x")
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat.round(
        [user("?")],
        split(tokenizer, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'),
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
    )
    results = [{"role": "tool", "tool_call_id": "c", "content": text} for text in ("one", "two")]
    for new in (results, results[:1], [user("never mind")]):
        plan = appended(chat, new)
        assert tokenizer.decode(plan.prompt()).endswith(tokenizer.render([*chat.messages, *new], PLAIN)[-80:])


def test_append_costs_what_is_new(tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long conversation nothing but the last messages is rendered, decoded or tokenised."""
    chat = Chat(tokenizer)
    for turn in range(200):
        chat.messages += [user(f"question {turn}"), {"role": "assistant", "content": f" answer {turn}"}]
    chat.say([user("last")], " x")
    chat.say([user("last")], " x")
    work: list[int] = []
    plain_encode, plain_decode, plain_render = tokenizer._encode, tokenizer.decode, tokenizer.render

    def encode(text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        work.append(len(text))
        return plain_encode(text, add_special_tokens=add_special_tokens)

    def decode(ids: Sequence[int]) -> str:
        work.append(len(ids))
        return plain_decode(ids)

    monkeypatch.setattr(tokenizer, "_encode", encode)
    monkeypatch.setattr(tokenizer, "decode", decode)
    monkeypatch.setattr(tokenizer, "render", lambda *_, **__: pytest.fail("rendered whole"))
    plan = appended(chat, [user("and now?")])
    assert plan.spliced and sum(work) < 300
    monkeypatch.setattr(tokenizer, "render", plain_render)
    text = tokenizer.render([*chat.messages, user("and now?")], PLAIN)
    assert plain_decode(list(plan.prompt())) == text


words = st.text(alphabet="ab <|>\n{}\"'äß🙂\\", max_size=8) | st.sampled_from(
    ["<|im_end|>", "<|im_start|>user\n", "\n", " the other", "<tool_call>", "\ufffd", ""]
)
arguments = st.dictionaries(st.sampled_from(["q", "k"]), st.integers(0, 3) | words, max_size=2)
calls = st.lists(
    arguments.map(
        lambda given: {
            "id": "c",
            "type": "function",
            "function": {"name": "f", "arguments": json.dumps(given)},
        }
    ),
    max_size=2,
)
incoming = st.lists(
    st.tuples(st.sampled_from(["user", "tool", "system"]), words).map(
        lambda pair: {"role": pair[0], "content": pair[1]}
    ),
    min_size=1,
    max_size=3,
)
turns = st.lists(
    st.tuples(incoming, words, calls, st.sampled_from(["split", "whole", "partial", "other"]), st.booleans(),
              st.integers(0, 9)),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(turns, st.booleans(), st.integers(0, 2**32))
def test_the_text_is_always_that_of_the_messages(
    tokenizer: PromptTokenizer, rounds: list[Any], with_tools: bool, seed: int
) -> None:
    """Any conversation, edited pasts, odd outputs, full and appended: the prompt says what the messages say,
    but for the spaces in tool calls; and whatever is kept was served."""
    chance = random.Random(seed)
    chat = Chat(tokenizer, TemplateOptions(TOOLS if with_tools else None))
    spaced = False
    for new, text, tool_calls, how, ended, edit in rounds:
        if edit == 0 and chat.messages:
            chat.messages[chance.randrange(len(chat.messages))] = user("edited")
        if chat.base.parts and chat.messages == list(chat.base.messages):
            plan, whole = (
                appended(chat, new),
                go_on(tokenizer, chat.base, [*chat.messages, *new], chat.options),
            )
            spaced = spaced or bool(chat.messages and chat.base.parts[-1].text[2:])
            assert tokenizer.decode(plan.prompt()) == tokenizer.decode(whole.prompt())
        reply: dict[str, Any] = {"role": "assistant", "content": text or None}
        if tool_calls:
            reply["tool_calls"] = tool_calls
        shown = tokenizer.render([user("x"), reply], PLAIN, ask=False)
        shown = shown.partition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>\n")
        if how == "other" and tool_calls:
            shown = shown.replace(": ", ":  ").replace(", ", ",")
        ids = split(tokenizer, shown) if how == "split" else tokenizer.encode_rendered(shown)
        if how == "partial":
            ids = ids[: len(ids) // 2]
        served = list(chat.base.prompt)
        prompt = chat.round(new, [*ids, *(tokenizer.eos_ids if ended else ())], reply)
        assert chat.plan is not None
        assert list(prompt)[: chat.plan.kept_tokens] == served[: chat.plan.kept_tokens]
        said, meant = tokenizer.decode(prompt), tokenizer.render(chat.messages[:-1], chat.options)
        if said != meant:
            assert any(message.get("tool_calls") for message in chat.messages)
            assert squeezed(said) == squeezed(meant)


def squeezed(text: str) -> str:
    return "".join(text.split())
