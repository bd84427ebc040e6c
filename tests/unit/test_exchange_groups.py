"""Groups whose members connect in their first collective, as nccl's and hccl's do: that is over before a rank has one.

gloo does what they would, under a name that connects late.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from elasticmoe.services.worker.backends.torch import TorchBackend
from elasticmoe.services.worker.exchange import groups as module
from elasticmoe.services.worker.exchange.groups import Group, Groups
from tests.devices import vendor
from tests.procs.waiting import wait_until
from tests.unit.exchanges import Host

CPU = torch.device("cpu")
make_gloo = module.BY_DEVICE["cpu"]


class Late:
    """A group of torch's, and in which threads its collectives were begun."""

    def __init__(self, group: Any) -> None:
        self.group, self.threads = group, list[str]()
        self.is_aborted = False

    def alltoall_base(self, *arguments: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        return self.group.alltoall_base(*arguments)

    def abort(self) -> None:
        group, self.group = self.group, None  # who lets go of it last waits for its peers
        group.abort()
        del group
        self.is_aborted = True


class Alone(Late):
    """One whose peer has died before it connected: what is begun is never over. `num_looks`: whether it is."""

    num_looks = 0

    def alltoall_base(self, *_: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        return self

    def is_completed(self) -> bool:
        self.num_looks += 1
        return False


class Broken(Late):
    """One that torch refuses to connect."""

    def alltoall_base(self, *_: Any) -> Any:
        raise RuntimeError("Duplicate GPU detected")


class Makers:
    """Makes groups of a `kind` where ranks ask for gloo's. `made`: all of them."""

    def __init__(self) -> None:
        self.kind: type[Late] = Late
        self.made: list[Late] = []

    def make(self, device: torch.device, store: Any, rank: int, size: int) -> Group:
        one = self.kind(make_gloo(device, store, rank, size)._group)
        self.made.append(one)
        return Group(one, ends_by_itself=True, connects_on=device)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Makers:
    """Groups of CPUs connect late. Before `pair`."""
    makers = Makers()
    monkeypatch.setitem(module.BY_DEVICE, "cpu", makers.make)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)  # CPUs have no current one
    return makers


@pytest.fixture
def host() -> Host:
    """Of two ranks, whose first generation runs."""
    made = Host((2, 4, 8, 2))
    made.observer.set_membership(1, 0b11, True, 1)
    return made


@pytest.fixture
def pair(tmp_path: Path, host: Host) -> Iterator[list[Groups]]:
    """Of the two ranks."""
    made = [Groups(tmp_path / "rendezvous", "memory", host.join(slot), CPU) for slot in (0, 1)]
    yield made
    for each in made:
        each.keep(2)
    for each in made:
        each.close()


def come(pair: list[Groups], generation: int = 1) -> list[bool]:
    """Both ranks ask; whether they have a group."""
    return [each.prepare(generation, [0, 1]) for each in pair]


def test_members_are_connected_before_a_rank_has_the_group(late: Makers, pair: list[Groups]) -> None:
    wait_until(lambda: all(come(pair)), "both have a group", 20.0)
    assert [group.threads for group in late.made] == [["group-1"]] * 2, "one of each, in no rank's own thread"
    sent, came = torch.tensor([1.0, 2.0]), [torch.zeros(2) for _ in pair]
    begun = [each.get(1) for each in pair]
    for group, target in zip(begun, came, strict=True):
        assert group is not None
        group.start(target, sent, [1, 1], [1, 1], 20.0)
    for group in begun:
        assert group is not None
        wait_until(group.is_done, "the collective is over", 20.0)
        group.finish()
    assert [target.tolist() for target in came] == [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        (Alone, TimeoutError, "2 members have not connected in 0.2 s"),
        (Broken, RuntimeError, "Duplicate GPU detected"),  # nccl, of two ranks on one GPU
    ],
)
def test_members_that_do_not_connect_hold_up_no_rank(
    late: Makers,
    pair: list[Groups],
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Late],
    error: type[Exception],
    text: str,
) -> None:
    """It is told why when it asks for the group, and not at its step's deadline."""
    monkeypatch.setattr(module, "CONNECT_S", 0.2)
    late.kind, made = kind, late.made
    come(pair)
    wait_until(lambda: len(made) == 2 and all(group.is_aborted for group in made), "both are given up", 20.0)
    for each in pair:
        with pytest.raises(error, match=text):
            wait_until(partial(each.get, 1), "it has failed", 20.0)
    assert come(pair) == [False, False], "it is made no second time"


