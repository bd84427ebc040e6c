"""What each command makes of what a rank hands over: told by its type, named by the fields of its id."""

from __future__ import annotations

from collections import Counter

import pytest

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.ids import CommandId, CommandKind, TransitionId
from elasticmoe.common.protocol.rank import (
    CancelMigration,
    DecodeOnly,
    Drain,
    MigrateTo,
    MoveTarget,
    Precopy,
    RankCommand,
)
from elasticmoe.services.worker.migration.targets import Targets

OWN, OTHER, THIRD = RankId(0, 0), RankId(1, 0), RankId(2, 0)
PLACES = (MoveTarget(OWN, 0, 5), MoveTarget(OTHER, 1, 2), MoveTarget(THIRD, 2, 1))


def named(kind: CommandKind) -> CommandId:
    return CommandId("op", 0, 1, kind)


@pytest.mark.parametrize(
    ("command", "wanted", "is_leaving"),
    [
        (MigrateTo(named("migrate"), PLACES), {OTHER, THIRD}, False),
        (Precopy(named("precopy"), PLACES, 6), {OTHER, THIRD}, False),
        (Precopy(named("precopy"), (), 6), set(), False),
        (Drain(named("drain"), PLACES), {OTHER, THIRD}, True),
        (Drain(named("drain"), PLACES[:1]), set(), False),  # nobody could take anything
        (DecodeOnly(named("decode_only"), 6), set(), False),
        (CancelMigration(named("cancel")), set(), False),
    ],
)
def test_a_command_replaces_the_one_in_force(command: RankCommand, wanted: set[RankId], is_leaving: bool) -> None:
    targets = Targets(OWN)
    assert targets.command_id is None
    for before in (Drain(named("drain"), PLACES), MigrateTo(named("migrate"), PLACES)):
        targets.obey(before)
        targets.obey(command)
        assert {target.rank for target in targets.wanted(Counter())} == wanted
        assert (targets.is_leaving, targets.command_id) == (is_leaving, command.id)


def test_only_a_drain_has_no_number() -> None:
    targets = Targets(OWN)
    for command, wants_more in ((MigrateTo(named("migrate"), PLACES), False), (Drain(named("drain"), PLACES), True)):
        targets.obey(command)
        for _ in range(2):
            targets.note_done(OTHER)
        assert (OTHER in {target.rank for target in targets.wanted(Counter())}) == wants_more


def test_an_id_is_not_told_apart_by_its_spelling() -> None:
    """These were one string each, `op/0.0.ahead` among them, and an operation may be called so."""
    assert TransitionId("op/0.0", 0, 0) != TransitionId("op", 0, 0)
    assert CommandId("op/0.0.ahead", 0, 0, "cancel") != CommandId("op", 0, 0, "precopy")
    assert str(TransitionId("op", 1, 2)) == "op/1.2"
