"""Codes that operators meet: answers of the admin API, and why operations end."""

from __future__ import annotations

from elasticmoe.common.error_codes.code import Code

OPERATORS: dict[str, Code] = {
    "invalid_admin_token": Code(
        "The admin token is missing or wrong",
        "Send the text of `RUN_DIR/secrets/admin.token` as a bearer token",
        (401,),
    ),
    "invalid_target": Code(
        "The order names no target that can be understood or reached", "Correct it: scaling.md", (422, 400)
    ),
    "too_few_devices": Code(
        "More replicas are asked for than there are devices",
        "Ask for fewer, or start with more: `--devices host:N`",
        (422, 400),
    ),
    "unknown_device": Code("There is no such device", "`GET /v1/devices` lists them", (422,)),
    "unknown_replica": Code("There is no such replica", "`GET /v1/layout` lists them", (422,)),
    "last_replica": Code("The order would leave no replica", "Use `elasticmoe down` to stop", (422,)),
    "does_not_fit": Code(
        "An operation or a start would exceed a budget of bytes; the text has the figures",
        "Use more devices, or less: `--kv-memory`, `--max-model-len`",
        (422,),
    ),
    "unknown_operation": Code("There is no such operation; the last 100 are kept", "`GET /v1/operations`", (404,)),
    "conflict": Code("The state does not allow it now", "See the text", (409,)),
    "operation_running": Code("Another operation is in progress", "Try again when it has ended", (409,), True),
    "op_id_reused": Code(
        "An operation of this `op_id` exists with another target", "Let each operation have an id of its own", (409,)
    ),
    "policy_changed": Code(
        "The policy is not what the writer has seen: somebody else has changed it meanwhile",
        "Read `GET /v1/policy`, and decide anew",
        (409,),
    ),
    "wrong_instance": Code(
        "The order names another deployment than the one it came to: that one is gone, or its state was dropped",
        "Read `instance_id` of `GET /v1/scale`, and decide anew",
        (409,),
    ),
    "committed": Code("The operation is past its commit: there is only forward", "Scale back when it is done", (409,)),
    "operation_ended": Code("The operation has ended already", "Nothing to do", (409,)),
    "device_lost": Code(
        "A device has lost its memory, and is left out first; or the operation was given up for that",
        "Try again when that is done, or name the device in the order",
        (409,),
        True,
    ),
    "stale_epoch": Code(
        "The sender acts under an epoch that has been superseded: another scaler has taken over",
        "Nothing: it ends, and its successor answers",
        (409,),
    ),
    "not_ready": Code(
        "The deployment, or the part that is asked, does not serve yet",
        "Try again: `elasticmoe status`",
        (503,),
        None,
    ),
    "too_many_listeners": Code("All places of the event stream are taken", "Close one", (429,), True),
    "cancelled": Code("The operation was cancelled, or the request's client left", "Nothing to do"),
    "layout_changed": Code("Another layout came into force than the one that was planned from", "Order it again"),
    "stage_failed": Code("The HMM could not make what the layout needs", "See the HMM's log"),
    "joiner_exited": Code("A rank ended before it joined", "Order it again; see the pool's log", (), True),
    "interrupted": Code("The HMM ended while it made what the operation needs", "Order it again"),
    "aborted": Code("The load or the operation was given up", "Order it again", (), None),
    "rank_crash_loop": Code(
        "A seat's ranks died more than `rank_restarts_max` times in `rank_restarts_window_s`",
        "runbooks/crash-loop.md",
    ),
}
