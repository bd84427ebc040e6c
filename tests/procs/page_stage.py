"""The admin listener as it is, before a deployment of hundreds of devices that is made up: `python -m
tests.procs.page_stage 384` serves it for who wants to look; with `0 growing` behind that, in the midst of a growth, and
with `0 idle` without anything that was routed to experts."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from elasticmoe.common.capacity import MemoryForecast, Sizes
from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.devices.names import LOCAL_HOST
from elasticmoe.common.http.listener import bind
from elasticmoe.common.layout import Layout, RankId, Seat
from elasticmoe.common.protocol.scaler import DeviceStatus, HmmStatus, PoolRank, PoolStatus, RankLoad, TransitionStatus
from elasticmoe.common.protocol.signals import RankWindow
from elasticmoe.common.store import Event
from elasticmoe.services.scaler.api.admin import build_app, serve
from elasticmoe.services.scaler.api.event_stream import EventStream
from elasticmoe.services.scaler.api.experts import ExpertLoads
from elasticmoe.services.scaler.api.series import Series
from elasticmoe.services.scaler.api.snapshot import StatusCache, StatusSnapshot
from elasticmoe.services.scaler.cluster import Cluster, HostStatus, in_force
from elasticmoe.services.scaler.control.admission import Accepted, Command, CommandQueue, Order, accept
from elasticmoe.services.scaler.control.autoscaler import Decided
from elasticmoe.services.scaler.metrics import Meters
from elasticmoe.services.scaler.operation.operation import Operation, Request, planned_of
from elasticmoe.services.scaler.planning.plan import Target
from elasticmoe.services.scaler.planning.planner import make_plan
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.figures import Signals, Throughput
from elasticmoe.services.scaler.policy.record import PolicyRecord
from elasticmoe.services.scaler.policy.saturation import Saturation
from elasticmoe.services.scaler.policy.state import Evidence, Reason

GIB = 1 << 30
LAYERS, EXPERTS, BLOCKS = 24, 128, 4_000
TURN_S = 0.25
SIZES = Sizes(GIB // 4, (GIB // 32,) * LAYERS, (GIB // 128,) * LAYERS)
COPIED_S = 250  # until the growth's records are copied; then it begins anew
QUARTER_S, DAY_S, STEP_S = 900, 86_400, 120
MOVING = range(10)  # slots of ranks that hand a sequence over, while it grows


class Stage:
    """Serves until `close`. Every rank's load is another one in each turn. `is_growing`: records are being copied to
    the devices that were free. `is_idle`: nothing is routed to experts. `instance`: the deployment's name. `failed`:
    numbers of devices that cannot be used."""

    def __init__(
        self,
        num_devices: int,
        token: str,
        port: int = 0,
        *,
        is_growing: bool = False,
        is_idle: bool = False,
        instance: str = "i-stage",
        failed: Collection[str] = (),
    ) -> None:
        self._num = num_devices
        self._is_idle = is_idle
        self._instance = instance
        self._failed = failed
        self._random = random.Random(1)
        used = max(1, num_devices - num_devices // 8)
        seats = tuple(Seat(RankId(slot, 0), slot, f"host:{slot}") for slot in range(used))
        homes = tuple(tuple((expert * used // EXPERTS,) for expert in range(EXPERTS)) for _ in range(LAYERS))
        self._layout = Layout(3, 1, seats, homes)
        self._operation = self._growth() if is_growing else None
        self._running = [self._random.randint(0, 24) for _ in seats]
        self.series, self.events, self.commands = (
            Series("stage"),
            EventStream(),
            CommandQueue(lambda: None, SYSTEM_CLOCK),
        )
        self.experts = ExpertLoads()
        self.status_cache = StatusCache(self._snapshot(0))
        self._remember()
        self._listener = bind("127.0.0.1", port)
        self.port = self._listener.getsockname()[1]
        meters = Meters()
        app = build_app(
            self.status_cache,
            self.commands,
            self.events,
            self.series,
            self.experts,
            meters,
            token,
            600.0,
            "127.0.0.1",
            Path("/nonexistent"),
        )
        self._server = serve(app, meters, 75.0)
        self._ended = threading.Event()
        sockets = {"sockets": [self._listener]}
        self._threads = [threading.Thread(target=self._server.run, kwargs=sockets), threading.Thread(target=self._run)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End both threads."""
        self._ended.set()
        self._server.stop()
        for thread in self._threads:
            thread.join(60)
        self._listener.close()

    def _run(self) -> None:
        turn = 0
        while not self._ended.wait(TURN_S):
            turn += 1
            self.status_cache.snapshot = self._snapshot(turn)
            self.commands.serve(self._answer)
            if turn % 20 == 1 and not self._is_idle:
                self._route(turn)
            self.series.note(self.status_cache.snapshot, time.monotonic(), time.time())

    def _growth(self) -> Operation:
        """A growth to all devices, whose first leg is being copied."""
        names = [f"host:{number}" for number in range(self._num)]
        used = dict.fromkeys(names[: len(self._layout.seats)], 9)
        memory = MemoryForecast(dict.fromkeys(names, 48 * GIB), 27 * GIB, GIB // 8, GIB, 2, used)
        target = Target(devices=tuple(names))
        plan = make_plan(self._layout, target, SIZES, memory, names)
        order = Order("op-stage", Request(devices=target.devices), target)
        begun = accept(order, order.op_id, plan, planned_of(plan, SIZES), time.time())
        return msgspec.structs.replace(begun, phase="prepare", why="the HMM copies")

    def _answer(self, order: Command) -> Accepted:
        """What a dry run of the growth is answered with."""
        assert isinstance(order, Order), order
        assert order.is_dry_run, order
        assert self._operation is not None, "nothing is planned here"
        return Accepted(self._operation, self._operation.plan, SIZES)

    def _copying(self, turn: int) -> TransitionStatus | None:
        if self._operation is None:
            return None
        total = self._operation.current_leg().bytes_copied
        turns = int(COPIED_S / TURN_S)
        done = total * (turn % turns) // turns
        return TransitionStatus(self._operation.transition_id, 4, "copying", (), done, total, {})

    def _route(self, turn: int) -> None:
        """What each rank tells of its experts: some are asked for much more often than others."""
        for seat in self._layout.seats:
            places = [
                layer * EXPERTS + expert
                for layer, experts in enumerate(self._layout.homes)
                for expert, slots in enumerate(experts)
                if seat.slot in slots
            ]
            rows = tuple((place, int(self._random.paretovariate(1.6) * 20)) for place in places)
            window = RankWindow(
                rank=seat.rank,
                incarnation=f"rank-{seat.rank}:0",
                number=turn,
                epoch=3,
                ended_s=time.monotonic(),
                span_s=5.0,
                num_steps=50,
                expert_steps=6,
                expert_rows=rows,
            )
            self.experts.take(window)

    def _remember(self) -> None:
        """A day that has passed, its last quarter of an hour by the second, and what happened in that."""
        now, now_unix = time.monotonic(), time.time()
        for ago in (*range(DAY_S, QUARTER_S, -STEP_S), *range(QUARTER_S, 0, -1)):
            self.series.note(self._snapshot(-4 * ago, now - ago), now - ago, now_unix - ago)
        for n, seat in enumerate(self._layout.seats[:6]):
            facts = {"rank": str(seat.rank), "exit_code": "-9"}
            self.events.publish(Event("rank_exited", "killed by SIGKILL", 3, "stage", time.time() - 500 + n, facts))

    def _snapshot(self, turn: int, now: float | None = None) -> StatusSnapshot:
        for slot in range(len(self._running)):
            self._running[slot] = min(32, max(0, self._running[slot] + self._random.randint(-2, 2)))
        wave = 0.5 + 0.4 * math.sin(turn / 300)
        devices = tuple(self._device(number) for number in range(self._num))
        hmm = HmmStatus("ready", 1, 1, None, devices, 1, self._layout.slots, True, layout=self._layout)
        hmm = msgspec.structs.replace(hmm, transition=self._copying(turn))
        ranks = tuple(
            PoolRank(seat.rank, seat.slot, seat.device, f"rank-{seat.rank}:0", 1000 + seat.slot, True, 31.0)
            for seat in self._layout.seats
        )
        hosts = {LOCAL_HOST: HostStatus(hmm, PoolStatus(2, ranks))}
        total, width = sum(self._running), len(ranks)
        signals = Signals(
            at_s=time.monotonic() if now is None else now,
            admitted_per_s=width * wave,
            refused_per_s=0.0 if wave < 0.85 else wave,
            queued=int(20 * wave),
            running=float(total),
            ttft_s=0.4 + 2.0 * wave**3,
            itl_s=0.03 + 0.03 * wave,
            step_s=0.03,
            kv_share_most=0.3 + 0.5 * wave,
            attainment=1 - 0.05 * wave**2,
        )
        return StatusSnapshot(
            phase="serving",
            reason="nothing to do",
            error=None,
            layout=self._layout,
            cluster=Cluster(hosts, in_force(hosts, None, self._layout)),
            fence=1,
            config={},
            operation=self._operation,
            loads={seat.slot: self._load(seat, wave) for seat in self._layout.seats},
            instance=self._instance,
            sizes=SIZES,
            policy=PolicyRecord(1, PolicyConfig(), PolicyConfig()),
            decided=(_decided(2, Reason.GROW_FORECAST, width + 1), _decided(1, Reason.STEADY, None)),
            signals=signals,
            saturation=Saturation(
                ttft=signals.ttft_s / 2, itl=signals.itl_s * 10, backlog=wave / 2, queue_age=0.1, kv=wave
            ),
            decision=_decided(2, Reason.GROW_FORECAST, width + 1),
            throughput=Throughput(total * 21.0, width * wave * 540),
        )

    def _device(self, number: int) -> DeviceStatus:
        is_used = number < len(self._layout.seats)
        weights, kv = (18 * GIB + (number % 5) * GIB, 9 * GIB) if is_used else (0, 0)
        other = GIB // 2 if is_used else 0
        free = 48 * GIB - weights - kv - other
        failure = "its driver says that it is lost" if str(number) in self._failed else ""
        return DeviceStatus(f"host:{number}", 48 * GIB, weights, kv, other, free, 8, BLOCKS, None, failure=failure)

    def _load(self, seat: Seat, wave: float) -> RankLoad:
        running = self._running[seat.slot]
        free = max(0, BLOCKS - int(running * 90 * wave) - 200)
        moving = int(self._operation is not None and seat.slot in MOVING)
        return RankLoad(seat.rank, "r", running, running // 9, moving, 0, 0, free, BLOCKS, False, None, 1, 3)


def _decided(at: int, reason: Reason, target: int | None) -> Decided:
    evidence = Evidence(raw=Saturation(ttft=0.4, itl=0.3, kv=0.7), smoothed=0.6, threshold=0.81)
    return Decided(
        time_unix=time.time() - 100 + at,
        mode="advise",
        reason=reason,
        replicas=336,
        target=target,
        op_id=None,
        supersedes=None,
        acts=False,
        evidence=evidence,
    )


@contextmanager
def staged(num_devices: int, *words: str, port: int = 0) -> Iterator[str]:
    """The same in a process of its own; its address. `words`: `growing`, `idle`, `token=TEXT`, `instance=NAME`,
    `failed=N,N`."""
    argv = [sys.executable, "-m", "tests.procs.page_stage", str(num_devices), str(port), *words]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().partition("/#")[0]
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


if __name__ == "__main__":
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    words = dict(word.partition("=")[::2] for word in sys.argv[3:])
    token, instance = words.get("token", "stage"), words.get("instance", "i-stage")
    failed = words.get("failed", "").split(",")
    are = {"is_growing": "growing" in words, "is_idle": "idle" in words}
    stage = Stage(int(sys.argv[1]), token, port, instance=instance, failed=failed, **are)
    print(f"http://127.0.0.1:{stage.port}/#token={token}", flush=True)
    sys.stdin.readline()
    stage.close()
