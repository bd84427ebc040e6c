"""What `up` verifies before it starts anything. Each check raises one error that names the limit and the value."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from elasticmoe.cli.console import size
from elasticmoe.cli.doctor_process import TestProcess
from elasticmoe.cli.probes import bind_once
from elasticmoe.cli.settings import Settings
from elasticmoe.common.capacity import (
    AVAILABLE_SHARE,
    DeviceTooSmall,
    budgets_of,
    load_of,
    needs_of,
    size_load,
    sizes_of,
    weights_on,
)
from elasticmoe.common.checkpoint import Checkpoint
from elasticmoe.common.devices.driver import MemoryInfo
from elasticmoe.common.devices.factory import check_devices, granularity_of
from elasticmoe.common.devices.names import hardware_of
from elasticmoe.common.families import load_spec
from elasticmoe.common.layout import Layout, initial_layout
from elasticmoe.common.machine import available_bytes
from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit, InvalidRequest, Unavailable
from elasticmoe.common.protocol.hmm import LoadModel
from elasticmoe.common.seat_sizes import size_ledger, size_mailbox
from elasticmoe.common.wording import counted

_DISK_BYTES_MIN = 64 * 1024 * 1024
_GIVEN_BACK_S = 10.0  # a driver may tidy up after dead processes in its own time
_POLL_S = 0.2


def check_hardware(settings: Settings) -> None:
    """The devices are there, with their driver, and what is to compute there does. Raises DeviceError no_driver,
    no_device, no_torch; ConfigError no_compute."""
    _ = settings.scaler.compute_backend
    check_devices(settings.scaler.device_count)


def check_ports(settings: Settings) -> None:
    """Both listeners' ports are free: told before a model is made. Raises InvalidRequest."""
    router, scaler = settings.router, settings.scaler
    if router.port == scaler.admin_port != 0:
        raise InvalidRequest(f"--port and --admin-port are both {router.port}", code="port_in_use")
    bind_once(router.host, router.port, "--port")
    bind_once(scaler.admin_host, scaler.admin_port, "--admin-port")


def check_store(settings: Settings) -> None:
    """A store that --store names answers. Raises Unavailable; ConfigError for a URL that cannot be read."""
    if not settings.scaler.store_url:
        return
    from elasticmoe.common.store import store_of  # here: the client is a quarter of what `up` imports otherwise

    store = store_of(settings.scaler, "elasticmoe")
    try:
        store.ping()
    except Unavailable as error:
        raise Unavailable(f"--store: {error.message}", code=error.code) from None
    finally:
        store.close()


def layout_left(settings: Settings) -> Layout | None:
    """The layout that the store says was committed last. None where there is none, where an operation that was cut off
    may have committed another one, and where the store's answer is for the scaler to refuse."""
    from elasticmoe.common.store import store_of

    store = store_of(settings.scaler, "elasticmoe")
    try:
        is_cut_off = store.get_operation(msgspec.msgpack.Decoder(msgspec.Raw)) is not None
        return None if is_cut_off else store.get_layout()
    except Unavailable:
        return None
    finally:
        store.close()


def check_memory(settings: Settings, model: Path) -> list[str]:
    """The model fits into the devices, by the HMM's own arithmetic, and they into the machine. Gives what there is to
    remark, one line each: devices that cannot be used, and that the first layout does without, as the HMM will.

    Raises DoesNotFit with the figures, CheckpointError when config.json describes no model that can be served;
    DeviceError where a device of the first layout cannot be used.
    """
    scaler, available = settings.scaler, available_bytes()
    spec = load_spec(model, scaler.dtype, scaler.tp)
    used = scaler.device_count.names()[: scaler.replicas * scaler.tp]
    told, failed = _memory_told(settings, used)
    budgets = budgets_of(settings.hmm, available, told)
    if short := _short(budgets, told):
        raise DoesNotFit(short, code="out_of_memory")
    load = load_of(scaler, spec, initial_layout(spec.num_experts_by_layer, used, tp=scaler.tp))
    try:
        sizes = size_load(load, spec, budgets, _granularity(settings))
    except DeviceTooSmall as small:
        needs = _needs(load, small.weights_bytes, small.ledger_bytes, small.mailbox_bytes, small.kv_bytes_min)
        of = told.get(small.device)
        share = _share(available) if of is None else _share(of.total, f"{small.device} has")
        raise DoesNotFit(f"{needs} {_limit(settings, small, share)}", code="out_of_memory") from None
    if told:  # the machine's memory is not what these devices have
        return [f"{name} cannot be used, and is left out: {reason}" for name, reason in failed.items()]
    kv_min = needs_of(load, spec, sizes.kv, _granularity(settings)).kv_handles_min * sizes.kv.handle_bytes
    most = max(sizes.devices.values(), key=lambda device: device.weights_bytes)
    needed = len(used) * (most.weights_bytes + most.ledger_bytes + most.mailbox_bytes + kv_min)
    if needed > available * AVAILABLE_SHARE:
        each = _needs(load, most.weights_bytes, most.ledger_bytes, most.mailbox_bytes, kv_min)
        raise DoesNotFit(
            f"{each} {size(needed)} on {counted(len(used), 'device')}, "
            f"more than {_share(available)}; a smaller --max-model-len or --max-sequences takes less",
            code="out_of_memory",
        )
    return []


class _Told(NamedTuple):
    """What drivers say of the devices' memory, and of those that cannot be used, why. Both are empty where the memory
    is the machine's."""

    memory: dict[str, MemoryInfo]
    failed: dict[str, str]


