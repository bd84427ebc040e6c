"""What the answer to POST /v1/chat/completions looks like."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.services.router.answer_parsers.parts import AnswerPart, CallArguments, CallStart, Reasoning, Text
from elasticmoe.services.router.api.answer_reader import AnswerForm, AnswerReader
from elasticmoe.services.router.api.errors import DONE, failing
from elasticmoe.services.router.api.front import Front
from elasticmoe.services.router.api.generate import Generation
from elasticmoe.services.router.api.logprobs import Entries, Teller
from elasticmoe.services.router.api.options import Options
from elasticmoe.services.router.api.told import (
    AnswerMessage,
    CallDelta,
    ChatDelta,
    ChatLogprobs,
    ToldCall,
    ToldFunction,
    Usage,
)
from elasticmoe.services.router.api.usage import end_of_event, end_of_events, usage_of
from elasticmoe.services.router.dispatch.streams import Output, Stream

_encode = msgspec.json.encode


class ChatRenderer:
    """Chat's shapes. The parts of an event that do not change are made once."""

    def __init__(self, answer_id: str, front: Front, options: Options, form: AnswerForm | None = None) -> None:
        self._id = answer_id
        self._model = front.model.name
        self._teller = Teller(front.model.table, options.sampling.logprobs, as_ids=options.as_ids)
        self._created = int(time.time())
        self._wants_logprobs = options.sampling.logprobs >= 0
        self._usage = options.usage
        self._end = end_of_events(options.usage)
        self._form = form
        self._readers: dict[int, AnswerReader] = {}  # by choice
        self._gathered: dict[int, tuple[_Message, Entries]] = {}
        facts = {"id": answer_id, "object": "chat.completion.chunk", "created": self._created, "model": self._model}
        self._head = b"data: " + _encode(facts)[:-1]

    def _event(self, index: int, stream: Stream, delta: bytes, logprobs: bytes, finish: bytes) -> bytes:
        return b'%b,"choices":[{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b%b' % (
            self._head,
            index,
            delta,
            logprobs,
            finish,
            self._end or end_of_event(stream, self._num_thought([stream], index)),
        )

    def is_ready(self, _generation: Generation, _index: int) -> bool:
        """Nothing has to be waited for."""
        return True

    async def opening(self, generation: Generation, index: int) -> list[bytes]:
        """The event with the role."""
        role = b'{"role":"assistant","content":""}'
        return [self._event(index, generation.streams[index], role, b"null", b"null")]

    def events(self, index: int, stream: Stream, output: Output, finish_reason: str | None) -> bytes:
        """Events with text and calls, one with the finish reason."""
        deltas = [_encode(delta) for delta in self._deltas(index, output.text, is_last=finish_reason is not None)]
        if output.tokens and not deltas:
            deltas = [b'{"content":""}']
        logprobs = b"null"
        if self._wants_logprobs and deltas:
            logprobs = _encode(ChatLogprobs(self._teller.entries(output.tokens)))
        events = b""
        for delta in deltas:
            events += self._event(index, stream, delta, logprobs, b"null")
            logprobs = b"null"  # they are those of all these tokens, and told once
        if finish_reason is not None:
            events += self._event(index, stream, b"{}", b"null", _encode(self._reason(index, finish_reason)))
        return events

    def _deltas(self, index: int, text: str, *, is_last: bool) -> list[ChatDelta]:
        if self._form is None:
            return [ChatDelta(content=text)] if text else []
        reader = self._reader_of(index, self._form)
        deltas = []
        number = reader.num_calls - 1
        for part in reader.take(text, is_last=is_last):
            match part:
                case Text(said):
                    deltas.append(ChatDelta(content=said))
                case Reasoning(thought):
                    deltas.append(ChatDelta(reasoning_content=thought))
                case CallStart(name):
                    number += 1
                    call = CallDelta(number, ToldFunction("", name), reader.new_call_id(), "function")
                    deltas.append(ChatDelta(tool_calls=[call]))
                case CallArguments(said):
                    deltas.append(ChatDelta(tool_calls=[CallDelta(number, ToldFunction(said))]))
        return deltas

    def _reader_of(self, index: int, form: AnswerForm) -> AnswerReader:
        if index not in self._readers:
            self._readers[index] = AnswerReader(form)
        return self._readers[index]

    def _reason(self, index: int, reason: str) -> str:
        return reason if self._form is None else self._reader_of(index, self._form).finish_reason(reason)

    def _used(self, generation: Generation) -> Usage:
        return usage_of(generation, self._num_thought(generation.streams))

    def _num_thought(self, streams: Sequence[Stream], first: int = 0) -> int | None:
        """Tokens of the choices from `first` on that were thinking; None where the model does not think."""
        form = self._form
        if form is None or form.marks is None:
            return None
        return sum(self._reader_of(index, form).num_thought(stream) for index, stream in enumerate(streams, first))

    def ending(self, generation: Generation) -> bytes:
        """The event with the usage and no choices, where it was asked for."""
        if not self._usage.at_end:
            return DONE
        return b'%b,"choices":[],"usage":%b}\n\n%b' % (self._head, _encode(self._used(generation)), DONE)

    def failing(self, error: ElasticMoEError) -> bytes:
        """What went wrong."""
        return failing(error)

    async def gather(self, generation: Generation, index: int, output: Output) -> None:
        """Keep the parts of the text, and the log probabilities as JSON."""
        message, entries = self._gathered.setdefault(index, (_Message(), Entries(self._teller)))
        entries.add(output.tokens)
        if self._form is None:
            message.texts.append(output.text)
        else:
            message.take(await self._reader_of(index, self._form).take_all(output.text, generation.turns))

    def body(self, generation: Generation) -> list[bytes]:
        """A chat.completion object."""
        facts = {"id": self._id, "object": "chat.completion", "created": self._created, "model": self._model}
        pieces = [_encode(facts)[:-1], b',"choices":[']
        for index, stream in enumerate(generation.streams):
            assert stream.ending is not None
            made, entries = self._gathered[index]
            message = _encode(self._message(index, made))
            pieces.append(b'%b{"index":%d,"message":%b,"logprobs":' % (b"," if index else b"", index, message))
            pieces += entries.json() if self._wants_logprobs else [b"null"]
            pieces.append(b',"finish_reason":%b}' % _encode(self._reason(index, stream.ending.reason)))
        return [*pieces, b'],"usage":%b}' % _encode(self._used(generation))]

    def _message(self, index: int, made: _Message) -> AnswerMessage:
        if self._form is None:
            return AnswerMessage("assistant", "".join(made.texts))
        reader = self._reader_of(index, self._form)
        made.take(reader.take("", is_last=True))
        said, thought = "".join(made.texts), "".join(made.thoughts)
        told = [ToldCall(reader.new_call_id(), "function", ToldFunction("".join(a), name)) for name, a in made.calls]
        return AnswerMessage("assistant", said if said or not told else None, told or UNSET, thought or UNSET)


class _Message:
    """What was gathered of one choice. `calls`: names, and the pieces of their arguments."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[tuple[str, list[str]]] = []

    def take(self, parts: Sequence[AnswerPart]) -> None:
        """Let it grow."""
        for part in parts:
            match part:
                case Text(text):
                    self.texts.append(text)
                case Reasoning(text):
                    self.thoughts.append(text)
                case CallStart(name):
                    self.calls.append((name, []))
                case CallArguments(text):
                    self.calls[-1][1].append(text)
