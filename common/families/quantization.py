"""Quantized weights: the one format that is read, and the names of the others, which are refused.

What is read is "fine-grained" FP8, as DeepSeek-V3 and Qwen3-FP8 are published: weights in E4M3 [N, K] and, called
`<name>_scale_inv`, one scale for each block of `weight_block_size`, [ceil(N / rows), ceil(K / columns)], which the
weights are to be multiplied with. The last block of a row or column may be cut off. Sources: `weight_dequant` in the
inference code of DeepSeek-V3; `Fp8Dequantize` of transformers 5, which takes all blocks as equally large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NoReturn

from elasticmoe.common.model_spec import WeightBlock
from elasticmoe.common.protocol.errors import CheckpointError

SCALE: Final = "_scale_inv"  # what a weight's name ends with, for the name of its scales
_KEY: Final = "quantization_config"
_BLOCK: Final = (128, 128)  # where config.json says nothing, as in transformers
_BLOCK_SIDE_MAX: Final = 65_536
_BLOCK_ELEMENTS_MIN: Final = 128  # scales of 4 bytes are small beside the weights then

# Names of methods in config.json, as in transformers' AUTO_QUANTIZER_MAPPING and vLLM's QUANTIZATION_METHODS.
_METHODS: Final[dict[str, str]] = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "experts_int8": "int8 experts",
    "fbgemm_fp8": "FBGEMM FP8",
    "fouroversix": "Four Over Six",
    "fp8": "FP8",
    "fp_quant": "FP-Quant",
    "gemma": "Gemma's quantization",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "gptq_marlin": "GPTQ (Marlin)",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "inc": "Intel Neural Compressor",
    "intel/auto-round": "AutoRound",
    "metal": "Metal's quantization",
    "modelopt": "ModelOpt",
    "modelopt_fp4": "ModelOpt NVFP4",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
# What quantizers add to the name of a weight, `<stem>.weight` or that of a fused tensor of all experts, for what they
# store in its place or beside it; and to the stem alone.
BESIDE_WEIGHT: Final[dict[str, str]] = {
    SCALE: "FP8 in blocks",
    "_packed": "compressed-tensors",
    "_scale_2": "NVFP4",
    "_scale": "FP8 with a scale for each tensor or row, or compressed-tensors",
    "_scales": "MXFP4 or EETQ",
    "_blocks": "MXFP4",
    ".quant_map": "bitsandbytes",
    ".absmax": "bitsandbytes",
    "._data": "Quanto",
}
BESIDE_STEM: Final[dict[str, str]] = {
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes",
    ".W_q": "HQQ",
    ".codes": "AQLM",
    ".dense_weights": "SpQR",
    ".indices": "VPTQ",
}

# Keys of a `quantization_config` of FP8 that say how it was made, or what is known from the stored tensors.
_NEUTRAL: Final = frozenset(
    {"quant_method", "fmt", "weight_block_size", "activation_scheme", "scale_fmt", "expert_dtype", "dequantize"}
    | {"modules_to_not_convert", "modules_to_convert", "ignored_layers"}
)


def weight_block_of(fields: Mapping[str, Any]) -> WeightBlock | None:
    """The blocks of quantized weights that config.json's `fields` announce; None where they announce none.

    Raises CheckpointError, code `quantization_unsupported` for another format than is read.
    """
    if fields.get("compression_config") is not None:
        raise quantized(_method_of(fields["compression_config"]), "compression_config of config.json")
    config = fields.get(_KEY)
    if config is None:
        return None
    where = f"{_KEY} of config.json"
    if not isinstance(config, dict) or config.get("quant_method") != "fp8":
        raise quantized(_method_of(config), where)
    _check(config, "fmt", "e4m3", ("e4m3",))
    _check(config, "activation_scheme", "dynamic", ("dynamic",))
    _check(config, "scale_fmt", "float", ("float", "ue8m0"))
    _check(config, "expert_dtype", "fp8", ("fp8",))
    block = config.get("weight_block_size", list(_BLOCK))
    if block is None:
        raise quantized("FP8 with a scale for each tensor", f"{_KEY}.weight_block_size=null of config.json")
    return _parse_block(block)


def _check(config: Mapping[str, Any], key: str, default: str, allowed: tuple[str, ...]) -> None:
    value = config.get(key, default)
    if value is None or (value.lower() if isinstance(value, str) else value) in allowed:
        return
    raise quantized(f"FP8, {key}={value!r:.40}", f"{_KEY} of config.json; supported: {', '.join(allowed)}")


def _parse_block(value: Any) -> WeightBlock:
    sides = value if isinstance(value, list) else []
    if len(sides) == 2 and all(type(side) is int and 1 <= side <= _BLOCK_SIDE_MAX for side in sides):
        block = WeightBlock(*sides)
        if block.rows * block.columns >= _BLOCK_ELEMENTS_MIN:
            return block
    _refuse_block(value)


def _refuse_block(value: Any) -> NoReturn:
    raise CheckpointError(
        f"config.json: {_KEY}.weight_block_size must be two integers in [1, {_BLOCK_SIDE_MAX}], whose product is at "
        f"least {_BLOCK_ELEMENTS_MIN}; is {value!r:.80}"
    )


def quantized(method: str, where: str) -> CheckpointError:
    """The error of a checkpoint whose weights are quantized with `method`, as `where` tells."""
    return CheckpointError(
        f"the weights are quantized with {method} ({where}); only FP8 in blocks (E4M3, `weight_scale_inv`), float32, "
        "bfloat16 and float16 are read",
        code="quantization_unsupported",
    )


def unread_quantization_keys(fields: Mapping[str, Any]) -> list[str]:
    """Keys of the `quantization_config` that nobody reads, in alphabetical order."""
    config = fields.get(_KEY)
    return sorted(f"{_KEY}.{key}" for key in config if key not in _NEUTRAL) if isinstance(config, dict) else []


def _method_of(config: Any) -> str:
    """The quantization's name, with its bits where it tells them."""
    if not isinstance(config, dict):
        return "an unnamed method"
    name = config.get("quant_method") or config.get("quantization_method") or config.get("quant_library")
    if name is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        name = "bitsandbytes"
    if name is None and isinstance(inner := config.get("quantization"), dict):  # as ModelOpt writes it
        name = inner.get("quant_algo")
    bits = config.get("bits") or config.get("w_bit") or (config.get("load_in_4bit") and 4)
    text = _METHODS.get(name, f"{name!r:.40}") if isinstance(name, str) else "an unnamed method"
    return f"{text}, {bits} bit" if type(bits) is int else text
