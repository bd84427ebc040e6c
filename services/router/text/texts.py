"""What the endpoints ask of texts: what is short is done at once, everything else and every template in a worker."""

from __future__ import annotations

import array
import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.router.text import jobs
from elasticmoe.services.router.text.codec import TextCodec
from elasticmoe.services.router.text.jobs import Conversation, Job, Reply
from elasticmoe.services.router.text.process import give_memory_back

log = get_logger("router")

INLINE_CHARS_MAX = 4_096  # tokenized in 4 to 15 ms; more would hold up the event loop
LARGE_CHARS = 1_000_000
TRIM_AFTER_SECONDS = 1.0
INLINE_SECONDS_MAX = 0.1  # of CPU: a tokenizer that takes longer for so little is not to be trusted


class Workers(Protocol):
    """What does the rest."""

    async def run(self, job: Job, client: str) -> Reply:
        """See `TextWorkers.run`."""


class Texts:
    """One served model's texts. `client`: whose turn it is where requests wait, see `fair.py`."""

    def __init__(self, codec: TextCodec, workers: Workers) -> None:
        self._codec = codec
        self._workers = workers
        self._inline_chars_max = INLINE_CHARS_MAX
        self._trimming: asyncio.TimerHandle | None = None
        self._has_freed = False  # since that was set

    async def encode(self, texts: Sequence[str], context: int, client: str, *, add_special: bool) -> list[list[int]]:
        """Tokens of each text. Raises InvalidRequest for one that cannot fit into `context` tokens, untokenized."""
        job = jobs.Encode(list(texts), add_special, context)
        with self._giving_back(job):
            for text in texts:
                self._check_length(text, context)
            reply = await self._run(job, client)
        assert isinstance(reply, jobs.Encoded)
        return [array.array("I", packed).tolist() for packed in reply.packed]

    async def encode_chat(self, conversation: Conversation, context: int, client: str) -> tuple[list[int], str]:
        """A conversation's tokens, and the last characters of its text. Raises InvalidRequest."""
        job = jobs.Chat(conversation, context)
        with self._giving_back(job):
            reply = await self._run(job, client)
        assert isinstance(reply, jobs.Encoded)
        return array.array("I", reply.packed[0]).tolist(), reply.tail

    async def tokenize(self, job: jobs.Tokenize, client: str) -> bytes:
        """The body of an answer to /tokenize. Raises InvalidRequest."""
        with self._giving_back(job):
            self._check_length(job.text, job.context)
            reply = await self._run(job, client)
        assert isinstance(reply, jobs.TokenizedBody)
        return reply.body

    async def decode(self, ids: Sequence[int], client: str, *, skip_special: bool) -> str:
        """The text of tokens in [0, vocab)."""
        reply = await self._run(jobs.Decode(array.array("I", ids).tobytes(), skip_special), client)
        assert isinstance(reply, jobs.Decoded)
        return reply.text

    async def compile(self, job: jobs.Compile, client: str) -> bytes:
        """A grammar, packed for ranks. Raises InvalidRequest."""
        reply = await self._workers.run(job, client)
        assert isinstance(reply, jobs.Compiled)
        return reply.packed

    async def spell(self, job: jobs.Spell) -> bytes:
        """The model's vocabulary, encoded for ranks."""
        reply = await self._workers.run(job, "")
        assert isinstance(reply, jobs.Spelled)
        return reply.data

    async def inspect(self) -> jobs.Inspected:
        """Why the chat template cannot be used, if it cannot."""
        reply = await self._workers.run(jobs.Inspect(), "")
        assert isinstance(reply, jobs.Inspected)
        return reply

    @contextmanager
    def _giving_back(self, job: Job) -> Iterator[None]:
        """A large request leaves the allocator with many free pages: return them soon after it has gone, however long
        it waits for its turn."""
        try:
            yield
        finally:
            if jobs.num_chars(job) > LARGE_CHARS:
                self._has_freed = True
                if self._trimming is None:
                    self._give_back_later()

    def _give_back_later(self) -> None:
        self._has_freed = False
        self._trimming = asyncio.get_running_loop().call_later(TRIM_AFTER_SECONDS, self._give_back)

    def _give_back(self) -> None:
        self._trimming = None
        give_memory_back()
        if self._has_freed:  # another one has ended meanwhile, and what it held may not have been free yet
            self._give_back_later()

    def _check_length(self, text: str, context: int) -> None:
        if self._codec.bound is not None and not self._codec.bound.ignores_spaces:  # that takes long: a worker does it
            self._codec.check_length(text, context)

    async def _run(self, job: Job, client: str) -> Reply:
        if _has_template(job) or jobs.num_chars(job) > self._inline_chars_max:
            return await self._workers.run(job, client)
        began = time.thread_time()
        try:
            return self._codec.perform(job)
        finally:
            if time.thread_time() - began > INLINE_SECONDS_MAX:
                self._inline_chars_max = -1
                log.warning("the tokenizer is slow: from now on workers do all its work", chars=jobs.num_chars(job))


def _has_template(job: Job) -> bool:
    return isinstance(job, jobs.Chat) or (isinstance(job, jobs.Tokenize) and job.conversation is not None)
