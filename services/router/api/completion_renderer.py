"""What the answer to POST /v1/completions looks like."""

from __future__ import annotations

import time
from typing import NamedTuple

import msgspec

from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.services.router.api.errors import DONE, failing
from elasticmoe.services.router.api.front import Front
from elasticmoe.services.router.api.generate import Generation
from elasticmoe.services.router.api.logprobs import Columns, Teller
from elasticmoe.services.router.api.options import Options
from elasticmoe.services.router.api.told import CompletionLogprobs
from elasticmoe.services.router.api.usage import end_of_event, end_of_events, usage_of
from elasticmoe.services.router.dispatch.streams import Output, Stream

_encode = msgspec.json.encode


class Prompts(msgspec.Struct, frozen=True):
    """Each prompt's tokens, and its text where it came as one."""

    ids: list[list[int]]
    texts: list[str] | None = None


class _Echo(NamedTuple):
    """What a choice repeats of its prompt: the number of characters, the text as JSON, and the log probabilities."""

    num_chars: int
    text: bytes
    columns: Columns | None


_NO_ECHO = _Echo(0, b'""', None)


class CompletionRenderer:
    """Completions' shapes. `prompts`: where they are to be repeated. What is repeated of a prompt is rendered once,
    from the log probabilities of its first choice, and shared by all. `client`: whose turn it is where that needs a
    worker."""

    def __init__(self, answer_id: str, front: Front, options: Options, client: str, prompts: Prompts | None) -> None:
        self._client = client
        self._front = front
        self._teller = Teller(front.model.table, options.sampling.logprobs, as_ids=options.as_ids)
        self._created = int(time.time())
        self._wants_logprobs = options.sampling.logprobs >= 0
        self._num_choices = options.num_choices
        self._usage = options.usage
        self._end = end_of_events(options.usage)
        self._prompts = prompts
        self._echoes: dict[int, _Echo] = {}  # by prompt
        self._gathered: dict[int, tuple[list[str], Columns]] = {}
        self._facts = {
            "id": answer_id,
            "object": "text_completion",
            "created": self._created,
            "model": front.model.name,
        }
        self._head = b"data: " + _encode(self._facts)[:-1]

    def is_ready(self, generation: Generation, index: int) -> bool:
        """Whether what is to be repeated of the prompt is known."""
        if self._prompts is None or not self._wants_logprobs:
            return True
        return generation.streams[self._first(index)].prompt_logprobs is not None

    async def opening(self, generation: Generation, index: int) -> list[bytes]:
        """The event with the repeated prompt, where it was asked for."""
        if self._prompts is None:
            return []
        echo = await self._prepare(generation, index)
        return [
            b'%b,"choices":[{"index":%d,"text":%b,"logprobs":' % (self._head, index, echo.text),
            *([b"null"] if echo.columns is None else echo.columns.json()),
            b',"finish_reason":null%b' % (self._end or end_of_event(generation.streams[index])),
        ]

    def events(self, index: int, stream: Stream, output: Output, finish_reason: str | None) -> bytes:
        """An event with text, and the finish reason if it is the last."""
        if not output.text and not output.tokens and finish_reason is None:
            return b""
        logprobs = b"null"
        if self._wants_logprobs:
            logprobs = _encode(CompletionLogprobs(*self._teller.rows(output.tokens, self._echo_of(index).num_chars)))
        return b'%b,"choices":[{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b' % (
            self._head,
            index,
            _encode(output.text),
            logprobs,
            _encode(finish_reason),
            self._end or end_of_event(stream),
        )

    def ending(self, generation: Generation) -> bytes:
        """The event with the usage and no choices, where it was asked for."""
        if not self._usage.at_end:
            return DONE
        return b'%b,"choices":[],"usage":%b}\n\n%b' % (self._head, _encode(usage_of(generation)), DONE)

    def failing(self, error: ElasticMoEError) -> bytes:
        """What went wrong."""
        return failing(error)

    async def gather(self, generation: Generation, index: int, output: Output) -> None:
        """Keep the text, and the log probabilities as JSON."""
        if index not in self._gathered:
            echo = await self._prepare(generation, index)
            columns = Columns(self._teller, offset=echo.num_chars, prompt=echo.columns)
            self._gathered[index] = ([], columns)
        texts, columns = self._gathered[index]
        texts.append(output.text)
        if self._wants_logprobs:
            columns.add(output.tokens)

    def body(self, generation: Generation) -> list[bytes]:
        """A text_completion object."""
        pieces = [_encode(self._facts)[:-1], b',"choices":[']
        for index, stream in enumerate(generation.streams):
            assert stream.ending is not None
            texts, columns = self._gathered[index]
            pieces += (b'%b{"index":%d,"text":' % (b"," if index else b"", index), self._echo_of(index).text[:-1])
            pieces += (_encode("".join(texts))[1:], b',"logprobs":')  # one text: the prompt's end is not quoted
            pieces += columns.json() if self._wants_logprobs else [b"null"]
            pieces.append(b',"finish_reason":%b}' % _encode(stream.ending.reason))
        return [*pieces, b'],"usage":%b}' % _encode(usage_of(generation))]

    def _first(self, index: int) -> int:
        """The first choice of the same prompt."""
        return index - index % self._num_choices

    def _echo_of(self, index: int) -> _Echo:
        return self._echoes.get(index // self._num_choices, _NO_ECHO)

    async def _prepare(self, generation: Generation, index: int) -> _Echo:
        """Render what is repeated of the prompt, once."""
        number = index // self._num_choices
        if self._prompts is None or number in self._echoes:
            return self._echo_of(index)
        prompts, columns = self._prompts, None
        if self._wants_logprobs:
            stream = generation.streams[self._first(index)]
            columns = Columns(self._teller)
            await columns.add_prompt(stream.submit.prompt, stream.prompt_logprobs or (), generation.turns)
            stream.prompt_logprobs = ()  # rendered: what it was made of is much larger
        if prompts.texts is not None:
            text = prompts.texts[number]
        else:
            text = await self._front.texts.decode(prompts.ids[number], self._client, skip_special=True)
        self._echoes[number] = _Echo(len(text), _encode(text), columns)
        return self._echoes[number]
