"""The kinds of events: when each comes, and its facts. `docs/reference/events.md` is made from these."""

from __future__ import annotations

from typing import NamedTuple

_OP_ID = {"op_id": "the operation"}
_PHASE = {"phase": "the phase that it is in"}
_RANK = {"rank": "such as `r1t0`"}
_EXIT_CODE = {"exit_code": "negative for a signal; left out where nobody knows it"}


class EventKind(NamedTuple):
    """`when`: what has happened. `facts`: the names that `facts` may have, and what they say."""

    when: str
    facts: dict[str, str]


KINDS: dict[str, EventKind] = {
    "decision": EventKind(
        "The deployment's state has another reason than before",
        {"phase": "`starting`, `loading`, `attaching`, `serving`, `degraded` or `failed`"},
    ),
    "rank_exited": EventKind("A rank that served has ended; a standby takes its seat", _RANK | _EXIT_CODE),
    "rank_ended": EventKind(
        "A rank has ended that was joining or leaving, so nobody takes its seat", _RANK | _EXIT_CODE
    ),
    "rank_ejected": EventKind(
        "A rank lived and made no progress for `rank_stall_s`; it is killed and replaced",
        _RANK | {"incarnation": "of the process"},
    ),
    "operation_accepted": EventKind(
        "An order has become an operation; `reason` is the order's", _OP_ID | {"kind": "`scale_up`, `rebalance`, …"}
    ),
    "operation_resumed": EventKind("A scaler goes on with an operation that it found in the journal", _OP_ID | _PHASE),
    "operation_phase": EventKind(
        "An operation has entered a phase, a leg or another attempt; `reason` says why",
        _OP_ID
        | _PHASE
        | {"leg": "counted from 1", "before": "the phase that ended", "before_s": "seconds spent in it"},
    ),
    "operation_late": EventKind("A committed operation is past its deadline; it goes on", _OP_ID | _PHASE),
    "operation_cancel": EventKind("An operator, or the policy, has cancelled an operation", _OP_ID),
    "operation_gives_way": EventKind("The operation ends early, for one that leaves a lost device out", _OP_ID),
    "operation_ended": EventKind(
        "An operation has ended; `reason` says why", _OP_ID | {"outcome": "`done`, `cancelled` or `aborted`"}
    ),
    "device_failed": EventKind(
        "The HMM cannot use a device; `reason` is its driver's. Nothing is planned with it",
        {"device": "its name"},
    ),
    "loaded_without": EventKind(
        "The HMM held nothing, and devices of the layout had failed: it is loaded without the replicas on them",
        {"replicas": "such as `r1, r2`"},
    ),
    "loss_refused": EventKind(
        "A lost device cannot be left out; nothing is served until the deployment is started again",
        {"code": "of the refusal: errors.md"},
    ),
    "policy": EventKind(
        "The policy has decided otherwise than before, or given an order; `reason` is one of its stable names",
        {
            "mode": "`advise` or `act`",
            "replicas": "in force",
            "target": "replicas that there should be",
            "acts": "`true` where it is done",
            "op_id": "of the order that it gave, or would have given",
            "evidence": "JSON: the figures that it rests on",
        },
    ),
    "policy_set": EventKind("Another policy is in force", {"mode": "`off`, `advise` or `act`"}),
    "policy_unreadable": EventKind(
        "The policy in the store cannot be read; `policy set` puts another in its place", {"mode": "until then"}
    ),
    "policy_refused": EventKind("An order of the policy was refused", _OP_ID | {"code": "of the refusal: errors.md"}),
    "orphans_found": EventKind(
        "Something is left of an operation that the journal does not know; it is cleared away", {}
    ),
}
