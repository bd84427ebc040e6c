"""Tools of a request: which of them the model is told, and how what it calls is told back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.answer_parsers.tools import Schemas, ToolParser
from elasticmoe.services.router.api.options import unsupported
from elasticmoe.services.router.api.schemas import ChatRequest, NamedTool, TokenizeRequest, Tool
from elasticmoe.services.router.grammar.structure import Structure, WrittenCalls, WrittenTool, structure

NO_PARAMETERS = {"type": "object", "properties": {}}


class ToolUse(NamedTuple):
    """Of a request whose answer may have calls. `is_single`: only its first one is told. `is_instead`: calls come
    instead of a text of a form, which may spell some; an answer that begins with none has none."""

    parser: type[ToolParser]
    schemas: Schemas
    is_single: bool
    is_instead: bool = False


def tools_of(raw: ChatRequest | TokenizeRequest) -> list[Tool]:
    """Those that the model is told. Raises InvalidRequest for what cannot be asked of it."""
    tools, choice = raw.tools or [], raw.tool_choice
    if raw.functions and raw.function_call != "none":
        raise unsupported("functions", "pass them as tools")
    if not raw.functions and raw.function_call not in (None, "none", "auto"):
        raise unsupported("function_call", "there are no functions")
    if choice == "none":
        return []
    if not tools and choice not in (None, "auto"):
        raise unsupported("tool_choice", "there are no tools")
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise InvalidRequest(f"tool_choice names {choice.function.name[:80]!r}, which is no tool", param="tool_choice")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"tools has {twice!r} twice", param="tools")
    return tools


def told_to_model(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """As chat templates print them, in OpenAI's shape; None without any, as templates expect."""
    return [_told(tool) for tool in tools] or None


def _told(tool: Tool) -> dict[str, Any]:
    given = tool.function
    described = {} if given.description is None else {"description": given.description}
    parameters = NO_PARAMETERS if given.parameters is None else given.parameters
    return {"type": "function", "function": {"name": given.name, **described, "parameters": parameters}}


def tool_use(
    raw: ChatRequest, tools: Sequence[Tool], parser: type[ToolParser] | None, asked: Structure | None
) -> tuple[ToolUse | None, Structure | None]:
    """How calls are read, None without tools; and what the answer has to look like, where its text is `asked` to look
    like something. Raises InvalidRequest where nobody knows how the model writes calls."""
    if not tools:
        return None, asked
    if parser is None:
        raise unsupported("tools", "how the model writes calls is not known; the setting tool_call_parser says it")
    schemas = {tool.function.name: tool.function.parameters or {} for tool in tools}
    choice = raw.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) else None
    is_single = raw.parallel_tool_calls is False or named is not None
    use = ToolUse(parser, schemas, is_single)
    if named or choice == "required":  # there is no text that could have another form
        return use, _calls(parser.name, tools, named, is_single=is_single)
    if asked is None:
        return use, None
    calls = _calls(parser.name, tools, None, is_single=is_single)
    return use._replace(is_instead=True), msgspec.structs.replace(asked, instead=calls)


def _calls(form: str, tools: Sequence[Tool], named: str | None, *, is_single: bool) -> Structure:
    """An answer of calls of these tools, or of the named one."""
    given = [tool.function for tool in tools if named in (None, tool.function.name)]
    calls = WrittenCalls(form, [WrittenTool(one.name, one.parameters) for one in given], is_single)
    return structure("calls", msgspec.json.encode(calls).decode(), "tools")


def calls_of(message: Any) -> list[dict[str, Any]]:
    """An assistant's calls as templates read them; their arguments are still a text."""
    return [
        {key: value for key, value in msgspec.to_builtins(call).items() if value is not None}
        for call in message.tool_calls
    ]
