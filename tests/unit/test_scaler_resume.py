"""What a scaler goes on with: nothing is dropped that nobody asked to drop, and no epoch falls (promise P7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.fence import Fence
from elasticmoe.common.layout import Layout, Served, initial_layout
from elasticmoe.common.protocol.errors import Conflict, Fenced, Unavailable
from elasticmoe.common.protocol.scaler import HmmStatus
from elasticmoe.common.store import Writer
from elasticmoe.common.transport import new_identity
from elasticmoe.services.scaler.actions import LoadLayout
from elasticmoe.services.scaler.control.members import serve
from elasticmoe.services.scaler.control.state import State
from elasticmoe.services.scaler.observation import Observation
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.policy.record import PolicyRecord, changed
from elasticmoe.services.scaler.store.journal import Journal
from elasticmoe.services.scaler.store.recall import Recall
from elasticmoe.services.scaler.store.resume import CODE, Left, Wanted, begin
from tests.unit.reserves import NO_RESERVE
from tests.unit.specs import tiny_mixtral_spec
from tests.unit.transitions import DOWN, UP, cluster_of, layout_of, operation_of

SERVED = Served("/models/a", "float32")
LEFT = Left(layout_of(3, (0, 1, 2)), SERVED, epoch=3)
WANTED = Wanted(SERVED, replicas=2, tp=1, devices=DeviceCount("host", 4), experts=(4,))


def wanted(**changes: object) -> Wanted:
    return msgspec.structs.replace(WANTED, **changes)


def left(**changes: object) -> Left:
    return msgspec.structs.replace(LEFT, **changes)


def test_the_first_of_all_begins_with_what_is_wanted() -> None:
    beginning = begin(Left(), WANTED)
    assert (beginning.layout.epoch, beginning.layout.dp, beginning.is_resumed) == (1, 2, False)


def test_what_was_committed_goes_on_whatever_number_of_replicas_is_wanted() -> None:
    for replicas in (1, 2, 4):
        beginning = begin(LEFT, wanted(replicas=replicas))
        assert (beginning.layout, beginning.is_resumed, beginning.refusal) == (LEFT.layout, True, None)


def test_more_devices_and_an_older_store_without_a_name_contradict_nothing() -> None:
    assert begin(LEFT, wanted(devices=DeviceCount("host", 9))).is_resumed
    assert begin(LEFT, wanted(devices=DeviceCount("host", 3))).is_resumed
    assert begin(left(served=None), WANTED).is_resumed


@pytest.mark.parametrize(
    ("found", "now", "text"),
    [
        (LEFT, wanted(served=Served("/models/b", "float32")), "`model` was /models/a, and is /models/b now"),
        (LEFT, wanted(served=Served("/models/a", "bfloat16")), "`dtype` was float32, and is bfloat16 now"),
        (LEFT, wanted(served=Served("/models/a", "float32", "torch")), "`compute` was host, and is torch now"),
        (
            LEFT,
            wanted(served=Served("/models/a", "float32", "host", "bfloat16")),
            "`activations` was float32, and is bfloat16 now",
        ),
        (LEFT, wanted(tp=2, replicas=1), "`tp` was 1, and is 2 now"),
        (
            LEFT,
            wanted(devices=DeviceCount("host", 2)),
            "its replicas lie on the first 3 devices, so --devices (ELASTICMOE_DEVICES) has to be host:3 or more; "
            "it is host:2 now",
        ),
        (
            left(layout=initial_layout([4], ["host:0", "node-b/host:1"])),
            WANTED,
            "its replicas use node-b/host:1, and this deployment has only this machine's host:4",
        ),
        (left(served=None), wanted(experts=(4, 4)), "its layers and experts are not those of the model"),
        (left(layout=None, damage="store value is not valid"), WANTED, "it cannot be read (store value is not valid)"),
    ],
)
def test_what_contradicts_is_refused_and_dropped_only_where_that_is_asked_for(
    found: Left, now: Wanted, text: str
) -> None:
    refusal = begin(found, now).refusal
    assert refusal is not None
    assert (refusal.code, refusal.retryable) == (CODE, False)
    assert text in refusal.message
    assert "use the settings of that run" in refusal.message
    assert "`elasticmoe up --fresh`" in refusal.message
    anew = begin(msgspec.structs.replace(found, is_dropped=True), now)
    assert (anew.refusal, anew.is_resumed, anew.layout.epoch) == (None, False, 4)
    assert anew.layout.dp == now.replicas


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_a_store_that_was_emptied_begins_above_what_was_seen(epoch: int) -> None:
    assert begin(Left(epoch=epoch), WANTED).layout.epoch == epoch + 1


def test_a_store_that_lost_its_last_writes_goes_on_above_what_was_seen() -> None:
    beginning = begin(left(epoch=5), WANTED)
    assert (beginning.layout.epoch, beginning.is_resumed) == (6, True)
    assert LEFT.layout is not None
    assert beginning.layout.seats == LEFT.layout.seats


def test_an_operation_goes_on_from_the_layout_that_it_may_have_committed() -> None:
    for plan in (UP, DOWN):
        for leg in range(len(plan.legs)):
            before = plan.legs[leg - 1].layout if leg else plan.before
            for phase in ("plan", "prepare", "abort", "commit", "migrate", "release"):
                operation = msgspec.structs.replace(operation_of(plan), phase=phase, leg=leg)
                found = left(layout=before, operation=operation, epoch=plan.after.epoch)
                is_forward = phase in ("commit", "migrate", "release")
                assert begin(found, WANTED).layout == (plan.legs[leg].layout if is_forward else before)
                # It had announced the layout already: nothing changes.
                after = left(layout=plan.legs[leg].layout, operation=operation, epoch=plan.after.epoch)
                assert begin(after, WANTED).layout == plan.legs[leg].layout
                # More was seen than it leads to: its end was lost with what followed.
                assert begin(msgspec.structs.replace(found, epoch=9), WANTED).layout.epoch == 10


def test_nothing_is_loaded_while_it_is_refused_and_what_is_held_goes_on() -> None:
    refusal = begin(LEFT, wanted(tp=2, replicas=1)).refusal
    assert LEFT.layout is not None
    empty = HmmStatus("empty", 0, 0, None, (), 0, (), False)
    state = State(stall_s=9.0)
    seen = Observation(cluster=cluster_of(empty, beginning=LEFT.layout))
    assert serve(state, seen, 0.0).actions == (LoadLayout(LEFT.layout),)
    refused = serve(state, msgspec.structs.replace(seen, load_refused=refusal), 0.0)
    assert (refused.actions, refused.state.phase, refused.state.error) == ((), "failed", refusal)
    held = msgspec.structs.replace(empty, phase="ready", layout=LEFT.layout)
    chosen = serve(state, Observation(cluster=cluster_of(held), load_refused=refusal), 0.0)
    assert (chosen.state.phase, chosen.state.error) == ("attaching", None)


class KeptStore:
    """What a store keeps, as values; `failure` is raised by every call while it is set, `layout_failure` by one."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.served: Served | None = None
        self.operation: Operation | None = None
        self.epoch = 0
        self.instance = ""
        self.policy: PolicyRecord | None = None
        self.policy_failure: Exception | None = None
        self.failure: Exception | None = None
        self.layout_failure: Exception | None = None
        self.writes: list[str] = []
        self.on_write: Callable[[], None] = lambda: None

    def _get(self, value: object, failure: Exception | None = None) -> object:
        if failure or self.failure:
            raise failure or self.failure or AssertionError
        return value

    def get_layout(self) -> object:
        return self._get(self.layout, self.layout_failure)

    def get_served(self) -> object:
        return self._get(self.served)

    def get_instance(self) -> object:
        return self._get(self.instance)

    def put_instance(self, _: Writer, instance: str) -> None:
        self.writes.append("instance")
        self.instance = instance

    def get_policy(self, _: object) -> object:
        return self._get(self.policy, self.policy_failure)

    def put_policy(self, _: Writer, policy: PolicyRecord) -> None:
        self.writes.append("policy")
        self.policy = policy

    def get_epoch(self) -> object:
        return self._get(self.epoch)

    def get_operation(self, _: object) -> object:
        return self._get(self.operation)

    def ended_operations(self, _: object) -> object:
        return self._get([])

    def put_served(self, _: Writer, served: Served) -> None:
        self.writes.append("served")
        self.served = served

    def put_operation(self, _: Writer, operation: Operation | None) -> str:
        self.on_write()
        self.writes.append("operation")
        self.operation = operation
        return "mark"

    def put_layout(self, _: Writer, layout: Layout) -> None:
        self.on_write()
        self.writes.append("layout")
        self.layout, self.epoch = layout, layout.epoch

    def journal_mark(self) -> str:
        return "mark"


