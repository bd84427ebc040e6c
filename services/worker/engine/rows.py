"""What a ledger row says beyond its tokens and blocks, and a row read back as a sequence that can go on.

A row is believed only where all of it fits together; whatever does not is BadRow, and the router starts that stream
anew from the tokens it has. Pure but for the ledger itself.
"""

from __future__ import annotations

import msgspec

from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.rank import Submit
from elasticmoe.common.wording import undecodable
from elasticmoe.native.ledger import Ledger, LedgerCorrupt, Row
from elasticmoe.services.worker.engine.sequence import Sequence
from elasticmoe.services.worker.engine.trial import after_death


class BadRow(ElasticMoEError):
    """A row that cannot be gone on with."""

    code = "bad_ledger_row"


class LedgerEntry(msgspec.Struct, frozen=True, array_like=True):
    """What a row's blob holds: whom to answer, and the request without its tokens, which the row has.

    `deadline`: on CLOCK_MONOTONIC, which all processes of a machine share.
    """

    peer: bytes
    request: Submit
    deadline: float


_decoder = msgspec.msgpack.Decoder(LedgerEntry)


def encode_entry(sequence: Sequence) -> bytes:
    """The blob of a sequence's row."""
    request = msgspec.structs.replace(sequence.request, prompt=sequence.request.prompt[:1])
    return msgspec.msgpack.encode(LedgerEntry(sequence.peer, request, sequence.deadline))


def entry_bytes_max(request: Submit, peer: bytes) -> int:
    """The size that the blob of this request never exceeds."""
    bare = msgspec.structs.replace(request, prompt=request.prompt[:1], output=(), suspicion=None)
    return len(msgspec.msgpack.encode(LedgerEntry(peer, bare, 0.0)))


def read_sequence(ledger: Ledger, row: int, *, num_blocks: int, block_size: int, vocab: int) -> Sequence:
    """The sequence that a live row tells of, with its blocks, which are not claimed yet. Raises BadRow."""
    try:
        read = ledger.read_row(row)
    except LedgerCorrupt as error:
        raise BadRow(str(error)) from None
    if read is None:
        raise BadRow("it is not live")
    try:
        entry = _decoder.decode(read.blob)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise BadRow(f"its request cannot be read: {undecodable(error)}") from None
    _check(read, num_blocks=num_blocks, block_size=block_size, vocab=vocab)
    prompt = tuple(read.tokens[: read.num_prompt])
    sequence = Sequence(msgspec.structs.replace(entry.request, prompt=prompt), entry.peer, 0, entry.deadline)
    sequence.tokens = read.tokens
    sequence.kv_len = sequence.kv_len_max = read.kv_len
    sequence.blocks = read.blocks[: -(-len(read.tokens) // block_size)]
    sequence.row = row
    sequence.trial = after_death(read.mark, len(read.tokens))
    return sequence


def _check(read: Row, *, num_blocks: int, block_size: int, vocab: int) -> None:
    tokens, blocks = read.tokens, read.blocks
    for is_wrong, what in (
        (not read.num_prompt, "it has no prompt"),
        (min([*tokens, *blocks], default=0) < 0, "it has negative numbers"),
        (max(tokens, default=0) >= vocab, f"it has token id {max(tokens, default=0)}; the vocabulary has {vocab}"),
        (read.kv_len >= len(tokens), f"it has KV of {read.kv_len} of {len(tokens)} tokens"),
        (len(blocks) * block_size < read.kv_len, f"it has {len(blocks)} blocks for {read.kv_len} tokens"),
        (max(blocks, default=0) >= num_blocks, f"it has block {max(blocks, default=0)} of {num_blocks}"),
        (len(set(blocks)) < len(blocks), "it has a block twice"),
    ):
        if is_wrong:
            raise BadRow(what)
