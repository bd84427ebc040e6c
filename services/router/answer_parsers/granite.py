"""`<|tool_call|>[{"name": …, "arguments": {…}}, …]`: Granite 3; the calls are an array."""

from __future__ import annotations

from elasticmoe.services.router.answer_parsers.json_calls import JsonCalls


class GraniteParser(JsonCalls):
    """The source of the form: the chat template of ibm-granite/granite-3.1-3b-a800m-instruct; granite-3.0 writes
    `<tool_call>` instead."""

    name = "granite"
    markers = ("<|tool_call|>", "<tool_call>")
    specials = markers
