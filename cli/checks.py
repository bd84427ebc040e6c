"""What `up` verifies before it starts anything. Each check raises one error that names the limit and the value."""

from __future__ import annotations

import shutil
from pathlib import Path

from cli.console import size
from cli.probes import bind_once
from cli.settings import Settings
from common.checkpoint import Checkpoint
from common.families import load_spec, records
from common.model_spec import ModelSpec, kv_geometry, round_up
from common.protocol.errors import DoesNotFit, InvalidRequest, Unavailable
from common.store import store_of

_MEMORY_SHARE = 0.8  # of what is available; the rest is for activations, the processes and everybody else
_DISK_BYTES_MIN = 64 * 1024 * 1024


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
    store = store_of(settings.scaler, "elasticmoe")
    try:
        store.ping()
    except Unavailable as error:
        raise Unavailable(f"--store: {error.message}", code=error.code) from None
    finally:
        store.close()


def check_memory(settings: Settings, model: Path) -> None:
    """The model fits into the devices and those into the machine. Raises DoesNotFit with the figures, CheckpointError
    when config.json describes no model that can be served."""
    scaler = settings.scaler
    spec = load_spec(model, scaler.dtype)
    granularity = settings.hmm.granularity
    weights = device_weights_bytes(spec, scaler.replicas * scaler.tp, granularity)
    kv_min = kv_geometry(spec, scaler.block_size, granularity).handle_bytes
    num_used = scaler.replicas * scaler.tp
    available = available_bytes()
    if settings.hmm.device_bytes:
        budget = settings.hmm.device_bytes
        if weights + kv_min > budget:
            raise DoesNotFit(
                f"{_shares(spec, weights, kv_min)} per device exceed the {size(budget)} of --device-memory",
                code="out_of_memory",
            )
    needed = num_used * (weights + kv_min)
    if needed > available * _MEMORY_SHARE:
        raise DoesNotFit(
            f"{num_used} devices need {size(needed)} ({_shares(spec, weights, kv_min)} each), and "
            f"{_MEMORY_SHARE:.0%} of the {size(available)} that are available are {size(available * _MEMORY_SHARE)}",
            code="out_of_memory",
        )


def check_checkpoint(settings: Settings, model: Path) -> list[str]:
    """The checkpoint has all that the model needs; reads headers only. What there is to remark about it, one line each.
    Raises CheckpointError before anything is started that would find out."""
    spec = load_spec(model, settings.scaler.dtype)
    with Checkpoint(model, spec) as checkpoint:
        remarks = checkpoint.remarks()
    asked, served = settings.scaler.max_model_len, spec.max_positions
    if asked > served == spec.sliding_window:
        remarks.append(f"sequences end at the {served} tokens of the model's sliding window, not at {asked}")
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


def available_bytes() -> int:
    """Memory that processes can still get: the machine's, or the container's where that is less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return min(available, max(0, int(limit) - used)) if limit.isdigit() else available


def _shares(spec: ModelSpec, weights: int, kv: int) -> str:
    return f"{size(weights)} of {spec.dtype} weights and at least {size(kv)} of KV"
