"""The served model: prompts from texts and conversations, and checkpoints that must not be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common.protocol.errors import CheckpointError, ConfigError
from elasticmoe.services.router.text.codec import load_codec
from elasticmoe.services.router.text.jobs import Conversation
from elasticmoe.services.router.text.tokenizer import ServedModel, load_model
from tests.procs.router_harness import write_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def change(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text())
    content.update(fields)
    path.write_text(json.dumps(content))


def test_name_and_ids(directory: Path) -> None:
    model = load_model(str(directory), "")
    assert (model.name, model.vocab, model.eos_ids) == ("model", 260, (257,))
    assert load_model(str(directory), "other").name == "other"


def test_a_beginning_of_sequence_as_transformers_gives_it(directory: Path) -> None:
    """Also where the text already has one; `add_special_tokens: false` of a request leaves it out."""
    change(
        directory / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [256], "tokens": ["<|bos|>"]}},
        },
    )
    model = ServedModel(directory, "m")
    assert model.codec.encode("a", add_special=True) == [256, 97]
    assert model.codec.encode("<|bos|>a", add_special=True) == [256, 256, 97]
    assert model.codec.encode("a", add_special=False) == [97]
    chat = Conversation(messages=[{"role": "user", "content": "a"}])
    assert model.codec.encode(model.codec.render(chat), add_special=False) == [256, 258, 97, 259]


def test_truncation_and_padding_are_off(directory: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "!"}
    change(directory / "tokenizer.json", truncation=truncation, padding=padding)
    assert load_codec(directory).encode("abc", add_special=True) == [97, 98, 99]


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", b"[]", "tokenizer.json is not valid"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", b"[1]", "must hold a JSON object"),
        ("config.json", None, "config.json is missing"),
    ],
)
def test_bad_files(directory: Path, file: str, content: bytes | None, text: str) -> None:
    if content is None:
        (directory / file).unlink()
    else:
        (directory / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        ServedModel(directory, "m")


def test_a_tokenizer_that_is_larger_than_the_model(directory: Path) -> None:
    change(directory / "config.json", vocab_size=200)
    with pytest.raises(CheckpointError, match="token id 255"):
        ServedModel(directory, "m")


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a directory"):
        load_model(str(tmp_path / "none"), "")