def test_a_group_that_is_not_wanted_any_more_connects_no_longer(late: Makers, pair: list[Groups]) -> None:
    late.kind, made = Alone, late.made
    come(pair)
    wait_until(lambda: all(group.threads for group in made) and len(made) == 2, "both connect", 20.0)
    for each in pair:
        each.keep(2)
    wait_until(lambda: all(group.is_aborted for group in made), "both are given up", 20.0)


def num_looks(made: list[Late]) -> int:
    return sum(group.num_looks for group in made if isinstance(group, Alone))


def test_a_group_whose_generation_is_over_is_given_up_though_its_rank_says_nothing(
    late: Makers, pair: list[Groups], host: Host
) -> None:
    """As where the rank waits for its device, on which the members connect: one of them dies before the flip, or just
    after it. Until then the group stays."""
    late.kind, made = Alone, late.made
    host.observer.stage_membership(2, 0b11, 2)
    come(pair, 2)
    wait_until(lambda: len(made) == 2 and all(group.threads for group in made), "both connect", 20.0)
    assert host.observer.flip(2)
    before = num_looks(made)
    wait_until(lambda: num_looks(made) > before + 10, "they go on", 20.0)
    assert not any(group.is_aborted for group in made)
    host.observer.set_membership(3, 0b11, False)
    wait_until(lambda: all(group.is_aborted for group in made), "both are given up", 20.0)
    for each in pair:
        with pytest.raises(TimeoutError, match="2 members have not connected, and are not to any more"):
            wait_until(partial(each.get, 2), "it has failed", 20.0)


def test_members_that_do_not_come_are_not_waited_for_when_the_generation_is_over(
    pair: list[Groups], host: Host
) -> None:
    host.observer.stage_membership(2, 0b11, 2)
    assert not pair[0].prepare(2, [0, 1])
    host.observer.set_membership(3, 0b01, False)
    with pytest.raises(TimeoutError, match="generation 2 is over"):
        wait_until(partial(pair[0].get, 2), "it has failed", 20.0)


def test_gloo_is_connected_when_it_is_made(pair: list[Groups], monkeypatch: pytest.MonkeyPatch) -> None:
    def unasked(*_: object) -> None:
        raise AssertionError("it has no collective before its ranks' own")

    monkeypatch.setattr(Group, "start", unasked)
    wait_until(lambda: all(come(pair)), "both have a group", 20.0)


class Streams:
    """Torch's module of a device, as far as streams go. `waited`: those that were waited for."""

    def __init__(self) -> None:
        self.current, self.waited = "the rank's", list[str]()

    def Stream(self) -> str:
        return "another"

    @contextmanager
    def stream(self, one: str) -> Iterator[None]:
        before, self.current = self.current, one
        yield
        self.current = before

    def current_stream(self, device: torch.device) -> Streams:
        assert device == CPU
        return self

    def synchronize(self) -> None:
        self.waited.append(self.current)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda _: made)
    return made


