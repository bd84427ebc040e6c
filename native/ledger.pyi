"""The ledger: what a replica must not lose, in a shared-memory segment that the HMM owns.

One row for each running sequence: an opaque blob (request id, sampling parameters), its tokens, its KV block table and the
committed position. One process writes a row at a time. A kill at any instruction leaves each row as it was before the operation
or after it; an operation on several rows is atomic for each of them. Readers check all counts against the geometry and raise
``LedgerCorrupt`` where somebody else wrote into the segment.

Nothing here blocks. Bad arguments raise ``ValueError`` and change nothing. Tokens and blocks are int32 ≥ 0. The segment must stay
mapped as long as a ``Ledger`` over it exists; ``addr`` is a multiple of 64.
"""

from collections.abc import Sequence

class LedgerCorrupt(RuntimeError):
    """A row's state or counts are impossible."""

def ledger_bytes(num_rows: int, max_tokens: int, max_blocks: int, blob_bytes: int) -> int:
    """Size of a segment. Limits: ``max_tokens`` < 2**22, ``max_blocks`` < 2**20, ``num_rows`` ≤ 2**20, ``blob_bytes`` ≤ 2**20."""

def format_ledger(addr: int, nbytes: int, num_rows: int, max_tokens: int, max_blocks: int, blob_bytes: int) -> None:
    """Write the header into a segment of zeros (HMM only, before anyone opens it)."""

class Row:
    """A consistent copy of one live row."""

    @property
    def blob(self) -> bytes: ...
    @property
    def tokens(self) -> list[int]:
        """Prompt tokens, then committed ones."""

    @property
    def num_prompt(self) -> int:
        """How many of ``tokens`` are the prompt."""

    @property
    def blocks(self) -> list[int]:
        """KV block ids, by position."""

    @property
    def kv_len(self) -> int:
        """Number of tokens whose KV is written."""

    @property
    def mark(self) -> int:
        """The writer's word about the row: see ``mark_rows``."""

class Ledger:
    """A view of the segment. For one thread at a time."""

    def __init__(self, addr: int, nbytes: int) -> None:
        """Open a formatted segment; ``ValueError`` where magic, version or geometry do not fit ``nbytes``."""

    @property
    def num_rows(self) -> int: ...
    @property
    def max_tokens(self) -> int:
        """Tokens of one row, the prompt included."""

    @property
    def max_blocks(self) -> int: ...
    @property
    def blob_bytes(self) -> int: ...
    def open_row(self, row: int, blob: bytes, tokens: Sequence[int], blocks: Sequence[int], mark: int = 0) -> None:
        """Start a row with its prompt and the blocks it has so far; ``kv_len`` is 0. ``ValueError`` if the row is live."""

    def append_blocks(self, row: int, blocks: Sequence[int]) -> None:
        """Add blocks at the end of the row's block table."""

    def commit(self, row: int, kv_len: int, new_tokens: Sequence[int]) -> None:
        """Append tokens and set the committed position, in one publication, after the KV up to ``kv_len`` is written.

        ``kv_len`` never falls (see ``rewind``) and is at most the number of tokens, the new ones included.
        """

    def commit_many(self, commits: Sequence[tuple[int, int, int]]) -> None:
        """``commit`` of one token for each ``(row, kv_len, token)``. All are checked before the first is applied; no row twice."""

    def mark_rows(self, rows: Sequence[int], mark: int) -> None:
        """Keep a word ≥ 0 < 2**63 beside each of the rows; no other operation on a live row changes it. All are checked before the
        first is marked, and all can be seen by other processes when this returns."""

    def rewind(self, row: int, kv_len: int, num_blocks: int) -> None:
        """Forget KV (preemption): lower the committed position and the number of blocks, in one publication. Tokens stay.

        Not while another process reads the row.
        """

    def close_row(self, row: int) -> None:
        """End a row. ``ValueError`` if it is not live."""

    def read_row(self, row: int) -> Row | None:
        """A copy of a row; None if it is not live."""

    def rows(self) -> list[int]:
        """Live rows, ascending."""
