"""Messages to a prompt by the checkpoint's own chat template, in a sandbox.

The template comes with the checkpoint, never from a client. It runs in jinja2's immutable sandbox with the helpers that
templates expect of `transformers`: `raise_exception`, `strftime_now`, `tojson` without HTML escapes, loop controls.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.protocol.errors import CheckpointError, InvalidRequest

TEMPLATE_CHARS_MAX = 1 << 20
TEMPLATE_ERROR_CHARS_MAX = 300


_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class _Refused(Exception):
    """The template called raise_exception."""


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message)[:TEMPLATE_ERROR_CHARS_MAX])


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ChatTemplate:
    """A compiled template. `constants`: the special tokens by the names that templates use (`bos_token`, ...)."""

    def __init__(self, source: str, constants: Mapping[str, str]) -> None:
        """Raises CheckpointError for a template that does not compile or is longer than TEMPLATE_CHARS_MAX."""
        if len(source) > TEMPLATE_CHARS_MAX:
            raise CheckpointError(f"chat template has {len(source)} characters; the limit is {TEMPLATE_CHARS_MAX}")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"chat template does not compile: {error!s:.200}") from None
        self._constants = dict(constants)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt's text. Raises InvalidRequest for messages that the template does not take."""
        variables = {**self._constants, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(variables)
        except _Refused as error:
            raise InvalidRequest(f"the chat template refuses the messages: {error}", param="messages") from None
        except _TEMPLATE_ERRORS as error:
            kind = type(error).__name__
            raise InvalidRequest(f"the chat template cannot render the messages ({kind})", param="messages") from None
