"""Messages to a prompt by the checkpoint's own chat template, in a sandbox.

The template comes with the checkpoint, never from a client. It runs in jinja2's immutable sandbox with what templates
expect of transformers (`utils/chat_template_utils.py`, version 5): `raise_exception`, `strftime_now`, `tojson` without
HTML escapes, loop controls, the `generation` tag, `tools` and `documents` that are None when absent, and every special
token by its name.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from elasticmoe.common.protocol.errors import CheckpointError, InvalidRequest

TEMPLATE_CHARS_MAX: Final = 1 << 20
TEMPLATE_ERROR_CHARS_MAX: Final = 300
REASONING_FIELDS: Final = ("reasoning_content", "thinking", "reasoning")  # the first is what templates read

# What a request must not set as a variable: what the renderer sets itself, and what transformers takes as an option.
RESERVED_VARIABLES: Final = frozenset(
    (
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "sanitize_control_tokens",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    )
)

_TAG: Final = "CONTINUE_FINAL_MESSAGE_TAG "  # where the final message ends; its space shows whether spaces are kept
_ABSENT: Final[Mapping[str, Any]] = {"tools": None, "documents": None}
_PROBES: Final = ("contentprobeone", "contentprobetwo")
_LEADS: Final[tuple[tuple[TemplateMessage, ...], ...]] = ((), ({"role": "system", "content": "x"},))

TemplateMessage = Mapping[str, Any]


class _Refused(Exception):
    """The template called raise_exception."""


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message)[:TEMPLATE_ERROR_CHARS_MAX])


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}`: marks what trainers learn from. Its body is rendered as it is, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """A call block around the body, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict(...)` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """A dictionary."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """A dictionary with equal values."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace(...)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r:.40}: it begins with an underscore")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment


class ChatTemplate:
    """A compiled template. `constants`: the special tokens by the names that templates use (`bos_token`, ...)."""

    def __init__(self, source: str, constants: Mapping[str, str]) -> None:
        """Raises CheckpointError for a template that does not compile or is longer than TEMPLATE_CHARS_MAX."""
        if len(source) > TEMPLATE_CHARS_MAX:
            raise CheckpointError(f"chat template has {len(source)} characters; the limit is {TEMPLATE_CHARS_MAX}")
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self._variables = meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise CheckpointError(f"chat template does not compile: {error!s:.200}") from None
        except Exception as error:  # constants are computed at compile time: it may be anything
            raise CheckpointError(f"chat template does not compile ({type(error).__name__})") from None
        self._source = source
        self._constants = dict(constants)

    def takes(self, variable: str) -> bool:
        """Whether the template reads a variable of this name."""
        return variable in self._variables

    def render(
        self,
        messages: Sequence[TemplateMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. `continue_final_message`: the final message stays open, or the field of it that is named;
        `tools`: in OpenAI's shape; `variables`: further ones, none of RESERVED_VARIABLES.

        Raises InvalidRequest for messages that the template does not take.
        """
        chat = [
            self._with_calls(_with_reasoning(self._with_content(message)), index)
            for index, message in enumerate(messages)
        ]
        more = {**(variables or {}), "tools": tools, "documents": documents}
        if not continue_final_message:
            return self._render(chat, add_generation_prompt, more)
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        opened, text = self._open(chat, field)
        rendered = self._render(opened, add_generation_prompt, more)
        return _cut(rendered, text)

    def _render(
        self, chat: Sequence[TemplateMessage], add_generation_prompt: bool, variables: Mapping[str, Any] = _ABSENT
    ) -> str:
        known = {**self._constants, **variables, "messages": chat}
        try:
            return self._template.render(known, add_generation_prompt=add_generation_prompt)
        except _Refused as error:
            raise InvalidRequest(f"the chat template refuses the messages: {error}", param="messages") from None
        except MemoryError:
            raise
        except Exception as error:  # a template is a program of strangers: it may raise anything
            kind = type(error).__name__
            raise InvalidRequest(f"the chat template cannot render the messages ({kind})", param="messages") from None

    # ---- contents: texts or lists of parts ---------------------------------------------------------------------------

    @cached_property
    def _takes_parts(self) -> bool:
        """The template reads lists of parts, all of them. It is tried: there is no other sign that can be relied on.

        A template that prints the list as Python or JSON does not read it. Some want a system message first.
        """
        parts = [{"type": "text", "text": probe} for probe in _PROBES]
        for lead in _LEADS:
            text = self._try(parts, lead)
            if text:
                plain = self._try(_PROBES[0], lead)  # what the template itself says of types
                is_printed = any(text.count(word) > plain.count(word) for word in ("'type'", '"type"'))
                return all(probe in text for probe in _PROBES) and not is_printed
        return False

    @cached_property
    def _needs_parts(self) -> bool:
        """The template reads lists of parts only, and loses a plain text."""
        return not any(_PROBES[0] in self._try(_PROBES[0], lead) for lead in _LEADS) and self._takes_parts

    def _try(self, content: Any, lead: Sequence[TemplateMessage]) -> str:
        try:
            return self._render([*lead, {"role": "user", "content": content}], True)
        except InvalidRequest:
            return ""

    def _with_content(self, message: TemplateMessage) -> dict[str, Any]:
        """The message as the template reads it: texts joined by line ends where it takes no parts."""
        content = message.get("content")
        if isinstance(content, list) and not self._takes_parts:
            content = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and self._needs_parts:
            content = [{"type": "text", "text": content}]
        return {**message, "content": content}

    # ---- calls: arguments as an object or as its JSON ----------------------------------------------------------------

    @cached_property
    def _takes_arguments_as_text(self) -> bool:
        """The template prints the arguments of calls as they are. Most take an object and print it as JSON; those of
        DeepSeek V3 and R1 join texts. It is tried, as for parts."""
        given = {_PROBES[0]: _PROBES[1]}
        return not self._try_call(given) and bool(self._try_call(json.dumps(given)))

    @cached_property
    def _takes_no_content(self) -> bool:
        """The template takes a message with calls whose content is none, and does not print that word."""
        given = {_PROBES[0]: _PROBES[1]}
        arguments = json.dumps(given) if self._takes_arguments_as_text else given
        text = self._try_call(arguments, content=None)
        return bool(text) and text.count("None") == self._try_call(arguments).count("None")

    def _try_call(self, arguments: Any, content: str | None = "") -> str:
        """A conversation with a call; empty where its arguments do not come out, or as Python prints an object."""
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": arguments}}
        said: list[TemplateMessage] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "content": "x", "tool_call_id": "abcdefghi"},
        ]
        for lead in _LEADS:
            try:
                text = self._render([*lead, *said], True, {**_ABSENT, "tools": [tool]})
            except InvalidRequest:
                continue
            if all(probe in text for probe in _PROBES) and f"{_PROBES[0]}'" not in text:
                return text
        return ""

    def _with_calls(self, message: dict[str, Any], index: int) -> dict[str, Any]:
        """The message with its calls as the template reads them."""
        calls = message.get("tool_calls")
        if not calls:
            return message
        if not self._takes_arguments_as_text:
            where = f"messages[{index}].tool_calls"
            calls = [_with_arguments(call, f"{where}[{number}]") for number, call in enumerate(calls)]
        content = message["content"]
        if content is None and not self._takes_no_content:
            content = ""
        return {**message, "content": content, "tool_calls": calls}

    # ---- a final message that stays open -----------------------------------------------------------------------------

    def _open(self, chat: list[dict[str, Any]], field: str) -> tuple[list[dict[str, Any]], str]:
        """The conversation with a tag at the end of what is to be continued, and that text."""
        last = chat[-1]
        value = last.get(field)
        if value is None:
            raise _cannot_continue(f"the final message has no {field!r:.40} to continue")
        fields = [field] if field not in REASONING_FIELDS else [f for f in REASONING_FIELDS if last.get(f) == value]
        if not any(name in self._source for name in fields):
            raise _cannot_continue(f"the chat template does not read {field!r:.40}")
        if isinstance(value, str):
            return [*chat[:-1], {**last, **{name: value + _TAG for name in fields}}], value
        if not value:
            raise _cannot_continue("the final message has no text to continue")
        text = value[-1]["text"]
        parts = [*value[:-1], {**value[-1], "text": text + _TAG}]
        return [*chat[:-1], {**last, field: parts}], text


def _with_arguments(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        text = f"{where}: the arguments of the call of {function['name']!r:.80} are no JSON object, which the chat "
        raise InvalidRequest(f"{text}template needs", param="messages")
    return {**call, "function": {**function, "arguments": arguments}}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under each of the names that templates read, whichever of them the client used."""
    reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _cut(rendered: str, text: str) -> str:
    """What was rendered, up to the end of the open `text`."""
    at = rendered.rfind(_TAG.strip())
    if at < 0 or text.strip() not in rendered:
        raise _cannot_continue("the chat template changes the final message or leaves it out")
    kept = rendered[:at]
    return kept if rendered[at : at + len(_TAG)] == _TAG else kept.rstrip()


def _cannot_continue(why: str) -> InvalidRequest:
    return InvalidRequest(f"continue_final_message: {why}", param="continue_final_message")
