"""`python -m elasticmoe.cli.bench.load_child read|load FOLDER DTYPE`: one turn of `bench load`, told in JSON."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import msgspec

from elasticmoe.cli.bench.load import read_through
from elasticmoe.common.capacity import sizes_of
from elasticmoe.common.devices.factory import open_device
from elasticmoe.common.families import load_spec
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.layout import initial_layout
from elasticmoe.common.machine import available_bytes
from elasticmoe.common.model_spec import Dtype
from elasticmoe.common.protocol.hmm import LoadModel
from elasticmoe.services.hmm.loading.loader import ModelLoad
from elasticmoe.services.hmm.memory.memory import BusSegment, DeviceMemory

_GRANULARITY = os.sysconf("SC_PAGESIZE")
_DEVICE = "host:0"
_BLOCK_SIZE, _MODEL_LEN, _KV_BYTES = 16, 64, 64 << 20  # little beside the weights
_TURN_S = 0.01


def read(model: Path) -> dict[str, Any]:
    """Read the weights' files."""
    started = time.perf_counter()
    for path in sorted(model.glob("*.safetensors")):
        read_through(path)
    return {"seconds": time.perf_counter() - started}


def load(model: Path, dtype: Dtype) -> dict[str, Any]:
    """Load the weights into one device."""
    spec = load_spec(model, dtype)
    layout = initial_layout(spec.num_experts_by_layer, [_DEVICE])
    request = LoadModel("bench", str(model), dtype, layout, _BLOCK_SIZE, _KV_BYTES, 32, 4, _MODEL_LEN)
    sizes_of(spec, _GRANULARITY)  # not a load's work: whoever asks for one has asked what it needs
    memory = DeviceMemory(open_device(_DEVICE, _GRANULARITY, available_bytes() // _GRANULARITY * _GRANULARITY))
    segment = BusSegment(HostShared.create("bus"))
    model_load = ModelLoad(request, {_DEVICE: memory}, segment, _GRANULARITY)
    before = _own_bytes()
    peak, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(_TURN_S):
            peak[0] = max(peak[0], memory.device.pages + _own_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    model_load.run()
    seconds = time.perf_counter() - started
    is_over.set()
    watcher.join()
    result = {"seconds": seconds, "bytes_read": model_load.bytes_done, "result_bytes": memory.device.pages}
    segment.close()
    memory.close()
    return result | {"peak_bytes": peak[0]}


def _own_bytes() -> int:
    """Memory of this process that it shares with none."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def main(action: str, folder: str, dtype: Dtype) -> None:
    """Do it, and tell."""
    result = read(Path(folder)) if action == "read" else load(Path(folder), dtype)
    sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], cast(Dtype, sys.argv[3]))
