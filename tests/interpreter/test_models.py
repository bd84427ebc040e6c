"""Whole small models of each kind of attention, in few steps: tests/unit/test_model_parity.py has the many."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from elasticmoe.cli.models import random_checkpoint
from elasticmoe.services.worker.backends.factory import open_backend
from tests.unit.ranks import Ranks, generate
from tests.unit.test_model_parity import CONFIGS, FLOAT32_BOUND, compare, make_streams, reference_of

NUM_TOKENS = 2


@pytest.mark.parametrize("name", ["qwen3", "deepseek3"])
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """In float32, in chunks of several streams, whose bits are those of each alone."""
    directory = random_checkpoint(tmp_path / "model", CONFIGS[name], seed=3, dtype="float32")
    ranks = Ranks(directory, 1, backend=partial(open_backend, "triton"))
    together = make_streams(1, (9, 3), num_tokens=NUM_TOKENS)
    logits = generate(ranks, together, NUM_TOKENS)
    worst, is_greedy = compare(reference_of(directory), together, logits, NUM_TOKENS)
    assert worst < FLOAT32_BOUND
    assert is_greedy
    alone = make_streams(1, (9, 3), num_tokens=NUM_TOKENS)
    del alone[0][1:]
    got = generate(ranks, alone, NUM_TOKENS, lambda _: 9)
    assert alone[0][0].tokens == together[0][0].tokens
    assert torch.equal(got[id(alone[0][0])], logits[id(together[0][0])])


@pytest.mark.parametrize("name", ["olmoe", "deepseek3"])
def test_two_ranks_of_a_replica_compute_what_one_does(name: str, tmp_path: Path) -> None:
    """Norms over all heads of a token, shared experts, and parts of embedding and head: what only replicas compute."""
    directory = random_checkpoint(tmp_path / "model", CONFIGS[name], seed=3, dtype="float32")
    streams = make_streams(1, (5, 1), num_tokens=NUM_TOKENS)
    logits = generate(Ranks(directory, 1, backend=partial(open_backend, "triton"), tp=2), streams, NUM_TOKENS)
    worst, is_greedy = compare(reference_of(directory), streams, logits, NUM_TOKENS)
    assert worst < FLOAT32_BOUND
    assert is_greedy


@pytest.mark.parametrize("name", ["qwen3", "deepseek3"])
def test_a_rank_without_tokens_takes_part(name: str, tmp_path: Path) -> None:
    """It has no position to attend to, and computes rows for its experts."""
    directory = random_checkpoint(tmp_path / "model", CONFIGS[name], seed=3, dtype="float32")
    streams = make_streams(2, (5,), num_tokens=1)
    del streams[1][:]
    logits = generate(Ranks(directory, 2, backend=partial(open_backend, "triton")), streams, 1)
    assert compare(reference_of(directory), streams, logits, 1)[0] < FLOAT32_BOUND
