"""Events as sentences. Pure, but for the local time zone."""

from __future__ import annotations

import time
from typing import Any

from elasticmoe.common.wording import counted

Event = dict[str, Any]

# By kind: a sentence with the event's facts and `reason` in it. `docs/reference/events.md` says when each comes.
_SENTENCES = {
    "decision": "the deployment is {phase}: {reason}",
    "rank_exited": "rank {rank} has ended, and a standby takes its seat: {reason}",
    "rank_ended": "rank {rank}, which was joining or leaving, has ended: {reason}",
    "rank_ejected": "rank {rank} is killed and replaced: {reason}",
    "operation_accepted": "operation {op_id} ({kind}) begins: {reason}",
    "operation_resumed": "operation {op_id} goes on in phase {phase}: {reason}",
    "operation_phase": "operation {op_id}: {before} took {before_s} s; now {phase}, leg {leg}: {reason}",
    "operation_late": "operation {op_id} is past its deadline and goes on: {reason}",
    "operation_cancel": "operation {op_id} is cancelled: {reason}",
    "operation_gives_way": "operation {op_id} gives way to another one: {reason}",
    "operation_ended": "operation {op_id} has ended, {outcome}: {reason}",
    "device_failed": "device {device} cannot be used: {reason}",
    "loaded_without": "the layout is loaded without {replicas}: {reason}",
    "loss_refused": "a lost device cannot be left out ({code}): {reason}",
    "policy": "the policy ({mode}), at {replicas}: {reason}, target {target}",
    "policy_set": "the policy is changed, mode {mode}: {reason}",
    "policy_unreadable": "the policy in the store cannot be read, so its mode is {mode}: {reason}",
    "policy_refused": "the policy's order {op_id} is refused ({code}): {reason}",
    "orphans_found": "what an unknown operation left is cleared away: {reason}",
}


class _Facts(dict[str, str]):
    """Facts that an event lacks are shown as such."""

    def __missing__(self, name: str) -> str:
        return "unknown"


def sentence(event: Event) -> str:
    """One event as a line: local time, epoch, what happened and why."""
    at = event.get("time_unix", 0)
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at if isinstance(at, int | float) else 0))
    facts = event.get("facts")
    facts = {str(name): str(value) for name, value in facts.items()} if isinstance(facts, dict) else {}
    if facts.get("kind"):
        facts["kind"] = facts["kind"].replace("_", " ")
    form = _SENTENCES.get(str(event.get("kind")))
    if event.get("kind") == "operation_accepted" and facts.get("kind") == "none":
        form = "operation {op_id} asks for what is there already: {reason}"
    if form is None:
        shown = "".join(f" {name}={value}" for name, value in facts.items())
        text = f"{event.get('kind')}: {event.get('reason')}{shown}"
    else:
        if facts.get("replicas", "").isdecimal():
            facts["replicas"] = counted(int(facts["replicas"]), "replica")
        text = form.format_map(_Facts(facts | {"reason": str(event.get("reason"))}))
    return f"{stamp}  epoch {event.get('epoch')}  {text}"
