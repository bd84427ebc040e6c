"""Where experts live after a change of the seats, and which device each copy is read from. Pure.

Per layer the experts are spread over the new slots within one of each other, with the fewest moves that this allows:
with E experts on D devices a device keeps at most `E // D` of those it holds, or one more if it is one of the `E % D`
devices that carry the remainder. The remainder goes to devices that hold too many, as long as there are any; which of
them is free to choose, and evens out the totals over the layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.hmm import RecordCopy

Homes = tuple[tuple[tuple[int, ...], ...], ...]
_PAIR = 1 << 20  # above every slot number: two slots as one integer, which hashes faster than a tuple
_ROUNDS = 3  # how often the choice of who carries a remainder is gone over; totals hardly change after the second


class _LayerPlacement(NamedTuple):
    """One layer's experts: `holders[expert]`; `kept[slot]`: experts that could stay there; `quotient`, `remainder`."""

    number: int
    holders: tuple[tuple[int, ...], ...]
    kept: dict[int, list[int]]
    quotient: int
    remainder: int


class Traffic:
    """Bytes read from each slot, and on each link (source slot, target slot), so that no choice makes one hot."""

    def __init__(self) -> None:
        self.egress: defaultdict[int, int] = defaultdict(int)
        self.link: defaultdict[int, int] = defaultdict(int)  # by source * _PAIR + target

    def add(self, source: int, target: int, nbytes: int) -> None:
        """Count a copy."""
        self.egress[source] += nbytes
        self.link[source * _PAIR + target] += nbytes


def place(
    homes: Homes, slots: Sequence[int], expert_bytes: Sequence[int], devices: Mapping[int, str]
) -> tuple[Homes, list[RecordCopy]]:
    """The homes of all experts on `slots`, and the copies that lead from `homes` to there, by layer.

    Each expert gets one home; further holders that it has are used as sources only. `expert_bytes[layer]`: of one
    expert of that layer; `devices`: by slot, as copies name them. O(experts + copies x targets), cheap where links are
    many.
    """
    members = sorted(slots)
    staying = set(members)
    layers = [
        _LayerPlacement(number, holders, _keepers(holders, staying), *divmod(len(holders), len(members)))
        for number, holders in enumerate(homes)
    ]
    extras = _choose_extras(layers, members, expert_bytes)
    traffic = Traffic()
    copies: list[RecordCopy] = []
    placed = []
    for layer, extra in zip(layers, extras, strict=True):
        layer_homes, movers = _place_layer(layer, extra, members, traffic, expert_bytes[layer.number])
        placed.append(layer_homes)
        for expert, source, target in movers:
            key = RecordKey("expert", layer.number, expert)
            copies.append(RecordCopy(key, devices[source], devices[target]))
    return tuple(placed), copies


def _keepers(holders: tuple[tuple[int, ...], ...], staying: set[int]) -> dict[int, list[int]]:
    """Experts by the one staying slot that could keep them, spread as evenly as their holders allow.

    An expert with several holders goes to the least loaded slot that can be reached by passing experts on to their
    other holders. That makes an optimal semi-matching, whose loads are the most even possible, which keeps most.
    """
    kept: dict[int, list[int]] = defaultdict(list)
    choices: dict[int, list[int]] = {}
    for expert, slots in enumerate(holders):
        if len(slots) == 1:
            if slots[0] in staying:
                kept[slots[0]].append(expert)
            continue
        options = [slot for slot in slots if slot in staying]
        if len(options) > 1:
            choices[expert] = options
        elif options:
            kept[options[0]].append(expert)
    for expert, options in choices.items():
        reached: dict[int, tuple[int, int] | None] = dict.fromkeys(options)  # slot -> (slot before, expert passed on)
        queue = list(options)
        for slot in queue:
            for passed in kept[slot]:
                for other in choices.get(passed, ()):
                    if other not in reached:
                        reached[other] = (slot, passed)
                        queue.append(other)
        slot = min(queue, key=lambda slot: (len(kept[slot]), slot))
        while (step := reached[slot]) is not None:
            kept[step[0]].remove(step[1])
            kept[slot].append(step[1])
            slot = step[0]
        kept[slot].append(expert)
    if choices:
        for experts in kept.values():
            experts.sort()
    return kept


