"""Several threads compute what one does, to the bit; and how many of them a rank takes."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import msgspec
import pytest
import torch

from elasticmoe.common.config import PoolConfig
from elasticmoe.native import kernels
from elasticmoe.services.worker.backends.factory import BackendOptions, open_backend
from elasticmoe.services.worker.rank.cores import threads_of
from tests.unit.kernel_memory import DTYPES, random

pytestmark = pytest.mark.usefixtures("instruction_set")


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    yield
    kernels.use_threads(1)


def linear(x_NH: torch.Tensor, w_WH: torch.Tensor, code: int) -> torch.Tensor:
    (rows, depth), width = x_NH.shape, w_WH.shape[0]
    out = torch.full((rows, width), float("nan"))
    kernels.linear(x_NH.data_ptr(), rows, w_WH.data_ptr(), code, width, depth, out.data_ptr(), False, 0)
    return out


def experts(rows_RH: torch.Tensor, counts: list[int], w13: torch.Tensor, w2: torch.Tensor, code: int) -> torch.Tensor:
    (hidden, width), each = w2.shape[1:], array("i", counts)
    out = rows_RH.clone()
    kernels.experts(
        out.data_ptr(),
        len(out),
        each.buffer_info()[0],
        len(counts),
        w13.data_ptr(),
        w13.stride(0) * w13.element_size(),
        w2.data_ptr(),
        w2.stride(0) * w2.element_size(),
        code,
        hidden,
        width,
        out.data_ptr(),
    )
    return out


@pytest.mark.parametrize(
    ("dtype", "code"),
    [*DTYPES.items(), (torch.bfloat16, kernels.ROUNDED)],
    ids=["float32", "bfloat16", "rounded"],
)
def test_products_and_experts_are_the_same_by_any_number_of_threads(dtype: torch.dtype, code: int) -> None:
    w_WH, x_NH = random(1000, 512, seed=1).to(dtype), random(60, 512)
    w13, w2 = random(6, 2 * 192, 512, seed=2).to(dtype), random(6, 512, 192, seed=3).to(dtype)
    loads = [[1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0], [10, 10, 10, 10, 10, 10], [0, 55, 0, 0, 5, 0]]

    def all_of_them() -> list[torch.Tensor]:
        return [linear(x_NH[:rows], w_WH, code) for rows in (1, 5, 60)] + [
            experts(x_NH[: sum(counts)], counts, w13, w2, code) for counts in loads
        ]

    alone = all_of_them()
    for count in (2, 3, 8):
        kernels.use_threads(count)
        assert kernels.threads() == count
        assert all(torch.equal(got, want) for got, want in zip(all_of_them(), alone, strict=True))


@pytest.mark.parametrize("count", [0, -1, 65, 1 << 40])
def test_numbers_out_of_range_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="count"):
        kernels.use_threads(count)
    assert kernels.threads() == 1


@pytest.mark.parametrize(
    ("cores", "devices", "most", "threads"),
    [
        (2, "host:1", 64, 2),
        (2, "host:2", 64, 1),
        (16, "host:3", 64, 5),
        (16, "host:1", 4, 4),
        (1, "host:1", 64, 1),
        (2, "host:8", 64, 1),
        (400, "host:1", 64, 64),
    ],
)
def test_a_rank_has_the_cores_of_one_device(cores: int, devices: str, most: int, threads: int) -> None:
    config = PoolConfig(run_dir="/nonexistent", devices=devices, threads_max=most)
    assert [threads_of(config, cores, num_ranks) for num_ranks in (1, 2)] == [threads, threads]
    assert threads_of(msgspec.structs.replace(config, pin_cores=True), cores, 1) == 1


@pytest.mark.parametrize(
    ("cores", "num_ranks", "most", "threads"),
    [(2, 1, 64, 2), (2, 2, 64, 1), (16, 3, 64, 5), (16, 1, 4, 4), (1, 2, 64, 1)],
)
def test_ranks_that_share_cores_have_equal_parts(cores: int, num_ranks: int, most: int, threads: int) -> None:
    config = PoolConfig(run_dir="/nonexistent", devices="host:8", threads_max=most, share_cores=True)
    assert threads_of(config, cores, num_ranks) == threads
    assert threads_of(msgspec.structs.replace(config, pin_cores=True), cores, num_ranks) == 1


def test_a_backend_has_the_threads_that_it_is_given() -> None:
    backend = open_backend("host", options=BackendOptions(threads=3))
    assert (kernels.threads(), backend.computes_by.endswith(", 3 threads")) == (3, True)
    open_backend("host")
    assert kernels.threads() == 1


def test_a_backend_that_shares_cores_has_more_or_fewer_threads_as_ranks_go_and_come() -> None:
    backend = open_backend("host", options=BackendOptions(threads=2, shares_cores=True))
    assert backend.computes_by.endswith(", shared cores")
    for count in (1, 4, 4, 1):
        backend.use_threads(count)
        assert kernels.threads() == count


@pytest.mark.parametrize("error", [RuntimeError("Resource temporarily unavailable"), MemoryError()])
def test_a_thread_that_cannot_be_started_is_done_without(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(_: int) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(kernels, "use_threads", refuse)
        assert open_backend("host", options=BackendOptions(threads=4)).name == "host"
    assert kernels.threads() == 1
