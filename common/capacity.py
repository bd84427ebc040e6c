"""What a model needs on each device and what fits: asked before a start, by the HMM when it loads, and for the figures
that scaling is planned with. So `up` says yes where the HMM does. Pure; all in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from elasticmoe.common.config import HmmConfig, ScalerConfig
from elasticmoe.common.devices.factory import backend_of, granularity_of
from elasticmoe.common.families import records
from elasticmoe.common.layout import Layout, keys_on
from elasticmoe.common.model_spec import KvGeometry, ModelSpec, RecordKey, RecordSpec, kv_geometry, round_up
from elasticmoe.common.protocol.errors import DoesNotFit, InvalidRequest
from elasticmoe.common.protocol.hmm import LoadModel
from elasticmoe.common.protocol.limits import RANKS_MAX
from elasticmoe.common.wording import size
from elasticmoe.native.bus import bus_bytes
from elasticmoe.native.ledger import ledger_bytes

LEDGER_BLOB_BYTES = 16_384  # a request's id, sampling parameters and router in one ledger row
AVAILABLE_SHARE = 0.8  # of memory for all devices; the rest is for activations, the processes and everybody else
_RANKS_MIN = 8  # slots of the bus beyond the layout's, so that a deployment can grow


class DeviceTooSmall(DoesNotFit):
    """A device's budget holds no `weights_bytes`, `ledger_bytes` and `kv_bytes_min`, the KV of one sequence of full
    length; or the load allows less KV than that."""

    def __init__(
        self, device: str, budget: int, weights_bytes: int, ledger_bytes: int, kv_bytes_min: int, load: LoadModel
    ) -> None:
        room = max(0, budget - weights_bytes - ledger_bytes)
        super().__init__(
            f"{device}: the KV of one sequence of {load.max_model_len} tokens needs {size(kv_bytes_min)}; of the "
            f"budget of {size(budget)}, weights take {size(weights_bytes)} and the ledger {size(ledger_bytes)}, which "
            f"leaves {size(room)}, and KV may take {size(load.kv_bytes_max)}: {_way_out(room < kv_bytes_min)}"
        )
        self.weights_bytes = weights_bytes
        self.ledger_bytes = ledger_bytes
        self.kv_bytes_min = kv_bytes_min


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


class LoadSizes(NamedTuple):
    """All that a load needs: the model's records, the KV's geometry, one rank's ledger, the bus, and what each device
    of the layout gets."""

    records: tuple[RecordSpec, ...]
    kv: KvGeometry
    ledger: LedgerSizes
    bus: BusSizes
    devices: dict[str, DeviceSizes]


def budget_of(config: HmmConfig, available_bytes: int, num_devices: int) -> int:
    """Of each device, a multiple of the granularity: what the operator says, else an equal share of most of the memory
    that is available now."""
    given = config.device_bytes or int(available_bytes * AVAILABLE_SHARE) // num_devices
    granularity = granularity_of(config.devices, config.granularity)
    return given // granularity * granularity


def load_of(config: ScalerConfig, spec: ModelSpec, layout: Layout) -> LoadModel:
    """What the HMM is told to load for a deployment of this configuration."""
    return LoadModel(
        op_id=f"load-epoch-{layout.epoch}",
        model_path=str(Path(config.model).absolute()),
        dtype=spec.dtype,
        layout=layout,
        block_size=config.block_size,
        kv_bytes_max=config.kv_bytes,
        max_tokens=config.max_tokens_per_step,
        max_sequences=config.max_sequences,
        max_model_len=min(config.max_model_len, spec.max_positions),
    )


def size_load(load: LoadModel, spec: ModelSpec, budgets: Mapping[str, int], granularity: int) -> LoadSizes:
    """`budgets`: of every device of the host. Raises DoesNotFit with the figures, InvalidRequest."""
    if load.max_model_len > spec.max_positions:
        limit = "sliding_window" if spec.sliding_window == spec.max_positions else "max_position_embeddings"
        raise InvalidRequest(
            f"max_model_len {load.max_model_len} exceeds the model's {limit} of {spec.max_positions} tokens"
        )
    check_layout(load.layout, spec)
    specs = tuple(records(spec))
    handle_bytes_min = max(backend_of(seat.device).kv_handle_bytes_min for seat in load.layout.seats)
    geometry = kv_geometry(spec, load.block_size, granularity, handle_bytes_min)
    ledger = size_ledger(load, granularity)
    bus = size_bus(load, spec, len(budgets), granularity)
    return LoadSizes(specs, geometry, ledger, bus, size_devices(load, specs, geometry, ledger, granularity, budgets))


def device_weights_bytes(spec: ModelSpec, num_devices: int, granularity: int) -> int:
    """Most weight bytes of one device: everything but experts, and its share of each layer's experts."""
    replicated, experts = 0, 0
    for record in records(spec):
        nbytes = round_up(record.nbytes, granularity)
        if record.key.kind == "expert":
            experts += nbytes
        else:
            replicated += nbytes
    return replicated + -(-experts // num_devices)


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
            raise DeviceTooSmall(seat.device, budget, weights, ledger.nbytes, kv_min, load)
        result[seat.device] = DeviceSizes(keys, weights, ledger.nbytes, num_kv)
    return result


def _way_out(is_budget: bool) -> str:
    """Which settings help, with the flags of `elasticmoe up` that set them."""
    if is_budget:
        return "raise device_bytes (--device-memory), take fewer devices, or lower max_model_len (--max-model-len)"
    return "raise kv_bytes (--kv-memory), or lower max_model_len (--max-model-len)"


def check_layout(layout: Layout, spec: ModelSpec) -> None:
    """Raise InvalidRequest unless the layout gives exactly the model's experts a home."""
    counts = tuple(len(experts) for experts in layout.homes)
    if counts != spec.num_experts_by_layer:
        raise InvalidRequest(
            f"the layout has experts {list(counts)[:8]} in its first layers of {len(counts)}, the model has "
            f"{list(spec.num_experts_by_layer)[:8]} of {spec.num_layers}"
        )
