"""What the answer to POST /v1/responses looks like: items, and events as each grows.

Source of the shapes: OpenAI's API reference, "Responses" and "Streaming events". One choice; nothing is kept.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec

from elasticmoe.common.http.errors import detail_of
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.services.router.answer_parsers.parts import AnswerPart, CallArguments, CallStart, Reasoning, Text
from elasticmoe.services.router.api.answer_reader import AnswerForm, AnswerReader
from elasticmoe.services.router.api.chat import StartedChat
from elasticmoe.services.router.api.front import Front
from elasticmoe.services.router.api.generate import Generation
from elasticmoe.services.router.api.responses_schemas import FunctionTool, ResponsesRequest
from elasticmoe.services.router.dispatch.streams import Output, Stream

_encode = msgspec.json.encode
Item = dict[str, Any]

_BEGINNINGS: dict[str, Item] = {"message": {"role": "assistant"}, "reasoning": {"summary": []}}
_PARTS: dict[str, Item] = {"message": {"annotations": [], "logprobs": []}, "reasoning": {}}


class ResponsesRenderer:
    """Of one request. `_items`: the output so far; while `_is_open` the last one's text, or arguments, are in
    `_pieces`."""

    def __init__(self, answer_id: str, front: Front, raw: ResponsesRequest, chat: StartedChat) -> None:
        self._raw = raw
        self._options = chat.options
        self._is_strict = chat.is_strict
        self._reader = AnswerReader(chat.form or AnswerForm())
        self._facts = {"id": answer_id, "object": "response", "created_at": int(time.time()), "model": front.model.name}
        self._number = 0  # of the next event
        self._items: list[Item] = []
        self._pieces: list[str] = []
        self._is_open = False

    # ---- the stream's events -----------------------------------------------------------------------------------------

    def is_ready(self, _generation: Generation, _index: int) -> bool:
        """Nothing has to be waited for."""
        return True

    async def opening(self, generation: Generation, _index: int) -> list[bytes]:
        """The response before it has any output."""
        response = self._response(generation, "in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def events(self, _index: int, _stream: Stream, output: Output, finish_reason: str | None) -> bytes:
        """What has grown, and the last item's end."""
        events = b"".join(
            self._take(part) for part in self._reader.take(output.text, is_last=finish_reason is not None)
        )
        return events + self._close(is_cut=finish_reason == "length") if finish_reason is not None else events

    def ending(self, generation: Generation) -> bytes:
        """The whole response."""
        status = self._status(generation)
        return self._event(f"response.{status}", response=self._response(generation, status))

    def failing(self, error: ElasticMoEError) -> bytes:
        """What went wrong, after which nothing comes."""
        detail = detail_of(error)
        return self._event("error", code=detail.code, message=detail.message, param=detail.param)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        body = _encode({"type": kind, "sequence_number": self._number - 1, **fields})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)

    # ---- items -------------------------------------------------------------------------------------------------------

    def _take(self, part: AnswerPart) -> bytes:
        """Let the output grow by a part."""
        match part:
            case Text(text):
                return self._grow("message", "output_text", text, logprobs=[])
            case Reasoning(text):
                return self._grow("reasoning", "reasoning_text", text)
            case CallStart(name):
                call_id = self._reader.new_call_id()
                return self._close() + self._open("function_call", {"call_id": call_id, "name": name, "arguments": ""})
            case CallArguments(text):
                self._pieces.append(text)
                return self._of_item("response.function_call_arguments.delta", delta=text)

    def _grow(self, kind: str, part_kind: str, text: str, **told: Any) -> bytes:
        """Let the one part of an item of that kind grow, which begins where the last item is another. `told`: beside
        the text, in each event."""
        events = b""
        if not (self._is_open and self._items[-1]["type"] == kind):
            events = self._close() + self._open(kind, {**_BEGINNINGS[kind], "content": []})
            part = {"type": part_kind, "text": "", **_PARTS[kind]}
            self._items[-1]["content"].append(part)
            events += self._of_part("response.content_part.added", part=part)
        self._pieces.append(text)
        return events + self._of_part(f"response.{part_kind}.delta", delta=text, **told)

    def _open(self, kind: str, fields: Item) -> bytes:
        prefix = {"message": "msg", "function_call": "fc", "reasoning": "rs"}[kind]
        item = {"id": f"{prefix}_{secrets.token_hex(12)}", "type": kind, "status": "in_progress", **fields}
        self._items.append(item)
        self._is_open = True
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close(self, *, is_cut: bool = False) -> bytes:
        """The last item has ended; `is_cut`: because the answer may be no longer."""
        if not self._is_open:
            return b""
        self._is_open = False
        text, item = "".join(self._pieces), self._items[-1]
        self._pieces.clear()
        item["status"] = "incomplete" if is_cut else "completed"
        if item["type"] == "function_call":
            item["arguments"] = text
            events = self._of_item("response.function_call_arguments.done", name=item["name"], arguments=text)
        else:
            part = item["content"][0]
            part["text"] = text
            told: Item = {"logprobs": []} if item["type"] == "message" else {}
            events = self._of_part(f"response.{part['type']}.done", text=text, **told)
            events += self._of_part("response.content_part.done", part=part)
        return events + self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _of_part(self, kind: str, **fields: Any) -> bytes:
        return self._of_item(kind, content_index=0, **fields)

    # ---- the whole ---------------------------------------------------------------------------------------------------

    async def gather(self, generation: Generation, _index: int, output: Output) -> None:
        """Let the items grow."""
        for part in await self._reader.take_all(output.text, generation.turns):
            self._take(part)

    def body(self, generation: Generation) -> list[bytes]:
        """A response object."""
        for part in self._reader.take("", is_last=True):
            self._take(part)
        status = self._status(generation)
        self._close(is_cut=status == "incomplete")
        return [_encode(self._response(generation, status))]

    def _status(self, generation: Generation) -> str:
        ending = generation.streams[0].ending
        return "incomplete" if ending is not None and ending.reason == "length" else "completed"

    def _response(self, generation: Generation, status: str) -> dict[str, Any]:
        raw, sampling = self._raw, self._options.sampling
        is_over = status != "in_progress"
        num_in, num_out = generation.prompt_tokens, generation.completion_tokens
        usage = {
            "input_tokens": num_in,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": num_out,
            "output_tokens_details": {"reasoning_tokens": self._reader.num_thought(generation.streams[0])},
            "total_tokens": num_in + num_out,
        }
        return {
            **self._facts,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": raw.instructions,
            "max_output_tokens": raw.max_output_tokens,
            "metadata": raw.metadata or {},
            "output": self._items if is_over else [],
            "parallel_tool_calls": raw.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": raw.reasoning.effort if raw.reasoning else None, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": _format(raw), "verbosity": "medium"},
            "tool_choice": "auto" if raw.tool_choice is None else raw.tool_choice,
            "tools": [self._told(tool) for tool in raw.tools or ()],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": usage if is_over else None,
            "user": raw.user,
        }

    def _told(self, tool: FunctionTool) -> FunctionTool:
        """As it was sent, and whether its calls satisfy its schema."""
        return msgspec.structs.replace(tool, strict=self._is_strict) if tool.strict is None else tool


def _format(raw: ResponsesRequest) -> dict[str, Any]:
    """What the text was asked to be."""
    given = raw.text.format if raw.text else None
    if given is None or given.type == "text":
        return {"type": "text"}
    if given.type == "json_object":
        return {"type": "json_object"}
    facts = {"name": given.name, "description": given.description, "schema": given.schema or {}, "strict": True}
    return {"type": given.type, **facts}
