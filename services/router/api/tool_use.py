"""Tools of a request: which of them the model is told, and how what it calls is told back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.answer_parsers.tools import Schemas, ToolParser
from elasticmoe.services.router.api.options import unsupported
from elasticmoe.services.router.api.schemas import ChatRequest, FunctionDefinition, NamedTool, TokenizeRequest
from elasticmoe.services.router.grammar.structure import Structure, WrittenCalls, WrittenTool, structure

NO_PARAMETERS = {"type": "object", "properties": {}}


class ToolUse(NamedTuple):
    """Of a request whose answer may have calls. `is_single`: only its first one is told. `is_instead`: calls come
    instead of a text of a form, which may spell some; an answer that begins with none has none."""

    parser: type[ToolParser]
    schemas: Schemas
    is_single: bool
    is_instead: bool = False


def tools_of(raw: ChatRequest | TokenizeRequest) -> list[FunctionDefinition]:
    """Those that the model is told. Raises InvalidRequest for what cannot be asked of it."""
    choice, functions = raw.tool_choice, _functions(raw)
    if raw.functions and raw.function_call != "none":
        raise unsupported("functions", "pass them as tools")
    if not raw.functions and raw.function_call not in (None, "none", "auto"):
        raise unsupported("function_call", "there are no functions")
    if choice == "none":
        return []
    if not functions and choice not in (None, "auto"):
        raise unsupported("tool_choice", "there are no tools")
    names = [function.name for function in functions]
    named = named_of(choice)
    if named is not None and named not in names:
        raise InvalidRequest(f"tool_choice names {named[:80]!r}, which is no tool", param="tool_choice")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"tools has {twice!r} twice", param="tools")
    return functions


def _functions(raw: ChatRequest | TokenizeRequest) -> list[FunctionDefinition]:
    functions = []
    for number, tool in enumerate(raw.tools or ()):
        check_kind(f"tools[{number}]", tool.type)
        if tool.function is None:
            raise InvalidRequest(f"tools[{number}] has no function", param=f"tools[{number}].function")
        functions.append(tool.function)
    return functions


def check_kind(where: str, kind: str | None, only: str = "function") -> None:
    """Raises InvalidRequest for a tool, or the choice of one, of another kind."""
    if kind not in (None, only):
        raise unsupported(where, f"type {kind[:40]!r}; supported: {only}")


def named_of(choice: str | NamedTool | None) -> str | None:
    """The function that has to be called. Raises InvalidRequest for a choice of another kind."""
    if not isinstance(choice, NamedTool):
        return None
    check_kind("tool_choice", choice.type)
    if choice.function is None:
        raise InvalidRequest("tool_choice has no function", param="tool_choice.function")
    return choice.function.name


def told_to_model(tools: Sequence[FunctionDefinition]) -> list[dict[str, Any]] | None:
    """As chat templates print them, in OpenAI's shape; None without any, as templates expect."""
    return [_told(tool) for tool in tools] or None


def _told(given: FunctionDefinition) -> dict[str, Any]:
    described = {} if given.description is None else {"description": given.description}
    parameters = NO_PARAMETERS if given.parameters is None else given.parameters
    return {"type": "function", "function": {"name": given.name, **described, "parameters": parameters}}


def tool_use(
    raw: ChatRequest,
    tools: Sequence[FunctionDefinition],
    parser: type[ToolParser] | None,
    asked: Structure | None,
    *,
    is_strict: bool = False,
) -> tuple[ToolUse | None, Structure | None]:
    """How calls are read, None without tools; and what the answer has to look like, where its text is `asked` to look
    like something, or tools are strict. `is_strict`: those are that do not say whether they are, too. Raises
    InvalidRequest where nobody knows how the model writes calls."""
    if not tools:
        return None, asked
    if parser is None:
        raise unsupported("tools", "how the model writes calls is not known; the setting tool_call_parser says it")
    schemas = {tool.name: tool.parameters or {} for tool in tools}
    named = named_of(raw.tool_choice)
    is_single = raw.parallel_tool_calls is False or named is not None
    use = ToolUse(parser, schemas, is_single)
    if named or raw.tool_choice == "required":  # there is no text that could have another form
        given = [WrittenTool(tool.name, tool.parameters) for tool in tools if named in (None, tool.name)]
        return use, _calls(WrittenCalls(parser.name, given, is_single))
    if asked is not None:
        given = [WrittenTool(tool.name, tool.parameters) for tool in tools]
        calls = _calls(WrittenCalls(parser.name, given, is_single))
        return use._replace(is_instead=True), msgspec.structs.replace(asked, instead=calls)
    written = [_written(tool, is_strict=is_strict) for tool in tools]
    if all(tool.is_free for tool in written):
        return use, None
    return use, _calls(WrittenCalls(parser.name, written, is_single, is_in_text=True))


def _written(tool: FunctionDefinition, *, is_strict: bool) -> WrittenTool:
    """One that the model may call by itself."""
    if tool.strict if tool.strict is not None else is_strict:
        return WrittenTool(tool.name, tool.parameters)
    return WrittenTool(tool.name, is_free=True)


def _calls(calls: WrittenCalls) -> Structure:
    return structure("calls", msgspec.json.encode(calls).decode(), "tools")


def calls_of(message: Any) -> list[dict[str, Any]]:
    """An assistant's calls as templates read them; their arguments are still a text."""
    return [
        {key: value for key, value in msgspec.to_builtins(call).items() if value is not None}
        for call in message.tool_calls
    ]
