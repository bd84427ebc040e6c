"""How an answer's events end, with usage or without, and what a request used."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from elasticmoe.services.router.api.generate import Generation
from elasticmoe.services.router.api.options import UsageChunks
from elasticmoe.services.router.api.told import CompletionDetails, Usage
from elasticmoe.services.router.dispatch.streams import Stream

_encode = msgspec.json.encode


def end_of_events(usage: UsageChunks) -> bytes:
    """How every chunk with a choice ends; nothing where each has a usage of its own."""
    if usage.always:
        return b""
    return b'}],"usage":null}\n\n' if usage.at_end else b"}]}\n\n"


def end_of_event(stream: Stream, num_thought: int | None = None) -> bytes:
    """The end of a chunk with its choice's usage so far; `num_thought` as for `usage_of`."""
    return b'}],"usage":%b}\n\n' % _encode(_usage(len(stream.submit.prompt), stream.num_tokens, num_thought))


def usage_of(generation: Generation, num_thought: int | None = None) -> Usage:
    """Tokens of prompts and choices. `num_thought`: those that were thinking, None where nobody tells it apart."""
    return _usage(generation.prompt_tokens, generation.completion_tokens, num_thought)


def _usage(prompt: int, completion: int, num_thought: int | None) -> Usage:
    details: CompletionDetails | UnsetType = UNSET if num_thought is None else CompletionDetails(num_thought)
    return Usage(prompt, completion, prompt + completion, details)
