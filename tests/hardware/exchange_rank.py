"""Run by scripts/exchange_cost.py: one rank, which exchanges rows with others as ranks of a deployment do. No model.

It does what is asked of it by the socket with the number of its first argument, until that is closed. An order and its
answer are one packet each, in JSON, with descriptors beside them.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, cast

import torch

from elasticmoe.common.devices.base import Device, FdToken, KeyToken, Token
from elasticmoe.common.devices.factory import granularity_of, importer_number, open_device
from elasticmoe.common.devices.names import DeviceCount, DeviceId
from elasticmoe.common.host_shared import HostShared
from elasticmoe.native.bus import Bus, bus_bytes, format_bus
from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror
from elasticmoe.services.worker.backends.factory import open_backend
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.exchange.factory import open_exchange
from elasticmoe.services.worker.hmm.mailboxes import Mailboxes

PACKET_BYTES_MAX: Final = 1 << 16
FDS_MAX: Final = 64
FLOAT_BYTES: Final = 4
DEADLINE_MS: Final = 60_000.0  # of one call: groups of torch's are made in the first
_WARM: Final = 5  # exchanges before those that count
_LAYER: Final = 0
Answered = tuple[Any, int | None]  # a value, and a descriptor to go with it


class Config(NamedTuple):
    """What all ranks of a run have in common but for `slot` and `device`. `shape`: ranks, tokens of each at the most,
    elements of a row, experts for a token."""

    slot: int
    device: str
    kind: str
    compute: str
    shape: tuple[int, int, int, int]
    num_experts: int
    rendezvous: str


class Work(NamedTuple):
    """A rank's tokens of an exchange, as every kind of it gets them. Where the seed is the same, so are they."""

    x_NH: torch.Tensor
    ids_NK: torch.Tensor
    weights_NK: torch.Tensor


def make_work(config: Config, rows: int) -> Work:
    """Each token chooses its experts evenly, no one twice."""
    _, _, hidden, top_k = config.shape
    draw = torch.Generator().manual_seed(1_000 * config.slot + rows)
    ids = torch.stack([torch.randperm(config.num_experts, generator=draw)[:top_k] for _ in range(rows)])
    weights = torch.rand(rows, top_k, generator=draw)
    return Work(torch.randn(rows, hidden, generator=draw), ids.to(torch.int32), weights)


def bytes_to_others(kind: str, owners: Sequence[int], slot: int, ids_NK: torch.Tensor, hidden: int) -> int:
    """Of one dispatch and combine: bytes of rows that this rank's tokens make travel between it and others.

    Through `shm` an owner reads a token for each expert that it computes; by the others it gets all tokens of a rank
    once, where it computes one at all. Each answer comes back by itself.
    """
    owner_P = torch.tensor(owners)[ids_NK.reshape(-1).long()]
    answers = int((owner_P != slot).sum())
    others = set(owner_P.tolist()) - {slot}
    sent = answers if kind == "shm" else len(others) * ids_NK.shape[0]
    return (sent + answers) * hidden * FLOAT_BYTES


