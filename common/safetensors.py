"""Strict reading of safetensors files: every header is verified before any tensor is read.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON object
{name: {dtype, shape, data_offsets}}, then the tensors' bytes without gaps. It permits duplicate names, for the last of
which readers differ, and any number of empty tensors: both are refused or bounded here. The format has no checksums, so
changed bytes *inside* a tensor cannot be seen; everything that describes them is.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from elasticmoe.common.checkpoint_files import LFS_POINTER, check_no_pointer
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.protocol.limits import SAFETENSORS_HEADER_BYTES_MAX, SAFETENSORS_TENSORS_MAX
from elasticmoe.common.wording import broken_json

DTYPE_BYTES: Final[dict[str, int]] = {
    **{"F32": 4, "F16": 2, "BF16": 2},
    **{"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8},
    **{"F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E5M2FNUZ": 1, "F8_E4M3FNUZ": 1},
}


class StoredTensor(NamedTuple):
    """One tensor in a file: its bytes are [begin, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return self.end - self.begin


class TensorFile:
    """One open safetensors file with a verified header. Owns its descriptor."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a file that breaks the format or a limit."""
        self.name = path.name
        self.bytes_read = 0  # of tensors
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang the start
        except OSError as error:
            raise CheckpointError(f"{self.name} cannot be read: {error.strerror}") from None
        try:
            self.tensors = self._read_header()
        except OSError as error:
            os.close(self.fd)
            raise CheckpointError(f"{self.name} cannot be read: {error.strerror}") from None
        except BaseException:
            os.close(self.fd)
            raise

    def _fail(self, text: str) -> NoReturn:
        raise CheckpointError(f"{self.name}: {text}")

    def _read_header(self) -> dict[str, StoredTensor]:
        self._status = status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            self._fail("is not a regular file")
        head = os.pread(self.fd, 8, 0)
        check_no_pointer(self.name, os.pread(self.fd, len(LFS_POINTER), 0))
        if len(head) < 8:
            self._fail(f"has {status.st_size} bytes, too few for a header")
        (length,) = struct.unpack("<Q", head)
        if not 2 <= length <= SAFETENSORS_HEADER_BYTES_MAX:
            self._fail(f"header of {length} bytes is not within [2, {SAFETENSORS_HEADER_BYTES_MAX}]")
        if 8 + length > status.st_size:
            self._fail(f"header of {length} bytes exceeds the file of {status.st_size} bytes")
        raw = os.pread(self.fd, length, 8)
        if len(raw) != length or raw[:1] != b"{":
            self._fail("header is not a JSON object")
        return self._check_ranges(self._parse(raw), 8 + length, status.st_size)

    def _parse(self, raw: bytes) -> dict[str, Any]:
        def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            fields: dict[str, Any] = {}
            for name, value in pairs:
                if name in fields:
                    self._fail(f"header has the name {name!r:.200} twice")
                fields[name] = value
            return fields

        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
        except (ValueError, RecursionError) as error:
            self._fail(f"header is not valid JSON {broken_json(error)}")
        if not isinstance(header, dict):
            self._fail("header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self._fail("__metadata__ must map strings to strings")
        if len(header) > SAFETENSORS_TENSORS_MAX:
            self._fail(f"{len(header)} tensors exceed the limit of {SAFETENSORS_TENSORS_MAX}")
        return header

    def _check_ranges(self, header: dict[str, Any], start: int, size: int) -> dict[str, StoredTensor]:
        tensors = {name: self._tensor(name, entry, start) for name, entry in header.items()}
        at = start
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if tensor.begin != at:
                self._fail(f"tensor {name!r:.200} begins at {tensor.begin}, not at {at}: a gap or an overlap")
            at = tensor.end
        if at != size:
            self._fail(f"has {size} bytes; its header describes {at}")
        return tensors

    def _tensor(self, name: str, entry: Any, start: int) -> StoredTensor:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            self._fail(f"tensor {name!r:.200} must have exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            self._fail(f"tensor {name!r:.200} has the dtype {dtype!r:.40}; known: {', '.join(DTYPE_BYTES)}")
        if not _are_sizes(shape) or len(shape) > 8:
            self._fail(f"tensor {name!r:.200} has the shape {shape!r:.80}")
        if not _are_sizes(offsets) or len(offsets) != 2:
            self._fail(f"tensor {name!r:.200} has the data_offsets {offsets!r:.80}")
        nbytes = DTYPE_BYTES[dtype]
        for dim in shape:
            nbytes *= dim
        if offsets[1] - offsets[0] != nbytes:
            self._fail(f"tensor {name!r:.200} needs {nbytes} bytes; data_offsets {offsets!r:.80} give another number")
        return StoredTensor(dtype, tuple(shape), start + offsets[0], start + offsets[1])

    def check_unchanged(self) -> None:
        """Raise CheckpointError if somebody wrote to the file since its header was read."""
        now = os.fstat(self.fd)
        if (now.st_size, now.st_mtime_ns) != (self._status.st_size, self._status.st_mtime_ns):
            self._fail("was changed while it was read")

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
