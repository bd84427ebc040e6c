"""Performance modes: what they set, and that whatever is set by name counts instead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common import performance
from elasticmoe.common.config import PoolConfig, ScalerConfig, load
from elasticmoe.common.machine import multiplies_bfloat16
from elasticmoe.common.protocol.errors import ConfigError

FAST = {"max_tokens_per_step": 512, "replicas": 1, "share_cores": True}
MODE = "ELASTICMOE_PERFORMANCE_MODE"


@pytest.fixture(autouse=True)
def _nothing_else_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in [key for key in os.environ if key.startswith("ELASTICMOE_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("ELASTICMOE_RUN_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("given", "has_products", "values"),
    [
        ({}, True, FAST | {"activations": "bfloat16"}),
        ({}, False, FAST),
        ({"compute": "host", "devices": "host:4"}, True, FAST | {"activations": "bfloat16"}),
        ({"dtype": "float32"}, True, FAST),
        ({"compute": "torch"}, True, {"max_tokens_per_step": 512, "replicas": 1}),
        ({"pin_cores": "true"}, False, {"max_tokens_per_step": 512, "replicas": 1}),
        ({"pin_cores": "false"}, False, FAST),
        ({"devices": "cuda:0,cuda:1"}, True, {"max_tokens_per_step": 512}),
        ({"replicas": "3", "activations": "float32"}, True, {"max_tokens_per_step": 512, "share_cores": True}),
        ({"max_tokens_per_step": 64, "share_cores": False}, False, {"replicas": 1}),
    ],
)
def test_throughput_sets_what_nobody_has_set(given: dict[str, Any], has_products: bool, values: dict[str, Any]) -> None:
    assert performance.defaults_of({"performance_mode": "throughput"} | given, has_products=has_products) == values
    for mode in ({}, {"performance_mode": "balanced"}):
        assert performance.defaults_of(mode | given, has_products=has_products) == {}


def test_every_service_reads_the_same_of_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, usual_pool = load(ScalerConfig), load(PoolConfig)
    monkeypatch.setenv(MODE, "throughput")
    scaler, pool = load(ScalerConfig), load(PoolConfig)
    assert (usual.replicas, usual.max_tokens_per_step, usual_pool.share_cores) == (2, 128, False)
    assert (scaler.replicas, scaler.max_tokens_per_step, pool.share_cores) == (1, 512, True)
    assert scaler.activations == ("bfloat16" if multiplies_bfloat16() else "float32")
    monkeypatch.setenv("ELASTICMOE_REPLICAS", "2")
    assert load(ScalerConfig, {"max_tokens_per_step": 64, "activations": "float32"}).max_tokens_per_step == 64
    assert (load(ScalerConfig).replicas, load(ScalerConfig).max_tokens_per_step) == (2, 512)


def test_cores_are_shared_or_pinned_and_not_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTICMOE_PIN_CORES", "true")
    monkeypatch.setenv(MODE, "throughput")
    assert not load(PoolConfig).share_cores
    monkeypatch.setenv("ELASTICMOE_SHARE_CORES", "true")
    with pytest.raises(ConfigError, match="ELASTICMOE_SHARE_CORES and ELASTICMOE_PIN_CORES are both true"):
        load(PoolConfig)


def test_a_mode_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE, "fastest")
    for kind in (ScalerConfig, PoolConfig):
        with pytest.raises(ConfigError, match=f"{MODE}: has to be one of balanced, throughput"):
            load(kind)


@pytest.mark.parametrize(
    ("text", "has_products"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16\n", True),
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16x\n\nbugs : avx512_bf16\n", False),
        ("", False),
        (None, False),
    ],
)
def test_the_kernel_lists_what_processors_multiply(text: str | None, has_products: bool, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text(text)
    assert multiplies_bfloat16(tmp_path) is has_products
