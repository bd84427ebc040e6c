"""Two hundred scale cycles leave nothing behind, in any process (promise P17): `pytest -m soak -s tests/soak`.

What can be counted (descriptors, threads, children, shared memory that is mapped, sockets, device pages, keys) must not
grow or shrink over the second half; the first is for what is made once. Why private memory may: tests/procs/samples.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.procs.clients import check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.integrity import check_integrity
from tests.procs.samples import SETTINGS, LightLoad, Sample, cycles, growing, settled_sample, slope

pytestmark = [pytest.mark.procs, pytest.mark.soak, pytest.mark.timeout(1_800)]

CYCLES = 200
EACH = 10  # cycles between two samples


async def test_200_cycles_have_no_slope(deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]) -> None:
    deployment = deploy("oracle", replicas=2, devices=3, **SETTINGS)
    samples: list[Sample] = []
    async with LightLoad(deployment.base_url, clients=2, seed=8, longest=40) as load:
        async for number in cycles(deployment, CYCLES, seed=19, spare_from=CYCLES // 2 - EACH):
            if number % EACH == 0:
                samples.append(await asyncio.to_thread(settled_sample, deployment))
    half = samples[len(samples) // 2 :]
    first, last = samples[0].private_kib, half[-1].private_kib
    for name in sorted(last):
        values = [float(sample.private_kib[name]) for sample in half]
        print(
            f"{name}: {first[name]} KiB, {half[0].private_kib[name]}, {last[name]}; {slope(values) / EACH:+.1f} a cycle"
        )
    assert growing(half, EACH) == {}
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 0
    check_integrity(deployment)
    assert deployment.stop().count("error") == 0