def test_a_rank_waits_for_what_it_computes_and_not_for_a_group_that_connects(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend()
    backend.is_synchronous = False  # as on an accelerator
    monkeypatch.delattr(torch.accelerator, "synchronize")  # waits for all streams of the device
    backend.fence()
    assert streams.waited == ["the rank's"]


class Foreign:
    """ProcessGroupNCCL and ProcessGroupHCCL, as far as they are used. Their kinds are not here: what is asked of them
    is, of all that were made."""

    Options = type("Options", (), {})
    streams: Streams
    asked: list[tuple[Any, ...]]
    registers: list[str | None]

    def __init__(self, *arguments: Any) -> None:
        self.asked.append(arguments[1:3])
        self.registers.append(os.environ.get("NCCL_GRAPH_REGISTER"))

    def _set_default_timeout(self, timeout: timedelta) -> None:
        assert timeout == timedelta(seconds=module.COLLECT_S)

    def alltoall_base(self, came: torch.Tensor, sent: torch.Tensor, *sizes: Any) -> Any:
        self.asked.append((self.streams.current, came.device, sent.device, came.shape, sizes[:2]))
        return self

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def abort(self) -> None:
        self.asked.append(("abort",))


class ForeignHccl(Foreign):
    """As torch-npu has it."""

    def abort_hccl_comm(self, reason: str | None, /) -> None:
        self.asked.append(("abort_hccl_comm", reason))


@pytest.fixture
def foreign(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Accelerators' groups are of these kinds; what they were asked for."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Foreign, "streams", streams, raising=False)
    monkeypatch.setattr(Foreign, "asked", asked, raising=False)
    monkeypatch.setattr(Foreign, "registers", [], raising=False)
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "1")
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Foreign, raising=False)
    monkeypatch.setattr(module.importlib, "import_module", lambda _: SimpleNamespace(ProcessGroupHCCL=ForeignHccl))
    return asked


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_accelerators_groups_connect_on_their_ranks_device(
    kind: str, streams: Streams, foreign: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, current, asked = torch.device("meta"), list[torch.device](), foreign
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    group = module.BY_DEVICE[kind](device, None, 1, 3)  # type: ignore[arg-type]
    group.connect(3, lambda: True)
    assert current == [device]
    assert Foreign.registers == ["0" if kind == "cuda" else "1"], "nccl keeps no addresses: others may be mapped there"
    assert asked == [(1, 3), ("another", device, device, torch.Size([3]), ([1, 1, 1], [1, 1, 1]))]
    assert streams.current == "the rank's"
    group.connect(1, lambda: True)
    assert len(asked) == 2, "who is alone has nobody to connect to"


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_accelerators_groups_are_given_up_by_what_ends_their_collectives(
    kind: str, foreign: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of hccl's that is another call; of a version that has none, the one of all groups."""
    device = torch.device("meta")
    group = module.BY_DEVICE[kind](device, None, 0, 2)  # type: ignore[arg-type]
    for _ in range(2):
        group.abort()
    assert foreign[1:] == [("abort",) if kind == "cuda" else ("abort_hccl_comm", "its generation is over")], "once"
    monkeypatch.delattr(ForeignHccl, "abort_hccl_comm")
    module.BY_DEVICE[kind](device, None, 0, 2).abort()  # type: ignore[arg-type]
    assert foreign[-1] == ("abort",)


@pytest.mark.parametrize("wheel", vendor.GROUPS, ids=lambda wheel: wheel.requirement)
def test_what_ends_hccls_collectives_is_what_the_vendor_declares(wheel: vendor.Headers) -> None:
    """Its `abort` overrides none of torch's, and so is none for Python; torch's own does nothing."""
    declared, calls = (path.read_text() for path in vendor.headers(wheel))
    group = declared[declared.index("  // Provides an API to abort the ProcessGroup") :]
    assert re.search(r"bool abort\(c10::optional<std::string> abortReason = c10::nullopt\);", group)
    assert re.search(r"void abortAndClearHcclComm\(c10::optional<std::string> abortReason\);", group)
    assert "void abort() override" not in group
    assert '.abort_hccl_comm("reinit")' in calls
    text = (Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/Backend.hpp").read_text()
    assert "virtual void abort() {}" in text