BY = Writer("scaler:a", 1)


@pytest.fixture
def store() -> KeptStore:
    return KeptStore()


def recall_of(store: KeptStore, folder: Path, **settings: object) -> Recall:
    values = {"run_dir": str(folder), "model": "/models/a", "dtype": "float32", "devices": "host:4", **settings}
    config = ScalerConfig(**values)  # type: ignore[arg-type]
    config.state_dir.mkdir(parents=True, exist_ok=True)
    epochs = Fence(config.state_dir, "layout")
    spec = tiny_mixtral_spec(num_local_experts=4, num_hidden_layers=1)
    return Recall(config, spec, store, epochs, new_identity)  # type: ignore[arg-type]


def test_the_store_names_what_it_serves_before_the_first_layout(store: KeptStore, tmp_path: Path) -> None:
    recalled = recall_of(store, tmp_path).read(BY)
    assert (recalled.resumed, store.writes) == (None, ["served", "instance", "policy"])
    assert store.served == Served("/models/a", tiny_mixtral_spec().dtype)
    again = recall_of(store, tmp_path).read(BY)
    assert store.writes == ["served", "instance", "policy"]
    assert again.instance == recalled.instance == store.instance != ""


def test_what_is_dropped_is_dropped_once_and_survives_a_kill_before_that(store: KeptStore, tmp_path: Path) -> None:
    store.layout, store.epoch, store.operation, store.instance = layout_of(3, (0, 1, 2)), 3, operation_of(UP), "i-old"
    recall = recall_of(store, tmp_path)
    (tmp_path / "state/fresh").touch()
    for _ in range(2):  # killed before its layout was written, it begins anew again
        recalled = recall.read(BY)
        assert (recalled.beginning.layout.epoch, recalled.beginning.is_resumed) == (4, False)
        assert (recalled.operation, store.operation) == (None, None)
        assert recalled.instance == store.instance != "i-old", "its operations are another deployment's"
    store.put_layout(BY, recalled.beginning.layout)
    recall.settled()
    again = recall.read(BY)
    assert again.resumed is not None
    assert (again.resumed.epoch, again.beginning.is_resumed) == (4, True)


