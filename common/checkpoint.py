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
from elasticmoe.common.families.shared_keys import quantized
from elasticmoe.common.model_spec import ModelSpec, Source, TensorSpec
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.safetensors import DTYPE_BYTES, TensorFile
from elasticmoe.common.weights import Stored, Weights, named
from elasticmoe.common.wording import counted

SOURCE_DTYPES: Final = ("F32", "F16", "BF16")  # that weights may be stored in
# Written by old versions; transformers computes them.
_ROTARY = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# Ends of names that quantizers give to what they store in place of a weight or beside it.
_QUANTIZED: Final[dict[str, str]] = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight.quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
}


class Piece(NamedTuple):
    """Contiguous bytes of a file that one source of a tensor is read from, of safetensors' `dtype`."""

    file: TensorFile
    begin: int
    nbytes: int
    dtype: str


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
            stored = self._stored[self._family.canonical(source.name)][0]
            nbytes = math.prod(source.shape) * DTYPE_BYTES[stored.tensor.dtype]
            begin = stored.tensor.begin + source.part * nbytes
            pieces.append(Piece(stored.file, begin, nbytes, stored.tensor.dtype))
        return pieces

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
        self._used |= names

    def _check_source(self, source: Source) -> None:
        stored, *others = self._stored[self._family.canonical(source.name)]
        for other in others:
            raise CheckpointError(
                f"tensor {stored.name!r:.200} is in {stored.file.name} and, called {other.name!r:.200}, in "
                f"{other.file.name}"
            )
        if stored.tensor.shape != source.stored_shape:
            raise self._error(
                source.name,
                f"{stored.file.name}: tensor {stored.name!r:.200} has the shape {list(stored.tensor.shape)}, "
                f"config.json asks for {list(source.stored_shape)}",
            )
        if stored.tensor.dtype not in SOURCE_DTYPES:
            raise self._error(
                source.name,
                f"{stored.file.name}: tensor {stored.name!r:.200} has the dtype {stored.tensor.dtype}; "
                f"supported: {', '.join(SOURCE_DTYPES)}",
            )

    def _error(self, name: str, text: str) -> CheckpointError:
        """The error of the weight `name`: that it is quantized, where what lies beside it tells so, else `text`."""
        stem = self._family.canonical(name).removesuffix(".weight")
        for end, method in _QUANTIZED.items():
            if stored := self._stored.get(stem + end):
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
