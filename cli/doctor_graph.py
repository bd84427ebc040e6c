"""Whether a captured graph reads what stands behind its addresses now: what a flip of the layout relies on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elasticmoe.common.devices.base import Device

_SIDE = 256  # of a square of weights
_ROWS = 16
_WARM_UPS = 3

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes work on a device, captures it, and returns what replays it and waits for its end."""


def captured(accelerator: Any) -> Capture:
    """The capture of `torch.cuda`, or of what `torch_npu` makes `torch.npu`."""

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        stream = accelerator.Stream()
        stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        accelerator.synchronize()
        graph = getattr(accelerator, "CUDAGraph", None) or accelerator.NPUGraph
        made = graph()
        with accelerator.graph(made):
            work()

        def replay() -> None:
            made.replay()
            accelerator.synchronize()

        return replay

    return capture


def remap_under_graph(device: Device, capture: Capture) -> tuple[float, float]:
    """Sums of a captured product, replayed twice: over weights of ones, and after other memory, with twos, was mapped
    at their address. The second is twice the first where graphs follow the address. Raises DeviceError."""
    import torch

    handles = [device.create(device.granularity, "kv") for _ in range(2)]
    range_ = device.reserve(device.granularity)
    weights = device.wrap(range_, 0, (_SIDE, _SIDE), None, "float32")
    for value, handle in ((2.0, handles[1]), (1.0, handles[0])):
        device.map(range_, 0, handle, True)
        device.write_bytes(range_.base, torch.full((_SIDE * _SIDE,), value).numpy().tobytes())
        if handle is handles[1]:
            device.unmap(range_, 0)
    rows = torch.ones(_ROWS, _SIDE, device=weights.device)
    out = torch.zeros(_ROWS, _SIDE, device=weights.device)
    replay = capture(lambda: _multiply(rows, weights, out))
    replay()
    before = float(out.sum())
    device.unmap(range_, 0)
    device.map(range_, 0, handles[1], True)
    replay()
    after = float(out.sum())
    device.unmap(range_, 0)
    return before, after


def _multiply(rows: Any, weights: Any, out: Any) -> None:
    import torch

    torch.matmul(rows, weights, out=out)
