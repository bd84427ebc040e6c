"""How an answer's events end, with usage or without, and what a request used."""

from __future__ import annotations

import msgspec

from elasticmoe.services.router.api.generate import Generation
from elasticmoe.services.router.api.options import UsageChunks
from elasticmoe.services.router.api.told import Usage
from elasticmoe.services.router.dispatch.streams import Stream

_encode = msgspec.json.encode


def end_of_events(usage: UsageChunks) -> bytes:
    """How every chunk with a choice ends; nothing where each has a usage of its own."""
    if usage.always:
        return b""
    return b'}],"usage":null}\n\n' if usage.at_end else b"}]}\n\n"


def end_of_event(stream: Stream) -> bytes:
    """The end of a chunk with its choice's usage so far."""
    prompt, completion = len(stream.submit.prompt), stream.num_tokens
    return b'}],"usage":%b}\n\n' % _encode(Usage(prompt, completion, prompt + completion))


def usage_of(generation: Generation) -> Usage:
    """Tokens of prompts and choices."""
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return Usage(prompt, completion, prompt + completion)
