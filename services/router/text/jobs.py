"""What is asked of texts, and what comes back. On the way to a worker: MessagePack.

Token ids travel packed, four bytes each, in the machine's order: both ends are on one machine.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import msgspec

from elasticmoe.services.router.grammar.structure import Structure, Thought

TAIL_CHARS: Final = 32


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """What a chat template is given. `required`: variables that the template must read, because the request would
    otherwise be answered as if it had not said them; `add_special`: the tokenizer's own special tokens around it."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool | str = False
    documents: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = {}
    required: tuple[str, ...] = ()
    add_special: bool = False

    @property
    def given(self) -> tuple[Any, ...]:
        """What clients wrote, of whatever size."""
        return self.messages, self.documents or [], self.tools or [], self.variables

    @property
    def num_chars(self) -> int:
        """About what rendering and tokenizing it costs, in characters: a message costs what some text does."""
        return sum(_num_chars(given) for given in self.given)


def _num_chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return 100 + sum(_num_chars(entry) for entry in value.values())
    return sum(_num_chars(entry) for entry in value) if isinstance(value, list) else 1


class Encode(msgspec.Struct, frozen=True, tag=True):
    """Texts to tokens. One that cannot fit into `context` tokens is refused untokenized. Answered by Encoded."""

    texts: list[str]
    add_special: bool
    context: int


class Chat(msgspec.Struct, frozen=True, tag=True):
    """A conversation to tokens, `context` as for Encode. Answered by Encoded."""

    conversation: Conversation
    context: int


class Tokenize(msgspec.Struct, frozen=True, tag=True):
    """A text or a conversation to the answer of /tokenize. `context`: tokens of the model's context; a text that could
    not fit is refused, one that only does not fit is counted."""

    text: str
    conversation: Conversation | None
    add_special: bool
    with_strings: bool
    context: int


class Decode(msgspec.Struct, frozen=True, tag=True):
    """Packed tokens to text. Answered by Decoded."""

    packed: bytes
    skip_special: bool


class Compile(msgspec.Struct, frozen=True, tag=True):
    """What an answer has to look like to a grammar that has been tried, for a model of `size` tokens. Answered by
    Compiled."""

    structure: Structure
    thought: Thought | None
    size: int


class Spell(msgspec.Struct, frozen=True, tag=True):
    """The bytes of all tokens of a model that has `size`, and ends its answers by `eos`. Answered by Spelled."""

    size: int
    eos: tuple[int, ...]


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Look at the chat template. Answered by Inspected."""


class Encoded(msgspec.Struct, frozen=True, tag=True):
    """Packed tokens of each text. `tail`: a conversation's last TAIL_CHARS, which show in what the answer begins."""

    packed: list[bytes]
    tail: str = ""


class TokenizedBody(msgspec.Struct, frozen=True, tag=True):
    """JSON of /tokenize."""

    body: bytes


class Decoded(msgspec.Struct, frozen=True, tag=True):
    """A text."""

    text: str


class Compiled(msgspec.Struct, frozen=True, tag=True):
    """A grammar, packed for ranks."""

    packed: bytes


class Spelled(msgspec.Struct, frozen=True, tag=True):
    """A vocabulary, encoded for ranks."""

    data: bytes


class Inspected(msgspec.Struct, frozen=True, tag=True):
    """Why no chat template can be used, and the error's code; empty where one can."""

    text: str = ""
    code: str = ""


class JobRefused(msgspec.Struct, frozen=True, tag=True):
    """An InvalidRequest that crosses a process boundary."""

    text: str
    code: str
    param: str | None


Job = Encode | Chat | Tokenize | Decode | Compile | Spell | Inspect
Reply = Encoded | TokenizedBody | Decoded | Compiled | Spelled | Inspected
JOBS: msgspec.msgpack.Decoder[Job] = msgspec.msgpack.Decoder(Job)
REPLIES: msgspec.msgpack.Decoder[Reply | JobRefused] = msgspec.msgpack.Decoder(Reply | JobRefused)


def context_of(job: Job) -> int:
    """Tokens that the job may make, and so what it may need."""
    return job.context if isinstance(job, Encode | Chat | Tokenize) else 0


def num_chars(job: Job) -> int:
    """About what a job costs, in characters of text to tokenize."""
    match job:
        case Encode():
            return sum(map(len, job.texts))
        case Chat():
            return job.conversation.num_chars
        case Tokenize():
            return len(job.text) if job.conversation is None else job.conversation.num_chars
        case Decode():
            return len(job.packed) // 4
        case Compile():
            return len(job.structure.text)
        case Spell() | Inspect():
            return 0


def num_bytes(job: Job) -> int:
    """About what a request holds in memory for a job: its texts, what they came in, and what they travel in."""
    match job:
        case Encode():
            return sum(map(_text_bytes, job.texts))
        case Chat():
            return _value_bytes(job.conversation)
        case Tokenize():
            return _text_bytes(job.text) if job.conversation is None else _value_bytes(job.conversation)
        case Decode():
            return 16 * len(job.packed)
        case Compile():
            return _text_bytes(job.structure.text)
        case Spell() | Inspect():
            return 0


def _value_bytes(value: Any) -> int:
    if isinstance(value, str):
        return _text_bytes(value)
    if isinstance(value, Conversation):
        return sum(map(_value_bytes, value.given))
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 64 + sum(map(_value_bytes, entries))


def _text_bytes(text: str) -> int:
    return sys.getsizeof(text) + 2 * len(text)
