"""Which files a scale order passes, from the admin endpoint to the first byte: as docs/architecture.md says.

A file is passed where its code is on the stack when the order changes hands. What only carries it does not count: the
loops of the two services and the link between them, which have stand-ins here, and what starts threads.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.hmm import StageLayout
from elasticmoe.common.protocol.scaler import PoolStatus
from elasticmoe.common.transport import new_identity
from elasticmoe.services.hmm.memory.transfer import Supply, Transfer
from elasticmoe.services.hmm.status import Loading, hmm_status
from elasticmoe.services.hmm.transition.transition import Transitions
from elasticmoe.services.scaler.api.admin import build_app
from elasticmoe.services.scaler.api.event_stream import EventStream
from elasticmoe.services.scaler.api.experts import ExpertLoads
from elasticmoe.services.scaler.api.series import Series
from elasticmoe.services.scaler.api.snapshot import StatusCache, StatusSnapshot
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.control.admission import Admission, CommandQueue
from elasticmoe.services.scaler.control.executor import Executor
from elasticmoe.services.scaler.control.state import State
from elasticmoe.services.scaler.metrics import Meters
from elasticmoe.services.scaler.operation.prepare import prepare
from elasticmoe.services.scaler.planning.planner import plan_way
from tests.unit.test_hmm_memory_shortage import World
from tests.unit.transitions import cluster_of
from tests.unit.ways import Trace, hands_of, said

CARRIERS = frozenset({"hmm/background"})
HANDS = hands_of(
    queue=CommandQueue.ask,
    plan=plan_way,
    begin=Executor.begin,
    decide=prepare,
    send=Executor._send,
    stage=Transitions.stage,
    claim=Supply.claim_stage,
    write=Transfer._fill,
)


def _tell(kind: str, reason: str, /, **facts: str) -> None: ...


class Deployment:
    """A scaler without its loop, in front of an HMM without sockets."""

    def __init__(self, hmm: World, folder: Path) -> None:
        self.hmm = hmm
        for attached in hmm.by_slot.values():
            attached.incarnation = f"rank-{attached.slot}"
        silent: Any = SimpleNamespace(
            reserve=lambda _: None,
            decision=lambda _: None,
            put=lambda _: None,
            is_durable=lambda _: True,
            no_room=lambda: "",
            announced_epoch=0,
        )
        peers = SimpleNamespace(keep=lambda _: None, ask=lambda *_: None, receive=lambda: None, loads=lambda *_: {})
        links: Any = SimpleNamespace(starting=frozenset(), peers=peers, tell_hmm=self._tell_hmm, start=lambda *_: None)
        config, loaded = ScalerConfig(run_dir=str(folder)), hmm.holdings.loaded
        assert loaded is not None
        state = State(ever_served=True, stall_s=99.0)
        self.meters, self.commands = Meters(), CommandQueue(lambda: None, SYSTEM_CLOCK)
        self.executor = Executor(config, links, silent, self.meters, lambda *_, **__: None, state, SYSTEM_CLOCK)
        self.admission = Admission(
            config, loaded.spec, self.executor, (), lambda *_, **__: None, SYSTEM_CLOCK, new_identity
        )

    def _tell_hmm(self, command: Message) -> None:
        if isinstance(command, StageLayout):
            self.hmm.transitions.stage(command)

    def cluster(self) -> Cluster:
        hmm = self.hmm
        attachments: Any = SimpleNamespace(by_slot=hmm.by_slot)
        status = hmm_status(hmm.holdings, attachments, hmm.members, Loading(), hmm.transitions, {})
        return cluster_of(status, PoolStatus(ranks=(), standby=0))

    async def order(self, body: dict[str, object]) -> httpx.Response:
        """By HTTP; the loop is this one."""
        board = StatusCache(StatusSnapshot("serving", "", None, None, None, 0, {}))
        app: Any = build_app(
            board,
            self.commands,
            EventStream(),
            Series("s"),
            ExpertLoads(),
            self.meters,
            "secret",
            600.0,
            "localhost",
            Path("/nonexistent"),
        )
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://scaler") as client:
            headers = {"Authorization": "Bearer secret"}
            asked = asyncio.create_task(client.post("/v1/scale", json=body, headers=headers))
            while not asked.done():
                self.commands.serve(lambda order: self.admission.take(order, self.cluster(), ever_served=True))
                await asyncio.sleep(0)
            return await asked

    def turn(self) -> None:
        seen = self.executor.observe(self.cluster())
        self.executor.execute(self.executor.decide(seen))


def test_a_scale_order_passes_the_files_that_the_page_names(tiny_mixtral: Path, tmp_path: Path) -> None:
    hmm = World(tiny_mixtral, tmp_path)
    try:
        deployment = Deployment(hmm, tmp_path)
        trace = Trace(HANDS, CARRIERS)
        with trace.follow():
            answer = asyncio.run(deployment.order({"replicas": 3}))
            assert answer.status_code == 202, answer.text
            for _ in range(3):
                deployment.turn()
            hmm.turn_to("staged")
        assert set(trace.hands) == set(HANDS.values())
        assert trace.files == said("a scale order")
        assert len(trace.files) <= 8
        assert msgspec.json.decode(answer.content)["phase"] == "plan"
    finally:
        hmm.close()
