"""Codes that processes tell one another: they show in logs, and as reasons of what others report."""

from __future__ import annotations

from elasticmoe.common.error_codes.code import Code

_NOTHING = "Nothing: the sender goes on from what it sees"

INTERNAL: dict[str, Code] = {
    "duplicate_request_id": Code("A request with this id is at the rank already", _NOTHING),
    "protocol_error": Code("A message cannot be decoded", "Report it with both logs"),
    "version_mismatch": Code("Two processes are of different versions", "runbooks/upgrade.md"),
    "wrong_uid": Code("A process of another user connected", "Find out whose it is"),
    "too_many": Code("More connections than a service has places", "Report it with the log"),
    "no_standby": Code(
        "No standby is ready to take a seat", "It is asked for again; see the pool's log", is_retryable=True
    ),
    "descriptors_cut": Code("A process has no room for descriptors that it was sent", "Raise its limit of open files"),
    "no_descriptors": Code(
        "No descriptor is left: a connection was closed, or memory could not be shared",
        "Raise its limit of open files",
        is_retryable=True,
    ),
    "seat_taken": Code("A living rank has the seat", _NOTHING),
    "unknown_rank": Code("The pool has no such rank", _NOTHING),
    "leaving": Code("The rank hands its own sequences over, and takes none", _NOTHING, is_retryable=True),
    "not_reserved": Code("No place is kept for a sequence that was handed over", _NOTHING),
    "bad_hand_over": Code("What is handed over does not fit together", "Report it with both ranks' logs"),
    "bad_ledger_row": Code("A row of the ledger cannot be read; its request is submitted anew", _NOTHING),
    "token_out_of_range": Code("A token that the model does not have", "Report it with the router's log"),
    "not_attached": Code("A seat has no attached rank yet", _NOTHING, is_retryable=True),
    "stale_copy": Code("A copy of KV that was asked for before has ended", _NOTHING),
    "stale_incarnation": Code("The seat has another process by now", _NOTHING),
    "copying": Code("Blocks of the seat are still copied", _NOTHING, is_retryable=True),
    "loading": Code("Memory is being filled", "Ask again when the load is over"),
    "in_transition": Code("Another transition is under way", _NOTHING),
    "wrong_epoch": Code("The layout does not follow the one in force", _NOTHING),
    "not_prepared": Code("A rank has not mapped everything yet", _NOTHING),
    "not_flipped": Code("The ranks do not step by the new layout yet", _NOTHING),
    "still_attached": Code("A rank is still attached to a seat that is given up", _NOTHING),
    "missing_record": Code("Memory that a rank needs was not sent", "Report it with the HMM's log"),
    "memory_replaced": Code("The HMM holds other memory than the rank has mapped", "It ends and is replaced"),
}
