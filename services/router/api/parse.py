"""Bytes of a body to a request struct, or an error that names the field, the bound and the value.

A body is decoded once, in one go, so what it may consist of is bounded before. What is wrong is told by
`common/http/decode.py`.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
from fastapi import Request

from elasticmoe.common.http.decode import decode
from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.common.protocol.limits import PROMPT_TOKENS_MAX
from elasticmoe.services.router.api.front import Front
from elasticmoe.services.router.api.gate import front_of
from elasticmoe.services.router.api.parts import PIECE_BYTES, BodyParts
from elasticmoe.services.router.api.schemas import BATCH_MAX
from elasticmoe.services.router.api.whole import to_integers

T = TypeVar("T")

LARGE_BYTES = 64 * 1024  # below, whatever it consists of takes a few milliseconds


async def body_of(request: Request, decoder: msgspec.json.Decoder[T]) -> T:
    """The request's body. Large ones are looked at in pieces, so that others get their turns. Raises InvalidRequest."""
    raw = await request.body()
    if len(raw) > LARGE_BYTES:
        front = front_of(request)
        parts = BodyParts(_tokens_max(front))
        for start in range(0, len(raw), PIECE_BYTES):
            await front.turns.wait()
            parts.count(raw[start : start + PIECE_BYTES])
        await front.turns.wait()
    return parse(decoder, raw)


def _tokens_max(front: Front) -> int:
    """Of all prompts of a request together."""
    try:
        return min(BATCH_MAX * front.dispatcher.max_model_len(), PROMPT_TOKENS_MAX)
    except Unavailable:
        return PROMPT_TOKENS_MAX


def parse(decoder: msgspec.json.Decoder[T], raw: bytes) -> T:
    """Decode a body strictly, whose parts have been counted. Raises InvalidRequest for anything else than a valid
    request of that kind."""
    return to_integers(decode(decoder, raw))
