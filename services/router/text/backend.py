"""A checkpoint's tokenizer, built as transformers builds it: the class's pipeline, then special and added tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
from tokenizers import AddedToken, Tokenizer

from elasticmoe.common.protocol.errors import CheckpointError, ElasticMoEError
from elasticmoe.services.router.text.classes import TokenizerClass, class_of
from elasticmoe.services.router.text.files import TokenizerFiles
from elasticmoe.services.router.text.special import SpecialTokens, gather, install


class TokenizerBackend(NamedTuple):
    """A tokenizer with its tokens. `specials`: special tokens by the names that templates use; `eos_id`: the end of
    sequence that the tokenizer's files name; `cleans_up`: transformers would take spaces out of decoded texts."""

    tokenizer: Tokenizer
    specials: dict[str, str]
    eos_id: int | None
    cleans_up: bool


class _Rest(msgspec.Struct):
    """What of tokenizer.json is needed beside the tokenizer itself."""

    added_tokens: list[dict[str, Any]] = []
    padding: dict[str, Any] | None = None


class _Model(msgspec.Struct):
    vocab: dict[str, int] = {}
    merges: list[str | tuple[str, str]] = []
    type: str | None = None


class _Whole(msgspec.Struct):
    model: _Model
    post_processor: msgspec.Raw = msgspec.Raw(b"null")


def build(files: TokenizerFiles, family: str) -> TokenizerBackend:
    """The tokenizer of a model of `family`. Blocks for about 0.5 s for 150,000 tokens.

    Raises CheckpointError for files that transformers would not load, and for classes that are not supported.
    """
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # one text at a time: threads would only cost hand-overs and memory
    os.putenv("RUST_BACKTRACE", "0")  # where the library panics, two lines in the log will do
    with _valid("tokenizer.json"):
        rest = msgspec.json.decode(files.tokenizer, type=_Rest)
    kind = class_of(family, files.settings, files.config_class, files.tokenizer)
    padding = {"pad_token": rest.padding["pad_token"]} if rest.padding and "pad_token" in rest.padding else {}
    tokens = gather(files, rest.added_tokens, padding | (kind.defaults if kind else {}))
    with _valid("tokenizer.json"):
        tokenizer = Tokenizer.from_buffer(files.tokenizer) if kind is None else _rebuild(files, kind)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = bool(files.settings.get("split_special_tokens"))
        _add(tokenizer, tokens, kind)
    eos = tokens.named.get("eos_token")
    eos_id = tokenizer.token_to_id(str(eos)) if eos is not None else None
    is_bpe = type(tokenizer.model).__name__ == "BPE"  # for these transformers does not either
    cleans_up = bool(files.settings.get("clean_up_tokenization_spaces")) and not is_bpe
    return TokenizerBackend(tokenizer, tokens.texts(), eos_id, cleans_up)


def _add(tokenizer: Tokenizer, tokens: SpecialTokens, kind: TokenizerClass | None) -> None:
    install(tokenizer, tokens)
    if kind is not None and kind.readds_special:
        tokenizer.add_tokens([AddedToken(text, special=True) for text in tokens.everything()])


def _rebuild(files: TokenizerFiles, kind: TokenizerClass) -> Tokenizer:
    whole = msgspec.json.decode(files.tokenizer, type=_Whole)
    if whole.model.type not in (None, "BPE"):
        raise CheckpointError(f"tokenizer.json: the tokenizer class needs a BPE model, the file has {whole.model.type}")
    merges = [_pair(merge) for merge in whole.model.merges]
    tokenizer = kind.build(whole.model.vocab, merges, kind.defaults | files.settings)
    if not kind.drops_post_processor:
        tokenizer.post_processor = _post_processor(whole.post_processor)
    return tokenizer


def _pair(merge: str | tuple[str, str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _post_processor(described: msgspec.Raw) -> Any:
    """The library reads a post-processor only as a part of a tokenizer: this one has no vocabulary."""
    model = {"type": "BPE", "vocab": {}, "merges": []}
    parts = {"version": "1.0", "added_tokens": [], "model": model, "post_processor": described}
    return Tokenizer.from_buffer(msgspec.json.encode(parts)).post_processor


@contextmanager
def _valid(name: str) -> Iterator[None]:
    with errors_as(lambda text: CheckpointError(f"{name} is not valid: {text}")):
        yield


@contextmanager
def errors_as(make: Callable[[str], ElasticMoEError]) -> Iterator[None]:
    """Turn whatever the tokenizer library raises into `make` of its text: plain exceptions for what it dislikes, and
    panics, which are no exceptions for Python, where a regular expression exceeds its limit of steps, for instance."""
    try:
        yield
    except (ElasticMoEError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise make(str(error)[:200]) from None
