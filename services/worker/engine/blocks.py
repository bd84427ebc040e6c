"""KV blocks of one rank: who owns which, and which may be shared. Pure: no tensors, no clock.

A block holds `block_size` tokens of all layers. Full blocks are immutable, so that sequences with the same beginning
share them: a full block is entered in the prefix cache under (its predecessor's entry, its tokens), compared exactly.
A block without owners but with an entry stays available for a match until it is taken, oldest first.

The number of blocks may change. When it falls, blocks beyond it that have owners stay theirs until they are released
or relocated; nobody else gets them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

from elasticmoe.common.protocol.errors import Overloaded

_Key = tuple[int, tuple[int, ...]]  # (entry number of the predecessor, the block's tokens)


class BlockManager:
    """Owns the numbers 0 .. num_blocks - 1. Paired verbs: allocate / release, grow / shrink, match / register."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._owners = [0] * num_blocks
        self._free: list[int] = list(range(num_blocks - 1, -1, -1))  # never cached
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, without owner; oldest first
        self._entry_of: dict[int, tuple[int, _Key]] = {}  # block -> (entry number, key)
        self._block_of: dict[_Key, int] = {}
        self._next_entry = 1

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could give out now."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, count: int) -> bool:
        """Whether `allocate(count)` would succeed."""
        return count <= self.num_free

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with one owner each. Raises Overloaded when there are not enough; then none is taken."""
        if not self.can_allocate(count):
            raise Overloaded(
                f"{count} KV blocks wanted, {self.num_free} of {self.num_blocks} free", code="kv_exhausted"
            )
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._owners[block] = 1
            taken.append(block)
        return taken

    def claim(self, tables: Seq[Seq[int]]) -> None:
        """Own what a predecessor's sequences own, once per table that names a block. Only of a fresh manager."""
        for table in tables:
            for block in table:
                self._owners[block] += 1
        self._free = [block for block in self._free if not self._owners[block]]

    def release(self, blocks: Seq[int]) -> None:
        """Give up one ownership of each block. Cached ones stay matchable until they are taken."""
        for block in reversed(blocks):  # the end of a sequence goes first: its beginning is matched more often
            if self._owners[block] < 1:
                raise AssertionError(f"block {block} has no owner")
            self._owners[block] -= 1
            if self._owners[block] == 0:
                if block >= self.num_blocks:
                    self._drop_entry(block)
                elif block in self._entry_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def match(self, tokens: Seq[int]) -> list[int]:
        """The longest run of cached blocks that begins `tokens`, leaving at least one token to compute.

        The caller becomes an owner of each.
        """
        matched: list[int] = []
        parent = 0
        for start in range(0, (len(tokens) - 1) // self.block_size * self.block_size, self.block_size):
            block = self._block_of.get((parent, tuple(tokens[start : start + self.block_size])))
            if block is None:
                break
            parent = self._entry_of[block][0]
            matched.append(block)
        for block in matched:
            if self._owners[block] == 0:
                del self._idle[block]
            self._owners[block] += 1
        return matched

    def register(self, blocks: Seq[int], tokens: Seq[int], first: int, last: int) -> int:
        """Enter the full blocks number `first` .. `last` - 1 of a sequence; returns how many are now covered.

        Where another block already has the same content, this one stays private, and so does what follows it.
        """
        for index in range(first, last):
            parent = self._entry_of[blocks[index - 1]][0] if index else 0
            key = (parent, tuple(tokens[index * self.block_size : (index + 1) * self.block_size]))
            known = self._block_of.get(key)
            if known == blocks[index]:
                continue  # shared, and entered by another of its owners
            if known is not None:
                return index
            self._block_of[key] = blocks[index]
            self._entry_of[blocks[index]] = (self._next_entry, key)
            self._next_entry += 1
        return last

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self._drop_entry(block)
        return block

    def _drop_entry(self, block: int) -> None:
        entry = self._entry_of.pop(block, None)
        if entry is not None:
            del self._block_of[entry[1]]

    # ---- another number of blocks -----------------------------------------------------------------------------------

    def grow(self, num_blocks: int) -> None:
        """Give out the blocks up to `num_blocks` - 1 from now on, after all others. Undoes a `shrink`."""
        if num_blocks < self.num_blocks:
            raise ValueError(f"{num_blocks} blocks are fewer than the {self.num_blocks} there are")
        self._owners += [0] * (num_blocks - len(self._owners))
        added = range(num_blocks - 1, self.num_blocks - 1, -1)
        self._free[:0] = [block for block in added if self._owners[block] == 0]
        self.num_blocks = num_blocks

    def shrink(self, num_blocks: int) -> None:
        """Give out blocks from `num_blocks` on no more; cached ones without owner are forgotten.

        Those with owners are `blocks_to_vacate`; each ends with its `release`, or is moved with `relocate`.
        """
        if not 0 < num_blocks <= self.num_blocks:
            raise ValueError(f"{num_blocks} blocks; must be from 1 to the {self.num_blocks} there are")
        self.num_blocks = num_blocks
        self._free = [block for block in self._free if block < num_blocks]
        for block in [block for block in self._idle if block >= num_blocks]:
            del self._idle[block]
            self._drop_entry(block)

    @property
    def blocks_to_vacate(self) -> list[int]:
        """Blocks beyond `num_blocks` that have owners, ascending."""
        return [block for block in range(self.num_blocks, len(self._owners)) if self._owners[block]]

    def relocate(self, old: int) -> int | None:
        """Let a free block take the place of `old`, one of `blocks_to_vacate`; None while there is none.

        All owners of `old` own the new block instead, and the prefix cache names it. The caller copies the content and
        changes the owners' tables before it does anything else.
        """
        if not self.can_allocate(1):
            return None
        new = self.allocate(1)[0]
        self.replace(old, new)
        return new

    def replace(self, old: int, new: int) -> None:
        """`relocate` to a block that was allocated for it: nobody owns it but for this."""
        if old < self.num_blocks or self._owners[old] == 0:
            raise AssertionError(f"block {old} of {self.num_blocks} is not to be vacated")
        self._owners[new], self._owners[old] = self._owners[old], 0
        entry = self._entry_of.pop(old, None)
        if entry is not None:
            self._entry_of[new] = entry
            self._block_of[entry[1]] = new

    def check_integrity(self, owned: Seq[Seq[int]]) -> list[str]:
        """Findings, empty when all is well; `owned` are the block tables of all sequences."""
        counts = [0] * len(self._owners)
        for table in owned:
            for block in table:
                counts[block] += 1
        findings = [
            f"block {block}: {self._owners[block]} owners, {counts[block]} sequences"
            for block in range(len(self._owners))
            if self._owners[block] != counts[block]
        ]
        unowned = {block for block in range(self.num_blocks) if self._owners[block] == 0}
        if len(unowned) != self.num_free or set(self._free) | set(self._idle) != unowned:
            findings.append(f"{len(unowned)} blocks without owner, {self.num_free} in the free lists")
        if len(self._block_of) != len(self._entry_of):
            findings.append(f"{len(self._block_of)} cache keys, {len(self._entry_of)} cache entries")
        return findings
