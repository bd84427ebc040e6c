"""Another number of KV blocks, while sequences go on: blocks that go are vacated, a few at a time.

A rank that is a replica by itself moves its blocks between two steps. Where a replica has several ranks, all of them
have to, and none may know of a block's new place before all have its bytes there (ADR 37): moves are part of a step's
plan. Each rank makes the copies, and what the step writes goes to the new places; the leader's tables and its ledger
name these once the step is complete. Until then the old ones stay as they are; a step that is given up takes its moves
with it.
"""

from __future__ import annotations

from elasticmoe.common.seat_sizes import MOVES_MAX
from elasticmoe.native.ledger import Ledger
from elasticmoe.services.worker.engine import kv_bytes
from elasticmoe.services.worker.engine.scheduler import Scheduler
from elasticmoe.services.worker.exchange.board import Moves, ReplicaBoard
from elasticmoe.services.worker.model.weights import KvCache

NO_TOKENS: tuple[int, ...] = ()


class KvRoom:
    """Owned by the engine, to which scheduler, ledger and cache belong. `board`: see Engine."""

    def __init__(self, scheduler: Scheduler, ledger: Ledger, kv: KvCache, board: ReplicaBoard | None) -> None:
        self._scheduler = scheduler
        self._ledger = ledger
        self._kv = kv
        self._board = board
        self._goal = kv.num_blocks  # of blocks that are or stay mapped here
        self._moves: dict[int, int] = {}  # of the step that was planned last
        if board is not None:
            board.tell_blocks(scheduler.blocks.num_blocks)

    def resize(self, num_blocks: int, blocks_per_turn: int) -> bool:
        """Bring the rank to `num_blocks` KV blocks; called once between two steps until it returns True.

        More blocks must be mapped before the first call; fewer may be unmapped once it has returned True. Sequences go
        on meanwhile: at most `blocks_per_turn` of their blocks are moved in one call, as lower ones become free. What
        is kept for other ranks' sequences is not moved, since the HMM may be writing there; it ends by itself.
        """
        self._goal = num_blocks
        self._kv.num_blocks = max(self._kv.num_blocks, num_blocks)
        if self._board is not None:
            self.adapt()
        else:
            self._change(num_blocks)
            self._move(blocks_per_turn)
        if self._scheduler.blocks.blocks_to_vacate:
            return False
        self._kv.num_blocks = num_blocks
        return True

    def _change(self, num_blocks: int) -> None:
        blocks = self._scheduler.blocks
        if num_blocks > blocks.num_blocks:
            blocks.grow(num_blocks)
        elif num_blocks < blocks.num_blocks:
            blocks.shrink(num_blocks)

    def _to_move(self, blocks_max: int) -> list[int]:
        held = {block for hold in self._scheduler.holds for block in hold.blocks}
        return [block for block in self._scheduler.blocks.blocks_to_vacate if block not in held][:blocks_max]

    def _move(self, blocks_max: int) -> None:
        places: dict[int, int] = {}
        for old in self._to_move(blocks_max):
            new = self._scheduler.blocks.relocate(old)
            if new is None:
                break
            kv_bytes.copy_block(self._kv, old, new)
            places[old] = new
        if places:
            self._follow(places)

    def _follow(self, places: dict[int, int]) -> None:
        """Let the sequences name the blocks' new places. The old ones keep their bytes at least until all have: a kill
        in between leaves rows that end before the first moved block, at worst."""
        block_size = self._kv.geometry.block_size
        for sequence in self._scheduler.sequences():
            moved = [index for index, block in enumerate(sequence.blocks) if block in places]
            for index in moved:
                sequence.blocks[index] = places[sequence.blocks[index]]
            if not moved:
                continue
            sequence.relocations += 1
            first = moved[0]
            if first < sequence.logged:
                self._ledger.rewind(sequence.row, min(sequence.kv_len, first * block_size), first)
                self._ledger.append_blocks(sequence.row, sequence.blocks[first : sequence.logged])
                self._ledger.commit(sequence.row, sequence.kv_len, NO_TOKENS)

    # ---- where a replica has several ranks ------------------------------------------------------------------------

    def adapt(self) -> None:
        """Between two steps: give out what all ranks of the replica have, and say how much that is."""
        board, blocks = self._board, self._scheduler.blocks
        assert board is not None, "a replica of several ranks"
        self._drop_moves()
        usable = min(self._goal, board.blocks_of_followers)
        if usable > blocks.num_blocks:
            board.tell_blocks(usable)
            if board.blocks_of_followers < usable:  # one of them has begun to unmap at this moment
                board.tell_blocks(blocks.num_blocks)
                return
        if usable != blocks.num_blocks:
            self._change(usable)
        if not blocks.blocks_to_vacate:
            board.tell_blocks(blocks.num_blocks)

    def plan_moves(self) -> Moves:
        """Moves for the step that is being planned: each has a place of its own until `settle_moves`, or until the next
        step is planned."""
        for old in self._to_move(MOVES_MAX):
            if not self._scheduler.blocks.can_allocate(1):
                break
            self._moves[old] = self._scheduler.blocks.allocate(1)[0]
        return tuple(self._moves.items())

    def settle_moves(self) -> None:
        """The step is complete on all ranks: the blocks are in their new places."""
        for old, new in self._moves.items():
            self._scheduler.blocks.replace(old, new)
        self._follow(self._moves)
        self._moves = {}

    def _drop_moves(self) -> None:
        """The step that was planned last has not come to pass."""
        for new in self._moves.values():
            self._scheduler.blocks.release([new])
        self._moves = {}

    @property
    def places(self) -> list[int]:
        """Blocks that wait for what moves."""
        return list(self._moves.values())
