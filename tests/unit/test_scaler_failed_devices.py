"""Devices that the HMM says cannot be used: nothing is planned with one, an order that needs one is refused with the
reason, and it is told to people. And what is loaded where the HMM holds nothing and a device of the layout has failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.layout import Layout, RankId, Seat
from elasticmoe.common.model_spec import KvGeometry
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import HmmStatus, MemoryFacts, PoolStatus
from elasticmoe.common.transport import new_identity
from elasticmoe.services.scaler.actions import LoadLayout
from elasticmoe.services.scaler.api.now import Board
from elasticmoe.services.scaler.api.requests import parse_scale
from elasticmoe.services.scaler.api.snapshot import devices_view
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.control import admission
from elasticmoe.services.scaler.control.admission import Accepted, Admission, UnprocessableTarget, with_neighbours
from elasticmoe.services.scaler.control.members import serve
from elasticmoe.services.scaler.control.state import State, Status
from elasticmoe.services.scaler.observation import Observation, Step
from elasticmoe.services.scaler.planning.reduction import without_failed
from tests.unit.autoscaler_bench import Bench
from tests.unit.test_reference import samples
from tests.unit.test_scaler_admin import snapshot_of
from tests.unit.test_scaler_executor import Scene
from tests.unit.test_scaler_loss import Executor
from tests.unit.transitions import DEVICES, DOWN, SIZES, UP, World, cluster_of, host_of, layout_of, operation_of

REASON = "cuDeviceGet failed with 46 (CUDA_ERROR_DEVICE_UNAVAILABLE)"
FACTS = MemoryFacts(1, KvGeometry(16, 1, 1, 16, 16), 900, 10, 1, 10)


def hmm_of(layout: Layout, *failed: str, devices: int = 4) -> HmmStatus:
    """An HMM with room enough, of whose devices these have failed."""
    hmm = host_of(World(layout).seen()).hmm
    assert hmm is not None
    listed = tuple(
        msgspec.structs.replace(one, budget=1_000, kv=160, free=820, failure=REASON if one.device in failed else "")
        for one in hmm.devices[:devices]
    )
    return msgspec.structs.replace(hmm, devices=listed, memory=FACTS)


def seen_of(layout: Layout, *failed: str, devices: int = 4) -> Cluster:
    return cluster_of(hmm_of(layout, *failed, devices=devices), PoolStatus(2, ()))


@pytest.fixture
def taking(monkeypatch: pytest.MonkeyPatch) -> Admission:
    """What takes orders, before the first."""
    monkeypatch.setattr(admission, "sizes_of", lambda *_: SIZES)
    executor, config = Executor(msgspec.structs.replace(operation_of(None), phase="done")), ScalerConfig(run_dir="/r")
    return Admission(config, None, executor, (), lambda *_, **__: None, SYSTEM_CLOCK, new_identity)  # type: ignore[arg-type]


def take(taking: Admission, body: str, cluster: Cluster) -> Accepted:
    return taking.take(parse_scale(body.encode(), 9.0), cluster, ever_served=True)


def refusal(taking: Admission, body: str, cluster: Cluster) -> tuple[str, str]:
    with pytest.raises(UnprocessableTarget) as refused:
        take(taking, body, cluster)
    return refused.value.code, refused.value.message


# ---- what is chosen and refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_growth_takes_the_next_device(taking: Admission, dry_run: str) -> None:
    body = f'{{"replicas": 3, "dry_run": {dry_run}}}'
    operation = take(taking, body, seen_of(UP.before, "host:2")).operation
    assert operation.plan is not None
    assert {seat.device for seat in operation.plan.after.seats} == {"host:0", "host:1", "host:3"}


def test_who_asks_for_more_than_there_is_learns_which_devices_do_not_count(taking: Admission) -> None:
    code, text = refusal(taking, '{"replicas": 4}', seen_of(UP.before, "host:2"))
    assert code == "too_few_devices"
    assert "1 are free" in text
    assert text.endswith("; host:2 cannot be used")


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_an_order_that_names_one_is_refused_with_its_reason(taking: Admission, dry_run: str) -> None:
    body = f'{{"devices": ["host:0", "host:1", "host:2"], "dry_run": {dry_run}}}'
    assert refusal(taking, body, seen_of(UP.before, "host:2")) == (
        "driver_failed",
        f"host:2 cannot be used: {REASON}",
    )


@pytest.mark.parametrize("body", ['{"replicas": 3}', '{"remove": ["r1"]}', '{"devices": ["host:2", "host:3"]}'])
def test_an_order_that_would_read_from_one_of_the_layout_is_told_what_helps(taking: Admission, body: str) -> None:
    code, text = refusal(taking, body, seen_of(UP.before, "host:1"))
    assert code == "driver_failed"
    assert text.startswith(f"host:1 cannot be used: {REASON}. ")
    assert "`elasticmoe scale --remove r1 --lost`" in text


def test_who_leaves_a_lost_device_out_leaves_failed_ones_out(taking: Admission) -> None:
    """Nothing could be read from them, nor come to them."""
    lost = '{"remove": ["r1"], "lost": true}'
    operation = take(taking, lost, seen_of(DOWN.before, "host:1", "host:2")).operation
    assert operation.plan is not None
    assert [seat.device for seat in operation.plan.after.seats] == ["host:0"]
    with pytest.raises(UnprocessableTarget, match=r"r0 would be lost, too: .* or failed ones") as refused:
        with_neighbours(parse_scale(lost.encode(), 9.0), UP.before, {"host:0": REASON})
    assert refused.value.code == "last_replica"


def test_the_policy_plans_with_none() -> None:
    bench = Bench()
    bench.hmm = msgspec.structs.replace(bench.hmm, devices=hmm_of(UP.before, "host:2").devices)
    load = bench.load()
    assert load is not None
    assert load.devices == ("host:0", "host:1", "host:3")


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_it_is_told_beside_what_the_layout_uses() -> None:
    snapshot = snapshot_of(World(UP.before), cluster=seen_of(UP.before, "host:1", "host:2"))
    told = [(one.device, one.state, one.failure) for one in devices_view(snapshot).devices]
    assert told == [
        ("host:0", "used", ""),
        ("host:1", "used", REASON),
        ("host:2", "failed", REASON),
        ("host:3", "free", ""),
    ]
    assert [(one.device, one.state, one.failure) for one in Board("b").read(snapshot, "").devices] == told
    metrics = samples(snapshot)
    assert [metrics["elasticmoe:device_failed", name] for name in DEVICES] == [0, 1, 1, 0]


class Told(Scene):
    """Keeps what is told, and with what; its HMM answers as it is asked to."""

    def _tell(self, kind: str, reason: str, /, **facts: str) -> None:
        self.told.append((kind, reason, facts))

    def turn_with(self, hmm: HmmStatus | None, layout: Layout) -> list[Any]:
        """What a turn tells of devices."""
        self.told.clear()
        self.executor.execute(self.executor.decide(Observation(cluster=cluster_of(hmm, beginning=layout))))
        return [one for one in self.told if one[0] != "decision"]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Told]:
    made = Told(World(UP.before), tmp_path)
    yield made
    made.journal.close()


def test_an_event_tells_once_of_each(scene: Told) -> None:
    healthy, broken = hmm_of(UP.before), hmm_of(UP.before, "host:2")
    told = ("device_failed", REASON, {"device": "host:2"})
    assert scene.turn_with(healthy, UP.before) == []
    assert scene.turn_with(broken, UP.before) == [told]
    assert scene.turn_with(broken, UP.before) == []
    assert scene.turn_with(None, UP.before) == [], "nobody says anything of it"
    assert scene.turn_with(broken, UP.before) == [], "the same, or what the next HMM says"
    assert scene.turn_with(healthy, UP.before) == []
    assert scene.turn_with(broken, UP.before) == [told], "it had come back"


def test_an_event_tells_what_is_loaded_without(scene: Told) -> None:
    loads: list[Layout] = []
    scene.links.load = loads.append  # type: ignore[attr-defined]
    kinds = [kind for kind, _, _ in scene.turn_with(EMPTY, LAYOUT)]
    assert kinds == ["device_failed", "loaded_without"]
    assert scene.told[-1][2] == {"replicas": "r1"}
    assert scene.turn_with(EMPTY, LAYOUT) == [], "asked for again, and told once"
    assert [layout.epoch for layout in loads] == [4, 4]


# ---- what is loaded --------------------------------------------------------------------------------------------------

LAYOUT = layout_of(3, (0, 1, 2))
SERVING = Status("serving", "")
EMPTY = HmmStatus("empty", 0, 0, None, hmm_of(LAYOUT, "host:1").devices, 0, (), False)
FAILED = msgspec.structs.replace(EMPTY, phase="failed", error=Refused("driver_failed", "host:1 cannot be used", False))


def turn(hmm: HmmStatus, status: Status = SERVING, *, served: bool = True, **changes: Any) -> Step[Status]:
    """What is made of the HMM's answer by a scaler of this `status`, which has seen the deployment serve, or not."""
    state = State(status=status, ever_served=served, operation=changes.pop("operation", None), stall_s=9.0)
    return serve(state, Observation(cluster=cluster_of(hmm, beginning=LAYOUT), **changes), 10.0)