def test_a_refusal_changes_nothing_in_the_store(store: KeptStore, tmp_path: Path) -> None:
    store.layout, store.epoch, store.operation = layout_of(3, (0, 1, 2)), 3, operation_of(UP)
    store.served = Served("/models/b", "float32")
    recalled = recall_of(store, tmp_path).read(BY)
    assert recalled.beginning.refusal is not None
    assert store.writes == []


def test_a_store_that_does_not_answer_is_asked_again_and_one_that_is_corrupt_is_refused(
    store: KeptStore, tmp_path: Path
) -> None:
    recall = recall_of(store, tmp_path)
    store.epoch = 3
    for code in ("store_unavailable", "storage_full"):
        store.failure = Unavailable("no", code=code)
        with pytest.raises(Unavailable):
            recall.read(BY)
    store.failure, store.layout_failure = None, Unavailable("value is not valid", code="store_corrupt")
    refusal = recall.read(BY).beginning.refusal
    assert refusal is not None
    assert "value is not valid" in refusal.message
    (tmp_path / "state/fresh").touch()
    assert recall.read(BY).beginning.layout.epoch == 4


def test_an_epoch_is_on_this_hosts_disk_before_anybody_can_see_it(store: KeptStore, tmp_path: Path) -> None:
    recall = recall_of(store, tmp_path)
    epochs: list[int] = []
    store.on_write = lambda: epochs.append(int((tmp_path / "state/fence-layout").read_text()))
    journal = Journal(store, "scaler:a", recall.epochs.note, lambda: None, lambda: None, NO_RESERVE, SYSTEM_CLOCK)  # type: ignore[arg-type]
    journal.start()
    journal.announce(layout_of(2, (0, 1)))
    journal.act_under(1)
    journal.close()
    assert (store.writes, epochs) == (["layout"], [2])
    journal = Journal(store, "scaler:a", recall.epochs.note, lambda: None, lambda: None, NO_RESERVE, SYSTEM_CLOCK)  # type: ignore[arg-type]
    journal.start()
    journal.put(operation_of(UP))
    journal.act_under(1)
    journal.close()
    assert epochs == [2, UP.after.epoch]
    # The store is emptied, and everything ends: what was seen is passed, not met.
    anew = recall_of(KeptStore(), tmp_path).read(BY)
    assert anew.beginning.layout.epoch == UP.after.epoch + 1


