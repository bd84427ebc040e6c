"""Which replicas join and which leave for a target: numbers, slots, devices; or a refusal with the figures. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

from elasticmoe.common.layout import Layout, RankId, Seat
from elasticmoe.common.protocol.errors import InvalidRequest, NotFound
from elasticmoe.common.wording import counted
from elasticmoe.services.scaler.planning.plan import Target

_NAMED_MAX = 8


class Seating(NamedTuple):
    """The seats that stay, join and leave."""

    staying: tuple[Seat, ...]
    joining: tuple[Seat, ...]
    leaving: tuple[Seat, ...]


def reseat(layout: Layout, target: Target, devices: Sequence[str]) -> Seating:
    """Settle who joins and who leaves. Joiners get the lowest replica numbers and slots that the layout does not use,
    and `devices` that it does not use in their order (or the target's), in groups of tp.

    Raises InvalidRequest (`invalid_target`, `too_few_devices`, `last_replica`) or NotFound (`unknown_replica`,
    `unknown_device`).
    """
    given = [value for value in (target.replicas, target.devices, target.remove) if value is not None]
    if len(given) != 1:
        raise _invalid(f"a target needs exactly one of replicas, devices and remove; it has {len(given)}")
    if target.replicas is not None:
        return _for_number(layout, target.replicas, devices)
    if target.devices is not None:
        return _for_devices(layout, target.devices, devices)
    return _for_removal(layout, target.remove or ())


def _invalid(text: str) -> InvalidRequest:
    return InvalidRequest(text, code="invalid_target")


def _replicas(layout: Layout) -> list[int]:
    return sorted({seat.rank.replica for seat in layout.seats})


def _for_number(layout: Layout, wanted: int, devices: Sequence[str]) -> Seating:
    replicas = _replicas(layout)
    if wanted < 0:
        raise _invalid(f"the number of replicas must be at least 1, is {wanted}")
    _check_some_stay(wanted)
    if wanted <= len(replicas):
        return _split(layout, set(replicas[wanted:]), ())
    used = {seat.device for seat in layout.seats}
    free = [device for device in devices if device not in used]
    needed = (wanted - len(replicas)) * layout.tp
    if needed > len(free):
        raise InvalidRequest(
            f"{counted(wanted, 'replica')} of {counted(layout.tp, 'device')} need {needed} more than the {len(used)} "
            f"in use, and {len(free)} are free: take {counted(len(replicas) + len(free) // layout.tp, 'replica')} at "
            f"most, or start with more devices (--devices)",
            code="too_few_devices",
        )
    return _split(layout, set(), free[:needed])


def _for_devices(layout: Layout, wanted: tuple[str, ...], devices: Sequence[str]) -> Seating:
    if len(set(wanted)) != len(wanted):
        raise _invalid(f"the {len(wanted)} devices of the target are only {len(set(wanted))} different ones")
    used = {seat.device for seat in layout.seats}
    unknown = sorted(set(wanted) - set(devices) - used)
    if unknown:
        names = ", ".join(devices[:_NAMED_MAX]) + ", …" * (len(devices) > _NAMED_MAX)
        raise NotFound(f"{unknown[0]:.80} is not one of the {len(devices)} devices: {names}", code="unknown_device")
    _check_some_stay(len(wanted))
    if len(wanted) % layout.tp:
        raise _invalid(f"{counted(len(wanted), 'device')}: no whole replicas of tp={layout.tp}")
    leaving = {seat.rank.replica for seat in layout.seats if seat.device not in wanted}
    torn = [seat for seat in layout.seats if seat.rank.replica in leaving and seat.device in wanted]
    if torn:
        raise _invalid(
            f"replica {torn[0].rank.replica} would keep only some of its {layout.tp} devices: {torn[0].device} stays"
        )
    return _split(layout, leaving, [device for device in wanted if device not in used])


def _for_removal(layout: Layout, remove: tuple[int, ...]) -> Seating:
    replicas = _replicas(layout)
    unknown = sorted(set(remove) - set(replicas))
    if unknown:
        names = ", ".join(f"r{replica}" for replica in replicas)
        text = f"replica {unknown[0]} is not one of the {len(replicas)} replicas: {names}"
        raise NotFound(text, code="unknown_replica")
    if len(set(remove)) != len(remove):
        raise _invalid(f"the {len(remove)} replicas to remove are only {len(set(remove))} different ones")
    _check_some_stay(len(replicas) - len(remove))
    return _split(layout, set(remove), ())


def _check_some_stay(replicas: int) -> None:
    if replicas == 0:
        raise InvalidRequest("at least 1 replica must stay, 0 would", code="last_replica")


def _split(layout: Layout, leaving: set[int], joining: Sequence[str]) -> Seating:
    """Seats by fate; `joining` devices make new replicas, tp of them each."""
    numbers = list(islice(_free({seat.rank.replica for seat in layout.seats}), len(joining) // layout.tp))
    slots = list(islice(_free(set(layout.slots)), len(joining)))
    seats = tuple(
        Seat(RankId(numbers[i // layout.tp], i % layout.tp), slots[i], device) for i, device in enumerate(joining)
    )
    return Seating(
        staying=tuple(seat for seat in layout.seats if seat.rank.replica not in leaving),
        joining=seats,
        leaving=tuple(seat for seat in layout.seats if seat.rank.replica in leaving),
    )


def _free(used: set[int]) -> Iterator[int]:
    return (number for number in count() if number not in used)
