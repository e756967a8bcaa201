"""What the routes take, as JSON schemas: the structs' own, and by hand what a struct leaves open.

The structs take messages and tools as plain objects, which are checked in code; here is what those checks let
through. Clients may send more: unknown fields are ignored everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from antiphon.scheduler.gateway.openapi_schemas import (
    FLAG,
    NOTHING,
    OBJECT,
    TEXT,
    Schema,
    an_object,
    const,
    either,
    listed,
    one_of,
    ref,
)
from antiphon.scheduler.gateway.sessions import (
    EVENTS,
    MAX_FORKS,
    MAX_METADATA_CHARS,
    MAX_METADATA_KEY_CHARS,
    MAX_METADATA_KEYS,
)

SESSION_ID: Schema = {"type": "string", "pattern": "^[!-~]{1,255}$"}
NOT_EMPTY: Schema = {"type": "string", "minLength": 1}


def _several(schema: Schema) -> Schema:
    return listed(schema) | {"minItems": 1}


def _or_nothing(schema: Schema) -> Schema:
    return either(schema, NOTHING)


TEXT_PART = an_object(type=const("text"), text=TEXT)
CONTENT = either(TEXT, listed(TEXT_PART))
FUNCTION = an_object({"description": TEXT, "parameters": OBJECT, "strict": FLAG}, name=NOT_EMPTY)
CALL = an_object(id=TEXT, type=const("function"), function=an_object(name=TEXT, arguments=TEXT))
CHAT_MESSAGE = either(
    an_object(role=one_of("system", "developer", "user"), content=CONTENT),
    an_object({"tool_calls": listed(CALL)}, role=const("assistant"), content=_or_nothing(CONTENT)),
    an_object(role=const("tool"), tool_call_id=TEXT, content=CONTENT),
)
RESPONSE_FORMAT = either(
    an_object(type=one_of("text", "json_object")),
    an_object(type=const("json_schema"), json_schema=an_object(name=TEXT, schema=OBJECT)),
)
INPUT_TEXT = an_object(type=one_of("input_text", "output_text"), text=TEXT)
INPUT_ITEM = either(
    an_object(
        role=one_of("system", "developer", "user", "assistant"), content=either(TEXT, listed(INPUT_TEXT))
    ),
    an_object(type=const("function_call"), call_id=TEXT, name=TEXT, arguments=TEXT),
    an_object(type=const("function_call_output"), call_id=TEXT, output=TEXT),
)
BLOCK = either(
    TEXT_PART,
    an_object(type=const("tool_result"), tool_use_id=TEXT, content=CONTENT),
)
ANSWERED_BLOCK = either(TEXT_PART, an_object(type=const("thinking"), thinking=TEXT))
ANTHROPIC_MESSAGE = either(
    an_object(role=const("user"), content=either(TEXT, listed(BLOCK))),
    an_object(role=const("assistant"), content=either(TEXT, listed(ANSWERED_BLOCK))),
)

COMPONENTS: dict[str, Schema] = {
    "ChatMessageParam": CHAT_MESSAGE,
    "ToolParam": an_object(type=const("function"), function=FUNCTION),
    "ResponseFormat": RESPONSE_FORMAT,
    "ResponseItem": INPUT_ITEM,
    "FunctionTool": an_object(
        {"description": TEXT, "parameters": OBJECT, "strict": FLAG}, type=const("function"), name=NOT_EMPTY
    ),
    "MessageParam": ANTHROPIC_MESSAGE,
    "CustomTool": an_object({"description": TEXT}, name=NOT_EMPTY, input_schema=OBJECT),
}

_METADATA: dict[str, Schema] = {
    "metadata": _or_nothing(
        {
            "type": "object",
            "maxProperties": MAX_METADATA_KEYS,
            "propertyNames": {"maxLength": MAX_METADATA_KEY_CHARS},
            "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_CHARS},
        }
    )
}
_OF_SESSION: dict[str, Schema] = {
    "session": _or_nothing(ref("SessionFields")),
    "session_id": _or_nothing(SESSION_ID),
    "nvext": _or_nothing(an_object({"agent_hints": OBJECT})),
}
_COMPLETING: dict[str, Schema] = {
    **_OF_SESSION,
    "extra_key": NOTHING,
    "lora_path": NOTHING,
    "cache_salt": _or_nothing(NOT_EMPTY),
    "best_of": {"enum": [1, None]},
    "response_format": _or_nothing(ref("ResponseFormat")),
    "regex": _or_nothing({"type": "string", "format": "regex"}),
    "stop_regex": _or_nothing({"type": "string", "format": "regex"}),
}
_CHAT_TOOLS: dict[str, Schema] = {
    "messages": _several(ref("ChatMessageParam")),
    "tools": _or_nothing(listed(ref("ToolParam"))),
    "tool_choice": either(
        one_of("auto", "none"), an_object(type=const("function"), function=an_object(name=TEXT)), NOTHING
    ),
}
_OF_MESSAGES: dict[str, Schema] = {
    **_OF_SESSION,
    "messages": _several(ref("MessageParam")),
    "system": either(TEXT, listed(TEXT_PART), NOTHING),
    "tools": _or_nothing(listed(ref("CustomTool"))),
    "tool_choice": either(an_object(type=one_of("auto", "none")), NOTHING),
    "thinking": either(an_object(type=one_of("enabled", "disabled", "adaptive")), NOTHING),
    "output_config": _or_nothing(
        an_object({"format": an_object(type=const("json_schema"), schema=OBJECT), "effort": TEXT})
    ),
}
_REFINED: dict[str, dict[str, Schema]] = {
    "SessionFields": {"id": _or_nothing(SESSION_ID), "parent_id": _or_nothing(SESSION_ID)},
    "SessionCreate": {"id": _or_nothing(SESSION_ID), "parent_id": _or_nothing(SESSION_ID), **_METADATA},
    "SessionUpdate": _METADATA,
    "SessionFork": {
        "ids": _or_nothing(_several(SESSION_ID) | {"maxItems": MAX_FORKS, "uniqueItems": True}),
        "from": either(const("tip"), {"type": "integer", "minimum": 0}),
    },
    "SessionEvent": {"type": one_of(*EVENTS)},
    "ChatBody": {
        **_COMPLETING,
        **_CHAT_TOOLS,
        "audio": NOTHING,
        "modalities": _or_nothing(listed(const("text"))),
    },
    "CompletionBody": {
        **_COMPLETING,
        "prompt": either(NOT_EMPTY, _several({"type": "integer", "minimum": 0})),
        "suffix": NOTHING,
    },
    "ResponsesBody": {
        **_OF_SESSION,
        "cache_salt": _or_nothing(NOT_EMPTY),
        "input": either(NOT_EMPTY, _several(ref("ResponseItem"))),
        "tools": _or_nothing(listed(ref("FunctionTool"))),
        "tool_choice": either(one_of("auto", "none"), an_object(type=const("function"), name=TEXT), NOTHING),
        "background": {"enum": [False, None]},
        "prompt": NOTHING,
        "truncation": {"enum": ["disabled", None]},
    },
    "TextConfig": {
        "format": either(
            an_object(type=one_of("text", "json_object")),
            an_object(type=const("json_schema"), name=TEXT, schema=OBJECT),
            NOTHING,
        )
    },
    "MessagesBody": _OF_MESSAGES,
    "CountBody": _OF_MESSAGES,
    "TokenizeBody": {
        "messages": _or_nothing(_several(ref("ChatMessageParam"))),
        "add_generation_prompt": {"const": True},
    },
}
"""Struct -> its fields that are told more closely than by their types."""


def body_schemas(structs: Sequence[type]) -> dict[str, Schema]:
    """Components for these structs and all that they refer to."""
    _, found = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    for name, fields in _REFINED.items():
        if name in found:
            properties: dict[str, Any] = found[name]["properties"]
            for field, schema in fields.items():
                kept = {key: properties[field][key] for key in ("default",) if key in properties[field]}
                properties[field] = schema | kept
    return {**found, **COMPONENTS}
