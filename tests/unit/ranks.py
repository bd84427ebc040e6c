"""Ranks without processes: models over plain memory, joined by a real bus, each in a thread while a step runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from elasticmoe.common.checkpoint import Checkpoint
from elasticmoe.common.devices.factory import backend_of
from elasticmoe.common.families import load_spec, record, records
from elasticmoe.common.layout import ExchangeKind, initial_layout
from elasticmoe.common.model_spec import DTYPE_BYTES, ModelSpec, RecordKey, RecordSpec, kv_geometry, round_up
from elasticmoe.common.seat_sizes import half_elements_of
from elasticmoe.common.sharding import shard_of
from elasticmoe.services.hmm.loading.reader import Reader
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.backends.host import HostBackend
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.model.batch import Batch, BatchPart
from elasticmoe.services.worker.model.registry import Model, build_model
from elasticmoe.services.worker.model.weights import KvCache, RankWeights
from tests.device_memory import DeviceMemory
from tests.unit.exchanges import Host

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEADLINE_MS = 20_000.0
GRANULARITY = 4096
NUM_BLOCKS = 64
BLOCK_SIZE = 4
PLAN_BYTES = 1 << 16


def read_record(checkpoint: Checkpoint, described: RecordSpec) -> dict[str, torch.Tensor]:
    """A record's tensors, read as the HMM reads them, into memory of their own."""
    read = DeviceMemory(described.nbytes)
    reader = Reader(checkpoint, lambda _: None)
    reader.add(described, read.device, read.address)
    reader.read()
    memory = torch.frombuffer(bytearray(read.device.read_bytes(read.address, described.nbytes)), dtype=torch.uint8)
    return {
        tensor.name: memory[tensor.offset : tensor.offset + tensor.nbytes].view(DTYPES[tensor.dtype]).view(tensor.shape)
        for tensor in described.tensors
    }


