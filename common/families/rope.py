"""Rotary parameters, from whichever keys config.json gives them in, by the precedence of transformers 5
(`RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`, and the functions of `modeling_rope_utils`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from elasticmoe.common.families.config import check_type, number, refuse_value
from elasticmoe.common.model_spec import RopeScaling, RopeSpec
from elasticmoe.common.protocol.errors import CheckpointError

_THETA_MAX: Final = 1e15
_FACTOR_MAX: Final = 1e6
_POSITIONS_MAX: Final = float(1 << 40)
_COMMON: Final = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
# What each type reads beside these. `dynamic` changes nothing up to max_position_embeddings, which nothing exceeds.
_READ: Final[dict[str, frozenset[str]]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"}
        | {"mscale_all_dim", "truncate"}
    ),
    "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
}


class RopeForm(NamedTuple):
    """What a family says of its rotary embedding.

    `theta`: base where config.json has none. `dims`: elements of a head that can rotate. `interleaved`: see RopeSpec.
    `share`: of `dims` that rotate where config.json does not say; None: the family's code knows all or nothing.
    `has_mscale`: the scores' scale grows with yarn's factor, too (`yarn_apply_mscale`).
    """

    theta: float
    dims: int
    interleaved: bool = False
    share: float | None = None
    has_mscale: bool = False


def rope_of(fields: Mapping[str, Any], form: RopeForm, max_positions: int) -> RopeSpec:
    """The rotary parameters of config.json's `fields`; `max_positions` is its max_position_embeddings.

    A non-empty `rope_scaling` takes the place of all `rope_parameters`, their base included. The base and the share
    that rotates stand inside, or beside them. Raises CheckpointError for a type that is not built, by its name.
    """
    name, parameters = _chosen(fields)
    kind = _kind_of(name, parameters)
    base = parameters.get("rope_theta", fields.get("rope_theta", form.theta))
    theta = number("rope_theta", base, 1e-3, _THETA_MAX)
    if kind == "yarn" and theta == 1:  # its bounds are quotients by the logarithm
        raise CheckpointError(f"config.json: rope_theta must not be 1 with the rope type 'yarn' of {name}")
    dims = int(form.dims * _share(fields, name, parameters, form))
    if dims < 2 or dims % 2:
        raise CheckpointError(f"config.json: {dims} of {form.dims} elements of a head rotate; must be even, at least 2")
    read = _Parameters(name, parameters, fields, max_positions)
    scaling = _SCALINGS[kind](read) if kind in _SCALINGS else None
    if kind == "dynamic":
        read.number("factor", 1e-6, _FACTOR_MAX)  # must be there, and changes nothing up to max_position_embeddings
        if dims == 2:
            raise CheckpointError(
                f"config.json: the rope type 'dynamic' of {name} needs more than 2 elements that rotate"
            )
    return RopeSpec(
        theta=theta,
        dims=dims,
        interleaved=form.interleaved,
        scaling=scaling,
        amplitude=_amplitude(read, scaling),
    )


def score_factor_of(fields: Mapping[str, Any], form: RopeForm) -> float:
    """What the scores' scale is multiplied with besides: `yarn_apply_mscale` of transformers' DeepSeek models."""
    name, parameters = _chosen(fields)
    all_dims = parameters.get("mscale_all_dim", 0)
    if not form.has_mscale or _kind_of(name, parameters) == "default" or not all_dims:
        return 1.0
    read = _Parameters(name, parameters, fields, 0)
    mscale = _mscale(read.number("factor", 1e-6, _FACTOR_MAX), read.number("mscale_all_dim", -1e3, 1e3))
    return mscale * mscale


def unread_rope_keys(fields: Mapping[str, Any]) -> list[str]:
    """Keys that change nothing beside those that `rope_of` reads, in alphabetical order."""
    name, parameters = _chosen(fields)
    read = _COMMON | _READ[_kind_of(name, parameters)]
    unread = [f"{name}.{key}" for key in parameters if key not in read]
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


def _kind_of(name: str, parameters: Mapping[str, Any]) -> str:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in _READ:
        supported = ", ".join(_READ)
        raise CheckpointError(f"config.json: rope type {kind!r:.40} of {name} is not supported; supported: {supported}")
    if parameters.get("type", kind) != kind:
        raise CheckpointError(
            f"config.json: {name} has the type {parameters['type']!r:.40} and the rope_type {kind!r:.40}"
        )
    nested = next((key for key, value in parameters.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise CheckpointError(f"config.json: rotary parameters per layer type ({name}.{nested:.40}) are not supported")
    return kind


def _share(fields: Mapping[str, Any], name: str, parameters: Mapping[str, Any], form: RopeForm) -> float:
    key = "partial_rotary_factor"
    share = parameters.get(key, fields.get(key, form.share))
    if key in parameters:
        key = f"{name}.{key}"
    if form.share is None and (isinstance(share, bool) or share not in (None, 1)):
        refuse_value(key, share, (None, 1))
    return 1.0 if share is None else number(key, share, 0.0, 1.0)


class _Parameters(NamedTuple):
    """The object that was chosen, and how to name what stands in it."""

    name: str
    values: Mapping[str, Any]
    fields: Mapping[str, Any]
    max_positions: int

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A number in [low, high]; without a default it must be there. Raises CheckpointError."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"config.json: {self.name}.{key} is missing")
            return default
        return number(f"{self.name}.{key}", value, low, high)

    @property
    def original_positions(self) -> int:
        """What the model was first trained on. Beside the parameters it goes before what stands in them. null is
        nothing that could be computed with, in transformers neither."""
        key = "original_max_position_embeddings"
        if key in self.fields:
            return int(number(key, self.fields[key], 1, _POSITIONS_MAX))
        return int(number(f"{self.name}.{key}", self.values.get(key, self.max_positions), 1, _POSITIONS_MAX))


def _linear(read: _Parameters) -> RopeScaling:
    return RopeScaling("linear", read.number("factor", 1e-6, _FACTOR_MAX))


def _yarn(read: _Parameters) -> RopeScaling:
    original = read.original_positions
    # The code of transformers takes a null, not an absent factor, as the ratio of the two lengths.
    ratio = read.max_positions / original if "factor" in read.values else None
    truncate = read.values.get("truncate", True)
    check_type(f"{read.name}.truncate", truncate, bool)
    return RopeScaling(
        "yarn",
        read.number("factor", 1e-6, _FACTOR_MAX, default=ratio),
        original,
        fast=read.number("beta_fast", 0.0, _FACTOR_MAX, default=32.0) or 32.0,
        slow=read.number("beta_slow", 0.0, _FACTOR_MAX, default=1.0) or 1.0,
        truncate=truncate,
    )


def _llama3(read: _Parameters) -> RopeScaling:
    slow = read.number("low_freq_factor", 1e-6, _FACTOR_MAX)
    fast = read.number("high_freq_factor", 1e-6, _FACTOR_MAX)
    if fast <= slow:
        raise CheckpointError(
            f"config.json: {read.name}.high_freq_factor {fast:g} must be above low_freq_factor {slow:g}"
        )
    return RopeScaling(
        "llama3", read.number("factor", 1e-6, _FACTOR_MAX), read.original_positions, fast=fast, slow=slow
    )


_SCALINGS: Final = {"linear": _linear, "yarn": _yarn, "llama3": _llama3}


def _amplitude(read: _Parameters, scaling: RopeScaling | None) -> float:
    """What cosines and sines are multiplied with: yarn's attention factor, else 1."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    given = read.number("attention_factor", 0.0, _FACTOR_MAX, default=-1.0)
    if given >= 0:
        return given
    mscale = read.number("mscale", -1e3, 1e3, default=0.0)
    all_dims = read.number("mscale_all_dim", -1e3, 1e3, default=0.0)
    if mscale and all_dims:
        return _mscale(scaling.factor, mscale) / _mscale(scaling.factor, all_dims)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    """yarn_get_mscale."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
