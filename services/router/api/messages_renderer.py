"""What the answer to POST /v1/messages looks like: blocks, and events as each grows.

Source of the shapes: Anthropic's API reference, "Messages" and "Streaming messages". Arguments that are no JSON object
are told as Anthropic advises for them: an object with the text as `INVALID_JSON`. In a stream, too: so a call's
arguments come in one piece, with its end.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from elasticmoe.common.http.errors import detail_of
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.services.router.answer_parsers.parts import AnswerPart, CallArguments, CallStart, Reasoning, Text
from elasticmoe.services.router.api.answer_reader import AnswerForm, AnswerReader
from elasticmoe.services.router.api.front import Front
from elasticmoe.services.router.api.generate import Generation
from elasticmoe.services.router.api.messages_schemas import MessageAnswer, MessagesUsage
from elasticmoe.services.router.dispatch.streams import Output, Stream

_encode = msgspec.json.encode
Made = dict[str, Any]


class MessagesRenderer:
    """Of one request. `_blocks`: the content so far; while `_is_open` the last one's text, or arguments, are in
    `_pieces`."""

    def __init__(self, answer_id: str, front: Front, form: AnswerForm | None) -> None:
        self._id = answer_id
        self._model = front.model.name
        self._reader = AnswerReader(form or AnswerForm())
        self._blocks: list[Made] = []
        self._pieces: list[str] = []
        self._is_open = False

    # ---- the stream's events -----------------------------------------------------------------------------------------

    def is_ready(self, _generation: Generation, _index: int) -> bool:
        """Nothing has to be waited for."""
        return True

    async def opening(self, generation: Generation, _index: int) -> list[bytes]:
        """The message without content."""
        usage = MessagesUsage(generation.prompt_tokens, 0)
        message = MessageAnswer(self._id, "message", "assistant", [], self._model, None, None, usage)
        return [_event("message_start", message=message)]

    def events(self, _index: int, _stream: Stream, output: Output, finish_reason: str | None) -> bytes:
        """What has grown, and the last block's end."""
        is_last = finish_reason is not None
        events = b"".join(self._take(part) for part in self._reader.take(output.text, is_last=is_last))
        return events + self._close() if is_last else events

    def ending(self, generation: Generation) -> bytes:
        """Why it ended, and what was used."""
        reason, sequence = self._stop_of(generation)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        usage = MessagesUsage(generation.prompt_tokens, generation.completion_tokens)
        return _event("message_delta", delta=delta, usage=usage) + _event("message_stop")

    def failing(self, error: ElasticMoEError) -> bytes:
        """What went wrong, after which nothing comes."""
        detail = detail_of(error)
        return _event("error", error={"type": detail.code, "message": detail.message})

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def _take(self, part: AnswerPart) -> bytes:
        """Let the content grow by a part."""
        match part:
            case Text(text):
                return self._grow("text", {"type": "text", "text": ""}, text)
            case Reasoning(text):
                return self._grow("thinking", {"type": "thinking", "thinking": "", "signature": ""}, text)
            case CallStart(name):
                block = {"type": "tool_use", "id": self._reader.new_call_id(), "name": name, "input": ""}
                return self._close() + self._open(block, {**block, "input": {}})
            case CallArguments(text):
                self._pieces.append(text)  # told once it is known to be an object: clients end a stream that is none
                return b""

    def _grow(self, kind: str, empty: Made, text: str) -> bytes:
        events = b""
        if not (self._is_open and self._blocks[-1]["type"] == kind):
            events = self._close() + self._open(empty, dict(empty))
        self._pieces.append(text)
        return events + self._delta({"type": f"{kind}_delta", kind: text})

    def _open(self, block: Made, told: Made) -> bytes:
        self._blocks.append(block)
        self._is_open = True
        return _event("content_block_start", index=len(self._blocks) - 1, content_block=told)

    def _delta(self, delta: Made) -> bytes:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _close(self) -> bytes:
        """The last block has ended."""
        if not self._is_open:
            return b""
        self._is_open = False
        text, block, events = "".join(self._pieces), self._blocks[-1], b""
        self._pieces.clear()
        if block["type"] == "tool_use":
            block["input"] = made = _object_of(text)
            events = self._delta({"type": "input_json_delta", "partial_json": _encode(made).decode()})
        else:
            block[block["type"]] = text  # the field is called as the type
        return events + _event("content_block_stop", index=len(self._blocks) - 1)

    # ---- the whole ---------------------------------------------------------------------------------------------------

    async def gather(self, generation: Generation, _index: int, output: Output) -> None:
        """Let the blocks grow."""
        for part in await self._reader.take_all(output.text, generation.turns):
            self._take(part)

    def body(self, generation: Generation) -> list[bytes]:
        """A message object."""
        for part in self._reader.take("", is_last=True):
            self._take(part)
        self._close()
        usage = MessagesUsage(generation.prompt_tokens, generation.completion_tokens)
        reason, sequence = self._stop_of(generation)
        answer = MessageAnswer(self._id, "message", "assistant", self._blocks, self._model, reason, sequence, usage)
        return [_encode(answer)]

    def _stop_of(self, generation: Generation) -> tuple[str, str | None]:
        """Why it ended, and the stop sequence that it met."""
        stream = generation.streams[0]
        if stream.stop_text is not None:
            return "stop_sequence", stream.stop_text
        if stream.ending is not None and stream.ending.reason == "length":
            return "max_tokens", None
        return ("tool_use" if self._reader.num_calls else "end_turn"), None


def _object_of(text: str) -> msgspec.Raw | Made:
    """As the model wrote it: numbers of any size and escapes stay what they are."""
    text = text.strip() or "{}"
    try:
        made = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        made = None
    return msgspec.Raw(text.encode()) if isinstance(made, dict) else {"INVALID_JSON": text}


def _no_constant(name: str) -> None:
    """NaN and the infinities are no JSON."""
    raise ValueError(name)


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **fields}))
