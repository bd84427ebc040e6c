"""The memory of two devices that models are loaded into, without processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from elasticmoe.common.devices.factory import open_device
from elasticmoe.common.devices.rules import ProcessRules
from elasticmoe.common.families import load_spec
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.layout import initial_layout
from elasticmoe.common.model_spec import RecordKey, TensorSpec
from elasticmoe.common.protocol.hmm import LoadModel
from elasticmoe.services.hmm.loading.loader import ModelLoad
from elasticmoe.services.hmm.memory.memory import BusSegment, DeviceMemory

PAGE = 4096
BUDGET = 64 << 20


class World:
    """Two empty devices of one process."""

    def __init__(self) -> None:
        rules = ProcessRules()
        self.memories = {
            name: DeviceMemory(open_device(name, PAGE, BUDGET, rules=rules)) for name in ("host:0", "host:1")
        }
        self.segment = BusSegment(HostShared.create("bus"))

    def load(self, directory: Path, dtype: str = "float32", devices: int = 2, **changes: Any) -> ModelLoad:
        spec = load_spec(directory, dtype) if (directory / "config.json").is_file() else None
        counts = spec.num_experts_by_layer if spec else (1,)
        layout = initial_layout(counts, list(self.memories)[:devices])
        request = LoadModel("load-1", str(directory), "float32", layout, 16, 4 << 20, 32, 4, 64)
        request = msgspec.structs.replace(request, dtype=dtype, **changes)
        return ModelLoad(request, self.memories, self.segment, PAGE)

    @property
    def pages(self) -> int:
        """Bytes that the devices really take."""
        return sum(memory.device.pages for memory in self.memories.values())

    @property
    def used(self) -> int:
        """Bytes that the devices have out."""
        return sum(sum(memory.device.used.values()) for memory in self.memories.values())

    def tensor(self, device: str, key: RecordKey, tensor: TensorSpec) -> torch.Tensor:
        """A copy of what lies in memory."""
        memory = self.memories[device]
        raw = memory.device.read_bytes(memory.address(memory.records[key]) + tensor.offset, tensor.nbytes)
        return torch.frombuffer(bytearray(raw), dtype=getattr(torch, tensor.dtype)).reshape(tensor.shape)

    def close(self) -> None:
        self.segment.close()
        for memory in self.memories.values():
            memory.close()
