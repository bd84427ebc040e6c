"""The weights of a checkpoint folder: which files they are in, and what each of them stores.

As in transformers, `model.safetensors` goes before an index, and the index only says which files there are: the tensors
are those that the files hold.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from elasticmoe.common.checkpoint_files import read_json
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.protocol.limits import (
    CHECKPOINT_FILES_MAX,
    CHECKPOINT_INDEX_BYTES_MAX,
    CONFIG_JSON_BYTES_MAX,
    SAFETENSORS_TENSORS_MAX,
)
from elasticmoe.common.safetensors import StoredTensor, TensorFile
from elasticmoe.common.wording import counted

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
ADAPTER: Final = "adapter_config.json"

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_COMPARED_BYTES: Final = 4 << 20  # at once, of each of two tensors
_NAMED_MAX: Final = 5  # names in one remark
_NAME_CHARS_MAX: Final = 120
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Stored(NamedTuple):
    """One tensor and the file that holds it."""

    name: str
    file: TensorFile
    tensor: StoredTensor


class Weights:
    """All tensors of a checkpoint folder. Owns its files; a context manager.

    `remarks`: how an index is wrong without harm, one line each.
    """

    def __init__(self, directory: Path) -> None:
        """Open the files and verify their headers. Raises CheckpointError, with words for weights of other forms."""
        self.files: list[TensorFile] = []
        self.remarks: tuple[str, ...] = ()
        try:
            self._open(directory)
        except BaseException:
            self.close()
            raise

    def _open(self, directory: Path) -> None:
        check_no_adapter(directory)
        index = None if (directory / SINGLE).exists() else _read_index(directory / INDEX)
        if index is None and not (directory / SINGLE).exists():
            raise no_weights(directory)
        names = [SINGLE] if index is None else sorted(set(index.values()))
        if len(names) > CHECKPOINT_FILES_MAX:
            raise CheckpointError(f"{INDEX}: {len(names)} files exceed the limit of {CHECKPOINT_FILES_MAX}")
        for name in names:
            self.files.append(TensorFile(directory / name))
        self.tensors = [Stored(name, file, tensor) for file in self.files for name, tensor in file.tensors.items()]
        if len(self.tensors) > SAFETENSORS_TENSORS_MAX:
            raise CheckpointError(f"{len(self.tensors)} tensors exceed the limit of {SAFETENSORS_TENSORS_MAX}")
        if index is not None:
            self.remarks = _compare(index, self.tensors)

    def close(self) -> None:
        """Close all files. Idempotent."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def are_equal(first: Stored, second: Stored) -> bool:
    """Whether two tensors have the same dtype, shape and bytes. Blocks: reads until the first difference, in bounded
    pieces. Raises CheckpointError for a file that cannot be read."""
    a, b = first.tensor, second.tensor
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    try:
        for done in range(0, a.nbytes, _COMPARED_BYTES):
            nbytes = min(_COMPARED_BYTES, a.nbytes - done)
            pieces = [os.pread(each.file.fd, nbytes, each.tensor.begin + done) for each in (first, second)]
            if pieces[0] != pieces[1]:
                return False
    except OSError as error:
        raise CheckpointError(f"{first.file.name} cannot be read: {error.strerror}") from None
    return True


def named(names: list[str]) -> str:
    """Some of `names` in quotes, and how many more there are: for an error or a remark of bounded length."""
    shown = ", ".join(repr(name)[:_NAME_CHARS_MAX] for name in names[:_NAMED_MAX])
    return shown if len(names) <= _NAMED_MAX else f"{shown} and {len(names) - _NAMED_MAX} more"


def check_no_adapter(directory: Path) -> None:
    """Raise CheckpointError for a folder with a PEFT adapter: alone it is no model, and beside one transformers applies
    it where the peft package is installed, and only there."""
    fields = read_json(directory / ADAPTER, CONFIG_JSON_BYTES_MAX)
    if fields is None:
        return
    base = fields.get("base_model_name_or_path")
    of = f" of {base!r:.100}" if isinstance(base, str) and base else ""
    raise CheckpointError(
        f"{ADAPTER}: this is an adapter{of}, which is not applied; merge it into its model (`merge_and_unload` of "
        "PEFT) and serve that",
        code="adapter_unsupported",
    )


def no_weights(directory: Path) -> CheckpointError:
    """The error of a folder without weights that can be read; it names what is there instead."""

    def first(*patterns: str) -> str | None:
        return next((path.name for pattern in patterns for path in sorted(directory.glob(pattern))), None)

    where = f"checkpoint {directory.name!r:.200}"
    if shard := first("*.safetensors"):
        what = "" if (directory / shard).exists() else ", a link to a file that is not there"
        return CheckpointError(f"{where} has neither {SINGLE} nor {INDEX}; it has {shard!r:.200}{what}")
    if pickle := first(*_PICKLES):
        return CheckpointError(
            f"{where} has its weights only in PyTorch's format ({pickle!r:.200}), which can run code when it is read; "
            "convert them to safetensors",
            code="weights_format_unsupported",
        )
    if file := first("*.gguf"):
        return CheckpointError(
            f"{where} is in GGUF format ({file!r:.200}); only safetensors are read", code="weights_format_unsupported"
        )
    return CheckpointError(f"{where} has neither {SINGLE} nor {INDEX}")


def _read_index(path: Path) -> dict[str, str] | None:
    fields = read_json(path, CHECKPOINT_INDEX_BYTES_MAX)
    if fields is None:
        return None
    weight_map = fields.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX} must have a weight_map with entries")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _FILE_NAME.fullmatch(file_name):
            raise CheckpointError(
                f"{INDEX}: {file_name!r:.200} for {name!r:.200} is not a plain .safetensors file name"
            )
    return weight_map


def _compare(index: dict[str, str], tensors: list[Stored]) -> tuple[str, ...]:
    files: dict[str, set[str]] = {}
    for stored in tensors:
        files.setdefault(stored.name, set()).add(stored.file.name)
    absent = sorted(name for name in index if name not in files)
    unlisted = sorted(name for name in files if name not in index)
    elsewhere = sorted(name for name, file in index.items() if name in files and file not in files[name])
    found = (
        (absent, "that no file has"),
        (elsewhere, "in another file than it names"),
    )
    remarks = [
        f"{INDEX} lists {counted(len(names), 'tensor')} {what}: {named(names)}" for names, what in found if names
    ]
    if unlisted:
        remarks.append(
            f"{INDEX} does not list {counted(len(unlisted), 'tensor')} that its files have: {named(unlisted)}"
        )
    return tuple(remarks)
