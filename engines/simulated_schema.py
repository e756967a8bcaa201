"""What a grammar would force a model to say: the smallest JSON value that a schema allows. Pure.

Real engines constrain the sampler; a simulated one has no sampler, so it says this when a request asks for
JSON or for a tool call and no script line answers it. Covers what agents' schemas hold; whatever else a
schema demands (patterns, formats, `not`) is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from antiphon.engines.scripts import ScriptedCall, ScriptLine

MAX_DEPTH = 32
"""Of a value: a recursive schema ends here."""
MAX_SIZE = 1000
"""Of a string or list."""


def forced_line(
    response_format: Mapping[str, Any] | None,
    json_schema: str | None,
    tools: list[dict[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
) -> ScriptLine | None:
    """The answer that the request's constraint leaves; None without one. Raises ValueError for a bad one."""
    try:
        return _forced(response_format, json_schema, tools, tool_choice)
    except (AttributeError, IndexError, KeyError, TypeError, msgspec.DecodeError) as error:
        raise ValueError(f"the constraint is malformed: {error!r}") from error


def _forced(
    response_format: Mapping[str, Any] | None,
    json_schema: str | None,
    tools: list[dict[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
) -> ScriptLine | None:
    if tools and isinstance(tool_choice, Mapping):
        name = (tool_choice.get("function") or {}).get("name")
        return _called([tool for tool in tools if tool["function"]["name"] == name])
    if tools and tool_choice == "required":
        return _called(tools[:1])
    schema = _schema_of(response_format, json_schema)
    return None if schema is None else ScriptLine(text=_json(smallest(schema)))


def smallest(schema: Any) -> Any:
    """A small value that `schema` allows."""
    return _value(schema, schema if isinstance(schema, dict) else {}, MAX_DEPTH)


def _called(tools: list[dict[str, Any]]) -> ScriptLine:
    calls = [
        ScriptedCall(tool["function"]["name"], _json(smallest(tool["function"].get("parameters") or {})))
        for tool in tools
    ]
    return ScriptLine(tool_calls=tuple(calls))


def _schema_of(response_format: Mapping[str, Any] | None, json_schema: str | None) -> Any:
    if json_schema is not None:
        return msgspec.json.decode(json_schema)
    kind = (response_format or {}).get("type")
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        assert response_format is not None
        schema = (response_format.get("json_schema") or {}).get("schema")
        if schema is None:
            raise ValueError("schema_ is required for json_schema response format request.")
        return schema
    return None


def _value(schema: Any, root: dict[str, Any], depth: int) -> Any:
    if not isinstance(schema, dict) or depth == 0:
        return {} if schema is not False and depth else None
    if "$ref" in schema:
        return _value(_resolve(schema["$ref"], root), root, depth - 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for several in ("anyOf", "oneOf"):
        if schema.get(several):
            return _value(schema[several][0], root, depth - 1)
    if schema.get("allOf"):
        merged: dict[str, Any] = {}
        for part in schema["allOf"]:
            part = _resolve(part["$ref"], root) if isinstance(part, dict) and "$ref" in part else part
            merged |= part if isinstance(part, dict) else {}
        return _value(merged, root, depth - 1)
    return _of_type(schema, root, depth)


def _of_type(schema: dict[str, Any], root: dict[str, Any], depth: int) -> Any:
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "string":
        return "x" * _size(schema, "minLength", 1)
    if kind in ("integer", "number"):
        least = schema.get("minimum", schema.get("exclusiveMinimum"))
        return 1 if least is None else least + ("exclusiveMinimum" in schema)
    if kind == "boolean":
        return True
    if kind == "null":
        return None
    if kind == "array":
        items = schema.get("items", {})
        return [_value(items, root, depth - 1) for _ in range(_size(schema, "minItems", 0))]
    properties = schema.get("properties") or {}
    required = schema.get("required", list(properties))
    return {name: _value(properties.get(name, {"type": "string"}), root, depth - 1) for name in required}


def _size(schema: dict[str, Any], name: str, default: int) -> int:
    size = int(schema.get(name, default))
    if size > MAX_SIZE:
        raise ValueError(f"{name} must be at most {MAX_SIZE}, got {size}")
    return size


def _resolve(reference: Any, root: dict[str, Any]) -> Any:
    """A reference within the document: "#/$defs/Name"."""
    found: Any = root
    for part in str(reference).removeprefix("#").strip("/").split("/"):
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return {} if found is None or found is root else found


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
