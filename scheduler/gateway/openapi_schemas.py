"""What the routes answer, as JSON schemas: the hand-written half of the OpenAPI document.

A schema says what is always there and of which type; what else an engine adds is let through.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

ANY: Schema = {}
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
NOTHING: Schema = {"type": "null"}
TEXT_OR_NOTHING: Schema = {"type": ["string", "null"]}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def const(value: str) -> Schema:
    return {"const": value}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def an_object(optional: dict[str, Schema] | None = None, /, **required: Schema) -> Schema:
    """An object that has all of `required`, and may have more."""
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


def a_list(items: Schema) -> Schema:
    return an_object(object=const("list"), data=listed(items))


SESSION = an_object(
    id=TEXT, parent_id=TEXT_OR_NOTHING, round=COUNT, arm=TEXT, identified_by=TEXT,
)  # fmt: skip
USAGE = an_object(
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_tokens_details=an_object(cached_tokens=COUNT),
)
CALL = an_object(id=TEXT, type=const("function"), function=an_object(name=TEXT, arguments=TEXT))
CHAT_MESSAGE = an_object(
    {"reasoning_content": TEXT, "tool_calls": listed(CALL)}, role=const("assistant"), content=TEXT_OR_NOTHING
)
CHOICE_END = {"logprobs": either(OBJECT, NOTHING), "finish_reason": TEXT_OR_NOTHING}
CHAT = an_object(
    id=TEXT, object=const("chat.completion"), created=WHOLE, model=TEXT, usage=ref("Usage"),
    session=ref("Session"), choices=listed(an_object(index=COUNT, message=ref("ChatMessage"), **CHOICE_END)),
)  # fmt: skip
COMPLETION = an_object(
    id=TEXT, object=const("text_completion"), created=WHOLE, model=TEXT, usage=ref("Usage"),
    session=ref("Session"), choices=listed(an_object(index=COUNT, text=TEXT, **CHOICE_END)),
)  # fmt: skip
RESPONSE = an_object(
    {"conversation": an_object(id=TEXT), "session": ref("Session")},
    id=TEXT, object=const("response"), created_at=WHOLE, model=TEXT, store=FLAG,
    status=one_of("completed", "incomplete", "failed", "in_progress"),
    error=either(OBJECT, NOTHING), incomplete_details=either(an_object(reason=TEXT), NOTHING),
    output=listed(an_object(id=TEXT, status=TEXT, type=one_of("message", "function_call", "reasoning"))),
    usage=either(
        an_object(
            input_tokens=COUNT, input_tokens_details=an_object(cached_tokens=COUNT), output_tokens=COUNT,
            output_tokens_details=an_object(reasoning_tokens=COUNT), total_tokens=COUNT,
        ),
        NOTHING,
    ),
)  # fmt: skip
BLOCK = either(
    an_object(type=const("text"), text=TEXT),
    an_object(type=const("thinking"), thinking=TEXT, signature=TEXT),
    an_object(type=const("tool_use"), id=TEXT, name=TEXT, input=OBJECT),
)
MESSAGE = an_object(
    {"session": ref("Session")},
    id=TEXT, type=const("message"), role=const("assistant"), model=TEXT, content=listed(BLOCK),
    stop_reason=one_of("end_turn", "max_tokens", "tool_use", "stop_sequence", "refusal"),
    stop_sequence=TEXT_OR_NOTHING,
    usage=an_object(
        input_tokens=COUNT, output_tokens=COUNT, cache_read_input_tokens=COUNT,
        cache_creation_input_tokens=COUNT,
    ),
)  # fmt: skip
ERROR = an_object(error=an_object(message=TEXT, type=TEXT, param=TEXT_OR_NOTHING, code=TEXT))
ANTHROPIC_ERROR = an_object(type=const("error"), error=an_object(type=TEXT, message=TEXT))
MODEL = an_object(
    id=TEXT, object=const("model"), created=WHOLE, owned_by=TEXT,
    max_model_len=either(COUNT, NOTHING),
)  # fmt: skip
TOKENS = an_object(
    tokens=listed(either(COUNT, listed(COUNT))), count=either(COUNT, listed(COUNT)), max_model_len=COUNT
)
DETOKENIZED = an_object(text=either(TEXT, listed(TEXT)), prompt=either(TEXT, listed(TEXT)))
EXPLANATION = an_object(
    object=const("antiphon.explanation"), endpoint=TEXT, model=TEXT, policy=TEXT, ordering=TEXT,
    session=OBJECT, slo=OBJECT,
)  # fmt: skip
READINESS = an_object(ready=FLAG, engines_alive=COUNT, ledger=TEXT, detail=TEXT, policy=TEXT)

SESSION_RESOURCE = an_object(
    id=TEXT, object=const("session"), created_at=WHOLE, last_active_at=WHOLE, expires_at=WHOLE,
    status=one_of("active", "waiting_tool", "closing", "closed"), parent_id=TEXT_OR_NOTHING, root_id=TEXT,
    round=COUNT, usage=ref("Usage"), metadata=OBJECT, context_tokens=COUNT,
)  # fmt: skip

COMPONENTS: dict[str, Schema] = {
    "Session": SESSION,
    "SessionResource": SESSION_RESOURCE,
    "Usage": USAGE,
    "ChatMessage": CHAT_MESSAGE,
    "ChatCompletion": CHAT,
    "Completion": COMPLETION,
    "Response": RESPONSE,
    "Message": MESSAGE,
    "Error": ERROR,
    "AnthropicError": ANTHROPIC_ERROR,
    "Model": MODEL,
    "Tokens": TOKENS,
    "Detokenized": DETOKENIZED,
    "Explanation": EXPLANATION,
    "Readiness": READINESS,
}