def loaded(step: Step[Status]) -> Layout:
    (action,) = step.actions
    assert isinstance(action, LoadLayout)
    return action.layout


@pytest.mark.parametrize(("served", "is_resumed"), [(True, False), (False, True)])
@pytest.mark.parametrize("hmm", [EMPTY, FAILED], ids=["empty", "failed"])
def test_the_others_load_what_a_failed_device_had(hmm: HmmStatus, served: bool, is_resumed: bool) -> None:
    step = turn(hmm, served=served, is_resumed=is_resumed)
    layout = loaded(step)
    layout.check()
    assert (layout.epoch, [seat.device for seat in layout.seats]) == (4, ["host:0", "host:2"])
    assert layout.num_experts() == {0: 2, 2: 2}, "all of them, evenly"
    assert (step.state.phase, "host:1 cannot be used" in step.reason) == ("loading", True)
    loading = turn(msgspec.structs.replace(EMPTY, phase="loading"), step.state, served=served, is_resumed=is_resumed)
    again = turn(FAILED, loading.state, served=served, is_resumed=is_resumed)
    assert (again.state.phase, again.state.error, again.actions) == ("failed", FAILED.error, ()), "not for ever"
    more = msgspec.structs.replace(FAILED, devices=hmm_of(LAYOUT, "host:1", "host:2").devices)
    assert [seat.device for seat in loaded(turn(more, loading.state)).seats] == ["host:0"], "another one failed in it"