def test_a_superseded_scaler_takes_nothing_over(store: KeptStore, tmp_path: Path) -> None:
    def fenced(*_: object) -> None:
        raise Fenced("another scaler holds the lease")

    store.put_served = fenced  # type: ignore[method-assign]
    with pytest.raises(Fenced):
        recall_of(store, tmp_path).read(BY)


def test_the_policy_that_was_set_while_it_ran_goes_on_until_the_settings_change(
    store: KeptStore, tmp_path: Path
) -> None:
    first = recall_of(store, tmp_path, policy="advise").read(BY).policy
    assert (first.version, first.config.mode, first.config.ttft_s) == (1, "advise", 2.0)
    store.policy = changed(first, 1, msgspec.structs.replace(first.config, mode="act", ttft_s=0.5))
    again = recall_of(store, tmp_path, policy="advise").read(BY).policy
    assert (again.version, again.config.mode, again.config.ttft_s) == (2, "act", 0.5)
    other = recall_of(store, tmp_path, policy="advise", itl_s=0.2).read(BY).policy
    assert (other.version, other.config.mode, other.config.itl_s) == (3, "advise", 0.2)
    assert store.policy == other
    (tmp_path / "state/fresh").touch()
    assert recall_of(store, tmp_path, itl_s=0.2).read(BY).policy.version == 1


@pytest.mark.parametrize(("mode", "used"), [("act", "advise"), ("advise", "advise"), ("off", "off")])
def test_a_policy_that_cannot_be_read_keeps_nothing_else_from_going_on(
    store: KeptStore, tmp_path: Path, mode: str, used: str
) -> None:
    """A later release's has fields that this one does not know. It may have said `off`: nothing is done by it."""
    store.layout, store.epoch = layout_of(3, (0, 1)), 3
    store.served = Served("/models/a", "float32")
    store.policy_failure = Unavailable("store value is not valid: config: has no field 'x'", code="store_corrupt")
    recalled = recall_of(store, tmp_path, policy=mode, ttft_s=0.5).read(BY)
    assert recalled.beginning.is_resumed
    assert (recalled.policy.config.mode, recalled.policy.config.ttft_s) == (used, 0.5)
    assert "has no field 'x'" in recalled.policy_damage
    assert "policy" not in store.writes, "the later release finds it as it was"
    store.policy_failure = Unavailable("store does not answer", code="store_unavailable")
    with pytest.raises(Unavailable, match="does not answer"):
        recall_of(store, tmp_path).read(BY)


def test_another_default_in_a_later_release_is_not_the_operators_word(store: KeptStore, tmp_path: Path) -> None:
    first = recall_of(store, tmp_path).read(BY).policy
    set_ = changed(first, 1, msgspec.structs.replace(first.config, mode="act"))
    store.policy = msgspec.structs.replace(set_, settings=msgspec.structs.replace(set_.settings, hold_s=42.0))
    assert recall_of(store, tmp_path).read(BY).policy == store.policy


def test_a_change_of_a_policy_that_somebody_else_has_changed_is_refused(store: KeptStore, tmp_path: Path) -> None:
    first = recall_of(store, tmp_path).read(BY).policy
    second = changed(first, 1, msgspec.structs.replace(first.config, mode="act"))
    assert changed(second, 2, second.config) is second, "nothing is changed"
    with pytest.raises(Conflict, match="the policy is at version 2 and the change is of version 1") as refused:
        changed(second, 1, first.config)
    assert refused.value.code == "policy_changed"