class Rank:
    """The orders, each a public method."""

    def __init__(self) -> None:
        self._shared: HostShared | None = None
        self._config: Config
        self._bus: Bus
        self._device: Device
        self._mailboxes: Mailboxes
        self._backend: ComputeBackend
        self._exchange: Exchange
        self._owners: list[int]

    def make_bus(self, shape: list[int]) -> Answered:
        """The bus of all ranks: its size, and its descriptor."""
        ranks, tokens, hidden, top_k = shape
        nbytes = -(-bus_bytes(ranks, tokens, hidden, top_k) // (2 << 20)) * (2 << 20)
        self._shared = HostShared.create("bus")
        self._shared.resize(nbytes)
        format_bus(self._shared.address, nbytes, ranks, tokens, hidden, top_k)
        return nbytes, os.dup(self._shared.fd)

    def open(self, config: list[Any], nbytes: int, fd: int) -> Answered:
        """Take a seat: by what the owner of mailboxes admits this process."""
        self._config = config_ = Config(*config)
        if self._shared is None:
            self._shared = HostShared.open(os.dup(fd), nbytes)
        torch.set_num_threads(1)
        self._bus = Bus(self._shared.address, nbytes, config_.slot)
        self._bus.join(1)
        count = DeviceCount.with_all([DeviceId.parse(config_.device)])
        self._device = open_device(config_.device, granularity_of(count, 0))
        self._backend = open_backend(cast(Any, config_.compute), None, self._device.open_torch())
        self._mailboxes = Mailboxes(self._device, self._bus)
        return importer_number(config_.device), None

    def follow(self, tokens: list[dict[str, int]], *fds: int) -> Answered:
        """Map the mailboxes of all slots."""
        left = iter(fds)
        named: dict[int, Token] = {}
        for slot, token in enumerate(tokens):
            if "offset" in token:
                named[slot] = FdToken(next(left), token["offset"], token["nbytes"], token["key"])
            else:
                named[slot] = KeyToken(token["key"], token["nbytes"])
        self._mailboxes.follow(named)
        return None, None

    def publish(self) -> Answered:
        """As the HMM does: all ranks are members."""
        Bus(self._bus_address, self._bus_bytes).set_membership(1, (1 << self._config.shape[0]) - 1, True)
        return None, None

    @property
    def _bus_address(self) -> int:
        assert self._shared is not None, "`open` came before"
        return self._shared.address

    @property
    def _bus_bytes(self) -> int:
        assert self._shared is not None, "`open` came before"
        return self._shared.nbytes

    def connect(self) -> Answered:
        """Open this rank's end of the exchange."""
        config = self._config
        # What of a rank's memory an exchange needs: there is neither model nor HMM.
        spec = SimpleNamespace(num_experts_by_layer=(config.num_experts,), tp=1)
        memory = SimpleNamespace(
            **{"bus": self._bus, "spec": spec, "exchange": config.kind, "mailboxes": self._mailboxes},
            **{"device": self._device, "memory_id": f"bench-{config.kind}", "replica": ()},
        )
        self._exchange = open_exchange(cast(Any, memory), self._backend, Path(config.rendezvous))
        self._owners = [expert % config.shape[0] for expert in range(config.num_experts)]
        self._exchange.set_routing(1, [self._owners])
        return None, None

    def run(self, rows: int, num: int) -> Answered:
        """Exchange the rows so often: how long a dispatch and combine took in the median, and what came out."""
        work, hidden, top_k = make_work(self._config, rows), self._config.shape[2], self._config.shape[3]
        backend = self._backend
        x, out = backend.mirror(rows, hidden), backend.mirror(rows, hidden)
        ids, weights = backend.mirror(rows, top_k, dtype=torch.int32), backend.mirror(rows, top_k)
        for mirror, values in ((x, work.x_NH), (ids, work.ids_NK), (weights, work.weights_NK)):
            mirror.host.copy_(values)
            backend.upload(mirror)(rows)
        backend.fence()
        took = [self._once(x, ids, weights, out, rows) for _ in range(_WARM + num)][_WARM:]
        backend.download(out)(rows)
        moved = bytes_to_others(self._config.kind, self._owners, self._config.slot, work.ids_NK, hidden)
        digest = hashlib.sha256(out.host[:rows].numpy().tobytes()).hexdigest()[:16]
        return {"us": statistics.median(took), "us_max": max(took), "bytes": moved, "digest": digest}, None

    def _once(self, x: Mirror, ids: Mirror, weights: Mirror, out: Mirror, rows: int) -> float:
        """Microseconds. The experts' answers are their rows."""
        exchange = self._exchange
        exchange.begin_step(self._config.shape[0] * rows, DEADLINE_MS)
        begun = time.perf_counter()
        exchange.dispatch(_LAYER, x, ids, weights, rows)
        exchange.combine(_LAYER, exchange.rows_RH, out, rows)
        self._backend.fence()
        return (time.perf_counter() - begun) * 1e6


def main() -> None:
    """Do as the socket says."""
    rank = Rank()
    with socket.socket(fileno=int(sys.argv[1])) as orders:
        while True:
            packet, fds, _, _ = socket.recv_fds(orders, PACKET_BYTES_MAX, FDS_MAX)
            if not packet:
                os._exit(0)  # threads of torch's groups may wait for peers that have gone
            name, *args = json.loads(packet)
            try:
                value, fd = getattr(rank, name)(*args, *fds)
                answer: dict[str, Any] = {"value": value}
            except Exception as error:
                answer, fd = {"error": " ".join(str(error).split())[:300] or type(error).__name__}, None
            for received in fds:
                os.close(received)
            socket.send_fds(orders, [json.dumps(answer).encode()], [] if fd is None else [fd])
            if fd is not None:
                os.close(fd)


if __name__ == "__main__":
    main()
