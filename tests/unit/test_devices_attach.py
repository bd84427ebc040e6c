"""What it costs a rank to attach, and its owner to let it, in calls of the driver: counted by the stand-ins."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import pytest

from elasticmoe.common.devices.base import ProcessRules
from tests.devices import standins

PAGE = standins.GRANULARITY
NUM = 10_000
# Of each handle, the owner's for this rank and the rank's own together, as docs/ascend.md and docs/cuda.md have it.
CALLS_MAX = {"npu": 3, "cuda": 2}


@pytest.fixture
def _descriptors() -> Iterator[None]:
    """As many as the system lets a process have: a GPU's owner has one for each handle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.usefixtures("_descriptors")
@pytest.mark.parametrize("kind", standins.KINDS)
def test_ten_thousand_handles_are_attached_by_few_calls(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_BYTES", str(NUM * PAGE))
    with standins.memory(monkeypatch) as folder:
        kinds = [standins.process(kind, folder) for _ in range(2)]
        owner = kinds[0](f"{kind}:0", PAGE, NUM * PAGE, rules=ProcessRules())
        rank = kinds[1](f"{kind}:0", PAGE, rules=ProcessRules())
        handles = [owner.create(PAGE, "weights") for _ in range(NUM)]
        for handle in handles:
            owner.export(handle)  # once, for all ranks that ever come
        before = sum(standins.loaded(one).standin_calls() for one in kinds)
        began = time.perf_counter()
        owner.admit([rank.importer_number(0)])
        imported = [rank.import_(owner.export(handle)) for handle in handles]
        range_ = rank.reserve(NUM * PAGE)
        rank.map_many(range_, [(at * PAGE, handle) for at, handle in enumerate(imported)], False)
        seconds = time.perf_counter() - began
        calls = sum(standins.loaded(one).standin_calls() for one in kinds) - before
        print(f"{kind}: {NUM} handles attached in {seconds:.2f} s by {calls} calls")
        assert calls <= CALLS_MAX[kind] * NUM + 20
        first = owner.reserve(PAGE)
        owner.map(first, 0, handles[-1], True)
        owner.write_bytes(first.base, b"last")
        assert rank.read_bytes(range_.address((NUM - 1) * PAGE), 4) == b"last"
        rank.close()
        owner.close()
