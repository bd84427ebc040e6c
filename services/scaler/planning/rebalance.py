"""Which sequences should move between replicas so that all have the same number. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec


class SequenceMove(msgspec.Struct, frozen=True):
    """`num_sequences` from the rank in slot `source` to the one in slot `target`."""

    source: int
    target: int
    num_sequences: int


def level_ahead(loads: Mapping[int, int], joining: Collection[int]) -> tuple[SequenceMove, ...]:
    """One sequence for each of the slots in `joining`, which hold nothing yet, where others have too many: enough to
    begin with. The rest follows when KV and new requests there are known: a joiner begins with little KV."""
    moves = [move for move in level({**loads, **dict.fromkeys(joining, 0)}) if move.target in joining]
    first = {move.target: move for move in reversed(moves)}
    return tuple(SequenceMove(move.source, target, 1) for target, move in sorted(first.items()))


def level(loads: Mapping[int, int]) -> tuple[SequenceMove, ...]:
    """The fewest moves after which all slots hold the same number of sequences within one; `loads[slot]`: how many now.

    The fullest slots keep the remainder of an uneven division, so that none of it travels. Deterministic.
    """
    if len(loads) < 2:
        return ()
    share, remainder = divmod(sum(loads.values()), len(loads))
    order = sorted(loads, key=lambda slot: (-loads[slot], slot))
    excess = {slot: loads[slot] - share - (1 if i < remainder else 0) for i, slot in enumerate(order)}
    givers = [(slot, excess[slot]) for slot in order if excess[slot] > 0]
    takers = [(slot, -excess[slot]) for slot in reversed(order) if excess[slot] < 0]
    moves = []
    while givers and takers:
        (source, surplus), (target, room) = givers.pop(0), takers.pop(0)
        count = min(surplus, room)
        moves.append(SequenceMove(source, target, count))
        if surplus > count:
            givers.insert(0, (source, surplus - count))
        if room > count:
            takers.insert(0, (target, room - count))
    return tuple(moves)
