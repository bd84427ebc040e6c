"""The stored form of operations, and how the one of the release before is read. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from elasticmoe.services.scaler.operation.operation import Accounting, LegProgress, Operation


class OperationRecords:
    """A decoder, as `Store` takes it. The record of the release before has no `form`, and has the fields of `progress`
    and `accounting` beside the others; its attempts are spelled `op/leg.attempt`."""

    def decode(self, raw: bytes) -> Operation:
        """The operation in `raw`. Raises msgspec.DecodeError for what is neither of this form nor of the one before."""
        record = msgspec.msgpack.decode(raw, type=dict[str, Any])
        if "form" not in record:
            for name, part in (("progress", LegProgress), ("accounting", Accounting)):
                record[name] = {field: record.pop(field) for field in part.__struct_fields__ if field in record}
            attempt, nbytes = record["accounting"].pop("bytes_of", ("", 0))
            if attempt:
                op, _, place = attempt.rpartition("/")
                record["accounting"]["bytes_of"] = ((op, *(int(number) for number in place.split("."))), nbytes)
        return msgspec.convert(record, Operation)


OPERATIONS = OperationRecords()
