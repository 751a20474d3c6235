"""Calls of tools and the tools that a row declares, as chat templates take them, or why they cannot be taken."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from sft_lab.data.values import (
    RowError,
    from_json,
    holds,
    json_object,
    kind,
    listed,
    nearest,
    non_empty_list,
    present,
    text,
)

_CALL = {"id", "type", "function", "name", "arguments"}  # what is read of a call


def calls_of(message: Mapping[str, Any]) -> Any:
    """`tool_calls`, or the one call that the first API had instead; None where there is none."""
    if message.get("tool_calls"):
        return message["tool_calls"]
    call = message.get("function_call")
    return [call] if call is not None else None


def one_or_more(calls: Any, where: str) -> list[Any]:
    calls = from_json(calls, where)
    return [calls] if isinstance(calls, Mapping) else non_empty_list(calls, where)


def tool_calls(calls: Any, where: str, unread: set[str]) -> list[dict[str, Any]]:
    """The calls of a message; names of keys that nothing reads are added to `unread`."""
    calls = from_json(calls, f"{where}: tool_calls")
    if not isinstance(calls, list):
        raise RowError(f"{where}: tool_calls is {kind(calls)} where a list was expected")
    return [_tool_call(call, f"{where}: tool call {number}", unread) for number, call in enumerate(calls, start=1)]


def _tool_call(call: Any, where: str, unread: set[str]) -> dict[str, Any]:
    function = _function(call, where)
    if "arguments" not in function:
        raise RowError(f"{where} has no 'arguments' (it has {listed(function)}{nearest('arguments', function)})")
    arguments = json_object(function["arguments"], f"{where}: arguments")
    clean = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if present(call, "id"):  # some templates write it, and refuse a call without
        clean["id"] = text(call["id"], f"{where}: id")
    left = (call.keys() - _CALL) | (function.keys() - _CALL)
    unread.update(f"tool_calls.{key}" for key in left if holds(call.get(key, function.get(key))))
    return clean


def declared(tools: Any, name: str = "tools") -> list[dict[str, Any]]:
    """Declared tools from a list of them, or from a JSON text; `name` is the column's."""
    if tools in (None, ""):
        return []
    tools = from_json(tools, name)
    if not isinstance(tools, list):
        raise RowError(f"{name} is {kind(tools)} where a list was expected")
    return [_tool(from_json(tool, f"tool {number}"), f"tool {number}") for number, tool in enumerate(tools, start=1)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = json_object(_function(tool, where), where)
    if present(function, "parameters"):
        function["parameters"] = json_object(function["parameters"], f"{where}: parameters")
    return {"type": "function", "function": function}


def _function(value: Any, where: str) -> Mapping[str, Any]:
    """The function of a call or a tool, which stands under the key `function`, or bare."""
    if not isinstance(value, Mapping):
        raise RowError(f"{where} is {kind(value)} where an object was expected")
    if value.get("type") not in (None, "function"):
        raise RowError(f"{where} has type {reprlib.repr(value['type'])} (allowed: function)")
    bare = {key: item for key, item in value.items() if key not in ("type", "function", "id")}
    function = value["function"] if present(value, "function") else bare
    if not isinstance(function, Mapping):
        raise RowError(f"{where}: function is {kind(function)} where an object was expected")
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError(f"{where} has no name (it has {listed(function)}{nearest('name', function)})")
    return function
