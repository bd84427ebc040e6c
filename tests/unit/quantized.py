"""What checkpoints in FP8 mean, written down a second time, in torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from elasticmoe.cli.models.fp8 import BLOCK, expanded, quantize_files

FP8 = torch.float8_e4m3fn


def dequantized(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """As transformers' Fp8Dequantize does it, but for blocks that are cut off: float32's product, rounded once."""
    wide = expanded(scales.to(torch.float32), block, (codes.shape[-2], codes.shape[-1]))
    return (codes.to(torch.float32) * wide).to(dtype)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def quantized_copy(
    source: Path, target: Path, *, block: tuple[int, int] = BLOCK, scale_dtype: torch.dtype = torch.float32
) -> Path:
    """The checkpoint in FP8."""
    target.mkdir()
    quantize_files(source, target, block=block, scale_dtype=scale_dtype)
    return target


def dequantized_copy(directory: Path, target: Path) -> Path:
    """The checkpoint in float32, without a trace of its quantization."""
    target.mkdir()
    config = json.loads((directory / "config.json").read_text())
    rows, columns = config.pop("quantization_config")["weight_block_size"]
    for path in directory.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(path, target / path.name)
    (target / "config.json").write_text(json.dumps(config))
    tensors = stored(directory)
    plain = {
        name: dequantized(tensor, tensors[name + "_scale_inv"], (rows, columns), torch.float32)
        if tensor.dtype == FP8
        else tensor.to(torch.float32)
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }
    save_file(plain, target / "model.safetensors", metadata={"format": "pt"})
    return target
