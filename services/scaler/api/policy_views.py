"""The policy on the admin surface: what it is told to keep, how it stands, and what it has decided. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from elasticmoe.common.described import says
from elasticmoe.common.http.decode import decode
from elasticmoe.services.scaler.api.snapshot import StatusSnapshot, unready, wanted_replicas
from elasticmoe.services.scaler.control.admission import SetPolicy
from elasticmoe.services.scaler.control.autoscaler import Decided
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.figures import Missing, Signals, Unknown


class PolicyBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of PUT /v1/policy: the whole policy; a field that is not given has its default."""

    version: Annotated[
        Annotated[int, Meta(ge=1)],
        says("That the writer has seen: refused with `policy_changed` where it is another one by now", 1),
    ]
    policy: Annotated[PolicyConfig, says("What shall be in force")]


class LoadView(msgspec.Struct, frozen=True):
    """The load as it is seen now. A figure is null where nothing happened that could tell it, and where somebody who
    has a share in it is silent; `silent` says who."""

    silent: Annotated[tuple[str, ...], says("Routers and ranks that have not told anything for too long")]
    requests_per_s: Annotated[float | None, says("Asked for: admitted, and refused")]
    refused_per_s: Annotated[float | None, says("Refused for want of room, by the routers that are heard")]
    queued: Annotated[int, says("Requests without a first token")]
    running: Annotated[float | None, says("Sequences of all ranks")]
    ttft_s: Annotated[float | None, says("The objective's quantile of the time to the first token")]
    itl_s: Annotated[float | None, says("Mean time between tokens")]
    kv_share: Annotated[float | None, says("Used share of the fullest rank's KV")]
    attainment: Annotated[
        float | None, says("Share of the requests of late that kept both objectives; those refused or failed did not")
    ]


class PolicyView(msgspec.Struct, frozen=True):
    """The policy in force, and how the deployment stands by it."""

    version: Annotated[int, says("Grows by one with each change")]
    policy: Annotated[PolicyConfig, says("What is in force")]
    replicas: Annotated[int, says("That serve now")]
    target: Annotated[
        int, says("That there should be: what an operation in progress leads to, else what the last decision wants")
    ]
    decision: Annotated[Decided | None, says("The last one; null before the first")]
    load: Annotated[LoadView | None, says("What is seen of the load; null before the first look")]


class DecisionsView(msgspec.Struct, frozen=True):
    """What the policy has decided since this scaler began, newest first."""

    decisions: Annotated[
        tuple[Decided, ...], says("Each has changed something or is new; one that comes and goes is told once a minute")
    ]


_body = msgspec.json.Decoder(PolicyBody, strict=True)


def parse_policy(raw: bytes) -> SetPolicy:
    """The order in the body of PUT /v1/policy. Raises InvalidRequest."""
    body = decode(_body, raw)
    return SetPolicy(body.version, body.policy)


def policy_view(snapshot: StatusSnapshot) -> PolicyView:
    """GET /v1/policy. Raises Unready before the journal has been read."""
    record = snapshot.policy
    if record is None or snapshot.layout is None:
        raise unready(snapshot, "the policy has not been read yet")
    return PolicyView(
        version=record.version,
        policy=record.config,
        replicas=snapshot.layout.dp,
        target=wanted_replicas(snapshot, snapshot.layout),
        decision=snapshot.decision,
        load=load_view(snapshot.signals) if snapshot.signals is not None else None,
    )


def load_view(signals: Signals) -> LoadView:
    """What is known of the load."""

    def known(figure: float | Missing | Unknown) -> float | None:
        return None if isinstance(figure, Missing | Unknown) else round(figure, 4)

    return LoadView(
        silent=signals.silent,
        requests_per_s=known(signals.admitted_per_s),
        refused_per_s=known(signals.refused_per_s),
        queued=signals.queued,
        running=known(signals.running),
        ttft_s=known(signals.ttft_s),
        itl_s=known(signals.itl_s),
        kv_share=known(signals.kv_share_most),
        attainment=known(signals.attainment),
    )
