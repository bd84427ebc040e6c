"""A checkpoint whose every needed tensor has been found: the stored weights, matched with a model's records.

The match is verified before any memory is touched. What the model needs must be there, once, in the right shape and a
dtype that can be converted. What it does not use is named in a remark, as in transformers, which warns and ignores it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from elasticmoe.common.families import FAMILIES, read_config, records, unread_names
from elasticmoe.common.families.quantization import BESIDE_STEM, BESIDE_WEIGHT, SCALE, quantized
from elasticmoe.common.model_spec import ModelSpec, Source, TensorSpec, WeightBlock
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.safetensors import DTYPE_BYTES, TensorFile
from elasticmoe.common.weights import Stored, Weights, named
from elasticmoe.common.wording import counted

SOURCE_DTYPES: Final = ("F32", "F16", "BF16")  # that weights may be stored in
FP8: Final = "F8_E4M3"  # and this one, with scales
SCALE_DTYPES: Final = ("F32", "BF16", "F16", "F8_E8M0")
# Written by old versions; transformers computes them.
_ROTARY = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class Part(NamedTuple):
    """Contiguous bytes of a file, of safetensors' `dtype`."""

    file: TensorFile
    begin: int
    nbytes: int
    dtype: str


class Scales(NamedTuple):
    """Of a matrix [rows, columns] stored in FP8: one for each `block`, in `part`, [grid rows, grid columns]. `name`: of
    the stored tensor."""

    name: str
    part: Part
    rows: int
    columns: int
    block: WeightBlock


class ColumnRange(NamedTuple):
    """Of a matrix with rows of `of` elements, those in [begin, end) of each row."""

    begin: int
    end: int
    of: int


class Piece(NamedTuple):
    """What one source of a tensor is read from; `scales` are to be multiplied with. `name`: of the stored tensor.

    `first`: elements of the matrix that lie before the part. `columns`: what is taken of the part's rows, where that is
    not all."""

    name: str
    part: Part
    scales: Scales | None = None
    first: int = 0
    columns: ColumnRange | None = None


