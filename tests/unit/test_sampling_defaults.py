"""generation_config.json: its values are the defaults, a request's own words win, and nonsense stops the start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.protocol.rank import Sampling
from elasticmoe.services.router.api.options import options_of
from elasticmoe.services.router.api.parse import parse
from elasticmoe.services.router.api.sampling_defaults import OPENAI, SamplingDefaults, read_defaults
from elasticmoe.services.router.api.schemas import CompletionRequest
from elasticmoe.services.router.text.tokenizer import ServedModel

COMPLETION = msgspec.json.Decoder(CompletionRequest)


def defaults_of(directory: Path, text: str, setting: str = "auto") -> SamplingDefaults:
    (directory / "generation_config.json").write_text(text)
    return read_defaults(directory, setting)


def sampling(model: ServedModel, defaults: SamplingDefaults, **body: Any) -> Sampling:
    request = parse(COMPLETION, msgspec.json.encode({"prompt": "x", "seed": 1, **body}))
    return options_of(request, model, max_tokens=None, logprobs=-1, defaults=defaults).sampling


FULL = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20.0,  # some writers have floats only
    "min_p": 0.05,
    "repetition_penalty": 1.05,
    "max_new_tokens": 300,
    "eos_token_id": [1, 2],
    "transformers_version": "5.0.0",
}


def test_what_the_file_says_is_the_default_and_the_request_wins(model: ServedModel, tmp_path: Path) -> None:
    defaults = defaults_of(tmp_path, json.dumps(FULL))
    assert defaults == SamplingDefaults(0.6, 0.95, 20, 0.05, 1.05, 300)
    plain = sampling(model, defaults)
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p, plain.repetition_penalty) == (
        0.6,
        0.95,
        20,
        0.05,
        1.05,
    )
    own = {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
    assert sampling(model, defaults, **own) == Sampling(seed=1, temperature=0.0)
    assert sampling(model, defaults, temperature=None) == plain
    mixed = sampling(model, defaults, temperature=1.5)
    assert (mixed.temperature, mixed.top_k) == (1.5, 20)


def test_without_a_file_or_by_the_setting_they_are_openais(model: ServedModel, tmp_path: Path) -> None:
    assert read_defaults(tmp_path, "auto") == OPENAI
    assert defaults_of(tmp_path, json.dumps(FULL), "none") == OPENAI
    assert defaults_of(tmp_path, '{"bos_token_id": 1, "temperature": null}') == OPENAI
    assert sampling(model, OPENAI) == Sampling(seed=1)
    assert OPENAI.given() == {}


def test_who_says_not_to_sample_is_greedy(tmp_path: Path) -> None:
    assert defaults_of(tmp_path, '{"do_sample": false, "temperature": 0.7}').given() == {"temperature": 0.0}
    assert defaults_of(tmp_path, '{"temperature": 0.7}').given() == {"temperature": 0.7}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"temperature": -0.5}', "temperature: has to be a number of at least 0; it is -0.5"),
        ('{"temperature": NaN}', "temperature: has to be a number of at least 0; it is nan"),
        ('{"temperature": 1e999}', "temperature: has to be a number of at most 10; it is inf"),
        ('{"temperature": "0.5"}', 'temperature: has to be a number; it is "0.5"'),
        ('{"temperature": true}', "temperature: has to be a number; it is true"),
        ('{"top_p": 1.5}', "top_p: has to be a number of at most 1; it is 1.5"),
        ('{"top_k": 2.5}', "top_k: has to be a whole number; it is 2.5"),
        ('{"max_new_tokens": 0}', "max_new_tokens: has to be a whole number of at least 1; it is 0"),
        ('{"do_sample": 1}', "do_sample: has to be true or false; it is 1"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_nonsense_stops_the_start_and_the_setting_helps(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        defaults_of(tmp_path, text)
    assert caught.value.message.startswith("generation_config.json")
    assert told in caught.value.message
    assert defaults_of(tmp_path, text, "none") == OPENAI


def test_what_is_not_supported_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unusual = {"num_beams": 4, "typical_p": 1.0, "bad_words_ids": [], "stop_strings": ["###"], "temperature": 0.5}
    assert defaults_of(tmp_path, json.dumps(unusual)).given() == {"temperature": 0.5}
    (record,) = caplog.records
    assert record.facts["ignored"] == ["num_beams", "stop_strings"]  # type: ignore[attr-defined]
