"""Growing and shrinking again and again leaves nothing behind, in any process (promise P17).

Here ten cycles, after which every count must be what it was; tests/soak/test_slope.py does two hundred.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.procs.clients import check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.samples import SETTINGS, SETTLE_S, LightLoad, Sample, cycles, sample, settled_sample
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

CYCLES = 10
WARM = 3  # whatever is made once, at its first use, has been made by then


def check_same(deployment: Deployment, before: Sample) -> None:
    """Wait until every count is what it was."""
    seen = ["no sample could be taken"]

    def is_same() -> bool:
        now = sample(deployment)
        if now is not None:
            seen[0] = now.explain(before)
        return now is not None and not seen[0]

    try:
        wait_until(is_same, "every count is as before", SETTLE_S)
    except AssertionError as error:
        raise AssertionError(f"{error}: {seen[0]}") from None


async def test_ten_cycles_leave_every_count_as_it_was(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=2, devices=3, **SETTINGS)
    before = Sample({}, {})
    async with LightLoad(deployment.base_url, clients=2, seed=8, longest=40) as load:
        async for number in cycles(deployment, CYCLES, seed=17, spare_from=WARM + 1):
            if number == WARM:
                before = await asyncio.to_thread(settled_sample, deployment)
        await asyncio.to_thread(check_same, deployment, before)
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 0
    assert deployment.stop().count("error") == 0
