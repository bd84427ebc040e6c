"""Ledgers as the HMM makes them: one for each seat, in memory of the host, empty for its first rank."""

from __future__ import annotations

from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.common.seat_sizes import LEDGER_BLOB_BYTES, LedgerSizes
from elasticmoe.native.ledger import format_ledger


def claim_ledger(device: str, sizes: LedgerSizes) -> HostShared:
    """Memory for the ledger of the rank on `device`, without its pages: `populate` makes them, and `format_pages` ends
    that. The caller closes it. Raises DoesNotFit, and Unavailable at the limit of open files."""
    try:
        shared = HostShared.create(f"{device}.ledger")
    except OSError as error:
        raise Unavailable(f"no descriptor for a ledger: {error.strerror}") from None
    try:
        shared.resize(sizes.nbytes)
    except BaseException:
        shared.close()
        raise
    return shared


def format_pages(shared: HostShared, sizes: LedgerSizes) -> None:
    """Write an empty ledger's header."""
    at, blob = shared.address, LEDGER_BLOB_BYTES
    format_ledger(at, sizes.nbytes, sizes.num_rows, sizes.max_tokens, sizes.max_blocks, blob)


def make_ledger(device: str, sizes: LedgerSizes) -> HostShared:
    """A whole one at once. Blocks while pages are made. Raises as `claim_ledger`."""
    shared = claim_ledger(device, sizes)
    try:
        shared.populate(0, sizes.nbytes)
        format_pages(shared, sizes)
    except BaseException:
        shared.close()
        raise
    return shared