def _choose_extras(
    layers: Sequence[_LayerPlacement], members: Sequence[int], expert_bytes: Sequence[int]
) -> list[set[int]]:
    """For each layer the slots that hold one expert more than the others, with even totals over the layers."""
    totals = dict.fromkeys(members, 0)
    chosen: list[set[int]] = [set() for _ in layers]
    for _ in range(_ROUNDS):
        for layer in layers:
            if not layer.remainder:
                continue
            nbytes = expert_bytes[layer.number]
            for slot in chosen[layer.number]:
                totals[slot] -= nbytes
            over = [slot for slot in members if len(layer.kept.get(slot, ())) > layer.quotient]
            if len(over) >= layer.remainder:
                pick = _least(over, totals, layer.remainder)
            else:
                rest = sorted(set(members).difference(over))
                pick = over + _least(rest, totals, layer.remainder - len(over))
            chosen[layer.number] = set(pick)
            for slot in pick:
                totals[slot] += nbytes
    return chosen


def _least(slots: list[int], totals: dict[int, int], count: int) -> list[int]:
    """The `count` slots with the least totals, the lower slot first where they are equal (`slots` ascend)."""
    return sorted(slots, key=totals.__getitem__)[:count]


def _place_layer(
    layer: _LayerPlacement, extra: set[int], members: Sequence[int], traffic: Traffic, nbytes: int
) -> tuple[tuple[tuple[int, ...], ...], list[tuple[int, int, int]]]:
    """One layer's homes, and who moves: (expert, source, target), by expert."""
    home: list[int] = [-1] * len(layer.holders)
    room: list[tuple[int, int]] = []
    for slot in members:
        limit = layer.quotient + (slot in extra)
        kept = layer.kept.get(slot, [])
        for expert in kept[:limit]:
            home[expert] = slot
        if len(kept) < limit:
            room.append((slot, limit - len(kept)))
    movers = [expert for expert, slot in enumerate(home) if slot < 0]
    arrivals = []
    if movers:
        turn = layer.number % len(room)
        targets = dict(room[turn:] + room[:turn])
        for expert, source in _interleave(movers, layer.holders, traffic):
            target = _coldest(source, targets, traffic)
            targets[target] -= 1
            if not targets[target]:
                del targets[target]
            traffic.add(source, target, nbytes)
            home[expert] = target
            arrivals.append((expert, source, target))
    single = {slot: (slot,) for slot in members}
    return tuple(single[slot] for slot in home), sorted(arrivals)


def _interleave(movers: Sequence[int], holders: tuple[tuple[int, ...], ...], traffic: Traffic) -> list[tuple[int, int]]:
    """(expert, source) of each mover, in turns over the sources; the source is the holder that gives least so far."""
    planned: dict[int, int] = defaultdict(int)
    turns = []
    for expert in movers:
        source = min(holders[expert], key=lambda slot: (planned[slot], traffic.egress[slot], slot))
        turns.append((planned[source], source, expert))
        planned[source] += 1
    return [(expert, source) for _, source, expert in sorted(turns)]


def _coldest(source: int, targets: dict[int, int], traffic: Traffic) -> int:
    """The target whose link from `source` carried least so far; the first of `targets` among equals."""
    first = source * _PAIR
    link = traffic.link
    best, least = -1, -1
    for target in targets:
        carried = link.get(first + target, 0)
        if not carried:
            return target
        if best < 0 or carried < least:
            best, least = target, carried
    return best


def spread_common(
    records: Sequence[tuple[RecordKey, int]],
    sources: Sequence[str],
    joiners: Sequence[str],
    busy: Mapping[str, int],
) -> list[RecordCopy]:
    """Copies of `records` (key, bytes), which all devices `sources` hold, to all `joiners`, by record.

    Sources give equally many bytes, within two records; what they give anyway, by `busy`, counts. The largest records
    are given out first; of the sources that have given least, or one record more, the one is taken that the joiner has
    read least from; the first in `sources` where they are equal. O(records x joiners x sources), cheap steps.
    """
    egress = {source: busy.get(source, 0) for source in sources}
    links = {target: dict.fromkeys(egress, 0) for target in joiners}
    copies: dict[RecordKey, list[RecordCopy]] = {}
    for number, (key, nbytes) in enumerate(sorted(records, key=lambda record: -record[1])):
        some = []
        turn = number % len(joiners)  # the last one has least choice: not always the same
        for target in [*joiners[turn:], *joiners[:turn]]:
            link = links[target]
            limit = min(egress.values()) + nbytes
            free = sorted([name for name, given in egress.items() if given <= limit], key=egress.__getitem__)
            source = min(free, key=link.__getitem__)  # the first of the least: the one that has given least
            egress[source] += nbytes
            link[source] += nbytes
            some.append(RecordCopy(key, source, target))
        copies[key] = some
    return [copy for key, _ in records for copy in copies[key]]
