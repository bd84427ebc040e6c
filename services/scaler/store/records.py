"""The stored form of operations, and how the one of the release before is read. Pure."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

from elasticmoe.services.scaler.operation.operation import Accounting, LegProgress, Operation

_Attempt = Annotated[str, msgspec.Meta(pattern=r"^(.+/[0-9]{1,9}\.[0-9]{1,9})?$")]
_POLICYS = re.compile(r"policy-([0-9]{1,9})-[0-9]+\.[0-9]{3}")  # names of its orders then


class OperationRecords:
    """A decoder, as `Store` takes it. The record of the release before has no `form`, and has the fields of `progress`
    and `accounting` beside the others; its attempts are spelled `op/leg.attempt`. Whether an order was the policy's was
    told by its name alone, and is noted since."""

    def decode(self, raw: bytes) -> Operation:
        """The operation in `raw`. Raises msgspec.DecodeError for what is neither of this form nor of the one before."""
        record = msgspec.msgpack.decode(raw, type=dict[str, Any])
        if "form" not in record:
            for name, part in (("progress", LegProgress), ("accounting", Accounting)):
                record[name] = {field: record.pop(field) for field in part.__struct_fields__ if field in record}
            if "bytes_of" in record["accounting"]:
                record["accounting"]["bytes_of"] = _bytes_of(record["accounting"]["bytes_of"])
        if "policy_order" not in record and (policys := _POLICYS.fullmatch(str(record.get("op_id")))):
            record["policy_order"] = int(policys[1])
        return msgspec.convert(record, Operation)


def _bytes_of(before: object) -> tuple[tuple[str, int, int], int] | None:
    attempt, nbytes = msgspec.convert(before, tuple[_Attempt, int])
    if not attempt:
        return None
    op, _, place = attempt.rpartition("/")
    leg, _, number = place.partition(".")
    return (op, int(leg), int(number)), nbytes


OPERATIONS = OperationRecords()