class Checkpoint:
    """The verified checkpoint of a model. Owns its files; a context manager."""

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        """Verify the checkpoint in `directory` against `spec`'s records. Reads headers only. Raises CheckpointError."""
        self._directory = directory
        self._spec = spec
        self._family = FAMILIES[spec.family]
        self._weights = Weights(directory)
        try:
            self._stored: dict[str, list[Stored]] = {}  # by canonical name
            for stored in self._weights.tensors:
                self._stored.setdefault(self._family.canonical(stored.name), []).append(stored)
            self._used: set[str] = set()
            self._tied = {self._family.canonical(self._family.head)} if spec.tie_embeddings else set()
            for record in records(spec):
                for tensor in record.tensors:
                    self._check(tensor)
            self._unused = self._find_unused()
        except BaseException:
            self.close()
            raise

    def pieces(self, tensor: TensorSpec) -> list[Piece]:
        """Where the sources of a tensor of the verified records are, in the order in which they are stacked."""
        pieces = []
        for source in self._form(tensor):
            stored = self._get(source.name)
            assert stored is not None, "the checkpoint is verified"
            scales = self._scales(source) if stored.tensor.dtype == FP8 else None
            pieces.append(_piece(stored, source, scales))
        return pieces

    def _scales(self, source: Source) -> Scales:
        stored, block, (rows, columns) = self._get(source.name + SCALE), self._spec.weight_block, source.whole
        assert stored is not None, "the checkpoint is verified"
        assert block is not None, "the checkpoint is verified"
        return Scales(stored.name, _part(stored, block.grid(rows, columns), source.part), rows, columns, block)

    def _get(self, name: str) -> Stored | None:
        return next(iter(self._stored.get(self._family.canonical(name), ())), None)

    def _form(self, tensor: TensorSpec) -> tuple[Source, ...]:
        """The first of the tensor's forms that is stored whole. Raises CheckpointError where none is."""
        forms = (tensor.sources, *tensor.alternatives)
        for form in forms:
            if not self._lacking(form):
                return form
        begun = next((form for form in forms if len(self._lacking(form)) < len(form)), forms[0])
        lacking = self._lacking(begun)[0].name
        raise self._error(lacking, f"checkpoint lacks the tensor {lacking!r:.200}")

    def _lacking(self, form: Sequence[Source]) -> list[Source]:
        return [source for source in form if self._family.canonical(source.name) not in self._stored]

    def _check(self, tensor: TensorSpec) -> None:
        form = self._form(tensor)
        for source in form:
            self._check_source(source)
        names = {self._family.canonical(source.name) for source in form}
        for other in (source for each in (tensor.sources, *tensor.alternatives) for source in each):
            name = self._family.canonical(other.name)
            if name in self._stored and name not in names | self._tied:
                first, second = self._stored[min(names)][0], self._stored[name][0]
                raise CheckpointError(
                    f"checkpoint has the same weights as {first.name!r:.200} and {second.name!r:.200}"
                )
        self._used |= names | {self._family.canonical(source.name + SCALE) for source in form}

    def _check_source(self, source: Source) -> None:
        stored = self._check_stored(source.name, source.stored_shape)
        if stored.tensor.dtype == FP8:
            self._check_scales(source, stored)
        elif stored.tensor.dtype not in SOURCE_DTYPES:
            raise self._error(source.name, _wrong_dtype(stored, (*SOURCE_DTYPES, FP8)))
        elif scale := self._get(source.name + SCALE):
            raise CheckpointError(
                f"{scale.file.name}: {scale.name!r:.200} has scales for {stored.name!r:.200}, which is stored in "
                f"{stored.tensor.dtype}, not in {FP8}"
            )

    def _check_stored(self, name: str, shape: tuple[int, ...]) -> Stored:
        """The stored tensor `name`, which is there, once and with this shape."""
        stored, *others = self._stored[self._family.canonical(name)]
        for other in others:
            raise CheckpointError(
                f"tensor {stored.name!r:.200} is in {stored.file.name} and, called {other.name!r:.200}, in "
                f"{other.file.name}"
            )
        if stored.tensor.shape != shape:
            raise self._error(
                name,
                f"{stored.file.name}: tensor {stored.name!r:.200} has the shape {list(stored.tensor.shape)}, "
                f"config.json asks for {list(shape)}",
            )
        return stored

    def _check_scales(self, source: Source, stored: Stored) -> None:
        """Raise CheckpointError unless a weight in FP8 is a matrix with the scales that config.json announces."""
        block, where = self._spec.weight_block, f"{stored.file.name}: tensor {stored.name!r:.200}"
        if block is None:
            raise self._error(source.name, f"{where} has the dtype {FP8}, and config.json no quantization_config")
        if len(source.whole) != 2 or self._get(source.name + SCALE) is None:
            raise self._error(source.name, f"{where} has the dtype {FP8} and no {stored.name + SCALE!r:.200}")
        grid = block.grid(*source.whole)
        scale = self._check_stored(source.name + SCALE, (source.parts, *grid) if source.parts else grid)
        if scale.tensor.dtype not in SCALE_DTYPES:
            raise CheckpointError(_wrong_dtype(scale, SCALE_DTYPES))

    def _error(self, name: str, text: str) -> CheckpointError:
        """The error of the weight `name`: that it is quantized, where what lies beside it tells so, else `text`."""
        weight = self._family.canonical(name)
        ends = {weight + end: method for end, method in BESIDE_WEIGHT.items()}
        ends |= {weight.removesuffix(".weight") + end: method for end, method in BESIDE_STEM.items()}
        if self._spec.weight_block is not None:
            del ends[weight + SCALE]
        for beside, method in ends.items():
            if stored := self._stored.get(beside):
                return quantized(method, f"{stored[0].file.name} has {stored[0].name!r:.200}")
        return CheckpointError(text)

    def _find_unused(self) -> list[str]:
        known = self._used | self._tied
        unused = [name for name in self._stored if name not in known and not _ROTARY.fullmatch(name)]
        counts = self._spec.num_experts_by_layer
        for name in unused:
            match = self._family.expert_names.fullmatch(name) if self._family.expert_names else None
            layer, expert = (int(number) for number in match.groups()) if match else (0, 0)
            # transformers stacks all experts that it finds in a layer, and then finds them too many.
            if match and layer < len(counts) and 0 < counts[layer] <= expert:
                raise CheckpointError(
                    f"checkpoint has {self._stored[name][0].name!r:.200}; layer {layer} has {counts[layer]} experts"
                )
        return sorted(self._stored[name][0].name for name in unused)

    def remarks(self) -> list[str]:
        """What the checkpoint says or stores and nobody uses: one line each, of bounded length; mostly none. Reads
        config.json again."""
        remarks = [*_config_remarks(read_config(self._directory), self._spec), *self._weights.remarks]
        if names := self._unused:
            remarks.append(f"{counted(len(names), 'tensor')} of the files the model does not use: {named(names)}")
        return remarks

    @property
    def bytes_read(self) -> dict[str, int]:
        """Bytes of tensors read so far, by file name."""
        return {file.name: file.bytes_read for file in self._weights.files}

    @property
    def files(self) -> Sequence[TensorFile]:
        """The files in order of their names."""
        return self._weights.files

    def close(self) -> None:
        """Close all files. Idempotent."""
        self._weights.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _part(stored: Stored, shape: Sequence[int], number: int) -> Part:
    """The part `number` of a tensor that is a stack of parts of this shape."""
    nbytes = math.prod(shape) * DTYPE_BYTES[stored.tensor.dtype]
    return Part(stored.file, stored.tensor.begin + number * nbytes, nbytes, stored.tensor.dtype)


