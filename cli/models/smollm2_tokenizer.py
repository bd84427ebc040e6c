"""Rebuild SmolLM2's `tokenizer.json` from the metadata that its GGUF file carries."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from elasticmoe.cli.models.checkpoint import write_json
from elasticmoe.cli.models.smollm2 import SmolLM2

# GGUF's `token_type` of tokens that control the model and never stand for text (LLAMA_TOKEN_TYPE_CONTROL).
_CONTROL = 3

# What the model card of SmolLM2-135M-Instruct recommends; at temperature 1 its answers ramble.
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}


def build_tokenizer(source: SmolLM2) -> Tokenizer:
    """Byte-level BPE with the GGUF's tokens and merges; its control tokens are special tokens with their own ids.

    SmolLM2's vocabulary lacks the six control characters 04, 06, 13, 14, 16 and 1D (hex): like the original, the
    tokenizer drops them. Raises ValueError if the file's tokenizer is not of SmolLM's kind.
    """
    kind = (source.field("tokenizer.ggml.model"), source.field("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"the GGUF file's tokenizer is of kind {kind}, expected ('gpt2', 'smollm')")
    tokens: list[str] = source.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in source.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = control_tokens(source)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def control_tokens(source: SmolLM2) -> list[str]:
    """The texts of the control tokens, in the order of their ids."""
    types = source.field("tokenizer.ggml.token_type")
    return [token for token, kind in zip(source.field("tokenizer.ggml.tokens"), types, strict=True) if kind == _CONTROL]


def special_ids(source: SmolLM2) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, as a hub `config.json` has them."""
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{key}_token_id": source.field(f"tokenizer.ggml.{name}_token_id") for key, name in keys.items()}


def write_tokenizer(stage: Path, source: SmolLM2) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` (with the chat template) and `generation_config.json`."""
    build_tokenizer(source).save(str(stage / "tokenizer.json"))
    tokens, ids = source.field("tokenizer.ggml.tokens"), special_ids(source)
    named = {key.removesuffix("_id"): tokens[index] for key, index in ids.items()}
    end_of_text = source.field("tokenizer.ggml.unknown_token_id")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "unk_token": tokens[end_of_text],
        "additional_special_tokens": [token for token in control_tokens(source) if token not in named.values()],
        "model_max_length": source.field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": source.field("tokenizer.chat_template"),
    }
    write_json(stage / "tokenizer_config.json", tokenizer_config)
    # A turn ends with <|im_end|>; a document of the pre-training data ended with <|endoftext|>, which may slip in too.
    eos = [ids["eos_token_id"], end_of_text]
    write_json(stage / "generation_config.json", {**ids, "eos_token_id": eos, **SAMPLING})
