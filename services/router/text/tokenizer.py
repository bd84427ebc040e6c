"""The served model as the router sees it: its tokenizer, vocabulary and end-of-sequence ids.

Read once at start from the checkpoint's directory; nothing of it changes afterwards. Reading is strict: a tokenizer
that can produce ids which the model's embedding does not have would poison the engine, so it stops the start. Added
tokens beyond the embedding (a padding token, mostly) do not: the prompt that uses one is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from elasticmoe.common.families import load_spec
from elasticmoe.common.protocol.errors import CheckpointError, ConfigError, InvalidRequest
from elasticmoe.common.protocol.limits import STOP_TOKEN_IDS_MAX
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.router.text.backend import TokenizerBackend
from elasticmoe.services.router.text.codec import load_codec

log = get_logger("router")

EOS_IDS_MAX = STOP_TOKEN_IDS_MAX // 2  # the other half is the clients'
_NAMED_MAX = 5  # tokens that a warning names


class ServedModel:
    """What requests are checked against and translated with. Shared by all requests, immutable.

    `codec`: its tokenizer; `warnings`: what a user should know about its files, each said once at the start.
    """

    def __init__(self, directory: Path, name: str) -> None:
        """Read the checkpoint's tokenizer files. Raises CheckpointError or ConfigError, naming the file."""
        spec = load_spec(directory, "bfloat16")
        self.name = name
        self.directory = directory
        self.vocab = spec.vocab
        self.codec = load_codec(directory)
        self.table = self.codec.table
        backend = self.codec.backend
        self.eos_ids = _eos_ids(spec.eos_token_ids, backend, spec.vocab)
        self._beyond = _tokens_beyond(backend, spec.vocab)
        self.warnings = tuple(_warnings(backend, self._beyond))

    def special_ids(self, texts: Iterable[str]) -> frozenset[int]:
        """Those of the special tokens, which are left out of texts, that have one of `texts`."""
        ids = {self.codec.backend.tokenizer.token_to_id(text) for text in texts}
        return self.table.special.intersection(ids)

    def check_embedded(self, ids: Sequence[int]) -> None:
        """Raises InvalidRequest for a prompt with a token that the model's embedding does not have."""
        if self._beyond:
            for token_id in ids:
                if token_id in self._beyond:
                    raise InvalidRequest(
                        f"there is token {self._beyond[token_id]!r:.80} of id {token_id} in the prompt; "
                        f"the model's embedding ends at {self.vocab - 1}",
                        code="token_without_embedding",
                        param="prompt",
                    )


def _eos_ids(configured: Sequence[int], backend: TokenizerBackend, vocab: int) -> tuple[int, ...]:
    """The ids that end a sequence: config.json's or generation_config.json's, and the one that the tokenizer names."""
    ids = [*configured, *([] if backend.eos_id is None else [backend.eos_id])]
    found = tuple(dict.fromkeys(token_id for token_id in ids if token_id < vocab))
    if len(found) > EOS_IDS_MAX:
        raise CheckpointError(f"the checkpoint has {len(found)} eos ids; the limit is {EOS_IDS_MAX}")
    return found


def _tokens_beyond(backend: TokenizerBackend, vocab: int) -> dict[int, str]:
    """Added tokens that the embedding does not have. Raises CheckpointError where it is not only added ones."""
    added = backend.tokenizer.get_added_tokens_decoder()
    beyond = {i: text for text, i in backend.tokenizer.get_vocab(with_added_tokens=True).items() if i >= vocab}
    wrong = max((token_id for token_id in beyond if token_id not in added), default=None)
    if wrong is not None:
        raise CheckpointError(f"tokenizer.json has token id {wrong}; config.json allows ids below {vocab}")
    return dict(sorted(beyond.items()))


def _warnings(backend: TokenizerBackend, beyond: Mapping[int, str]) -> list[str]:
    found = []
    if beyond:
        names = ", ".join(repr(text)[:80] for text in list(beyond.values())[:_NAMED_MAX])
        found.append(f"{len(beyond)} added tokens have no embedding; prompts with them are refused: {names}")
    if backend.cleans_up:
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
