"""A compute backend of an accelerator, for tests whose tensors lie in host memory: what its operations are bound to has
a twin on the device. Storages are copied whole, there before an operation and back after it, so that tensors which
share memory share it there too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from elasticmoe.services.worker.backends.answers import WeightedSum
from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror, Op
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.weights import KvCache

MADE = (
    *("embed", "linear", "rms_norm", "final_norm", "rope_table", "store_kv", "attention", "store_latent"),
    *("latent_attention", "route", "experts", "feed_forward", "shared_experts", "whole_number_attention"),
    *("clear", "square", "scale_by_squares"),
)


class _Twins:
    """Twins of host tensors, by the storage that they are of."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The twin of a tensor in host memory; others are their own."""
        if tensor.device.type != "cpu":
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._twins:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            self._twins[storage.data_ptr()] = whole, torch.empty_like(whole, device=self._device)
        there = self._twins[storage.data_ptr()][1].untyped_storage()
        twin = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return twin.set_(there, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]

    def send(self) -> None:
        """Bring the device up to date."""
        for whole, twin in self._twins.values():
            twin.copy_(whole)

    def fetch(self) -> None:
        """Bring host memory up to date. What has not changed is not written: it may be read-only."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        for whole, twin in self._twins.values():
            back = twin.cpu()
            if not torch.equal(back, whole):
                whole.copy_(back)


class MirroredBackend(ComputeBackend):
    """See the module's text. `inner`: what computes."""

    def __init__(self, inner: ComputeBackend) -> None:
        super().__init__()
        self.name = inner.name
        self._inner = inner
        self._cache: _Twins | None = None

    def __getattribute__(self, name: str) -> Any:
        """Operations with twins for their tensors."""
        return self._operation(name) if name in MADE else super().__getattribute__(name)

    def _operation(self, name: str) -> Callable[..., Callable[..., None]]:
        make = getattr(self._inner, name)

        def made(*arguments: Any, **options: Any) -> Callable[..., None]:
            twins = _Twins(self._inner.device)
            run = make(
                *(_replaced(one, twins) for one in arguments),
                **{key: _replaced(one, twins) for key, one in options.items()},
            )

            def call(*given: Any) -> None:
                passed = [one if _counts(one) else _replaced(one, twins) for one in given]
                taking_part = [twins] if self._cache is None else [twins, self._cache]
                for some in taking_part:
                    some.send()
                run(*passed)
                for some in taking_part:
                    some.fetch()

            return call

        return made

    def check_model(self, *arguments: Any) -> None:
        """See ComputeBackend."""
        self._inner.check_model(*arguments)

    def check_batch(self, batch: Batch, cache: KvCache) -> Any:
        """See ComputeBackend. The cache's twin takes part in the operations that follow."""
        self._cache = _Twins(self._inner.device)
        twin = self._cache.of(cache.blocks)
        return self._inner.check_batch(batch, dataclasses.replace(cache, blocks=twin))

    def choose(self, logits_BV: torch.Tensor, choices: Any) -> Any:
        """See ComputeBackend. Edits of the logits are told, too."""
        there_BV = logits_BV.to(self._inner.device)
        chosen = self._inner.choose(there_BV, choices)
        logits_BV.copy_(there_BV)
        return chosen

    def judge(self, logits_NV: torch.Tensor, tokens: Any, num_top: int) -> Any:
        """See ComputeBackend."""
        return self._inner.judge(logits_NV.to(self._inner.device), tokens, num_top)

    def weighted_sum(self, total: WeightedSum, n: int) -> None:
        """See ComputeBackend."""
        twins = _Twins(self._inner.device)
        there = WeightedSum(*(_replaced(one, twins) for one in total))
        twins.send()
        self._inner.weighted_sum(there, n)
        twins.fetch()

    def download(self, *mirrors: Mirror) -> Op:
        """See ComputeBackend: all is there."""
        return _is_there

    def upload(self, mirror: Mirror) -> Op:
        """See ComputeBackend: all is there."""
        return _is_there

    def _synchronize(self) -> None:
        """Nothing is in flight."""


def _counts(value: Any) -> bool:
    """Whether these are counts, which the host reads."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.int32


def _is_there(_: int) -> None:
    pass


# What is not above comes from `inner`, by __getattribute__: tests/unit/test_backends.py looks that nothing is left.
MirroredBackend.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def _replaced(value: Any, twins: _Twins) -> Any:
    if isinstance(value, torch.Tensor):
        return twins.of(value)
    return tuple(_replaced(one, twins) for one in value) if type(value) is tuple else value


def mirrored(open_: Callable[..., ComputeBackend], device: torch.device) -> Callable[..., ComputeBackend]:
    """What opens a backend of `device` in place of one of the CPU."""
    return lambda tell_waiting, _, graphs: MirroredBackend(open_(tell_waiting, device, graphs))
