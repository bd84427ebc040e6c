"""`up` says yes exactly where a real HMM does: both ask elasticmoe.common.capacity."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from elasticmoe.cli import checks, settings, up
from elasticmoe.common.capacity import load_of
from elasticmoe.common.families import load_spec
from elasticmoe.common.layout import initial_layout
from elasticmoe.common.protocol.errors import DoesNotFit
from tests.procs.hmm_harness import Deployment

pytestmark = pytest.mark.procs
PAGE = 4096


def resolved(run_dir: Path, model: Path, budget: int) -> settings.Settings:
    parser = argparse.ArgumentParser()
    up.add_arguments(parser)
    flags = ["--model", str(model), "--run-dir", str(run_dir), "--device-memory", f"{budget}B", "--replicas", "2"]
    return settings.from_flags(parser.parse_args([*flags, "--devices", "host:3", "--max-model-len", "256"]))


def says_yes(run_dir: Path, model: Path, budget: int) -> bool:
    try:
        checks.check_memory(resolved(run_dir, model, budget), model)
    except DoesNotFit:
        return False
    return True


def test_up_and_the_hmm_draw_the_same_line(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    model = model_folder("tiny-qwen3-moe")
    low, high = PAGE, 256 << 20  # refused, accepted
    while high - low > PAGE:
        middle = (low + high) // 2 // PAGE * PAGE
        low, high = (low, middle) if says_yes(tmp_path, model, middle) else (middle, high)
    for budget, phase in ((low, "failed"), (high, "ready")):
        given = resolved(tmp_path, model, budget)
        deployment = Deployment(devices="host:3", device_bytes=budget)
        try:
            deployment.start_keeper()
            deployment.start_hmm()
            spec = load_spec(model, given.scaler.dtype)
            layout = initial_layout(spec.num_experts_by_layer, ["host:0", "host:1"])
            deployment.call(load_of(given.scaler, spec, layout))
            status = deployment.wait_phase(phase)
            assert (status.error is not None and status.error.code == "does_not_fit") == (phase == "failed")
        finally:
            deployment.close()
