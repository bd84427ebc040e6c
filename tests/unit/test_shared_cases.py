"""Checkpoints of `shared/cases`, where a checkout has that folder beside or above it, against transformers' tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elasticmoe.common.families import load_spec
from tests.unit.ranks import Ranks, Stream, generate

ROOT = Path(__file__).parents[2]
PROMPTS = [list(b"The quick brown fox"), list(b"Lorem ipsum dolor sit amet, " * 8)]
NUM_TOKENS = 24


@pytest.fixture
def cases() -> Path:
    for parent in (ROOT, *ROOT.parents):
        if (parent / "shared/cases/check.py").is_file():
            return parent / "shared/cases"
    pytest.skip("no folder shared/cases beside or above this checkout")


@pytest.mark.parametrize(
    "name", ["q5-as-saved", "q5-fused", "q5-renamed", "q5-tied-own-head", "x5-no-theta", "x5-window"]
)
def test_the_tokens_are_those_of_transformers(name: str, cases: Path) -> None:
    blocks = iter(range(64))
    streams = [Stream(prompt, [next(blocks) for _ in range(-(-(len(prompt) + NUM_TOKENS) // 8))]) for prompt in PROMPTS]
    ranks = Ranks(cases / name, 2, block_size=8)
    generate(ranks, [[streams[0]], [streams[1]]], NUM_TOKENS, lambda _: 60)
    wanted = json.loads((cases / name / "ref.json").read_text())
    assert [stream.tokens[-NUM_TOKENS:] for stream in streams] == wanted


def test_yarn_beside_rope_parameters_takes_their_place(cases: Path) -> None:
    config = json.loads((cases / "q5-yarn-both/config.json").read_text())
    rope = load_spec(cases / "q5-yarn-both", "float32").attention.rope
    assert rope.scaling is not None
    assert (rope.scaling.kind, rope.scaling.factor) == ("yarn", config["rope_scaling"]["factor"])
