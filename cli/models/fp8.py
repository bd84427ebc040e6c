"""Quantize a checkpoint to FP8 in blocks, in the form that DeepSeek-V3 and Qwen3-FP8 are published in.

Every matrix of attention and feed-forwards becomes E4M3 with one scale for each block, its greatest weight / 448;
embedding, head, norms, biases and routers stay as they are.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from elasticmoe.cli.models.checkpoint import Progress, write_json

BLOCK: Final = (128, 128)
_GREATEST: Final = 448.0  # of E4M3
_QUANTIZED: Final = re.compile(r".+\.(?:\w+_proj|w[123])\.weight|.+\.experts\.(?:gate_up|down)_proj")
_INDEX: Final = "model.safetensors.index.json"


def quantize_files(
    source: Path,
    directory: Path,
    *,
    block: tuple[int, int] = BLOCK,
    scale_dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> None:
    """Write the checkpoint of `source`, quantized, to `directory`, which is there.

    Its files keep their names. Peak memory: one of them. Not atomic. Raises OSError when reading or writing fails.
    """
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    skipped: list[str] = []
    weight_map: dict[str, str] = {}
    shards = sorted(source.glob("*.safetensors"))
    done, total = 0, sum(path.stat().st_size for path in shards)
    for path in shards:
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in _tensors(path):
            if not _QUANTIZED.fullmatch(name):
                tensors[name] = tensor
                skipped.append(name.removesuffix(".weight"))
                continue
            tensors[name], scales = quantize(tensor, block)
            tensors[name + "_scale_inv"] = scales.to(scale_dtype)
        save_file(tensors, directory / path.name, metadata={"format": "pt"})
        (directory / path.name).chmod(path.stat().st_mode & 0o666)
        weight_map |= dict.fromkeys(tensors, path.name)
        done += path.stat().st_size
        if progress is not None:
            progress(done, total)
    if (source / _INDEX).exists():
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        write_json(
            directory / _INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        )
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", _INDEX):
            shutil.copy(path, directory / path.name)
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": sorted(skipped),
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    write_json(directory / "config.json", config)


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            yield name, file.get_tensor(name)


def quantize(tensor: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """(E4M3, float32 scales) of a matrix [N, K], or of a stack of them; last blocks may be cut off."""
    tensor = tensor.to(torch.float32)
    *_, rows, columns = tensor.shape
    grid = -(-rows // block[0]), -(-columns // block[1])
    padded = torch.nn.functional.pad(tensor, (0, grid[1] * block[1] - columns, 0, grid[0] * block[0] - rows))
    blocks = padded.abs().reshape(*tensor.shape[:-2], grid[0], block[0], grid[1], block[1])
    greatest = blocks.amax((-3, -1))
    scales = torch.where(greatest > 0, greatest / _GREATEST, 1.0)
    return (tensor / expanded(scales, block, (rows, columns))).to(torch.float8_e4m3fn), scales


def expanded(scales: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """Each element's own scale, of a matrix of this shape."""
    rows, columns = shape
    return scales.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
