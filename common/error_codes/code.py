"""What is said of an error code."""

from __future__ import annotations

from typing import NamedTuple


class Code(NamedTuple):
    """`statuses`: of the HTTP answers with this code, the usual one first; empty where none has it. `is_retryable`: the
    same call, unchanged, may succeed later; None: that depends, and `Retry-After` or the text tells."""

    meaning: str
    remedy: str
    statuses: tuple[int, ...] = ()
    is_retryable: bool | None = False