def _memory_told(settings: Settings, needed: Sequence[str]) -> _Told:
    """A process of its own asks: whoever asks a driver has some of a device's memory until it ends. Waits a while for
    what others are about to give back. Raises DeviceError where a `needed` device cannot be used; DeadlineExceeded."""
    devices = settings.scaler.device_count
    if devices.backend == "host":
        return _Told({}, {})
    names = devices.names()
    with TestProcess(names[0]) as process:
        deadline = time.monotonic() + _GIVEN_BACK_S
        while True:
            told = _ask_each(process, names, needed)
            is_short = _short(budgets_of(settings.hmm, 0, told.memory), told.memory)
            if not is_short or time.monotonic() > deadline:
                return told
            time.sleep(_POLL_S)


def _ask_each(process: TestProcess, names: Sequence[str], needed: Sequence[str]) -> _Told:
    told = _Told({}, {})
    for name in names:
        try:
            told.memory[name] = MemoryInfo(*process.ask("memory", [name])[name])
        except DeviceError as error:
            process.ask("memory", [])  # which raises where it is the process that has ended
            if name in needed:
                raise DeviceError(f"{name} cannot be used: {error.message}", code=error.code) from None
            told.failed[name] = error.message
    return told


def _short(budgets: Mapping[str, int], told: Mapping[str, MemoryInfo]) -> str:
    """Which budget is more than what is free, with the figures; empty where none is."""
    wanted: Counter[str] = Counter()
    for name, memory in told.items():
        hardware = hardware_of(name)
        wanted[hardware] += budgets[name]
        if wanted[hardware] > memory.free:
            what = "the budget" if name == hardware else "all budgets"
            return (
                f"{what} of {hardware}, {size(wanted[hardware])}, would be more than the {size(memory.free)} that are "
                f"free of its {size(memory.total)}: end what has the rest, take other --devices, or give less by "
                "--device-memory"
            )
    return ""


def _granularity(settings: Settings) -> int:
    return granularity_of(settings.scaler.device_count, settings.hmm.granularity)


def _needs(load: LoadModel, weights: int, ledger: int, mailbox: int, kv: int) -> str:
    exchanged = f", {size(mailbox)} of mailbox for {load.max_tokens} tokens" if mailbox else ""
    sequences = counted(load.max_sequences, "sequence")
    return (
        f"{size(weights)} of {load.dtype} weights, {size(ledger)} of ledger for {sequences}{exchanged} and {size(kv)} "
        f"of KV for one of {load.max_model_len} tokens take"
    )


def _limit(settings: Settings, small: DeviceTooSmall, share: str) -> str:
    """More than what, and what helps. `share`: what a budget is of where nobody gave it."""
    kv, needed = (
        settings.scaler.kv_bytes,
        small.weights_bytes + small.ledger_bytes + small.mailbox_bytes + small.kv_bytes_min,
    )
    if small.kv_bytes_min > kv:
        return f"more KV than the {size(kv)} of --kv-memory; raise it, or lower --max-model-len"
    each = f"{size(needed)} per device, more than the {size(small.budget)}"
    if settings.hmm.device_bytes:
        return f"{each} of --device-memory; raise it, or take more --replicas, which share the experts"
    devices = settings.scaler.device_count
    if devices.backend != "host":
        return f"{each} of {share}; take more --replicas, which share the experts, or a smaller --model"
    return f"{each} that each of {devices.count} gets of {share}; take fewer --devices or a smaller --model"


def _share(nbytes: int, which: str = "available") -> str:
    return f"the {size(nbytes * AVAILABLE_SHARE)} that are {AVAILABLE_SHARE:.0%} of the {size(nbytes)} {which}"


def num_devices_that_fit(settings: Settings, model: Path) -> int:
    """How many of the devices to have: as many as there is memory for, each with a budget for its part of the only
    replica's weights and its KV, so that the deployment can grow and shrink; at least those of the replicas."""
    scaler, granularity = settings.scaler, _granularity(settings)
    spec = load_spec(model, scaler.dtype, scaler.tp)
    alone = initial_layout(spec.num_experts_by_layer, scaler.device_count.names()[: scaler.tp], tp=scaler.tp)
    weights = max(weights_on(sizes_of(spec, granularity), alone).values())
    load = load_of(scaler, spec, alone)
    whole = weights + size_ledger(load, granularity).nbytes + size_mailbox(load, spec, granularity) + scaler.kv_bytes
    room = int(available_bytes() * AVAILABLE_SHARE) // (settings.hmm.device_bytes or whole)
    return max(scaler.replicas * scaler.tp, min(room, scaler.device_count.count))


def check_checkpoint(settings: Settings, model: Path) -> list[str]:
    """The checkpoint has all that the model needs; reads headers only. What there is to remark about it, one line each.
    Raises CheckpointError before anything is started that would find out."""
    spec = load_spec(model, settings.scaler.dtype, settings.scaler.tp)
    with Checkpoint(model, spec) as checkpoint:
        remarks = checkpoint.remarks()
    asked, served = settings.scaler.max_model_len, spec.max_positions
    if asked > served:
        what = "sliding window" if served == spec.sliding_window else "max_position_embeddings"
        remarks.append(f"sequences end at the {served} tokens of the model's {what}, not at {asked}")
    return remarks


def check_disk(run_dir: Path) -> None:
    """The run directory's file system has room for the journal and the logs. Raises DoesNotFit."""
    folder = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < _DISK_BYTES_MIN:
        raise DoesNotFit(
            f"{folder} has {size(free)} free, less than the {size(_DISK_BYTES_MIN)} that a run directory needs",
            code="storage_full",
        )