def load_experts(checkpoint: Checkpoint, spec: ModelSpec, layer: int, held: set[int]) -> dict[str, torch.Tensor]:
    """Strided tensors over slots for all experts; the slots of those not held are full of NaN."""
    described = record(spec, RecordKey("expert", layer, 0))
    stride = round_up(described.nbytes, GRANULARITY)
    count = spec.num_experts_by_layer[layer]
    memory = torch.full((count * stride,), 0xFF, dtype=torch.uint8)
    slots = {}
    for tensor in described.tensors:
        typed = memory.view(DTYPES[tensor.dtype])
        size = DTYPE_BYTES[tensor.dtype]
        inner = [int(n) for n in torch.empty(tensor.shape, device="meta").stride()]
        slots[tensor.name] = typed.as_strided((count, *tensor.shape), (stride // size, *inner), tensor.offset // size)
    for expert in held:
        for name, tensor in read_record(checkpoint, record(spec, RecordKey("expert", layer, expert))).items():
            slots[name][expert] = tensor
    return slots


def load_weights(
    checkpoint: Checkpoint, spec: ModelSpec, held: Sequence[set[int]], kv: KvCache, index: int = 0
) -> RankWeights:
    """The weights of a rank with that tp index, in plain memory."""
    by_key = {described.key: described for described in records(spec)}
    return RankWeights(
        spec,
        read_record(checkpoint, by_key[RecordKey("base", shard=index)]),
        [read_record(checkpoint, by_key[RecordKey("layer", layer, shard=index)]) for layer in range(spec.num_layers)],
        [
            load_experts(checkpoint, spec, layer, held[layer]) if count else {}
            for layer, count in enumerate(spec.num_experts_by_layer)
        ],
        kv,
        shard_of(spec, index),
    )


class Ranks:
    """`size` replicas of one model, of `tp` ranks each. A rank has its shard of all non-expert weights, its share of
    the experts and its own KV cache."""

    def __init__(
        self,
        directory: Path,
        size: int,
        *,
        dtype: str = "float32",
        max_tokens: int = 64,
        block_size: int = BLOCK_SIZE,
        num_blocks: int = NUM_BLOCKS,
        backend: Callable[[], ComputeBackend] = HostBackend,
        exchange_kind: ExchangeKind = "shm",
        tp: int = 1,
        half_elements: int = 0,
    ) -> None:
        """`half_elements`: of the bus; 0: as many as a deployment has."""
        self.spec = load_spec(directory, dtype, tp)
        self.block_size = block_size
        self._tp, size = tp, size * tp
        self.layout = initial_layout(self.spec.num_experts_by_layer, [f"device{i}" for i in range(size)], tp=tp)
        geometry = kv_geometry(self.spec, block_size, GRANULARITY, backend_of("host").kv_handle_bytes_min)
        self._kv_memory: list[DeviceMemory] = []
        shape = (size, max_tokens, self.spec.hidden, self.spec.moe.top_k)
        half = half_elements or half_elements_of(self.spec, max_tokens)
        self._host = host = Host(shape, half, PLAN_BYTES if tp > 1 else 0)
        self._observer = host.observer
        self._generation = 1
        self._observer.set_membership(1, (1 << size) - 1, True)
        self.models: list[Model] = []
        self.weights: list[RankWeights] = []
        self.exchanges: list[Exchange] = []
        for slot in range(size):
            bus = host.join(slot, slot + 1)
            held = [set(self.layout.experts_on(slot, layer)) for layer in range(self.spec.num_layers)]
            # Full of NaN: what is read must have been written.
            kv_memory = DeviceMemory(num_blocks * geometry.block_stride)
            kv_memory.device.write_bytes(kv_memory.address, b"\xff" * (num_blocks * geometry.block_stride))
            self._kv_memory.append(kv_memory)
            shape, stride = self.spec.rank_attention.kv, geometry.block_stride // DTYPE_BYTES[self.spec.dtype]
            inside = (self.spec.num_layers, shape.planes, shape.heads, block_size, shape.width)
            inner = torch.empty(inside, device="meta").stride()
            blocks = kv_memory.device.wrap(kv_memory.range, 0, (num_blocks, *inside), (stride, *inner), self.spec.dtype)
            kv = KvCache(blocks, num_blocks, geometry, kv_memory.device, kv_memory.address)
            with Checkpoint(directory, self.spec) as checkpoint:
                self.weights.append(load_weights(checkpoint, self.spec, held, kv, slot % tp))
            made = backend()
            self.models.append(build_model(made, self.weights[-1], max_tokens))
            replica = range(slot - slot % tp, slot - slot % tp + tp) if tp > 1 else ()
            exchange = host.open(exchange_kind, bus, self.spec.num_experts_by_layer, made, replica)
            self.exchanges.append(exchange)
        self._set_routing()

    def _set_routing(self) -> None:
        for exchange in self.exchanges:
            owners = [self.layout.owners(layer) for layer in range(self.spec.num_layers)]
            exchange.set_routing(self._generation, owners)

    def new_generation(self, *, routing: bool = True) -> None:
        """Start afresh after a step was given up; without `routing`, only end the one that is."""
        self._generation += 1
        self._observer.set_membership(self._generation, (1 << len(self.models)) - 1, True)
        if routing:
            self._set_routing()

    def step(self, work: Sequence[Sequence[BatchPart]]) -> list[torch.Tensor]:
        """Logits of each replica's parts, all ranks in lockstep."""
        total = sum(len(part.token_ids) for parts in work for part in parts)
        work = [parts for parts in work for _ in range(self._tp)]
        results: list[torch.Tensor | BaseException] = [RuntimeError("never ran")] * len(work)

        def run(rank: int) -> None:
            try:
                self.exchanges[rank].begin_step(total, DEADLINE_MS)
                batch = Batch(work[rank], self.block_size)
                results[rank] = self.models[rank].forward(batch, self.exchanges[rank]).clone()
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        logits = [result for result in results if isinstance(result, torch.Tensor)]
        assert all(len(rows) == 0 for rank, rows in enumerate(logits) if rank % self._tp)
        return logits[:: self._tp]


class Stream:
    """A sequence on one rank: its tokens so far and the blocks that it uses."""

    def __init__(self, prompt: Sequence[int], blocks: Sequence[int]) -> None:
        self.tokens = list(prompt)
        self.blocks = list(blocks)
        self.kv_len = 0

    def part(self, count: int, num_logits: int) -> BatchPart:
        start = self.kv_len
        return BatchPart(self.tokens[start : start + count], start, self.blocks, num_logits)


def generate(
    ranks: Ranks, streams: Sequence[Sequence[Stream]], num_tokens: int, chunk: Callable[[int], int] = lambda _: 7
) -> dict[int, torch.Tensor]:
    """Run all streams (by replica) greedily until each has `num_tokens` new tokens; logits of every row, by id(stream).

    `chunk(step)` is how many prompt tokens a stream may compute in a step.
    """
    ends = {id(stream): len(stream.tokens) + num_tokens for row in streams for stream in row}
    logits: dict[int, list[torch.Tensor]] = {key: [] for key in ends}
    for step in range(10_000):
        active = [[s for s in row if len(s.tokens) < ends[id(s)]] for row in streams]
        if not any(active):
            break
        counts = [[min(len(s.tokens) - s.kv_len, chunk(step)) for s in row] for row in active]
        work = [[s.part(n, n) for s, n in zip(row, ns, strict=True)] for row, ns in zip(active, counts, strict=True)]
        for row, ns, result in zip(active, counts, ranks.step(work), strict=True):
            at = 0
            for stream, count in zip(row, ns, strict=True):
                logits[id(stream)].append(result[at : at + count])
                at += count
                stream.kv_len += count
                if stream.kv_len == len(stream.tokens):
                    stream.tokens.append(int(result[at - 1].argmax()))
    return {key: torch.cat(rows) for key, rows in logits.items()}
