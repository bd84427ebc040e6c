"""The policy as the store keeps it: numbered, so that two writers do not overwrite one another unseen. Pure."""

from __future__ import annotations

import msgspec

from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.protocol.errors import Conflict
from elasticmoe.services.scaler.policy.config import Mode, PolicyConfig, policy_config

SETTINGS = ("mode", "ttft_s", "itl_s", "attainment", "replicas_min", "replicas_max")  # what the settings say of it


class PolicyRecord(msgspec.Struct, frozen=True):
    """`version`: grows by one with each change. `settings`: what the scaler's settings said when it was written: where
    they say something else at a later start, that is the operator's newer word."""

    version: int
    config: PolicyConfig
    settings: PolicyConfig


def policy_of(config: ScalerConfig) -> PolicyConfig:
    """What the settings say. Raises ConfigError where they contradict one another."""
    mode: Mode = "act" if config.policy == "act" else "off" if config.policy == "off" else "advise"
    return policy_config(
        {
            "mode": mode,
            "ttft_s": config.ttft_s,
            "itl_s": config.itl_s,
            "attainment": config.attainment,
            "replicas_min": config.replicas_min,
            "replicas_max": config.replicas_max,
        }
    )


def resumed(left: PolicyRecord | None, settings: PolicyConfig) -> PolicyRecord:
    """The policy to begin with: what is left, unless the settings have changed since it was written."""
    if left is None:
        return PolicyRecord(1, settings, settings)
    # Defaults of what no setting names may be others in another release: that is nobody's word.
    if any(getattr(left.settings, name) != getattr(settings, name) for name in SETTINGS):
        return PolicyRecord(left.version + 1, settings, settings)
    return left


def cautious(settings: PolicyConfig) -> PolicyRecord:
    """The policy to go on with where what is left cannot be read: it may have said that nothing is to be done."""
    mode: Mode = "off" if settings.mode == "off" else "advise"
    return PolicyRecord(1, msgspec.structs.replace(settings, mode=mode), settings)


def changed(record: PolicyRecord, version: int, config: PolicyConfig) -> PolicyRecord:
    """After a change by somebody who has seen `version`. Raises Conflict `policy_changed` where that is not the present
    one."""
    if version != record.version:
        text = f"the policy is at version {record.version} and the change is of version {version}: look at it again"
        raise Conflict(text, code="policy_changed")
    return record if config == record.config else PolicyRecord(version + 1, config, record.settings)
