"""Devices as torch has them: what torch needs to know a kind of device, and storages at addresses.

Nothing imports torch or a vendor's package before it is asked, and only a rank's process asks for a device: who has
used one must not fork (torch's notes on multiprocessing: "Poison fork in multiprocessing").
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from elasticmoe.common.protocol.errors import DeviceError

if TYPE_CHECKING:
    import torch

_EXTENSIONS: Final = {"npu": "torch_npu"}  # by torch's types of devices: the package without which it knows none
_QUEUES: Final = {"npu": "npu_stream"}  # of torch's stream, by its type of device: the driver's own
_WITHOUT_FLOAT64: Final = frozenset({"npu"})  # torch's types of devices
_opened: dict[str, torch.device] = {}  # by this process, by their names


def check_torch(name: str) -> None:
    """Whether this installation's torch knows devices such as `name`. Touches none. Raises DeviceError no_torch."""
    kind = name.partition(":")[0]
    extension = _EXTENSIONS.get(kind)
    if extension is not None and importlib.util.find_spec(extension) is None:
        text = f"torch knows no {kind} without the package {extension}, which is not installed"
        raise DeviceError(text, code="no_torch")
    if kind == "cuda":
        import torch

        if torch.version.cuda is None:
            text = f"torch {torch.__version__} was built without CUDA: install one of the builds for it"
            raise DeviceError(text, code="no_torch")


def prepare_torch(name: str) -> None:
    """Import what torch needs to know devices such as `name`, which takes seconds. Raises DeviceError no_torch."""
    check_torch(name)
    extension = _EXTENSIONS.get(name.partition(":")[0])
    if extension is not None:
        try:
            importlib.import_module(extension)
        except (ImportError, OSError, RuntimeError) as error:  # as where the vendor's libraries are not found
            raise DeviceError(f"{extension} cannot be imported: {_first_line(error)}", code="no_torch") from None


@cache  # each tensor asks
def open_torch(name: str) -> torch.device:
    """The device that torch calls `name`, once torch can use it. Raises DeviceError no_torch."""
    prepare_torch(name)
    import torch

    try:
        device = torch.empty(0, device=name).device
        if device.type != "cpu":  # kernels and pinned memory go by the process's current device
            torch.accelerator.set_device_index(device)
    except (RuntimeError, AssertionError) as error:  # torch has both, and no class of its own for it
        raise DeviceError(f"torch cannot use {name}: {_first_line(error)}", code="no_torch") from None
    _opened[name] = device
    return device


def fence_torch(name: str) -> None:
    """Return when all is over that torch was asked for on the device that it calls `name`, where this process has
    opened it and torch has a queue of its own before the driver's, as torch_npu has: no driver waits for what it was
    not given yet. Raises DeviceError driver_failed."""
    device = _opened.get(name)
    if device is None or device.type not in _QUEUES:
        return
    import torch

    try:
        getattr(torch, device.type).synchronize(device)  # `npuSynchronizeDevice`: empties the queue, then waits
    except RuntimeError as error:
        raise DeviceError(f"torch cannot wait for {name}: {_first_line(error)}", code="driver_failed") from None


def queue_of(device: torch.device) -> int | None:
    """The driver's stream on which torch computes there, by this thread; None where it computes at once. What is asked
    of the driver itself comes after all that torch was asked for: torch_npu, which has a queue of its own before the
    driver's, empties it when it is asked for the stream (`NPUStream::stream` in its source). So ask each time."""
    name = _QUEUES.get(device.type)
    if name is None:
        return None
    import torch

    return int(getattr(getattr(torch, device.type).current_stream(device), name))


def has_float64(device: torch.device) -> bool:
    """Whether numbers of float64 may be made there. On NPUs `.double()` gives float32 (torch_npu's `_to_copy`)."""
    return device.type not in _WITHOUT_FLOAT64


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["it says nothing"])[0]


def storage_at(address: int, device: torch.device, nbytes: int) -> Any:
    """A storage over the device's memory, which it does not own."""
    extension = _EXTENSIONS.get(device.type)
    module = importlib.import_module(extension or "torch")
    return module._C._construct_storage_from_data_pointer(address, device, nbytes)