def test_where_it_is_no_help_the_load_fails_as_it_does() -> None:
    all_gone = msgspec.structs.replace(FAILED, devices=hmm_of(LAYOUT, *DEVICES).devices)
    fits_not = msgspec.structs.replace(FAILED, error=Refused("bad_checkpoint", "tensor x is missing", False))
    other = msgspec.structs.replace(FAILED, devices=hmm_of(LAYOUT, "host:3").devices)
    for hmm in (all_gone, fits_not, other):
        step = turn(hmm)
        assert (step.state.phase, step.state.error, step.actions) == ("failed", hmm.error, ())
    assert turn(FAILED, served=False).state.phase == "failed", "it begins: it never had what it was asked for"
    assert loaded(turn(EMPTY, served=False)) == LAYOUT


def test_what_had_no_room_is_loaded_again_without_the_failed_device() -> None:
    short = msgspec.structs.replace(FAILED, error=Refused("does_not_fit", "the device's memory is short", False))
    state = Status("loading", "", reload=(60.0, 5.0))
    step = serve(
        State(status=state, ever_served=True, stall_s=9.0),
        Observation(cluster=cluster_of(short, PoolStatus(2, ()), beginning=LAYOUT)),
        10.0,
    )
    assert [seat.device for seat in loaded(step).seats] == ["host:0", "host:2"]


def test_no_operation_takes_the_smaller_layout_for_its_own() -> None:
    """A growth from the layout leads to epochs 4 and 5."""
    growing = operation_of(msgspec.structs.replace(UP, legs=tuple(map(later, UP.legs))))
    assert loaded(turn(EMPTY, operation=growing)).epoch == 6


def later(leg: Any) -> Any:
    """The leg of a plan that begins with LAYOUT."""
    return msgspec.structs.replace(leg, layout=msgspec.structs.replace(leg.layout, epoch=leg.layout.epoch + 2))


def test_replicas_leave_whole_and_keep_their_numbers() -> None:
    seats = tuple(Seat(RankId(slot // 2, slot % 2), slot, f"npu:{slot}") for slot in range(6))
    layout = Layout(7, 2, seats, (tuple((expert % 6,) for expert in range(12)), ()))
    left = without_failed(layout, {"npu:3", "npu:9"}, 8)
    assert left is not None
    left.check()
    assert [str(seat.rank) for seat in left.seats] == ["r0t0", "r0t1", "r2t0", "r2t1"]
    assert left.num_experts() == {0: 3, 1: 3, 4: 3, 5: 3}
    assert without_failed(layout, {"npu:9"}, 8) is None
    assert without_failed(layout, {"npu:1", "npu:2", "npu:4"}, 8) is None, "nothing would be left"
