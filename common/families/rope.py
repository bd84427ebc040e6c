"""Rotary parameters, from whichever keys config.json gives them in, by the precedence of transformers 5
(`RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from elasticmoe.common.families.config import number, refuse_value
from elasticmoe.common.model_spec import RopeSpec
from elasticmoe.common.protocol.errors import CheckpointError

_THETA_MAX: Final = 1e15
_READ: Final = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rope_of(fields: Mapping[str, Any], default_theta: float) -> RopeSpec:
    """The rotary parameters of config.json's `fields`; `default_theta` is the family's base.

    A non-empty `rope_scaling` takes the place of all `rope_parameters`, their base included. The base stands inside,
    or as `rope_theta` beside them. Raises CheckpointError for every type but "default", by its name.
    """
    name, parameters = _chosen(fields)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"config.json: rope type {kind!r:.40} of {name} is not supported; supported: default")
    if parameters.get("type", kind) != kind:
        raise CheckpointError(
            f"config.json: {name} has the type {parameters['type']!r:.40} and the rope_type {kind!r:.40}"
        )
    nested = next((key for key, value in parameters.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise CheckpointError(f"config.json: rotary parameters per layer type ({name}.{nested:.40}) are not supported")
    share = parameters.get("partial_rotary_factor")
    if share is not None and (isinstance(share, bool) or share != 1):
        refuse_value(f"{name}.partial_rotary_factor", share, (None, 1))
    theta = parameters.get("rope_theta", fields.get("rope_theta", default_theta))
    return RopeSpec(number("rope_theta", theta, 1e-3, _THETA_MAX))


def unread_rope_keys(fields: Mapping[str, Any]) -> list[str]:
    """Keys that change nothing beside those that `rope_of` reads, in alphabetical order."""
    name, parameters = _chosen(fields)
    unread = [f"{name}.{key}" for key in parameters if key not in _READ]
    if name == "rope_scaling" and fields.get("rope_parameters"):
        unread.append("rope_parameters")
    return sorted(unread)


def _chosen(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    parameters = fields.get(name)
    if parameters is None:
        return name, {}
    if not isinstance(parameters, dict):
        raise CheckpointError(f"config.json: {name} must be an object, is {parameters!r:.80}")
    return name, parameters