def _piece(stored: Stored, source: Source, scales: Scales | None) -> Piece:
    """What a source takes: whole rows, of which it may want some columns. Only rows can be read for themselves."""
    whole = _part(stored, source.whole, source.part)
    if source.window is None:
        return Piece(stored.name, whole, scales)
    width = math.prod(source.whole[1:])
    first, count = source.window.begin[0] * width, source.shape[0] * width
    size = DTYPE_BYTES[whole.dtype]
    part = whole._replace(begin=whole.begin + first * size, nbytes=count * size)
    columns = None
    if source.shape[1:] != source.whole[1:]:
        begin = source.window.begin[1]
        columns = ColumnRange(begin, begin + source.shape[1], width)
    return Piece(stored.name, part, scales, first, columns)


def _wrong_dtype(stored: Stored, supported: Sequence[str]) -> str:
    return (
        f"{stored.file.name}: tensor {stored.name!r:.200} has the dtype {stored.tensor.dtype}; "
        f"supported: {', '.join(supported)}"
    )


def _config_remarks(fields: dict[str, Any], spec: ModelSpec) -> list[str]:
    remarks = []
    if unread := unread_names(fields):
        remarks.append(f"config.json has {counted(len(unread), 'key')} without effect for this family: {named(unread)}")
    architectures = fields.get("architectures")
    if isinstance(architectures, list) and architectures and spec.architecture not in architectures:
        remarks.append(f"config.json is read by its model_type, not as {named([str(name) for name in architectures])}")
    padding = fields.get("pad_token_id")
    if isinstance(padding, int) and padding >= spec.vocab:
        remarks.append(f"config.json has the pad_token_id {padding}, beyond the vocabulary of {spec.vocab}")
    if fields.get("auto_map"):
        remarks.append("config.json has an auto_map: code that comes with a model is never run")
    if fields.get("tie_word_embeddings") is True and not spec.tie_embeddings:
        remarks.append("config.json ties the head to the embedding, but the two that are stored differ: kept apart")
    return remarks
