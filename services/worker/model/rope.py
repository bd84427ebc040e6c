"""Frequencies of the rotary embedding, the same bits for every backend: those of transformers' rope utilities."""

from __future__ import annotations

import math

import torch

from elasticmoe.common.model_spec import RopeScaling, RopeSpec


def inverse_frequencies(rope: RopeSpec) -> torch.Tensor:
    """float32 [D / 2] on the host: how fast each pair of rotating elements turns with the position."""
    exponents = torch.arange(0, rope.dims, 2, dtype=torch.int64).float() / rope.dims
    periods = torch.pow(rope.theta, exponents)
    frequencies = 1.0 / periods
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    return _yarn(rope, scaling, periods)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    lengths = 2 * math.pi / frequencies
    longest, shortest = scaling.original_positions / scaling.slow, scaling.original_positions / scaling.fast
    stretched = torch.where(lengths > longest, frequencies / scaling.factor, frequencies)
    smooth = (scaling.original_positions / lengths - scaling.slow) / (scaling.fast - scaling.slow)
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    return torch.where((lengths >= shortest) & (lengths <= longest), between, stretched)


def _yarn(rope: RopeSpec, scaling: RopeScaling, periods: torch.Tensor) -> torch.Tensor:
    def pair_that_turns(times: float) -> float:
        turns = math.log(scaling.original_positions / (times * 2 * math.pi))
        return rope.dims * turns / (2 * math.log(rope.theta))

    first, last = pair_that_turns(scaling.fast), pair_that_turns(scaling.slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dims - 1)
    if first == last:
        last += 0.001
    ramp = ((torch.arange(rope.dims // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept
