"""The two answers that any request may get."""

from __future__ import annotations

from typing import Annotated

from elasticmoe.common.described import says
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.limits import ERROR_TEXT_CHARS_MAX


class Ack(Message, frozen=True):
    """Done, with nothing to tell."""


class Refused(Message, frozen=True):
    """Not done; nothing changed."""

    code: Annotated[str, says("Stable: docs/reference/errors.md lists all", "deadline_exceeded")]
    message: Annotated[str, says("What is wrong, with the limit and the value")]
    retryable: Annotated[bool, says("The same may succeed later")] = False

    def raise_(self) -> None:
        """Raise this refusal as an ElasticMoEError."""
        raise ElasticMoEError(self.message, code=self.code, retryable=self.retryable)


def refusal(error: ElasticMoEError) -> Refused:
    """The refusal that carries `error` to the requester."""
    return Refused(error.code, error.message[:ERROR_TEXT_CHARS_MAX], error.retryable)
