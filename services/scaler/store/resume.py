"""What a scaler goes on with where the HMM holds nothing: what was committed last, or a layout of its own. Pure.

What earlier runs have left is dropped only where somebody asked for that; settings that contradict it are refused. The
epoch rises in every case: routers take only higher ones, and nothing may be taken for what it is not (promise P7).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from elasticmoe.common.described import says
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.layout import Layout, Served, initial_layout, lacking
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.services.scaler.operation.operation import Operation

CODE = "state_differs"
_FORWARD = ("commit", "migrate", "release")  # the HMM may have committed the leg's layout
_WAYS_OUT = (
    "use the settings of that run to resume it, or begin anew without its layout and its journal: "
    "`elasticmoe up --fresh`, in containers `python -m elasticmoe.cli.container fresh`"
)


class Left(msgspec.Struct, frozen=True):
    """What earlier runs have left: the layout that was announced last, what it serves (None: an older version has not
    written that), the operation in progress, the highest epoch that anybody may have seen, and why the rest cannot be
    read. `is_dropped`: an operator wants none of it."""

    layout: Layout | None = None
    served: Served | None = None
    operation: Operation | None = None
    epoch: int = 0
    damage: str = ""
    is_dropped: bool = False


class Wanted(msgspec.Struct, frozen=True):
    """What this scaler is to serve. `experts[layer]`: how many that layer has."""

    served: Served
    replicas: int
    tp: int
    devices: DeviceCount
    experts: tuple[int, ...]


class Resumed(msgspec.Struct, frozen=True):
    """The committed layout that a deployment goes on with, in place of the wanted replicas."""

    epoch: Annotated[int, says("Of the layout")]
    replicas: Annotated[int, says("That it has")]
    wanted: Annotated[int, says("Replicas that the settings name, which do not count")]
    op_id: Annotated[str, says("The operation in progress that it goes on with as well; empty for none")] = ""


class Beginning(msgspec.Struct, frozen=True):
    """The layout to begin with, whether it is the committed one, and why nothing may begin: None, or a refusal."""

    layout: Layout
    is_resumed: bool
    refusal: Refused | None = None


def begin(left: Left, wanted: Wanted) -> Beginning:
    """Go on with what is left, begin anew above its epoch, or refuse. Raises ConfigError for too few devices."""
    anew = Beginning(
        initial_layout(
            wanted.experts, wanted.devices.names()[: wanted.replicas * wanted.tp], tp=wanted.tp, epoch=left.epoch + 1
        ),
        is_resumed=False,
    )
    layout = committed(left)
    if left.is_dropped or (layout is None and not left.damage):
        return anew
    if contradictions := differences(left, layout, wanted):
        text = f"what an earlier run has left is of other settings: {'; '.join(contradictions)}. Either {_WAYS_OUT}"
        return Beginning(layout or anew.layout, is_resumed=False, refusal=Refused(CODE, text))
    assert layout is not None, "without one, something is damaged or it begins anew"
    return Beginning(layout, is_resumed=True)


def committed(left: Left) -> Layout | None:
    """The layout to go on with: the announced one, or the one of an operation that had been let commit it, with an
    epoch that does not fall."""
    layout, operation, led_to = left.layout, left.operation, 0
    if layout is not None and operation is not None and operation.plan is not None:
        led_to = operation.plan.after.epoch
        if operation.phase in _FORWARD and operation.layout_before() == layout:
            layout = operation.current_leg().layout
    # The store has lost its last writes: the layout is as good as a later one, but its epoch has been passed.
    if layout is not None and left.epoch > max(layout.epoch, led_to):
        return msgspec.structs.replace(layout, epoch=left.epoch + 1)
    return layout


def differences(left: Left, layout: Layout | None, wanted: Wanted) -> list[str]:
    """Why `layout` cannot be gone on with under these settings, one text each; empty when it can."""
    found: list[str] = []
    if left.damage or layout is None:
        return [f"it cannot be read ({left.damage})"]
    if left.served is not None:
        for name, ours in msgspec.structs.asdict(wanted.served).items():
            if (theirs := getattr(left.served, name)) != ours:
                found.append(f"`{name}` was {theirs}, and is {ours} now")
    if layout.tp != wanted.tp:
        found.append(f"`tp` was {layout.tp}, and is {wanted.tp} now")
    if not found and tuple(len(homes) for homes in layout.homes) != wanted.experts:
        found.append("its layers and experts are not those of the model")
    if text := lacking(layout, wanted.devices):
        found.append(text)
    return found
