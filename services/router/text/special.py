"""Special and added tokens: what transformers gathers from a checkpoint's files, in its order of precedence.

The source is transformers' `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__` (version 5):
`added_tokens_decoder` of tokenizer_config.json counts alone where it is present; else special_tokens_map.json,
added_tokens.json and the added tokens of tokenizer.json do. Tokens that the tokenizer lacks are added to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from tokenizers import AddedToken, Tokenizer

from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.services.router.text.files import TokenizerFiles

NAMES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDED_TOKENS_MAX: Final = 65_536

SpecialToken = str | AddedToken
_FIELDS = frozenset({"content", "single_word", "lstrip", "rstrip", "normalized", "special"})


class SpecialTokens(NamedTuple):
    """`named`: by name, the standard names first, then a checkpoint's own (`image_token`). `extra`: without a name.
    `added`: tokens with the place that the files give them, which only orders them."""

    named: dict[str, SpecialToken]
    extra: list[SpecialToken]
    added: dict[int, AddedToken]

    def texts(self) -> dict[str, str]:
        """The named ones as text: the variables of chat templates."""
        return {name: str(token) for name, token in self.named.items()}

    def everything(self) -> list[str]:
        """The text of each special token, once."""
        return list(dict.fromkeys(str(token) for token in [*self.named.values(), *self.extra]))


def gather(
    files: TokenizerFiles, in_tokenizer: list[dict[str, Any]], defaults: Mapping[str, str | None]
) -> SpecialTokens:
    """What the files say. `in_tokenizer`: the added tokens of tokenizer.json; `defaults`: for names that no file has.

    Raises CheckpointError for entries that are no tokens.
    """
    init = dict(files.settings)
    if "additional_special_tokens" in init and not init.get("extra_special_tokens"):
        init["extra_special_tokens"] = init.pop("additional_special_tokens")
    own: dict[str, Any] = {
        key: init.pop(key)
        for key in list(init)
        if key.endswith("_token") and key not in NAMES and isinstance(init[key], str)
    }
    if isinstance(init.get("extra_special_tokens"), dict):
        own.update(init.pop("extra_special_tokens"))
    if own:
        init["model_specific_special_tokens"] = own
    if "added_tokens_decoder" in init:
        added = _decoder_of(init["added_tokens_decoder"])
    else:
        added = _legacy(files, init, in_tokenizer)
    if len(added) > ADDED_TOKENS_MAX:
        raise CheckpointError(f"the tokenizer has {len(added)} added tokens; the limit is {ADDED_TOKENS_MAX}")
    by_text = {str(token): token for token in added.values()}
    return _named_and_extra({**defaults, **init}, by_text, added)


def _decoder_of(value: Any) -> dict[int, AddedToken]:
    if not isinstance(value, dict):
        raise CheckpointError("tokenizer_config.json: added_tokens_decoder must be an object")
    try:
        return {int(place): _object(token, "added_tokens_decoder") for place, token in value.items()}
    except ValueError:
        raise CheckpointError("tokenizer_config.json: added_tokens_decoder must have token ids as keys") from None


def _legacy(files: TokenizerFiles, init: dict[str, Any], in_tokenizer: list[dict[str, Any]]) -> dict[int, AddedToken]:
    """The files of before `added_tokens_decoder`. Completes `init` from special_tokens_map.json."""
    for key, value in (files.special_map or {}).items():
        if isinstance(value, dict) and key != "extra_special_tokens":
            value = _object({**value, "special": True}, key)
        elif key == "extra_special_tokens" and isinstance(value, list):
            value = [*(init.get(key) or []), *value]
        init[key] = value
    if isinstance(init.get("extra_special_tokens"), dict):
        own = init.setdefault("model_specific_special_tokens", {})
        own.update(init.pop("extra_special_tokens"))
    added: dict[int, AddedToken] = {}
    known = {str(init[name]) for name in NAMES if init.get(name)}
    known |= {str(token) for token in init.get("extra_special_tokens") or []}
    for text, place in (files.added or {}).items():
        if type(place) is not int:
            raise CheckpointError(f"added_tokens.json: the id of {text!r:.40} must be an integer, is {place!r:.40}")
        is_special = text in known
        added[place] = AddedToken(text, normalized=not is_special, special=is_special)
    for entry in in_tokenizer:
        fields = dict(entry)
        place = fields.pop("id", None)
        if type(place) is not int:
            raise CheckpointError("tokenizer.json: an added token has no id")
        added[place] = _object(fields, "added_tokens")
    return added


def _named_and_extra(
    init: dict[str, Any], by_text: dict[str, AddedToken], added: dict[int, AddedToken]
) -> SpecialTokens:
    named: dict[str, SpecialToken] = {}
    for name in NAMES:
        if init.get(name) is not None:
            token = _token(init[name], name)
            named[name] = by_text.get(str(token), token)
    for key, value in init.items():
        if key.endswith("_token") and key not in NAMES and _is_token(value):
            named[key] = _token(value, key)
    specific = init.get("model_specific_special_tokens") or {}
    if not isinstance(specific, dict):
        raise CheckpointError("tokenizer_config.json: model_specific_special_tokens must be an object")
    named |= {key: _token(value, key) for key, value in specific.items()}
    # New tokens get their ids in this order: the standard names first, wherever they were written.
    named = {name: named[name] for name in NAMES if name in named} | {k: v for k, v in named.items() if k not in NAMES}
    extra = init.get("extra_special_tokens", init.get("additional_special_tokens")) or []
    if not isinstance(extra, list):
        raise CheckpointError(f"tokenizer_config.json: extra_special_tokens must be a list, is {extra!r:.40}")
    return SpecialTokens(named, [_token(token, "extra_special_tokens") for token in extra], added)


def _is_token(value: Any) -> bool:
    return isinstance(value, str | AddedToken) or (isinstance(value, dict) and value.get("__type") == "AddedToken")


def _token(value: Any, name: str) -> SpecialToken:
    """A text, or an object with `content`."""
    return value if isinstance(value, str | AddedToken) else _object(value, name)


def _object(value: Any, name: str) -> AddedToken:
    fields = {key: entry for key, entry in value.items() if key in _FIELDS} if isinstance(value, dict) else {}
    if not isinstance(fields.get("content"), str):
        raise CheckpointError(f"tokenizer files: {name} must be a token, is {value!r:.80}")
    try:
        return AddedToken(**fields)
    except TypeError:
        raise CheckpointError(f"tokenizer files: {name} is not a valid token: {value!r:.80}") from None


def install(tokenizer: Tokenizer, tokens: SpecialTokens) -> None:
    """Add the tokens, in transformers' order: those with a place, then named ones and extra ones that are missing."""
    everything: list[SpecialToken] = [token for _, token in sorted(tokens.added.items())]
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | {str(t) for t in everything}
    for token in [*tokens.named.values(), *tokens.extra]:
        if str(token) not in present and token not in everything:
            everything.append(token)
    names = {str(token) for token in tokens.named.values()}
    tokenizer.add_tokens([_special_where(token, names) for token in everything])


def _special_where(token: SpecialToken, names: Iterable[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not token.special and str(token) in names:
        token.special = True
    return token
