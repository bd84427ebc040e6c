"""Recipes of `bench serve --recipes`: how they are written, and what is refused."""

from __future__ import annotations

import argparse

import pytest

from elasticmoe.cli.bench.recipes import Recipe, recipes, sized
from elasticmoe.cli.main import main


def test_a_recipe_is_a_size_and_settings() -> None:
    named, mode, two = recipes(
        "by name: max_tokens_per_step=512 activations=bfloat16; mode: devices=host:2 performance_mode=throughput;"
        "two: replicas=2 tp=2 served_name='a b';"
    )
    assert named == Recipe("by name", 1, 1, "host:1", (("max_tokens_per_step", "512"), ("activations", "bfloat16")))
    assert mode == Recipe("mode", 1, 1, "host:2", (("performance_mode", "throughput"),))
    assert two == Recipe("two", 2, 2, "host:4", (("served_name", "a b"),))
    assert sized(2, 1).name == "replicas: 2"
    assert sized(2, 2).devices == "host:4"
    assert sized(1, 1, "cuda:0").devices == "cuda:0"


WRONG = [
    (" ; ", "no recipe is given"),
    ("a", "'a' is not of the form"),
    (": tp=2", "is not of the form"),
    ("a: tp", "'tp' is no SETTING=VALUE"),
    ("a: tp=1 tp=2", "'tp=2' is no SETTING=VALUE, or gives a setting again"),
    ("a: tp=0", "0 is less than 1"),
    ("a: color=red", "'color' is no setting that a recipe can have"),
    ("a: port=1", "'port' is no setting that a recipe can have"),
    ("a: served_name='x", "No closing quotation"),
    ("a: devices=host:1 replicas=2", "a: host:1 are 1 of the 2 devices needed"),
    ("a: devices=moon", "'moon' names no devices"),
    ("a: tp=1; a: tp=2", "two recipes are called 'a'"),
]


@pytest.mark.parametrize(("text", "told"), WRONG)
def test_what_is_no_recipe_is_refused(text: str, told: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=told):
        recipes(text)


@pytest.mark.parametrize("given", [("--devices", "host:2"), ("--tp", "2"), ("--replicas", "1")])
def test_a_size_is_a_recipes_own(capsys: pytest.CaptureFixture[str], given: tuple[str, str]) -> None:
    assert main(["bench", "serve", "--recipes", "a: tp=1", *given]) == 2
    assert f"{given[0]}: it has no effect beside --recipes" in capsys.readouterr().err
