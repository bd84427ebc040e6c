"""Write a checkpoint folder: safetensors shards, their index and the small JSON files, all or nothing.

Every model of this package is a list of `TensorPlan`s. Shapes are known before any number is computed, so sizes, shards
and free disk space are settled first; the values are then made one tensor at a time while a shard fills.
"""

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file

Progress: TypeAlias = Callable[[int, int], None]
"""Called as `progress(bytes_done, bytes_total)` after each tensor; both count bytes in the checkpoint's dtype."""

DTYPES: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}

SHARD_BYTES = 500_000_000
"""Aim for one shard file. A shard is held in memory while it fills, so this also bounds the peak memory of a writer."""

_FREE_MARGIN_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of a checkpoint: its name, its shape, and how to make its values when its turn comes.

    `make` returns a fresh float32 tensor of exactly `shape`; the writer casts it to the checkpoint's dtype.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def check_seed(seed: int) -> None:
    """Raise ValueError if `seed` is negative."""
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of a checkpoint dtype's name. Raises ValueError that lists the known names."""
    try:
        return DTYPES[name]
    except KeyError:
        raise ValueError(f"dtype {name!r} is not supported; known: {', '.join(DTYPES)}") from None


@contextmanager
def staged_directory(directory: Path) -> Iterator[Path]:
    """Give an empty folder beside `directory` to fill; it becomes `directory` when the block ends without an error.

    When the block raises, the folder and any parents made for it are removed, so that nothing is left behind. Raises
    ValueError if `directory` is a file, a mount point (it could not be replaced), or a folder that is not empty.
    """
    target = Path(os.path.realpath(directory))
    _check_target(target)
    made_parents = _make_parents(target.parent)
    stage = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    try:
        stage.mkdir()
        yield stage
        try:
            # rename(2) replaces an empty folder and refuses one that was filled in the meantime.
            stage.rename(target)
        except OSError as error:
            raise ValueError(f"{target} appeared or was filled while its files were written: {error}") from error
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in made_parents:
            with suppress(OSError):
                parent.rmdir()
        raise


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder that is empty or does not exist yet")
    if target.is_mount():
        raise ValueError(f"{target} is a mount point, which cannot be replaced; give a folder inside it")
    if any(target.iterdir()):
        raise ValueError(f"{target} is not empty; give a folder that is empty or does not exist yet")


def _make_parents(parent: Path) -> list[Path]:
    """Create `parent` and what it needs; return the folders that were created, innermost first."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def num_shards_for(plans: Sequence[TensorPlan], dtype: torch.dtype) -> int:
    """How many shards keep each at about SHARD_BYTES."""
    return max(1, math.ceil(_total_bytes(plans, dtype) / SHARD_BYTES))


def write_weights(
    stage: Path,
    plans: Sequence[TensorPlan],
    dtype: torch.dtype,
    *,
    shards: int,
    progress: Progress | None = None,
) -> None:
    """Write the planned tensors as `model.safetensors`, or as several shards with `model.safetensors.index.json`.

    Tensors keep their order; at most `shards` files of about equal size are written (fewer if there are fewer tensors).
    Peak memory: one shard and one float32 tensor. Raises ValueError if `shards` < 1, if two tensors share a name or if
    the disk has not enough room; OSError when writing fails.
    """
    if shards < 1:
        raise ValueError(f"shards must be at least 1, got {shards}")
    names = [plan.name for plan in plans]
    if len(set(names)) != len(names):
        raise ValueError("two tensors of the checkpoint have the same name")
    total = _total_bytes(plans, dtype)
    _check_free_space(stage, total)
    groups = _split(plans, shards)
    weight_map: dict[str, str] = {}
    done = 0
    for index, group in enumerate(groups):
        tensors: dict[str, torch.Tensor] = {}
        for plan in group:
            tensors[plan.name] = _checked(plan).to(dtype)
            done += plan.numel * dtype.itemsize
            if progress is not None:
                progress(done, total)
        file_name = "model.safetensors"
        if len(groups) > 1:
            file_name = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file(tensors, stage / file_name, metadata={"format": "pt"})
        # safetensors creates files that only their owner may read; give them the mode that the umask asks for.
        (stage / file_name).chmod(stage.stat().st_mode & 0o666)
        weight_map.update(dict.fromkeys(tensors, file_name))
    if len(groups) > 1:
        index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(stage / "model.safetensors.index.json", index_json)


def _check_free_space(stage: Path, nbytes: int) -> None:
    free = shutil.disk_usage(stage).free
    if free < nbytes + _FREE_MARGIN_BYTES:
        raise ValueError(f"not enough disk space in {stage.parent}: {nbytes:,} bytes are needed, {free:,} are free")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _total_bytes(plans: Sequence[TensorPlan], dtype: torch.dtype) -> int:
    return sum(plan.numel for plan in plans) * dtype.itemsize


def _checked(plan: TensorPlan) -> torch.Tensor:
    tensor = plan.make()
    assert tuple(tensor.shape) == plan.shape, f"{plan.name}: made {tuple(tensor.shape)}, planned {plan.shape}"
    return tensor


def _split(plans: Sequence[TensorPlan], shards: int) -> list[list[TensorPlan]]:
    """Cut the list into at most `shards` consecutive groups of about equal size, none of them empty."""
    total = sum(plan.numel for plan in plans)
    groups: list[list[TensorPlan]] = [[] for _ in range(shards)]
    before = 0
    for plan in plans:
        # A tensor belongs to the shard in which its middle falls.
        groups[(2 * before + plan.numel) * shards // (2 * total)].append(plan)
        before += plan.numel
    return [group for group in groups if group]
