"""The stored form of operations, and how the one of the release before is read. Pure."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from elasticmoe.services.scaler.operation.operation import Accounting, LegProgress, Operation

_Attempt = Annotated[str, msgspec.Meta(pattern=r"^(.+/[0-9]{1,9}\.[0-9]{1,9})?$")]


class OperationRecords:
    """A decoder, as `Store` takes it. The record of the release before has no `form`, and has the fields of `progress`
    and `accounting` beside the others; its attempts are spelled `op/leg.attempt`."""

    def decode(self, raw: bytes) -> Operation:
        """The operation in `raw`. Raises msgspec.DecodeError for what is neither of this form nor of the one before."""
        record = msgspec.msgpack.decode(raw, type=dict[str, Any])
        if "form" not in record:
            for name, part in (("progress", LegProgress), ("accounting", Accounting)):
                record[name] = {field: record.pop(field) for field in part.__struct_fields__ if field in record}
            if "bytes_of" in record["accounting"]:
                record["accounting"]["bytes_of"] = _bytes_of(record["accounting"]["bytes_of"])
        return msgspec.convert(record, Operation)


def _bytes_of(before: object) -> tuple[tuple[str, int, int], int] | None:
    attempt, nbytes = msgspec.convert(before, tuple[_Attempt, int])
    if not attempt:
        return None
    op, _, place = attempt.rpartition("/")
    leg, _, number = place.partition(".")
    return (op, int(leg), int(number)), nbytes


OPERATIONS = OperationRecords()
