"""The keeper channel: the HMM parks its file descriptors with a process that does nothing else.

Same framing as handles.py; a Keep and a Kept carry one descriptor per name, in the order of `names`.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from elasticmoe.common.protocol.codec import Codec, Message
from elasticmoe.common.protocol.limits import FDS_MAX, NAME_CHARS_MAX
from elasticmoe.common.protocol.replies import Ack, Refused

Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
Names = Annotated[tuple[Name, ...], Meta(min_length=1, max_length=FDS_MAX)]


class Keep(Message, frozen=True):
    """HMM -> keeper: hold these descriptors under `names`; an earlier one of a name is closed. All or none. Answered by
    Ack."""

    names: Names


class Forget(Message, frozen=True):
    """HMM -> keeper: close the descriptors of `names`. Answered by Ack, also for one that there is not."""

    names: Names


class Fetch(Message, frozen=True):
    """HMM -> keeper: hand me the descriptors of names above `after`, in their order, as many as one message can carry.
    Answered by Kept; one without names says that there are no more."""

    after: Annotated[str, Meta(max_length=NAME_CHARS_MAX)] = ""


class Kept(Message, frozen=True):
    """keeper -> HMM: the names of the descriptors that accompany this message."""

    names: tuple[str, ...]


TO_KEEPER: Codec[Keep | Forget | Fetch] = Codec(Keep | Forget | Fetch)
FROM_KEEPER: Codec[Kept | Ack | Refused] = Codec(Kept | Ack | Refused)
