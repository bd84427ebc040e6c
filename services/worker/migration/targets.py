"""Which sequence goes to which rank next, as the command in force has it. Pure: no sockets, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.ids import CommandId
from elasticmoe.common.protocol.rank import CancelMigration, DecodeOnly, Drain, MoveTarget, RankCommand
from elasticmoe.services.worker.engine.sequence import Sequence

RETRY_S, RETRY_S_MAX = 0.05, 2.0  # pause after a refusal; doubles with each one of the same sequence and target
SILENT_S = 2.0  # pause after a target has not answered

_Place = tuple[bytes, str, RankId]


class Targets:
    """The command in force, what was done of it, and who is not to be asked again yet."""

    def __init__(self, own: RankId) -> None:
        self._own = own
        self.command_id: CommandId | None = None
        self.targets: tuple[MoveTarget, ...] = ()
        self.is_leaving = False  # everything has to go
        self._done: Counter[RankId] = Counter()  # handed over under this command
        self._pauses: dict[_Place, tuple[float, float]] = {}  # (until, seconds)
        self._silent: dict[RankId, float] = {}  # until

    def obey(self, command: RankCommand) -> None:
        """Replace the command."""
        targets = () if isinstance(command, DecodeOnly | CancelMigration) else command.targets
        self.command_id = command.id
        self.targets = tuple(target for target in targets if target.rank != self._own)
        self.is_leaving = isinstance(command, Drain) and bool(self.targets)
        self._done.clear()
        self._pauses.clear()
        self._silent.clear()

    def has(self, rank: RankId) -> bool:
        """Whether `rank` is a target."""
        return any(target.rank == rank for target in self.targets)

    def note_done(self, rank: RankId) -> None:
        """A sequence was handed over to `rank`."""
        self._silent.pop(rank, None)
        self._done[rank] += 1

    def pause(self, sequence: Sequence, rank: RankId, now: float) -> None:
        """`rank` did not take this sequence: ask it later again."""
        place = (sequence.peer, sequence.request.request_id, rank)
        seconds = min(RETRY_S_MAX, 2 * self._pauses[place][1]) if place in self._pauses else RETRY_S
        if len(self._pauses) > 10_000:
            self._pauses = {key: pause for key, pause in self._pauses.items() if pause[0] > now}
        self._pauses[place] = (now + seconds, seconds)

    def pause_all(self, rank: RankId, now: float) -> None:
        """`rank` does not answer."""
        self._silent[rank] = now + SILENT_S

    def wanted(self, on_the_way: Counter[RankId]) -> list[MoveTarget]:
        """Targets that get more, the most wanting first, those that did not answer last. `on_the_way`: sequences that
        are moving there now."""
        load = {target.rank: self._done[target.rank] + on_the_way[target.rank] for target in self.targets}
        if self.is_leaving:
            return sorted(self.targets, key=lambda t: (t.rank in self._silent, load[t.rank]))
        missing = [target for target in self.targets if load[target.rank] < target.num_sequences]
        return sorted(missing, key=lambda t: (t.rank in self._silent, load[t.rank] - t.num_sequences))

    def choose(
        self, candidates: Iterable[Sequence], wanted: Seq[MoveTarget], now: float
    ) -> tuple[Sequence, MoveTarget] | None:
        """The first candidate that a target may be asked about now."""
        open_targets = [target for target in wanted if self._silent.get(target.rank, now) <= now]
        if not open_targets:
            return None
        for sequence in candidates:
            for target in open_targets:
                until, _ = self._pauses.get((sequence.peer, sequence.request.request_id, target.rank), (now, 0.0))
                if until <= now:
                    return sequence, target
        return None
