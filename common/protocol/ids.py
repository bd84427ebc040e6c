"""What names a command. Nothing is read from how an id is spelled: its parts are fields."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from elasticmoe.common.protocol.limits import NAME_CHARS_MAX

# W3C's header of that name, version 00: trace, span, flags. Empty where nothing is traced.
TRACEPARENT_PATTERN = r"^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?\Z"

Count = Annotated[int, Meta(ge=0)]
CommandKind = Literal["decode_only", "precopy", "migrate", "drain", "cancel"]


class TransitionId(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One attempt to stage one leg of the operation `op`, as scaler and HMM name it."""

    op: Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
    leg: Count = 0
    attempt: Count = 0

    def __str__(self) -> str:
        """For texts."""
        return f"{self.op}/{self.leg}.{self.attempt}"


class CommandId(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One command to ranks.

    op: the operation that it is of; empty where none is
    leg, attempt: as of TransitionId; a drain lasts for all attempts of its leg and has attempt 0
    kind: of the command, one for each type in rank.RankCommand
    round: tells repeated ones apart that ask for something else each time
    """

    op: Annotated[str, Meta(max_length=NAME_CHARS_MAX)]
    leg: Count
    attempt: Count
    kind: CommandKind
    round: Count = 0


def trace_id_of(traceparent: str) -> str:
    """The trace that a `traceparent` names, 32 hexadecimal digits."""
    return traceparent[3:35]
