"""The served model as the router sees it: its tokenizer, chat template, vocabulary and end-of-sequence ids.

Read once at start from the checkpoint's directory; nothing of it changes afterwards. Reading is strict: a tokenizer
that can produce ids which the model's embedding does not have would poison the engine, so it stops the start. Added
tokens beyond the embedding (a padding token, mostly) do not: the prompt that uses one is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from common.families import load_spec, read_config
from common.protocol.errors import CheckpointError, ConfigError, InvalidRequest
from common.protocol.limits import STOP_TOKEN_IDS_MAX
from common.telemetry import get_logger
from services.router.detokenizer import TokenTable
from services.router.text.backend import Backend, build
from services.router.text.files import TemplateSource, read_tokenizer_files
from services.router.text.jobs import Conversation
from services.router.text.template import ChatTemplate

T = TypeVar("T")

log = get_logger("router")

INLINE_CHARS_MAX = 8_192  # longer texts are tokenized off the event loop: about 3 ms
EOS_IDS_MAX = STOP_TOKEN_IDS_MAX // 2  # the other half is the clients'
_WORKERS = 2
_NAMED_MAX = 5  # tokens that a warning names


class ServedModel:
    """What requests are checked against and translated with. Shared by all requests, immutable.

    `specials`: the special tokens by name. `warnings`: what a user should know about the checkpoint's files, each said
    once at the start.
    """

    def __init__(self, directory: Path, name: str) -> None:
        """Read the checkpoint's tokenizer files. Raises CheckpointError or ConfigError, naming the file."""
        spec = load_spec(directory, "bfloat16")
        self.name = name
        self.vocab = spec.vocab
        files = read_tokenizer_files(directory, read_config(directory))
        backend = build(files, spec.family)
        self._tokenizer = backend.tokenizer
        self.specials = backend.specials
        self.eos_ids = _eos_ids(spec.eos_token_ids, backend, spec.vocab)
        self._beyond = _tokens_beyond(backend, spec.vocab)
        self.table = TokenTable(self._tokenizer)
        self.template, self._no_template = _template(files.template, backend.specials)
        self.warnings = tuple(_warnings(files.settings, backend, self._beyond, self._no_template))
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="tokenize")

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of `text`, as the tokenizer of transformers gives them. `add_special`: as it begins a sequence.

        Blocks for about 0.4 s per million characters, without the interpreter's lock. Raises InvalidRequest for a text
        that the tokenizer does not take.
        """
        try:
            ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        except Exception as error:  # the library raises plain Exception: an unknown token that is unknown itself, say
            raise InvalidRequest(f"the text cannot be tokenized: {error!s:.200}", param="prompt") from None
        return ids

    def check_embedded(self, ids: Sequence[int]) -> None:
        """Raises InvalidRequest for a prompt with a token that the model's embedding does not have."""
        if self._beyond:
            for token_id in ids:
                if token_id in self._beyond:
                    raise InvalidRequest(
                        f"the prompt has token {self._beyond[token_id]!r:.80} of id {token_id}; "
                        f"the model's embedding ends at {self.vocab - 1}",
                        code="token_without_embedding",
                        param="prompt",
                    )

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of whole sequences of ids in [0, vocab)."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def render(self, conversation: Conversation) -> str:
        """The prompt's text for a conversation. Raises InvalidRequest, also for a model without a chat template that
        can be used."""
        if self.template is None:
            raise InvalidRequest(self._no_template.text, code=self._no_template.code)
        for name in conversation.required:
            if not self.template.takes(name):
                raise InvalidRequest(
                    f"{name} is not supported: the model's chat template does not read it",
                    code="unsupported",
                    param=name,
                )
        return self.template.render(
            conversation.messages,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            documents=conversation.documents,
            variables=conversation.variables,
        )

    def encode_chat(self, conversation: Conversation) -> list[int]:
        """The prompt's tokens. The template writes the special tokens, so by default none are added."""
        return self.encode(self.render(conversation), add_special=conversation.add_special)

    async def run(self, work: Callable[[], T], num_chars: int) -> T:
        """Do `work` on texts of `num_chars` here, or in a worker thread when it would hold up the event loop."""
        if num_chars <= INLINE_CHARS_MAX:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    def close(self) -> None:
        """Stop the worker threads; running work ends first."""
        self._workers.shutdown(wait=True, cancel_futures=True)


def _eos_ids(configured: Sequence[int], backend: Backend, vocab: int) -> tuple[int, ...]:
    """The ids that end a sequence: config.json's or generation_config.json's, and the one that the tokenizer names."""
    ids = [*configured, *([] if backend.eos_id is None else [backend.eos_id])]
    found = tuple(dict.fromkeys(token_id for token_id in ids if token_id < vocab))
    if len(found) > EOS_IDS_MAX:
        raise CheckpointError(f"the checkpoint has {len(found)} eos ids; the limit is {EOS_IDS_MAX}")
    return found


def _tokens_beyond(backend: Backend, vocab: int) -> dict[int, str]:
    """Added tokens that the embedding does not have. Raises CheckpointError where it is not only added ones."""
    added = backend.tokenizer.get_added_tokens_decoder()
    beyond = {i: text for text, i in backend.tokenizer.get_vocab(with_added_tokens=True).items() if i >= vocab}
    wrong = max((token_id for token_id in beyond if token_id not in added), default=None)
    if wrong is not None:
        raise CheckpointError(f"tokenizer.json has token id {wrong}; config.json allows ids below {vocab}")
    return dict(sorted(beyond.items()))


class _Refusal(NamedTuple):
    """What chat requests are told where no template can be used."""

    text: str = ""
    code: str = ""


def _template(source: TemplateSource, specials: Mapping[str, str]) -> tuple[ChatTemplate | None, _Refusal]:
    problem = source.problem
    if source.text is not None:
        try:
            return ChatTemplate(source.text, specials), _Refusal()
        except CheckpointError as error:
            problem = error.message
    if problem:
        text = f"the model's chat template cannot be used: {problem}; use /v1/completions"
        return None, _Refusal(text, "bad_chat_template")
    return None, _Refusal("the model has no chat template; use /v1/completions", "no_chat_template")


def _warnings(
    settings: Mapping[str, Any], backend: Backend, beyond: Mapping[int, str], no_template: _Refusal
) -> list[str]:
    found = []
    if no_template.code == "bad_chat_template":
        found.append(no_template.text)
    if beyond:
        names = ", ".join(repr(text)[:80] for text in list(beyond.values())[:_NAMED_MAX])
        found.append(f"{len(beyond)} added tokens have no embedding; prompts with them are refused: {names}")
    is_bpe = type(backend.tokenizer.model).__name__ == "BPE"
    if settings.get("clean_up_tokenization_spaces") and not is_bpe:
        found.append("clean_up_tokenization_spaces is not applied: spaces before punctuation stay in the text")
    return found


def load_model(model: str, served_name: str) -> ServedModel:
    """The model at directory `model`, served as `served_name` or the directory's name. Raises ConfigError."""
    if not model:
        raise ConfigError("model is not set: it is the checkpoint's directory")
    directory = Path(model)
    if not directory.is_dir():
        raise ConfigError(f"model {model!s:.200} is not a directory")
    served = ServedModel(directory, served_name or directory.absolute().name)
    for warning in served.warnings:
        log.warning(warning)
    return served
