"""The tokenizer files of a checkpoint: read once, within bounds, and not yet interpreted.

The files and their names are those of transformers' `PreTrainedTokenizerBase.from_pretrained`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from elasticmoe.common.checkpoint_files import read_file, read_json
from elasticmoe.common.protocol.errors import CheckpointError

TOKENIZER_BYTES_MAX: Final = 128 * 1024 * 1024
SETTINGS_BYTES_MAX: Final = 16 * 1024 * 1024
TEMPLATE_BYTES_MAX: Final = 4 * 1024 * 1024
TEMPLATES_MAX: Final = 64
TEMPLATE_FOLDER: Final = "additional_chat_templates"

_VERSIONED = re.compile(r"tokenizer\.(\d+(?:\.\d+)*)\.json")
_WITHOUT_JSON = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "vocab.txt")


class TemplateSource(NamedTuple):
    """The chat template's text, or None and the reason, for users, why the checkpoint has none that can be used.
    Both empty: it has none at all."""

    text: str | None = None
    problem: str = ""


class TokenizerFiles(NamedTuple):
    """What the files hold. `settings`: tokenizer_config.json, empty without one; `special_map`:
    special_tokens_map.json; `added`: added_tokens.json; `config_class`: the `tokenizer_class` of config.json."""

    tokenizer: bytes
    settings: dict[str, Any]
    special_map: dict[str, Any] | None
    added: dict[str, Any] | None
    config_class: str | None
    template: TemplateSource

    def digest(self) -> str:
        """Of what was read: two processes that read the same have the same."""
        rest = msgspec.json.encode((self.settings, self.special_map, self.added, self.config_class, self.template))
        return hashlib.sha256(hashlib.sha256(self.tokenizer).digest() + rest).hexdigest()


def read_tokenizer_files(directory: Path, config: dict[str, Any]) -> TokenizerFiles:
    """Read them. `config`: the fields of config.json.

    Raises CheckpointError for a missing tokenizer.json and for whatever cannot be read or is no JSON object, but not
    for templates: a bad one costs chat requests only.
    """
    settings = read_json(directory / "tokenizer_config.json", SETTINGS_BYTES_MAX) or {}
    declared = config.get("tokenizer_class")
    return TokenizerFiles(
        tokenizer=_read_tokenizer(directory, settings),
        settings=settings,
        special_map=read_json(directory / "special_tokens_map.json", SETTINGS_BYTES_MAX),
        added=read_json(directory / "added_tokens.json", SETTINGS_BYTES_MAX),
        config_class=declared if isinstance(declared, str) else None,
        template=_read_template(directory, settings),
    )


def _read_tokenizer(directory: Path, settings: dict[str, Any]) -> bytes:
    name = _tokenizer_name(settings.get("fast_tokenizer_files"))
    raw = read_file(directory / name, TOKENIZER_BYTES_MAX)
    if raw is None:
        others = [other for other in _WITHOUT_JSON if (directory / other).exists()]
        hint = (
            f": {others[0]} alone is not supported; save the tokenizer with transformers to get one" if others else ""
        )
        raise CheckpointError(f"{name} is missing{hint}")
    return raw


def _tokenizer_name(versioned: Any) -> str:
    """Some old checkpoints have a tokenizer.json for each range of versions of transformers: the newest counts."""
    found = {}
    for name in versioned if isinstance(versioned, list) else []:
        match = _VERSIONED.fullmatch(name) if isinstance(name, str) else None
        if match:
            found[tuple(int(part) for part in match.group(1).split("."))] = name
    return found[max(found)] if found else "tokenizer.json"


def _read_template(directory: Path, settings: dict[str, Any]) -> TemplateSource:
    """Files come before the entry of tokenizer_config.json; of several templates, the one called `default` counts."""
    try:
        templates = _template_files(directory)
    except CheckpointError as error:
        return TemplateSource(problem=error.message)
    given: Any = templates or settings.get("chat_template")
    if isinstance(given, list):
        is_named = all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in given)
        given = {entry["name"]: entry.get("template") for entry in given} if is_named else 0
    if isinstance(given, dict):
        if "default" not in given:
            names = ", ".join(sorted(str(name) for name in given))
            return TemplateSource(problem=f"of its chat templates ({names:.200}) none is called default")
        given = given["default"]
    if given is None or isinstance(given, str):
        return TemplateSource(given)
    return TemplateSource(problem="tokenizer_config.json: chat_template is neither a text nor a list of named texts")


def _template_files(directory: Path) -> dict[str, str]:
    paths = {"default": directory / "chat_template.jinja"}
    folder = directory / TEMPLATE_FOLDER
    for path in sorted(folder.glob("*.jinja")) if folder.is_dir() else []:
        if len(paths) > TEMPLATES_MAX:
            raise CheckpointError(f"{TEMPLATE_FOLDER} has more than {TEMPLATES_MAX} templates")
        paths[path.name.removesuffix(".jinja")] = path
    templates = {}
    for name, path in paths.items():
        raw = read_file(path, TEMPLATE_BYTES_MAX)
        if raw is None:
            continue
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{path.name} is not UTF-8") from None
        templates[name] = text.replace("\r\n", "\n").replace("\r", "\n")  # as a text file is read
    return templates
