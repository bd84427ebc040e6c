"""A rank in a process of its own: attached to the HMM, its memory mapped, its model built."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from elasticmoe.common import fdchannel
from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.config import PoolConfig
from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.fence import Fence
from elasticmoe.common.protocol.handles import TO_RANK
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.rank import CODEC
from elasticmoe.common.protocol.scaler import RankReady
from elasticmoe.common.transport import Sockets
from elasticmoe.services.worker.backends.factory import BackendOptions, open_backend
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.exchange.barrier import StepBarrier
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.exchange.board import ReplicaBoard
from elasticmoe.services.worker.exchange.factory import open_exchange
from elasticmoe.services.worker.exchange.shm_barrier import ShmBarrier
from elasticmoe.services.worker.exchange.shm_board import ShmBoard
from elasticmoe.services.worker.hmm.link import HmmLink
from elasticmoe.services.worker.hmm.memory import RankMemory
from elasticmoe.services.worker.model.registry import Model, build_model
from elasticmoe.services.worker.rank.cores import threads_of
from elasticmoe.services.worker.rank.follower import Follower
from elasticmoe.services.worker.rank.loop import SeatLoop
from elasticmoe.services.worker.rank.parts import SeatParts
from elasticmoe.services.worker.rank.rank import Rank
from elasticmoe.services.worker.rank.warm_up import warm_up


def open_rank(config: PoolConfig, seat: StartRank, tell_ready: Callable[[RankReady], None], cores: int) -> SeatLoop:
    """Attach and build. Raises the HMM's refusal, Unavailable, or DeviceError; the process ends then. `tell_ready` is
    called once, when the rank has begun to serve. `cores`: of the machine, that its devices share."""
    clock, transport = SYSTEM_CLOCK, Sockets(config.socket)
    started = clock.monotonic()
    server = transport.serve(f"rank-{seat.rank}", seat.incarnation, CODEC)
    handles = config.socket("handles")
    hmm = HmmLink(
        lambda deadline_ms: fdchannel.connect(handles, seat.incarnation, TO_RANK, deadline_ms=deadline_ms),
        seat,
        watch=server.watch,
        unwatch=server.unwatch,
    )
    fence = Fence(config.state_dir, f"rank-{seat.slot}")
    failpoint("rank.attach")
    reply, fds = hmm.attach()
    memory = RankMemory(reply, fds, seat.device, seat.slot, hmm.handed(), seat.rank.tp)
    attached = clock.monotonic()
    memory.bus.set_cores(cores)
    barrier = ShmBarrier(memory.bus, memory.doorbells, seat.slot)
    # The memory was sized when it was made; a scaler that was restarted with larger limits cannot stretch it.
    max_tokens = min(seat.max_tokens, memory.bus.max_tokens)
    threads = partial(threads_of, config, cores)
    num_ranks = (barrier.membership().members | 1 << seat.slot).bit_count()
    torch_device = memory.device.open_torch()
    backend = open_backend(
        seat.compute,
        barrier.tell_waiting,
        torch_device,
        BackendOptions(config.captured_graphs, threads(num_ranks), seat.activations, config.share_cores),
    )
    exchange = open_exchange(memory, backend, config.state_dir / "torch_dist")
    board = ShmBoard(memory.bus, memory.replica) if memory.spec.tp > 1 else None
    model = build_model(backend, memory.weights, max_tokens)
    engine = _engine(seat, memory, model, exchange, board, max_tokens) if seat.rank.tp == 0 else None
    failpoint("rank.warm_up")
    if not _is_awaited(barrier, seat.slot):
        warm_up(model, memory, exchange.rows_RH.device, min(max_tokens, seat.max_sequences))
    parts = SeatParts(
        seat=seat,
        clock=clock,
        transport=transport,
        server=server,
        hmm=hmm,
        fence=fence,
        memory=memory,
        revision=memory.revision,
        barrier=barrier,
        exchange=exchange,
        attach_ms=(attached - started) * 1e3,
        build_ms=(clock.monotonic() - attached) * 1e3,
        computes_by=backend.computes_by,
        use_cores=lambda num_ranks: backend.use_threads(threads(num_ranks)),
    )
    if engine is not None:
        return Rank(parts, engine, tell_ready)
    assert board is not None, "a replica of several ranks"
    return Follower(parts, board, model, memory.kv, tell_ready)


def _engine(
    seat: StartRank, memory: RankMemory, model: Model, exchange: Exchange, board: ReplicaBoard | None, max_tokens: int
) -> Engine:
    ledger = memory.ledger
    return Engine(
        model,
        exchange,
        memory.weights.kv,
        ledger,
        max_tokens=max_tokens,
        max_sequences=min(seat.max_sequences, ledger.num_rows),
        max_model_len=min(seat.max_model_len, ledger.max_tokens),
        board=board,
    )


def _is_awaited(barrier: StepBarrier, slot: int) -> bool:
    """Whether the others cannot step until this rank is there: its predecessor, a member, died."""
    now = barrier.membership()
    return now.generation > 0 and not now.is_running and bool(now.members >> slot & 1)
