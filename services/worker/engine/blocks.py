"""KV blocks of one rank: who owns which, and which may be shared. Pure: no tensors, no clock.

A block holds `block_size` tokens of all layers. Full blocks are immutable, so that sequences with the same beginning
share them: a full block is entered in the prefix cache under (its predecessor's entry, its tokens), compared exactly.
A block without owners but with an entry stays available for a match until it is taken, oldest first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

from common.protocol.errors import Overloaded

_Key = tuple[int, tuple[int, ...]]  # (entry number of the predecessor, the block's tokens)


class BlockManager:
    """Owns the numbers 0 .. num_blocks - 1. Verbs come in pairs: allocate / release, match / register."""

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

    def release(self, blocks: Seq[int]) -> None:
        """Give up one ownership of each block. Cached ones stay matchable until they are taken."""
        for block in reversed(blocks):  # the end of a sequence goes first: its beginning is matched more often
            if self._owners[block] < 1:
                raise AssertionError(f"block {block} has no owner")
            self._owners[block] -= 1
            if self._owners[block] == 0:
                if block in self._entry_of:
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
            if key in self._block_of:
                return index
            self._block_of[key] = blocks[index]
            self._entry_of[blocks[index]] = (self._next_entry, key)
            self._next_entry += 1
        return last

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        _, key = self._entry_of.pop(block)
        del self._block_of[key]
        return block

    def check_integrity(self, owned: Seq[Seq[int]]) -> list[str]:
        """Findings, empty when all is well; `owned` are the block tables of all sequences."""
        counts = [0] * self.num_blocks
        for table in owned:
            for block in table:
                counts[block] += 1
        findings = [
            f"block {block}: {self._owners[block]} owners, {counts[block]} sequences"
            for block in range(self.num_blocks)
            if self._owners[block] != counts[block]
        ]
        unowned = sum(1 for owners in self._owners if owners == 0)
        if unowned != self.num_free or len(set(self._free) | set(self._idle)) != self.num_free:
            findings.append(f"{unowned} blocks without owner, {self.num_free} in the free lists")
        if len(self._block_of) != len(self._entry_of):
            findings.append(f"{len(self._block_of)} cache keys, {len(self._entry_of)} cache entries")
        return findings
