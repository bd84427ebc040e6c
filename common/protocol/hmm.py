"""What the HMM can be told: control messages on its ZeroMQ socket. (Handles travel on another socket: handles.py.)"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from common.layout import Layout
from common.model_spec import Dtype
from common.protocol.codec import Codec, Message
from common.protocol.limits import NAME_CHARS_MAX


class LoadModel(Message, frozen=True):
    """Create all page handles of `layout` and fill them from the checkpoint; answered at once by Ack or Refused, then
    watched with GetHmmStatus. Idempotent for the same `op_id`.

    `kv_bytes_max`: KV memory per device; the device's budget may allow less. `max_tokens`: most tokens of one rank in
    one step; `max_sequences`: ledger rows per rank.
    """

    op_id: Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
    model_path: Annotated[str, Meta(min_length=1, max_length=4096)]
    dtype: Dtype
    layout: Layout
    block_size: Annotated[int, Meta(ge=1, le=1024)]
    kv_bytes_max: Annotated[int, Meta(ge=1)]
    max_tokens: Annotated[int, Meta(ge=1, le=65_536)]
    max_sequences: Annotated[int, Meta(ge=1, le=65_536)]
    max_model_len: Annotated[int, Meta(ge=2, le=1_048_576)]


class GetHmmStatus(Message, frozen=True):
    """Answered by scaler.HmmStatus."""


class SetMembership(Message, frozen=True):
    """Publish on the bus which slots take part from now on. `running=False` parks the ranks. Answered by Ack."""

    slots: tuple[Annotated[int, Meta(ge=0, le=63)], ...]
    running: bool


class CheckIntegrity(Message, frozen=True):
    """Verify the catalog against the devices: free + owned = total, every expert has a home, no owner is dead.
    `checksums`: also hash every weight record. Answered by scaler.Integrity."""

    checksums: bool = False


ToHmm = LoadModel | GetHmmStatus | SetMembership | CheckIntegrity
CODEC: Codec[ToHmm] = Codec(ToHmm)
