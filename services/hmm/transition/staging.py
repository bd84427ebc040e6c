"""Whether a layout can be staged, and what it takes: verified before anything changes. Pure."""

from __future__ import annotations

from elasticmoe.common.capacity import check_layout, needs_of, sizes_of, weights_on
from elasticmoe.common.layout import Layout
from elasticmoe.common.protocol.errors import Conflict, InvalidRequest, NotFound
from elasticmoe.common.protocol.hmm import StageLayout
from elasticmoe.services.hmm.memory.catalog import Catalog, Loaded, keys_of


def check_stage(catalog: Catalog, loaded: Loaded, request: StageLayout, max_ranks: int) -> None:
    """Verify that `request` leads from the layout in force to another one, and within every budget.

    Raises InvalidRequest, NotFound, Conflict, or DoesNotFit with the figures.
    """
    _check_seats(catalog, loaded, request.layout, max_ranks)
    _check_copies(loaded, request)
    _check_kv(catalog, loaded, request)
    _check_budgets(catalog, loaded, request)


def _check_seats(catalog: Catalog, loaded: Loaded, layout: Layout, max_ranks: int) -> None:
    before = loaded.layout
    if layout.epoch != before.epoch + 1:
        raise Conflict(
            f"layout {layout.epoch} does not follow layout {before.epoch}, which is in force", code="wrong_epoch"
        )
    try:
        layout.check()
    except ValueError as error:
        raise InvalidRequest(f"layout: {error}") from None
    if layout.tp != before.tp:
        text = f"layout has tp={layout.tp}; the deployment has tp={before.tp}"
        raise InvalidRequest(text, code="tp_unsupported")
    check_layout(layout, loaded.spec)
    if max(layout.slots) >= max_ranks:
        raise InvalidRequest(f"slot {max(layout.slots)} is not one of the bus's {max_ranks}")
    known = {entry.device for entry in catalog.devices}
    by_slot = {seat.slot: seat for seat in before.seats}
    for seat in layout.seats:
        if seat.device not in known:
            raise NotFound(f"device {seat.device} is not one of this host's {len(known)}")
        old = before.seat_on(seat.device) or by_slot.get(seat.slot)
        if old is not None and old != seat:
            raise InvalidRequest(
                f"rank {seat.rank} in slot {seat.slot} on {seat.device}: layout {before.epoch} has rank {old.rank} in "
                f"slot {old.slot} on {old.device}, and what stays, stays in its place"
            )


def _check_copies(loaded: Loaded, request: StageLayout) -> None:
    held = {seat.device: keys_of((loaded.layout,), seat.device) for seat in loaded.layout.seats}
    needed = {
        (key, seat.device)
        for seat in request.layout.seats
        for key in keys_of((request.layout,), seat.device) - held.get(seat.device, set())
    }
    named = [(copy.key, copy.target) for copy in request.copies]
    if len(set(named)) != len(named):
        raise InvalidRequest(f"{len(named) - len(set(named))} of {len(named)} copies are named twice")
    for key, device in sorted(needed ^ set(named)):
        what = "is not copied, but needed" if (key, device) in needed else "is copied without need"
        raise InvalidRequest(f"{key} to {device} {what}")
    for copy in request.copies:
        if copy.source and copy.key not in held.get(copy.source, set()):
            raise InvalidRequest(f"{copy.key} is to be copied from {copy.source}, which does not hold it")


def _check_kv(catalog: Catalog, loaded: Loaded, request: StageLayout) -> None:
    after = {seat.device for seat in request.layout.seats}
    before = {seat.device for seat in loaded.layout.seats}
    for name, counts, devices in (
        ("kv_handles", request.kv_handles, before | after),
        ("kv_handles_after", request.kv_handles_after, after),
    ):
        if set(counts) != devices:
            raise InvalidRequest(f"{name} is for {sorted(counts)[:8]}, not for the layout's {sorted(devices)[:8]}")
    for device in sorted(before):
        now, wanted = len(catalog.entry(device).kv), request.kv_handles[device]
        if wanted > now:
            raise InvalidRequest(f"{device}: kv_handles is {wanted}; it has {now}, and gets more at the release only")
    for device in sorted(after):
        if request.kv_handles_after[device] < request.kv_handles[device]:
            raise InvalidRequest(
                f"{device}: kv_handles_after is {request.kv_handles_after[device]}, less than the "
                f"{request.kv_handles[device]} of kv_handles"
            )


def _check_budgets(catalog: Catalog, loaded: Loaded, request: StageLayout) -> None:
    sizes = sizes_of(loaded.spec, catalog.granularity)
    needs = needs_of(loaded.load, loaded.spec, loaded.kv, catalog.granularity)
    budgets = {entry.device: entry.budget for entry in catalog.devices}
    both, after = weights_on(sizes, loaded.layout, request.layout), weights_on(sizes, request.layout)
    needs.check("after the release", budgets, after, request.kv_handles_after)
    needs.check("while both layouts are in memory", budgets, both, request.kv_handles)
