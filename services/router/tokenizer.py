"""The served model as the router sees it: its tokenizer, chat template, vocabulary and end-of-sequence ids.

Read once at start from the checkpoint's directory; nothing of it changes afterwards. Reading is strict: a tokenizer
that can produce ids which the model's embedding does not have would poison the engine, so it stops the start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from common.checkpoint_files import read_file, read_json
from common.families import load_spec
from common.protocol.errors import CheckpointError, ConfigError, InvalidRequest
from common.protocol.limits import STOP_TOKEN_IDS_MAX
from services.router.chat_template import ChatTemplate
from services.router.detokenizer import TokenTable

T = TypeVar("T")

TOKENIZER_BYTES_MAX = 128 * 1024 * 1024
INLINE_CHARS_MAX = 8_192  # longer texts are tokenized off the event loop: about 3 ms
EOS_IDS_MAX = STOP_TOKEN_IDS_MAX // 2  # the other half is the clients'
_WORKERS = 2
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class ServedModel:
    """What requests are checked against and translated with. Shared by all requests, immutable."""

    def __init__(self, directory: Path, name: str) -> None:
        """Read the checkpoint's tokenizer files. Raises CheckpointError or ConfigError, naming the file."""
        spec = load_spec(directory, "bfloat16")
        self.name = name
        self.vocab = spec.vocab
        self.eos_ids = tuple(token_id for token_id in spec.eos_token_ids if token_id < spec.vocab)
        if len(self.eos_ids) > EOS_IDS_MAX:
            raise CheckpointError(f"config.json has {len(self.eos_ids)} eos ids; the limit is {EOS_IDS_MAX}")
        self._tokenizer = _read_tokenizer(directory / "tokenizer.json")
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= spec.vocab:
            raise CheckpointError(f"tokenizer.json has token id {largest}; config.json allows ids below {spec.vocab}")
        self.table = TokenTable(self._tokenizer)
        settings = read_json(directory / "tokenizer_config.json", TOKENIZER_BYTES_MAX) or {}
        specials = _special_tokens(settings)
        self._bos_id = self._tokenizer.token_to_id(specials.get("bos_token", "")) if specials else None
        source = _template_source(directory, settings)
        self.template = ChatTemplate(source, specials) if source is not None else None
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="tokenize")

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of `text`. `add_special`: as the tokenizer begins a sequence; a bos that the text already begins
        with is not doubled. Blocks for about 0.4 s per million characters, without the interpreter's lock."""
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        if add_special and self._bos_id is not None and ids[:2] == [self._bos_id, self._bos_id]:
            del ids[0]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of whole sequences of ids in [0, vocab)."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt's text for a conversation. Raises InvalidRequest, also for a model without a chat template."""
        if self.template is None:
            raise InvalidRequest("the model has no chat template; use /v1/completions", code="no_chat_template")
        return self.template.render(messages, add_generation_prompt=add_generation_prompt)

    async def run(self, work: Callable[[], T], num_chars: int) -> T:
        """Do `work` on texts of `num_chars` here, or in a worker thread when it would hold up the event loop."""
        if num_chars <= INLINE_CHARS_MAX:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    def close(self) -> None:
        """Stop the worker threads; running work ends first."""
        self._workers.shutdown(wait=True, cancel_futures=True)


def _read_tokenizer(path: Path) -> Tokenizer:
    raw = read_file(path, TOKENIZER_BYTES_MAX)
    if raw is None:
        raise CheckpointError("tokenizer.json is missing")
    try:
        tokenizer = Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises plain Exception for whatever it dislikes
        raise CheckpointError(f"tokenizer.json is not valid: {error!s:.200}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name: given as text, or as an object with `content`."""
    values = {name: settings.get(name) for name in _SPECIAL_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _template_source(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The template's own file before tokenizer_config.json; of several named ones, `default`."""
    raw = read_file(directory / "chat_template.jinja", TOKENIZER_BYTES_MAX)
    if raw is not None:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise CheckpointError("chat_template.jinja is not UTF-8") from None
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def load_model(model: str, served_name: str) -> ServedModel:
    """The model at directory `model`, served as `served_name` or the directory's name. Raises ConfigError."""
    if not model:
        raise ConfigError("model is not set: it is the checkpoint's directory")
    directory = Path(model)
    if not directory.is_dir():
        raise ConfigError(f"model {model!s:.200} is not a directory")
    return ServedModel(directory, served_name or directory.absolute().name)
