"""docs/models.md tells how to add a family: its example is taken as it is, served, and compared with transformers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from elasticmoe.cli.models import random_checkpoint
from elasticmoe.common import families
from elasticmoe.common.families import parse_spec, unread_names
from elasticmoe.common.families.family import Family
from tests.markdown import ROOT, blocks_of
from tests.unit.backends import ON_CPU
from tests.unit.ranks import Ranks, Stream, generate

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "architectures": ["Dots1ForCausalLM"],
    "model_type": "dots1",
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "n_routed_experts": 9,
    "n_shared_experts": 1,
    "n_group": 3,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
    "vocab_size": 260,
    "max_position_embeddings": 256,
}
NUM_TOKENS = 6
MODULE = "family_of_the_page"


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Family:
    """The family of the page's Python block, in its place beside the others."""
    (block,) = (block for block in blocks_of(ROOT / "docs/models.md") if block.language == "python")
    (tmp_path / f"{MODULE}.py").write_text(block.text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    family: Family = importlib.import_module(MODULE).DOTS1
    monkeypatch.setitem(families.FAMILIES, family.name, family)
    monkeypatch.setitem(families._BY_MODEL_TYPE, family.model_type, family)
    monkeypatch.setitem(families._BY_ARCHITECTURE, family.architecture, family)
    return family


def test_the_recipes_family_has_the_keys_and_defaults_of_its_class(added: Family) -> None:
    fields = {field: getattr(transformers.Dots1Config(), field) for field in added.keys if field != "head_dim"}
    assert {key: added.keys[key].default for key in fields if key not in ("layer_types", "rope_parameters")} == {
        key: value for key, value in fields.items() if key not in ("layer_types", "rope_parameters")
    }
    assert parse_spec(TINY | {"sliding_window": 100, "max_window_layers": 1}, "float32").max_positions == 100
    assert unread_names(json.loads(transformers.Dots1Config().to_json_string(use_diff=False))) == []


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_recipes_family_computes_what_transformers_computes(added: Family, backend: str, tmp_path: Path) -> None:
    directory = random_checkpoint(tmp_path / "model", TINY, seed=2, dtype="float32")
    ranks = Ranks(directory, 2, backend=ON_CPU[backend])
    assert ranks.spec.family == added.name
    streams = [[Stream(list(range(10, 30)), range(8))], [Stream(list(range(90, 99)), range(8))]]
    logits = generate(ranks, streams, NUM_TOKENS)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for (stream,) in streams:
        with torch.no_grad():
            want = reference(torch.tensor([stream.tokens[:-1]])).logits[0]
        assert float((want - logits[id(stream)]).abs().max()) < 1e-4
        assert stream.tokens[-NUM_TOKENS:] == want.argmax(-1)[-NUM_TOKENS:].tolist()
