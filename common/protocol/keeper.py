"""The keeper channel: the HMM parks its file descriptors with a process that does nothing else.

Same framing as handles.py; a Keep carries exactly one descriptor, a Kept one per name, in the order of `names`.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from common.protocol.codec import Codec, Message
from common.protocol.limits import NAME_CHARS_MAX
from common.protocol.replies import Ack, Refused

Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]


class Keep(Message, frozen=True):
    """HMM -> keeper: hold this descriptor under `name`; an earlier one of that name is closed. Answered by Ack."""

    name: Name


class Forget(Message, frozen=True):
    """HMM -> keeper: close the descriptor of `name`. Answered by Ack, also when there is none."""

    name: Name


class Fetch(Message, frozen=True):
    """HMM -> keeper: hand me the descriptors of names above `after`, in their order, as many as one message can carry.
    Answered by Kept; one without names says that there are no more."""

    after: Annotated[str, Meta(max_length=NAME_CHARS_MAX)] = ""


class Kept(Message, frozen=True):
    """keeper -> HMM: the names of the descriptors that accompany this message."""

    names: tuple[str, ...]


TO_KEEPER: Codec[Keep | Forget | Fetch] = Codec(Keep | Forget | Fetch)
TO_HMM: Codec[Kept | Ack | Refused] = Codec(Kept | Ack | Refused)
