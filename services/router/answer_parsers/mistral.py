"""`[TOOL_CALLS]`: Mistral and Mixtral; an array of objects, or in newer ones each name with its arguments."""

from __future__ import annotations

import secrets
import string

from elasticmoe.services.router.answer_parsers.json_calls import JsonCalls
from elasticmoe.services.router.answer_parsers.tools import NoCall, Reading

NAME_CHARS_MAX = 256
_ID_CHARS = string.ascii_letters + string.digits
_ARGUMENTS, _ID = "[ARGS]", "[CALL_ID]"


class MistralParser(JsonCalls):
    """The source of the form: the chat templates of mistralai/Mixtral-8x22B-Instruct-v0.1 (`[TOOL_CALLS] [{…}]`) and
    mistralai/Mistral-Small-3.2 (`[TOOL_CALLS]name[CALL_ID]id[ARGS]{…}`, the marker anew before each call)."""

    name = "mistral"
    markers = ("[TOOL_CALLS]",)
    specials = ("[TOOL_CALLS]", _ID, _ARGUMENTS)

    @staticmethod
    def new_call_id() -> str:
        """Nine letters and digits: the templates refuse others."""
        return "".join(secrets.choice(_ID_CHARS) for _ in range(9))

    def _calls(self) -> Reading:
        yield from self._spaces()
        if self._buffer.startswith(("[", "{")):
            yield from super()._calls()
            return
        name: list[str] = []
        end = yield from self._until((_ARGUMENTS, _ID, "{"), name.append, NAME_CHARS_MAX)
        if end == _ID:
            end = yield from self._until((_ARGUMENTS,), lambda _: None, NAME_CHARS_MAX)
        if end == "{":
            self._buffer = end + self._buffer
            self._taken[-1:] = []
        self._start("".join(name).strip())
        yield from self._spaces()
        if not self._buffer.startswith("{"):
            raise NoCall
        yield from self._value(self._arguments)
