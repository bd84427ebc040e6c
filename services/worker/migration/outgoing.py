"""The handing side: each sequence on its way is a SequenceTransfer that goes through stages, a little at each turn.

reserving  the target was asked for a place; the sequence runs on here
ready      the next thing can be done: copy what is full, or hand over, once the target steps with the others
copying    the HMM copies full blocks, which nobody writes any more; the sequence runs on here
           (the last ones once it is detached, where a replica has several ranks: those cannot travel in a message)
handing    the sequence is detached and with the target, which may go on with it
draining   given up, but the HMM may still be writing to the target's place

Up to `handing` the sequence is this rank's, and giving up costs nothing. From there it is in doubt until the answer.
When none comes both ranks may go on with it: they choose the same tokens, and the router drops what it has seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

from elasticmoe.common.endpoints import Transport
from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.hmm import CopyBlocks
from elasticmoe.common.protocol.limits import BLOCKS_PER_COPY_MAX, TAIL_BYTES_MAX
from elasticmoe.common.protocol.peer import CODEC, Reserved, Taken, ToPeer
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.rank import HandOver, MoveTarget, Reserve, Unreserve
from elasticmoe.common.protocol.replies import Ack, Refused
from elasticmoe.common.protocol.router import MayMove, Moved
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.sequence import Sequence
from elasticmoe.services.worker.migration.link import Link
from elasticmoe.services.worker.migration.targets import Targets

log = get_logger("migration")

IN_TRANSIT_MAX = 8
ANSWER_S = 5.0  # of a rank; it answers between two steps
HAND_OVER_ATTEMPTS = 3
COPY_S = 10.0  # of the HMM. With FRESH_S less than the target's RESERVATION_S, so that no copy outlives its place
KEPT_S = 25.0  # a place that was asked for again within this is the same: it cannot have expired in between
FRESH_S = 10.0  # a copy does not begin later than this after the target's place was asked for; it is asked again
TAIL_BLOCKS = 8  # full blocks that rather travel with the hand-over than with one more copy, which costs a step
ROUNDS_MAX = 8  # copies that chase a sequence; what is full after them travels in the tail if it can
COPY_BYTES_MAX = 256 << 20  # of one CopyBlocks
AHEAD_TOKENS = 128  # that a sequence may grow by until it is handed over
LINK_IDLE_S = 4.0

TransferStage = Literal["reserving", "ready", "copying", "handing", "draining"]


class SequenceTransfer:
    """One sequence on its way. `place`: the target's answer. KV up to its block number `num_copied` is there; the copy
    under way brings it to `copying_to`."""

    def __init__(self, sequence: Sequence, target: MoveTarget) -> None:
        self.sequence = sequence
        self.target = target
        self.stage: TransferStage = "reserving"
        self.stops = sequence.stops
        self.relocations = 0
        self.place: Reserved | None = None
        self.num_copied = 0
        self.copying_to = 0
        self.rounds = 0
        self.reserved_at = 0.0
        self.reserved_before = 0.0
        self.asked_at = 0.0
        self.is_known = False  # to the target
        self.is_announced = False  # that it is handed over in the next turn
        self.message: HandOver | None = None
        self.attempts = 0


class Outgoing:
    """Owns the transfers and the links. `on_taken(sequence, target)` is called once the target has a sequence."""

    def __init__(
        self,
        seat: StartRank,
        engine: Engine,
        targets: Targets,
        transport: Transport,
        *,
        watch: Callable[[int], None],
        unwatch: Callable[[int], None],
        on_taken: Callable[[Sequence, MoveTarget], None],
    ) -> None:
        self._seat = seat
        self._engine = engine
        self._targets = targets
        self._transport = transport
        self._watch = watch
        self._unwatch = unwatch
        self._on_taken = on_taken
        self._links: dict[str, Link[SequenceTransfer]] = {}
        self._hmm_silent_until = 0.0
        self._num_copies = 0  # that the HMM was asked for
        self._members = 0
        self._news: list[tuple[bytes, Message]] = []
        self.transfers: list[SequenceTransfer] = []

    def turn(self, now: float, members: int) -> list[tuple[bytes, Message]]:
        """Advance everything. `members`: bit mask of the slots that step together. What is to be told to routers."""
        self._members = members
        self._receive(now)
        for transfer in list(self.transfers):
            self._check(transfer, now)
        self._begin(now)
        self._receive(now)  # a send may have consumed the edge of an answer's descriptor
        for name in [n for n, link in self._links.items() if link.idle_s(now) > LINK_IDLE_S]:
            self._close(name)
        news, self._news = self._news, []
        return news

    @property
    def on_the_way(self) -> Counter[RankId]:
        """Sequences by the rank that they move to."""
        return Counter(transfer.target.rank for transfer in self.transfers if transfer.stage != "draining")

    @property
    def is_handing(self) -> bool:
        """See Migration."""
        slots = [t.target.slot for t in self.transfers if t.is_announced and t.stage in ("ready", "copying")]
        return any(self._members >> slot & 1 for slot in slots)

    @property
    def candidates(self) -> list[Sequence]:
        """Sequences that could move, those with the most output still to come first, then those that wait."""
        busy = {id(transfer.sequence) for transfer in self.transfers}
        scheduler = self._engine.scheduler
        running = sorted(scheduler.running, key=lambda s: s.num_output - s.request.max_tokens)
        return [sequence for sequence in (*running, *scheduler.waiting) if id(sequence) not in busy]

    def tell(self, rank: RankId, message: Message, now: float) -> None:
        """Send a message to a rank without waiting for its answer."""
        self._link(f"rank-{rank}").tell(message, now)

    def give_up(self, transfer: SequenceTransfer, now: float) -> None:
        """The sequence, if it lives, goes on here. The target is told once nobody writes to its place any more."""
        sequence = transfer.sequence
        self._restore(sequence)
        if transfer.stage == "copying":
            transfer.stage = "draining"
            return
        self._end(transfer)
        if transfer.is_known:
            self.tell(transfer.target.rank, Unreserve(sequence.request.request_id, sequence.peer), now)

    def _restore(self, sequence: Sequence) -> None:
        if self._is_live(sequence) and sequence in self._engine.scheduler.detached:
            self._engine.scheduler.restore(sequence)

    def ask_again(self) -> None:
        """Hand over again what is in doubt, without waiting for the answer any longer."""
        for transfer in self.transfers:
            if transfer.stage == "handing":
                transfer.asked_at = -ANSWER_S

    def close(self) -> None:
        """Close all links."""
        for name in list(self._links):
            self._close(name)

    # ---- links ----------------------------------------------------------------------------------------------------

    def _link(self, name: str) -> Link[SequenceTransfer]:
        if name not in self._links:
            client = self._transport.connect(name, self._seat.incarnation, CODEC)
            self._links[name] = Link(client, watch=self._watch, unwatch=self._unwatch)
        return self._links[name]

    def _close(self, name: str) -> None:
        self._links.pop(name).close()

    def _receive(self, now: float) -> None:
        for link in list(self._links.values()):
            for transfer, answer in link.answers():
                self._take_answer(transfer, answer, now)

    def _end(self, transfer: SequenceTransfer) -> None:
        self.transfers.remove(transfer)
        for link in self._links.values():
            link.drop(transfer)

    def _ask(self, transfer: SequenceTransfer, name: str, question: Message, now: float) -> None:
        """Ask about a transfer; one that cannot be asked about is given up when no answer has come."""
        transfer.asked_at = now
        try:
            self._link(name).ask(question, transfer, now)
            transfer.is_known = True
        except ElasticMoEError as error:
            log.warning("cannot be sent", to=name, kind=type(question).__name__, because=error.message)

    # ---- one transfer ---------------------------------------------------------------------------------------------

    def _is_live(self, sequence: Sequence) -> bool:
        return self._engine.scheduler.get(sequence.peer, sequence.request.request_id) is sequence

    def _begin(self, now: float) -> None:
        wanted = self._targets.wanted(self.on_the_way)
        while wanted and len(self.transfers) < IN_TRANSIT_MAX:
            chosen = self._targets.choose(self.candidates, wanted, now)
            if chosen is None:
                return
            transfer = SequenceTransfer(*chosen)
            self.transfers.append(transfer)
            self._reserve(transfer, now)
            sequence = transfer.sequence
            self._news.append((sequence.peer, MayMove(sequence.request.request_id, transfer.target.rank)))
            wanted = self._targets.wanted(self.on_the_way)

    def _reserve(self, transfer: SequenceTransfer, now: float) -> None:
        sequence, blocks = transfer.sequence, self._engine.scheduler.blocks
        tokens, num_blocks = sequence.tokens, 0
        if sequence.kv_len:
            longest = min(sequence.num_prompt + sequence.request.max_tokens, self._engine.scheduler.capacity_tokens)
            num_blocks = blocks.blocks_for(min(len(tokens) + AHEAD_TOKENS, max(longest, len(tokens))))
            if sequence.wants_prompt_logprobs:
                tokens = tokens[: sequence.kv_len + 1]  # what was not computed must be, whatever the target's cache has
        transfer.stage = "reserving"
        transfer.reserved_before, transfer.reserved_at = transfer.reserved_at, now
        message = Reserve(sequence.request.request_id, sequence.peer, tuple(tokens), num_blocks)
        self._ask(transfer, f"rank-{transfer.target.rank}", message, now)

    def _check(self, transfer: SequenceTransfer, now: float) -> None:
        """Do what the transfer's stage and the time ask for."""
        if transfer.stage == "draining":
            if now - transfer.asked_at > COPY_S:
                self._lose_hmm(now)
        elif not self._is_live(transfer.sequence):
            self.give_up(transfer, now)
        elif transfer.stage == "handing":
            self._check_handing(transfer, now)
        elif transfer.sequence.stops != transfer.stops or not self._targets.has(transfer.target.rank):
            self.give_up(transfer, now)
        elif transfer.stage == "ready":
            self._advance(transfer, now)
        elif transfer.stage == "reserving" and now - transfer.asked_at > ANSWER_S:
            log.warning("no answer", rank=str(transfer.target.rank), **transfer.sequence.request.names)
            self._targets.pause_all(transfer.target.rank, now)
            self.give_up(transfer, now)
        elif transfer.stage == "copying" and now - transfer.asked_at > COPY_S:
            self._lose_hmm(now)

    def _check_handing(self, transfer: SequenceTransfer, now: float) -> None:
        if now - transfer.asked_at <= ANSWER_S:
            return
        if transfer.attempts < HAND_OVER_ATTEMPTS:
            self._send_hand_over(transfer, now)
            return
        log.warning(
            "sequence taken back",
            rank=str(transfer.target.rank),
            attempts=transfer.attempts,
            **transfer.sequence.request.names,
        )
        self._targets.pause_all(transfer.target.rank, now)
        self.give_up(transfer, now)

    def _lose_hmm(self, now: float) -> None:
        """The HMM does not answer. What it has not read yet is dropped; the targets' places expire by themselves, since
        it may still be writing to them."""
        log.warning("the HMM does not copy", seconds=COPY_S)
        self._hmm_silent_until = now + COPY_S
        if "hmm" in self._links:  # there is none where it could not be connected to
            self._close("hmm")
        for transfer in [t for t in self.transfers if t.stage in ("copying", "draining")]:
            self._targets.pause(transfer.sequence, transfer.target.rank, now)
            self._restore(transfer.sequence)
            self._end(transfer)

    def _take_answer(self, transfer: SequenceTransfer, answer: ToPeer, now: float) -> None:
        stage = transfer.stage
        if isinstance(answer, Refused):
            log.debug("refused", rank=str(transfer.target.rank), stage=stage, code=answer.code, because=answer.message)
            self._targets.pause(transfer.sequence, transfer.target.rank, now)
            if stage in ("copying", "draining"):
                transfer.stage = "ready"
            self.give_up(transfer, now)
        elif stage == "reserving" and isinstance(answer, Reserved) and answer.num_cached <= len(answer.blocks):
            if not _is_same_place(transfer, answer, now):
                transfer.num_copied = answer.num_cached
            transfer.place = answer
            transfer.stage = "ready"
        elif stage == "copying" and isinstance(answer, Ack):
            if transfer.relocations == transfer.sequence.relocations:  # else a block may have changed under the copy
                transfer.num_copied = transfer.copying_to
            transfer.rounds += 1
            transfer.stage = "ready"
            if transfer.sequence in self._engine.scheduler.detached:
                self._end_last_copy(transfer, now)
        elif stage == "draining" and isinstance(answer, Ack):
            transfer.stage = "ready"
            self.give_up(transfer, now)
        elif stage == "handing" and isinstance(answer, Taken):
            if self._is_live(transfer.sequence):
                self._finish(transfer)
            else:
                self.give_up(transfer, now)  # cancelled meanwhile

    def _advance(self, transfer: SequenceTransfer, now: float) -> None:
        sequence, kv, place = transfer.sequence, self._engine.kv, transfer.place
        assert place is not None
        full = sequence.kv_len // kv.geometry.block_size
        num_tail = self._engine.scheduler.blocks.blocks_for(sequence.kv_len) - transfer.num_copied
        tail_bytes_max = COPY_BYTES_MAX if self._engine.has_followers else TAIL_BYTES_MAX
        must_copy = num_tail * kv.geometry.block_bytes > tail_bytes_max
        may_copy = full - transfer.num_copied > TAIL_BLOCKS and transfer.rounds < ROUNDS_MAX
        room = min(full, len(place.blocks))
        if sequence.kv_len and not place.blocks:  # it has begun to run meanwhile
            self._reserve(transfer, now)
        elif not (must_copy or may_copy) or full <= transfer.num_copied:
            is_announced = transfer.is_announced or not sequence.kv_len
            transfer.is_announced = True  # also before the target joins: its first steps are urgent anyway
            if self._members >> transfer.target.slot & 1 and is_announced:
                self._copy_last(transfer, place, now) if self._engine.has_followers else self._hand_over(transfer, now)
            elif now - transfer.reserved_at > FRESH_S:
                self._reserve(transfer, now)  # a place is kept for those who are heard of
        elif room <= transfer.num_copied or now - transfer.reserved_at > FRESH_S:
            self._reserve(transfer, now)
        elif now < self._hmm_silent_until:
            self._targets.pause(sequence, transfer.target.rank, now)
            self.give_up(transfer, now)
        else:
            self._copy(transfer, place, room, now)

    def _copy(self, transfer: SequenceTransfer, place: Reserved, room: int, now: float) -> None:
        first = transfer.num_copied
        num_blocks_max = max(1, min(BLOCKS_PER_COPY_MAX, COPY_BYTES_MAX // self._engine.kv.geometry.block_bytes))
        last = min(room, first + num_blocks_max)
        pairs = tuple(zip(transfer.sequence.blocks[first:last], place.blocks[first:last], strict=True))
        transfer.copying_to = last
        transfer.relocations = transfer.sequence.relocations
        transfer.stage = "copying"
        seat = self._seat
        self._num_copies += 1
        message = CopyBlocks(
            seat.slot, seat.incarnation, place.slot, place.incarnation, self._num_copies, now + COPY_S, pairs
        )
        self._ask(transfer, "hmm", message, now)

    def _copy_last(self, transfer: SequenceTransfer, place: Reserved, now: float) -> None:
        """All that the target has not got yet, while nobody writes any of it; then the hand-over."""
        sequence, end = transfer.sequence, self._engine.scheduler.blocks.blocks_for(transfer.sequence.kv_len)
        if end <= transfer.num_copied:
            self._hand_over(transfer, now)
        elif end > len(place.blocks) or now - transfer.reserved_at > FRESH_S:
            self._reserve(transfer, now)
        elif now < self._hmm_silent_until or sequence.deadline <= now:
            self._targets.pause(sequence, transfer.target.rank, now)
            self.give_up(transfer, now)
        else:
            self._engine.scheduler.detach(sequence)
            self._copy(transfer, place, end, now)

    def _end_last_copy(self, transfer: SequenceTransfer, now: float) -> None:
        self._restore(transfer.sequence)
        end = self._engine.scheduler.blocks.blocks_for(transfer.sequence.kv_len)
        if transfer.num_copied >= end:  # else blocks have moved meanwhile, or it was more than one copy
            self._hand_over(transfer, now)

    def _hand_over(self, transfer: SequenceTransfer, now: float) -> None:
        sequence = transfer.sequence
        if sequence.deadline <= now:
            self.give_up(transfer, now)  # it is about to expire here
            return
        self._engine.scheduler.detach(sequence)
        transfer.message = self._engine.hand_over(sequence, transfer.num_copied, now)
        transfer.stage = "handing"
        failpoint("rank.hand_over")
        self._send_hand_over(transfer, now)

    def _send_hand_over(self, transfer: SequenceTransfer, now: float) -> None:
        assert transfer.message is not None
        transfer.attempts += 1
        self._ask(transfer, f"rank-{transfer.target.rank}", transfer.message, now)

    def _finish(self, transfer: SequenceTransfer) -> None:
        sequence, target = transfer.sequence, transfer.target
        self._end(transfer)
        self._engine.forget(sequence)
        self._targets.note_done(target.rank)
        incarnation = transfer.place.incarnation if transfer.place else ""
        self._news.append((sequence.peer, Moved(sequence.request.request_id, target.rank, incarnation)))
        self._on_taken(sequence, target)


def _is_same_place(transfer: SequenceTransfer, answer: Reserved, now: float) -> bool:
    """Whether what was copied to the place that the target named before lies in the one that it names now."""
    before = transfer.place
    return (
        before is not None
        and now - transfer.reserved_before < KEPT_S
        and (before.incarnation, before.num_cached) == (answer.incarnation, answer.num_cached)
        and before.blocks == answer.blocks[: len(before.blocks)]
    )
