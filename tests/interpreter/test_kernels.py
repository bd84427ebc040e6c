"""What the kernels promise beyond the interface of compute backends: slots that are not mapped, and splits.

Shape suffixes: E experts, R rows, H hidden, I expert width.
"""

from __future__ import annotations

import pytest
import torch

from elasticmoe.common.devices.factory import open_device
from elasticmoe.common.devices.rules import ProcessRules
from elasticmoe.common.model_spec import AttentionSpec, MoeSpec, RopeSpec
from elasticmoe.services.worker.backends.accelerator.triton_kernels import kernel_set
from elasticmoe.services.worker.backends.accelerator.triton_kernels.kernel_set import AttentionTile
from elasticmoe.services.worker.backends.factory import open_backend
from tests.unit.kernel_memory import random
from tests.unit.test_backends_attention import BLOCK_SIZE, LAYER, SPECS, Layer

PAGE = 4096


def test_slots_of_absent_experts_are_not_touched() -> None:
    """Touching one ends the process."""
    hidden, width, experts, held = 16, 12, 40, (1, 2, 38)
    device = open_device("host:0", PAGE, len(held) * PAGE, rules=ProcessRules())
    slots = device.reserve(experts * PAGE)
    w13_of, w2_of = ({expert: random(*shape, seed=expert) for expert in held} for shape in ((24, 16), (16, 12)))
    for expert in held:
        device.map(slots, expert * PAGE, device.create(PAGE, "weights"), True)
    stride, after = PAGE // 4, 2 * width * hidden * 4
    w13_E = device.wrap(slots, 0, (experts, 2 * width, hidden), (stride, hidden, 1), "float32")
    w2_E = device.wrap(slots, after, (experts, hidden, width), (stride, width, 1), "float32")
    counts_E = torch.zeros(experts, dtype=torch.int32)
    for expert in held:
        w13_E[expert], w2_E[expert] = w13_of[expert], w2_of[expert]
    counts_E[list(held)] = torch.tensor([1, 20, 2], dtype=torch.int32)
    moe = MoeSpec(experts, 1, width, False)
    rows_RH = random(40, hidden, seed=50)
    want_RH = torch.cat(
        [
            _feed_forward(rows, w13_of[expert], w2_of[expert])
            for rows, expert in zip(rows_RH[:23].split([1, 20, 2]), held, strict=True)
        ]
        + [rows_RH[23:]]
    )
    open_backend("triton").experts(w13_E, w2_E, moe, hidden)(rows_RH, counts_E, 23)
    torch.testing.assert_close(rows_RH, want_RH, rtol=1e-5, atol=1e-5)
    device.close()


def _feed_forward(x_RH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    gate_RI, up_RI = (x_RH @ w13.T).chunk(2, 1)
    return (torch.nn.functional.silu(gate_RI) * up_RI) @ w2.T


@pytest.mark.filterwarnings("ignore:overflow encountered")  # on purpose
def test_splits_in_which_all_scores_are_minus_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, before one that has others: they count nothing, and rows are what the later keys make of them."""
    monkeypatch.setattr(kernel_set, "SPLIT", 16)
    monkeypatch.setattr(kernel_set, "TILES", {planes: AttentionTile(16, 16, 4) for planes in (1, 2)})
    x_NW, blocks, outs = random(41, 64), list(range(11)), []
    x_NW[:, [13, 29]] = 1.0  # of each head's query
    for name in ("triton", "host"):
        layer = Layer(name, AttentionSpec(2, 1, 16, RopeSpec(1e4, 2), 10.0), "float32")
        layer.run([(0, 32, blocks)], x_NW[:32])
        layer.cache.cache.blocks[: 32 // BLOCK_SIZE, LAYER, 0, 0, :, 13] = -3e38
        outs.append(layer.run([(32, 9, blocks)], x_NW[32:]))
    assert torch.isfinite(outs[0]).all()
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["grouped", "latent, odd"])
def test_splits_of_long_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short splits, and no memory for the sums of more than one tile: as the host's kernels, and the same bits in a
    whole prompt, in its chunks, and beside others."""
    monkeypatch.setattr(kernel_set, "SPLIT", 16)
    monkeypatch.setattr(kernel_set, "TILES", {planes: AttentionTile(16, 16, 4) for planes in (1, 2)})
    monkeypatch.setattr(kernel_set, "SUMS_MAX", 1)
    layer, host = (Layer(backend, SPECS[name], "float32") for backend in ("triton", "host"))
    x_NW, blocks = random(37, layer.width), list(range(10))
    whole = layer.run([(0, 37, blocks)], x_NW)
    torch.testing.assert_close(whole, host.run([(0, 37, blocks)], x_NW), rtol=1e-4, atol=1e-5)
    first = layer.run([(0, 35, blocks)], x_NW[:35])
    both = torch.cat([x_NW[35:], x_NW[:1]])
    last = layer.run([(35, 2, blocks), (0, 1, [20])], both)[:2]
    assert torch.equal(torch.cat([first, last]), whole)
