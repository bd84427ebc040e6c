"""What a load needs on each device, settled before any memory is touched. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from common.layout import Layout
from common.model_spec import KvGeometry, ModelSpec, RecordKey, RecordSpec, round_up
from common.protocol.errors import DoesNotFit, InvalidRequest
from common.protocol.hmm import LoadModel
from common.protocol.limits import RANKS_MAX
from native.bus import bus_bytes
from native.ledger import ledger_bytes
from services.hmm.catalog import keys_on

LEDGER_BLOB_BYTES = 16_384  # a request's id, sampling parameters and router in one ledger row
_RANKS_MIN = 8  # slots of the bus beyond the layout's, so that a deployment can grow


class DeviceSizes(NamedTuple):
    """What one device gets: its records, the size of its ledger's handle, the number of its KV handles."""

    keys: tuple[RecordKey, ...]
    weights_bytes: int
    ledger_bytes: int
    num_kv_handles: int


class BusSizes(NamedTuple):
    """Parameters of the bus, and its size in bytes, a multiple of the granularity."""

    max_ranks: int
    max_tokens: int
    hidden: int
    top_k: int
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
    try:
        nbytes = bus_bytes(ranks, load.max_tokens, spec.hidden, spec.moe.top_k)
    except ValueError as error:
        raise InvalidRequest(f"no bus of {ranks} ranks with {load.max_tokens} tokens each: {error}") from None
    return BusSizes(ranks, load.max_tokens, spec.hidden, spec.moe.top_k, round_up(nbytes, granularity))


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


def kv_handles_min(load: LoadModel, geometry: KvGeometry) -> int:
    """KV handles that one sequence of full length needs."""
    return -(-load.max_model_len // (load.block_size * geometry.blocks_per_handle))


def size_devices(
    load: LoadModel,
    records: Sequence[RecordSpec],
    geometry: KvGeometry,
    ledger: LedgerSizes,
    granularity: int,
    budgets: Mapping[str, int],
) -> dict[str, DeviceSizes]:
    """Sizes by device of the layout. KV takes what `load.kv_bytes_max` and the budget allow.

    Raises DoesNotFit with the figures when a device cannot hold its weights and one sequence of full length;
    InvalidRequest when the layout is not for this model.
    """
    sizes = {record.key: round_up(record.nbytes, granularity) for record in records}
    handles_min = kv_handles_min(load, geometry)
    kv_min = handles_min * geometry.handle_bytes
    result = {}
    for seat in load.layout.seats:
        keys = tuple(keys_on(load.layout, seat.slot))
        foreign = next((key for key in keys if key not in sizes), None)
        if foreign is not None:
            raise InvalidRequest(f"the layout places {foreign}, which the model does not have")
        weights = sum(sizes[key] for key in keys)
        budget = budgets[seat.device]
        room = budget - weights - ledger.nbytes
        num_kv = max(0, min(load.kv_bytes_max, room)) // geometry.handle_bytes
        if num_kv < handles_min:
            raise DoesNotFit(
                f"{seat.device}: of the budget of {budget} bytes, weights take {weights}, the ledger {ledger.nbytes}; "
                f"{max(0, room)} are left and kv_bytes_max is {load.kv_bytes_max}, but the KV of one sequence of "
                f"{load.max_model_len} tokens needs {kv_min}"
            )
        result[seat.device] = DeviceSizes(keys, weights, ledger.nbytes, num_kv)
    return result


def check_layout(layout: Layout, spec: ModelSpec) -> None:
    """Raise InvalidRequest unless the layout gives exactly the model's experts a home."""
    counts = tuple(len(experts) for experts in layout.homes)
    if counts != spec.num_experts_by_layer:
        raise InvalidRequest(
            f"the layout has experts {list(counts)[:8]} in its first layers of {len(counts)}, the model has "
            f"{list(spec.num_experts_by_layer)[:8]} of {spec.num_layers}"
        )
