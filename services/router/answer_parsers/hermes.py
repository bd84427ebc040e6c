"""`<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen2, Qwen3, Granite 4; an object for each call."""

from __future__ import annotations

from elasticmoe.services.router.answer_parsers.json_calls import JsonCalls
from elasticmoe.services.router.answer_parsers.tools import NoCall, Reading

_END = "</tool_call>"


class HermesParser(JsonCalls):
    """The source of the form: the chat templates of Qwen/Qwen3-30B-A3B and ibm-granite/granite-4.0-h-small."""

    name = "hermes"
    markers = ("<tool_call>",)
    specials = ("<tool_call>", _END)

    def _calls(self) -> Reading:
        yield from super()._calls()
        if self._opening:  # an array of none
            raise NoCall
        yield from self._spaces()
        if (yield from self._has("}")):  # one too many
            yield from self._spaces()
        yield from self._has(_END)  # a model that leaves it out has called all the same
