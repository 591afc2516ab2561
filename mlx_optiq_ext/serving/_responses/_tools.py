"""The tools of a Responses request: functions, free-form tools and namespaces."""

from __future__ import annotations

from typing import Any, NamedTuple

from .._conversation import (
    function_tool,
    log_dropped_tools,
    pick_tools,
)
from .._errors import bad_request
from .._fields import choice, objects, optional, required
from .._request import Request

Body = dict[str, Any]

FREE_FORM = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}


class ToolName(NamedTuple):
    """What the client calls a tool."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


def flat_name(name: str, namespace: str | None) -> str:
    """What the model calls a tool: an identifier in any language."""
    return f"{namespace}__{name}" if namespace else name


class ToolBox:
    """The tools as the model sees them, and their names as the client does.

    Args:
        body (dict): The request.

    Raises:
        APIError: 400, if a tool or the choice of a tool is malformed.
    """

    def __init__(self, body: Body):
        self.tools: list[dict[str, Any]] = []
        self._names: dict[str, ToolName] = {}
        self._dropped: list[str] = []
        for path, tool in objects(optional(body, "tools", list, []), "tools"):
            self._add(tool, f"{path}.")
        log_dropped_tools(self._dropped)

    def client_name(self, name: str) -> ToolName:
        """What the client calls the tool that the model calls so."""
        if name in self._names:
            return self._names[name]
        # Models leave the namespace out now and then.
        members = [tool for tool in self._names.values() if tool.name == name]
        return members[0] if len(members) == 1 else ToolName(name)

    def choose(self, body: Body, request: Request) -> None:
        """Offer the tools that ``tool_choice`` leaves."""
        selected = optional(body, "tool_choice", (str, dict), "auto")
        if isinstance(selected, str):
            mode = choice(selected, ("auto", "none", "required"), "tool_choice")
            tools = self.tools
        else:
            mode, names = self._selection(selected)
            tools = pick_tools(self.tools, names, "tool_choice.name")
        request.choose_tools(mode, tools)
        request.one_call = not optional(body, "parallel_tool_calls", bool, True)

    def _selection(self, selected: Body) -> tuple[str, list[str]]:
        kind = required(selected, "type", str, "tool_choice.")
        if kind in ("function", "custom"):
            return "required", [self._selected(selected, "tool_choice.")]
        if kind != "allowed_tools":
            raise bad_request(
                f"tool_choice.type: {kind!r} is not supported here",
                param="tool_choice.type",
            )
        mode = required(selected, "mode", str, "tool_choice.")
        allowed = required(selected, "tools", list, "tool_choice.")
        names = [
            self._selected(tool, f"{path}.")
            for path, tool in objects(allowed, "tool_choice.tools")
            if tool.get("type") in ("function", "custom")
        ]
        return choice(mode, ("auto", "required"), "tool_choice.mode"), names

    def _selected(self, tool: Body, path: str) -> str:
        namespace = optional(tool, "namespace", str, path=path)
        return flat_name(required(tool, "name", str, path), namespace)

    def _add(self, tool: Body, path: str, namespace: str | None = None) -> None:
        kind = required(tool, "type", str, path)
        if kind == "namespace" and namespace is None:
            name = required(tool, "name", str, path)
            members = required(tool, "tools", list, path)
            for place, member in objects(members, f"{path}tools"):
                self._add(member, f"{place}.", name)
        elif kind in ("function", "custom"):
            self._add_function(tool, path, namespace)
        else:
            self._dropped.append(kind)

    def _add_function(self, tool: Body, path: str, namespace: str | None) -> None:
        is_custom = tool["type"] == "custom"
        client_name = ToolName(required(tool, "name", str, path), namespace, is_custom)
        name = flat_name(client_name.name, namespace)
        if name in self._names:
            raise bad_request(
                f"{path}name: two tools are named {name!r}", f"{path}name"
            )
        self._names[name] = client_name
        description = optional(tool, "description", str, "", path)
        parameters = optional(
            tool, "parameters", dict, {"type": "object", "properties": {}}, path
        )
        if is_custom:
            description, parameters = _with_format(tool, path, description), FREE_FORM
        self.tools.append(function_tool(name, description, parameters))


def _with_format(tool: Body, path: str, description: str) -> str:
    layout = optional(tool, "format", dict, {}, path)
    definition = optional(layout, "definition", str, "", f"{path}format.")
    if not definition:
        return description
    syntax = optional(layout, "syntax", str, "", f"{path}format.")
    return f"{description}\n\nThe input follows this {syntax} grammar:\n{definition}"
