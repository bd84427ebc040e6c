"""elasticmoe.native.ledger: rows of one view are read through another; wrong operations change nothing."""

import ctypes
import mmap
from collections.abc import Iterator

import pytest

from elasticmoe.native.ledger import Ledger, LedgerCorrupt, format_ledger, ledger_bytes

SHAPE = (4, 32, 6, 16)  # rows, tokens, blocks, blob bytes


class Segment:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory = mmap.mmap(-1, nbytes)
        self.view = (ctypes.c_char * nbytes).from_buffer(self.memory)
        self.addr = ctypes.addressof(self.view)

    def close(self) -> None:
        del self.view
        self.memory.close()


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment(ledger_bytes(*SHAPE))
    format_ledger(segment.addr, segment.nbytes, *SHAPE)
    yield segment
    segment.close()


@pytest.fixture
def ledger(segment) -> Ledger:
    return Ledger(segment.addr, segment.nbytes)


def test_geometry_is_read_back(ledger):
    assert (ledger.num_rows, ledger.max_tokens, ledger.max_blocks, ledger.blob_bytes) == SHAPE


def test_a_row_is_read_as_it_was_written(segment, ledger):
    ledger.open_row(1, b"request-7\0x", [5, 6, 7], [2])
    ledger.append_blocks(1, (4, 3))
    ledger.commit(1, 3, [8])
    ledger.commit_many([(1, 4, 9)])
    row = Ledger(segment.addr, segment.nbytes).read_row(1)
    assert row is not None
    assert (row.blob, row.tokens, row.blocks) == (b"request-7\0x", [5, 6, 7, 8, 9], [2, 4, 3])
    assert (row.kv_len, row.num_prompt, row.mark) == (4, 3, 0)
    assert ledger.rows() == [1]
    ledger.close_row(1)
    assert ledger.read_row(1) is None
    assert ledger.rows() == []


def test_preemption_rewinds_kv_and_keeps_tokens(ledger):
    ledger.open_row(0, b"", [1, 2, 3], [1, 2])
    ledger.commit(0, 3, [4])
    ledger.rewind(0, 0, 0)
    ledger.append_blocks(0, [5])
    row = ledger.read_row(0)
    assert (row.kv_len, row.blocks, row.tokens, row.num_prompt) == (0, [5], [1, 2, 3, 4], 3)


def test_marks_stay_until_the_row_is_opened_again(segment, ledger):
    reader = Ledger(segment.addr, segment.nbytes)
    ledger.open_row(0, b"", [1, 2, 3], [1], 2**63 - 1)
    ledger.open_row(2, b"", [1], [1])
    ledger.mark_rows([2], 5)
    ledger.mark_rows([], 7)
    ledger.commit(0, 3, [4])
    ledger.append_blocks(0, [2])
    ledger.rewind(0, 0, 0)
    assert [reader.read_row(row).mark for row in (0, 2)] == [2**63 - 1, 5]
    ledger.close_row(2)
    ledger.open_row(2, b"", [1], [1])
    assert reader.read_row(2).mark == 0


@pytest.mark.parametrize(
    "operation",
    [
        lambda ledger: ledger.open_row(1, b"", [], [], -1),
        lambda ledger: ledger.mark_rows([0, 1], 1),
        lambda ledger: ledger.mark_rows([0], -1),
        lambda ledger: ledger.open_row(0, b"", [], []),
        lambda ledger: ledger.open_row(4, b"", [], []),
        lambda ledger: ledger.open_row(1, b"x" * 17, [], []),
        lambda ledger: ledger.open_row(1, b"", [0] * 33, []),
        lambda ledger: ledger.open_row(1, b"", [], [0] * 7),
        lambda ledger: ledger.commit(0, 1, []),
        lambda ledger: ledger.commit(0, 4, [1]),
        lambda ledger: ledger.commit(0, 2, [-1]),
        lambda ledger: ledger.commit(1, 0, []),
        lambda ledger: ledger.commit_many([(0, 3, 1), (1, 0, 1)]),
        lambda ledger: ledger.commit_many([(0, 3, 1), (0, 3, 1)]),
        lambda ledger: ledger.append_blocks(0, [1] * 6),
        lambda ledger: ledger.rewind(0, 3, 0),
        lambda ledger: ledger.close_row(1),
        lambda ledger: ledger.read_row(-1),
    ],
)
def test_wrong_operations_change_nothing(ledger, operation):
    ledger.open_row(0, b"a", [1, 2], [9])
    ledger.commit(0, 2, [])
    with pytest.raises(ValueError):
        operation(ledger)
    row = ledger.read_row(0)
    assert (row.blob, row.tokens, row.blocks, row.kv_len, row.mark) == (b"a", [1, 2], [9], 2, 0)
    assert ledger.rows() == [0]


def test_a_foreign_segment_is_refused(segment):
    with pytest.raises(ValueError, match="formatted"):
        format_ledger(segment.addr, segment.nbytes, *SHAPE)
    with pytest.raises(ValueError, match="smaller"):
        Ledger(segment.addr, segment.nbytes - 1)
    segment.memory[0] ^= 1
    with pytest.raises(ValueError, match="magic"):
        Ledger(segment.addr, segment.nbytes)
    with pytest.raises(ValueError, match="max_tokens"):
        ledger_bytes(1, 2**22, 1, 1)


def test_overwritten_rows_are_corrupt_not_believed(segment, ledger):
    ledger.open_row(0, b"", [1], [])
    segment.memory[64 + 8 : 64 + 16] = b"\xff" * 8  # the first row's counts
    with pytest.raises(LedgerCorrupt):
        ledger.read_row(0)
