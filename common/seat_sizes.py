"""Sizes of what ranks have beside weights and KV: the bus, and each seat's ledger and mailbox. Pure; all in bytes."""

from __future__ import annotations

from typing import NamedTuple

from elasticmoe.common.model_spec import ModelSpec, round_up
from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.common.protocol.hmm import LoadModel
from elasticmoe.common.protocol.limits import RANKS_MAX
from elasticmoe.native.bus import bus_bytes
from elasticmoe.native.ledger import ledger_bytes

LEDGER_BLOB_BYTES = 16_384  # a request's id, sampling parameters and router in one ledger row
MOVES_MAX = 8  # KV blocks that a leader moves in one step
_RANKS_MIN = 8  # slots of the bus beyond the layout's, so that a deployment can grow


class BusSizes(NamedTuple):
    """Parameters of the bus, and its size in bytes, a multiple of the granularity."""

    max_ranks: int
    max_tokens: int
    hidden: int
    top_k: int
    half_elements: int
    plan_bytes: int
    nbytes: int


class LedgerSizes(NamedTuple):
    """Parameters of a ledger, and its size in bytes, a multiple of the granularity."""

    num_rows: int
    max_tokens: int
    max_blocks: int
    nbytes: int


def size_bus(load: LoadModel, spec: ModelSpec, num_devices: int, granularity: int) -> BusSizes:
    """A bus for every device that the deployment may grow to. Raises InvalidRequest."""
    ranks = min(RANKS_MAX, max(_RANKS_MIN, num_devices, *(slot + 1 for slot in load.layout.slots)))
    half, plan = half_elements_of(spec, load.max_tokens), plan_bytes_of(load)
    try:
        nbytes = bus_bytes(ranks, load.max_tokens, spec.hidden, spec.moe.top_k, half, plan)
    except ValueError as error:
        raise InvalidRequest(f"no bus of {ranks} ranks with {load.max_tokens} tokens each: {error}") from None
    return BusSizes(ranks, load.max_tokens, spec.hidden, spec.moe.top_k, half, plan, round_up(nbytes, granularity))


def half_elements_of(spec: ModelSpec, max_tokens: int) -> int:
    """float32 elements that a rank may bring to one collective of its replica: twice a step's rows, those that it has
    and those that are added up, or what it reads of the KV of a step's tokens, or its part of one row of logits. 0
    where replicas are single ranks."""
    width = max(2 * spec.hidden, spec.attention.kv.elements)
    return 0 if spec.tp == 1 else max(max_tokens * width, -(-spec.vocab // spec.tp))


def plan_bytes_of(load: LoadModel) -> int:
    """The longest plan that a leader may write for its replica (worker/model/batch.py): a part for each of its
    sequences, with as many blocks as a sequence may have, and MOVES_MAX moves of blocks. 0 where replicas are single
    ranks."""
    parts = min(load.max_sequences, load.max_tokens)
    blocks = parts * -(-load.max_model_len // load.block_size)
    num_counts, num_ends = 5, 2
    numbers = num_counts + num_ends + 2 * load.max_tokens + 3 * parts + blocks + 2 * MOVES_MAX
    return 0 if load.layout.tp == 1 else 4 * numbers  # int32


def size_ledger(load: LoadModel, granularity: int) -> LedgerSizes:
    """One rank's ledger. Raises InvalidRequest."""
    blocks = -(-load.max_model_len // load.block_size)
    try:
        nbytes = ledger_bytes(load.max_sequences, load.max_model_len, blocks, LEDGER_BLOB_BYTES)
    except ValueError as error:
        raise InvalidRequest(
            f"no ledger of {load.max_sequences} rows with {load.max_model_len} tokens and {blocks} blocks each: {error}"
        ) from None
    return LedgerSizes(load.max_sequences, load.max_model_len, blocks, round_up(nbytes, granularity))


def size_mailbox(load: LoadModel, spec: ModelSpec, granularity: int) -> int:
    """Bytes of one seat's mailbox, a multiple of the granularity: float32 rows of its own tokens, and one for each of
    their choices. 0 where ranks exchange tokens in another way."""
    if load.exchange != "mailbox":
        return 0
    return round_up(load.max_tokens * (1 + spec.moe.top_k) * spec.hidden * 4, granularity)
