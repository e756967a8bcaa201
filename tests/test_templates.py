"""Chat templates piece by piece: what is proven renders as the whole does; what may differ is not proven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.engines import tiny_model
from antiphon.scheduler.gateway.prompts import _environment
from antiphon.scheduler.gateway.templates import CONTEXT_MESSAGES, FIRST_MESSAGES, ChatTemplate

TINY = (Path(tiny_model.__file__).parent / "data" / "chatml.jinja").read_text()
PLAIN = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}</>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM_APART = """
{%- if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{%- set system = messages[0]['content'] %}
{%- else %}{% set loop_messages = messages %}{% set system = 'default' %}{% endif -%}
[{{ system }}]
{%- for message in loop_messages %}
{%- if loop.index0 == 0 %}{% set content = 'SYS ' + system + message.content %}
{%- else %}{% set content = message.content %}{% endif %}
{%- if message.role == 'user' %}[INST] {{ content }} [/INST]{% else %}{{ content }}{{ eos_token }}{% endif %}
{%- endfor -%}
"""
NEIGHBOURS = """
{%- for message in messages %}
{%- if message.role == "tool" %}
{%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<results>' }}{%- endif %}
{{- message.content }}
{%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '</results>' }}{%- endif %}
{%- elif (message.role == "system" and not loop.first) or message.role == "user" %}
{{- '<u>' + message.content + '</u>' }}
{%- else %}
{{- '<a>' + (message.content or '') }}{% for call in message.tool_calls or [] %}
{{- '\n' if not loop.first }}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}
{{- '</a>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<a>' }}{%- endif %}
"""
MACROS = """
{%- macro shown(content, mark='*') %}{{ mark }}{{ content | upper }}{{ mark }}{% endmacro -%}
{%- set greeting %}hello {{ tools | length if tools else 0 }}{% endset -%}
{{ greeting }}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif -%}
{{ shown(m.content, mark=greeting) if m.content else raise_exception('empty') }}{% endfor %}!
"""
PROVEN = {
    "the tiny model's": TINY,
    "plain": PLAIN,
    "system apart": SYSTEM_APART,
    "neighbours": NEIGHBOURS,
    "macros": MACROS,
}
NOT_PROVEN = {
    "state in a namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}"
    ),
    "the number of messages": "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "a number in the loop": "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
    "how many are left": "{% for m in messages %}{{ loop.revindex }}{% endfor %}",
    "far neighbours": "{% for m in messages %}{{ messages[loop.index0 - 2].role }}{% endfor %}",
    "the last message": "{{ messages[-1].role }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "the last message, in the loop": "{% for m in messages %}{{ messages[-1].role }}{% endfor %}",
    "two loops": "{% for m in messages %}{{ m }}{% endfor %}{% for m in messages %}{{ m }}{% endfor %}",
    "backwards": "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}",
    "a filter over all": "{% for m in messages | selectattr('role') %}{{ m.content }}{% endfor %}",
    "a condition": "{% for m in messages if m.content %}{{ loop.first }}{% endfor %}",
    "an else": "{% for m in messages %}{{ m.content }}{% else %}none{% endfor %}",
    "break": "{% for m in messages %}{% if m.stop %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "the clock": "{{ strftime_now('%H') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "chance": "{% for m in messages %}{{ [1, 2] | random }}{% endfor %}",
    "loop.previtem": "{% for m in messages %}{{ loop.previtem.role }}{% endfor %}",
    "loop.changed": "{% for m in messages %}{{ loop.changed(m.role) }}{% endfor %}",
    "cycle": "{% for m in messages %}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "loop as a value": "{% for m in messages %}{% set l = loop %}{{ l.index }}{% endfor %}",
    "another name with another start": (
        "{% set rest = messages[1:] %}{% for m in rest %}{{ messages[loop.index0 - 1].role }}{% endfor %}"
    ),
    "a name that is not always messages": (
        "{% set x = messages %}{% if t %}{% set x = tools %}{% endif %}{% for m in x %}{{ m }}{% endfor %}"
    ),
    "through a macro": (
        "{% macro n() %}{{ messages | length }}{% endmacro %}{% for m in messages %}{{ n() }}{% endfor %}"
    ),
    "after the loop": "{% for m in messages %}{{ m.role }}{% endfor %}{{ messages | length }}",
    "many left out": (
        "{% set a = messages[1:] %}{% set b = a[1:] %}{% set c = b[1:] %}{% for m in c %}{{ m }}{% endfor %}"
    ),
    "no loop": "{{ messages[0].content }}",
    "a loop in a condition": "{% if tools %}{% for m in messages %}{{ m.role }}{% endfor %}{% endif %}",
    "an inner loop over all": (
        "{% for m in messages %}{% for n in messages %}{{ n.role }}{% endfor %}{% endfor %}"
    ),
    "an index that is no neighbour": "{% for m in messages %}{{ messages[loop.index0 + m.n] }}{% endfor %}",
    "position against a number": "{% for m in messages %}{{ 'x' if loop.index0 > 3 }}{% endfor %}",
}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(_environment(), source)


@pytest.mark.parametrize("name", PROVEN)
def test_these_are_proven(name: str) -> None:
    assert template(PROVEN[name]).why_whole == ""


@pytest.mark.parametrize("name", NOT_PROVEN)
def test_these_are_not(name: str) -> None:
    """With a reason, and `pieces` says to render whole."""
    made = template(NOT_PROVEN[name])
    assert made.why_whole
    assert made.pieces({"messages": []}, []) is None


call = {"function": {"name": "f", "arguments": {"q": "x"}}}
messages = st.lists(
    st.builds(
        lambda role, content, calls: {"role": role, "content": content, **calls},
        st.sampled_from(["system", "user", "assistant", "tool"]),
        st.text(min_size=1, max_size=5),
        st.sampled_from([{}, {}, {"tool_calls": [call, call]}]),
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(PROVEN)), messages, messages, st.booleans())
def test_pieces_are_what_the_whole_says(
    name: str, before: list[dict[str, Any]], window: list[dict[str, Any]], with_tools: bool
) -> None:
    """The texts of a window's messages, but the first, and what begins the answer, end the whole text."""
    made = _MADE[name]
    whole = [*before, *window]
    variables = {
        "messages": whole, "tools": [{"name": "t"}] if with_tools else None, "add_generation_prompt": True,
        "bos_token": "<s>", "eos_token": "</s>",
    }  # fmt: skip
    if len(before) < CONTEXT_MESSAGES or len(whole) < FIRST_MESSAGES:
        return
    pieces = made.pieces(variables | {"messages": whole[:FIRST_MESSAGES]}, window)
    assert pieces is not None and len(pieces.messages) == len(window)
    tail = "".join(pieces.messages[1:]) + pieces.answer
    assert made.render(variables).endswith(tail)
    # and no piece lacks something: one message less in the window moves it out of the tail
    longer = made.pieces(variables | {"messages": whole[:FIRST_MESSAGES]}, whole[CONTEXT_MESSAGES:])
    assert longer is not None and "".join(longer.messages[1:]).endswith("".join(pieces.messages[1:]))
    first = len(whole) - CONTEXT_MESSAGES - len(longer.messages)
    assert first == 0


_MADE = {name: template(source) for name, source in PROVEN.items()}


def test_a_message_cannot_fake_a_seam() -> None:
    """Marks are drawn anew each time; a template that swallows one is rendered whole."""
    swallowing = template("{% for m in messages %}{{ m.content }}{% endfor %}")
    chat = [{"role": "user", "content": "\0" + "0" * 32 + "\0"}] * 5
    pieces = swallowing.pieces({"messages": chat[:4]}, chat[2:])
    assert pieces is not None and pieces.messages == tuple(m["content"] for m in chat[2:])


def test_the_time_does_not_depend_on_what_was_before() -> None:
    """Only the window and the first messages are looked at: nothing else is even given."""
    made = template(TINY)
    chat = [{"role": "user", "content": str(number)} for number in range(6)]
    pieces = made.pieces({"messages": chat[:FIRST_MESSAGES], "add_generation_prompt": True}, chat[3:])
    assert pieces is not None and pieces.answer == "<|im_start|>assistant\n"
    assert pieces.messages[-1] == "<|im_start|>user\n5<|im_end|>\n"
