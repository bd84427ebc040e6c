"""What `up` says about a checkpoint before it starts anything."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from elasticmoe.cli import checks, settings, up
from elasticmoe.common.protocol.errors import CheckpointError
from tests.unit import forms


@pytest.fixture
def tensors(tmp_path: Path) -> forms.Tensors:
    return forms.base_tensors(tmp_path / "base", "mixtral")


@pytest.fixture
def resolved(tmp_path: Path) -> settings.Settings:
    parser = argparse.ArgumentParser()
    up.add_arguments(parser)
    return settings.from_flags(parser.parse_args(["--run-dir", str(tmp_path), "--max-model-len", "512"]))


def test_nothing_is_said_about_a_checkpoint_without_oddities(
    tmp_path: Path, tensors: forms.Tensors, resolved: settings.Settings
) -> None:
    directory = forms.write(tmp_path / "m", "mixtral", tensors, config={"sliding_window": 512})
    assert checks.check_checkpoint(resolved, directory) == []


def test_what_is_not_used_and_what_limits_sequences_is_told(
    tmp_path: Path, tensors: forms.Tensors, resolved: settings.Settings
) -> None:
    odd = {"sliding_window": 100, "logit_scale": 2, "architectures": ["MyMixtral"], "pad_token_id": 260}
    directory = forms.write(tmp_path / "m", "mixtral", forms.beside(lm_head__bias=(260,))(tensors), config=odd)
    assert checks.check_checkpoint(resolved, directory) == [
        "config.json has 1 key without effect for this family: 'logit_scale'",
        "config.json is read by its model_type, not as 'MyMixtral'",
        "config.json has the pad_token_id 260, beyond the vocabulary of 260",
        "1 tensor of the files the model does not use: 'lm_head.bias'",
        "sequences end at the 100 tokens of the model's sliding window, not at 512",
    ]


def test_sequences_that_end_before_what_was_asked_for_are_told_of(
    tmp_path: Path, tensors: forms.Tensors, resolved: settings.Settings
) -> None:
    directory = forms.write(tmp_path / "m", "mixtral", tensors, config={"max_position_embeddings": 300})
    told = "sequences end at the 300 tokens of the model's max_position_embeddings, not at 512"
    assert checks.check_checkpoint(resolved, directory) == [told]


def test_a_checkpoint_that_lacks_something_is_refused(
    tmp_path: Path, tensors: forms.Tensors, resolved: settings.Settings
) -> None:
    directory = forms.write(tmp_path / "m", "mixtral", forms.without("lm_head.weight")(tensors))
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'lm_head\.weight'"):
        checks.check_checkpoint(resolved, directory)
