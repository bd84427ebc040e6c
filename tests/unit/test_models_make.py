"""The model maker: its files, what transformers makes of them, and that failures leave nothing behind."""

import hashlib
import json
import shutil
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from elasticmoe.cli.models import __main__ as command
from elasticmoe.cli.models import (
    checkpoint,
    configs,
    make_model,
    model_names,
    random_checkpoint,
)
from elasticmoe.cli.models.oracle import ORACLE_CONFIG
from elasticmoe.cli.models.random_weights import random_plans
from elasticmoe.common.families import FAMILIES, ORACLE, load_spec

BYTE_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def load_weights(directory: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def load_with_transformers(directory: Path) -> Any:
    """The model that transformers builds from `directory`, after a check that every tensor found its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    return model.eval()


def assert_nothing_left(parent: Path) -> None:
    assert list(parent.iterdir()) == []


# --- random checkpoints ---------------------------------------------------------------------------------------------


TINY = [name for name in model_names() if name.startswith("tiny-")]
# Of the checkpoints that other tests' expectations and people's benchmarks were made with.
SHA256 = {
    "tiny-mixtral": "73319527f3ab91bb46b198974ffe0abcf86eefc9b798b66420c585f75dc1b7ef",
    "tiny-qwen3-moe": "e76ced1c6ddd44f6f8f54c0654e2cdb4dbaec64792708b85889ca3ba21251b09",
}


@pytest.mark.parametrize("name", SHA256)
def test_a_name_and_a_seed_give_the_same_weights_in_every_version(name: str, tmp_path: Path) -> None:
    weights = make_model(name, tmp_path / "model") / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == SHA256[name]


def test_there_is_a_tiny_model_of_every_family(tmp_path: Path) -> None:
    made = {load_spec(make_model(name, tmp_path / name), "float32").family for name in TINY}
    assert made | {ORACLE.name} == set(FAMILIES)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_complete_and_transformers_loads_them(name: str, tmp_path: Path) -> None:
    directory = make_model(name, tmp_path / "model")
    assert {file.name for file in directory.iterdir()} == BYTE_FILES | {"model.safetensors"}
    model = load_with_transformers(directory)
    with torch.no_grad():
        logits = model(torch.arange(64).reshape(2, 32)).logits
    assert torch.isfinite(logits).all()
    # Well spread: a greedy choice is decided by more than rounding.
    assert 0.8 < logits.std() < 1.25
    best, second = logits.topk(2).values.unbind(-1)
    assert (best - second).median() > 0.1


VARIANTS = {
    "mixtral-default-head-dim-tied": configs.TINY_MIXTRAL | {"head_dim": None, "tie_word_embeddings": True},
    "qwen3-biases-tied": configs.TINY_QWEN3_MOE | {"attention_bias": True, "tie_word_embeddings": True},
    "qwen3-dense-layers": configs.TINY_QWEN3_MOE | {"mlp_only_layers": [0]},
    "qwen3-every-other-layer-sparse": configs.TINY_QWEN3_MOE | {"decoder_sparse_step": 2, "num_hidden_layers": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_every_variant_of_a_family(variant: str, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "model", VARIANTS[variant], seed=1, dtype="float32", shards=3)
    load_with_transformers(tmp_path / "model")


def test_values_depend_on_the_seed_and_not_on_the_shards(tmp_path: Path) -> None:
    config = configs.TINY_MIXTRAL
    for directory, seed, shards in (("one", 5, 1), ("four", 5, 4), ("other", 6, 1)):
        random_checkpoint(tmp_path / directory, config, seed=seed, dtype="float32", shards=shards)
    one, four, other = (load_weights(tmp_path / name) for name in ("one", "four", "other"))
    assert one.keys() == four.keys() == other.keys()
    assert all(torch.equal(one[name], four[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_shards_are_even_and_the_index_lists_every_tensor(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "model", configs.TINY_QWEN3_MOE, seed=0, dtype="bfloat16", shards=4)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{index}-of-00004.safetensors" for index in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    nbytes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(nbytes)
    assert max(nbytes) < 1.3 * min(nbytes)


def test_more_shards_than_tensors_leaves_no_empty_shard(tmp_path: Path) -> None:
    config = configs.TINY_MIXTRAL | {"num_hidden_layers": 1, "num_local_experts": 1, "num_experts_per_tok": 1}
    random_checkpoint(tmp_path / "model", config, seed=0, dtype="float32", shards=1000)
    files = list((tmp_path / "model").glob("*.safetensors"))
    assert 1 < len(files) <= len(random_plans(config, 0))
    assert all(load_file(file) for file in files)


def test_weights_files_may_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    directory = make_model("oracle", tmp_path / "model")
    assert len({file.stat().st_mode for file in directory.iterdir()}) == 1


def test_dtype_replaces_the_models_own(tmp_path: Path) -> None:
    make_model("tiny-mixtral", tmp_path / "model", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_weights(tmp_path / "model").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_progress_counts_up_to_the_bytes_of_all_tensors(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    make_model("tiny-mixtral", tmp_path / "model", progress=lambda done, total: calls.append((done, total)))
    nbytes = sum(tensor.nbytes for tensor in load_weights(tmp_path / "model").values())
    assert {total for _, total in calls} == {nbytes}
    assert calls == sorted(set(calls))
    assert calls[-1] == (nbytes, nbytes)


def test_the_cut_model_has_the_widths_of_deepseek_v2_lite_and_less_than_4_gb() -> None:
    plans = random_plans(configs.DEEPSEEK_V2_LITE_CUT, 0)
    nbytes = 2 * sum(plan.numel for plan in plans)
    assert 3.4e9 < nbytes < 3.6e9
    assert checkpoint.num_shards_for(plans, torch.bfloat16) == 8
    shapes = {plan.name.removeprefix("model.layers.5."): plan.shape for plan in plans}
    assert shapes["self_attn.q_proj.weight"] == (16 * 192, 2048)
    assert shapes["self_attn.kv_a_proj_with_mqa.weight"] == (576, 2048)
    assert shapes["self_attn.kv_b_proj.weight"] == (16 * 256, 512)
    assert shapes["mlp.experts.31.down_proj.weight"] == (2048, 1408)
    assert shapes["mlp.shared_experts.up_proj.weight"] == (2816, 2048)


def test_what_a_family_stores_fused_is_written_fused(tmp_path: Path) -> None:
    weights = load_weights(make_model("tiny-granitemoe", tmp_path / "model"))
    config = configs.TINY_GRANITEMOE
    hidden, width, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    at = "model.layers.2.block_sparse_moe."
    assert weights[at + "input_linear.weight"].shape == (experts, 2 * width, hidden)
    assert weights[at + "output_linear.weight"].shape == (experts, hidden, width)
    assert weights[at + "router.layer.weight"].shape == (experts, hidden)
    assert 0.9 < weights[at + "output_linear.weight"].std() * width**0.5 < 1.1


def test_the_large_random_model_has_about_a_billion_weights_in_five_shards() -> None:
    plans = random_plans(configs.QWEN3_MOE_1B, 0)
    assert sum(plan.numel for plan in plans) == 1_036_808_192
    assert checkpoint.num_shards_for(plans, torch.bfloat16) == 5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "llama"}, "'llama' is not supported; supported: mixtral"),
        ({"model_type": None}, "None is not supported"),
        ({"model_type": "oracle_moe"} | ORACLE_CONFIG, "whole numbers, which `make_oracle` writes"),
        ({"hidden_size": None}, "hidden_size .* is None"),
        ({"num_local_experts": 0}, "num_local_experts .* is 0"),
        ({"num_local_experts": True}, "num_local_experts .* is True"),
        ({"num_experts_per_tok": 8}, "top-k 8 exceeds the 7 experts"),
        ({"num_key_value_heads": 4}, "6 heads are no multiple of 4"),
        ({"head_dim": 15}, "head_dim must be even .* is 15"),
    ],
)
def test_a_bad_config_is_refused_before_anything_is_written(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        random_checkpoint(tmp_path / "a/model", configs.TINY_MIXTRAL | change, seed=0, dtype="float32")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"seed": -1, "dtype": "float32"}, "seed must not be negative, got -1"),
        ({"seed": 0, "dtype": "float16"}, "'float16' is not supported; known: bfloat16, float32"),
        ({"seed": 0, "dtype": "float32", "shards": 0}, "shards must be at least 1, got 0"),
    ],
)
def test_a_bad_argument_is_refused(arguments: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        random_checkpoint(tmp_path / "model", configs.TINY_MIXTRAL, **arguments)
    assert_nothing_left(tmp_path)


# --- the oracle model -----------------------------------------------------------------------------------------------


def test_the_oracle_holds_whole_numbers_below_its_modulus(tmp_path: Path) -> None:
    directory = make_model("oracle", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["OracleMoeForCausalLM"], "oracle_moe")
    weights = load_weights(directory)
    shapes = {"model.embed.weight": (config["vocab_size"], config["hidden_size"])}
    vectors = ["model.head.salt"]
    for layer in range(config["num_hidden_layers"]):
        vectors.append(f"model.layers.{layer}.attn.salt")
        for expert in range(config["num_local_experts"]):
            vectors += [f"model.layers.{layer}.experts.{expert}.{part}" for part in ("mul", "add")]
    shapes |= dict.fromkeys(vectors, (config["hidden_size"],))
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    for tensor in weights.values():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensor.round())
        assert 1 <= tensor.min() <= tensor.max() < config["oracle_modulus"]
    assert len({tuple(tensor.flatten().tolist()) for tensor in weights.values()}) == len(weights)


def test_the_oracle_refuses_a_dtype_that_would_round(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only float32 keeps exact, got dtype 'bfloat16'"):
        make_model("oracle", tmp_path / "model", dtype="bfloat16")


# --- all or nothing -------------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown model 'gpt-5'; known: " + ", ".join(model_names())):
        make_model("gpt-5", tmp_path / "model")
    assert_nothing_left(tmp_path)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    make_model("oracle", tmp_path / "model")
    assert (tmp_path / "model/config.json").is_file()


def test_a_folder_that_is_not_empty_and_a_file_are_left_alone(tmp_path: Path) -> None:
    note = tmp_path / "full/note.txt"
    note.parent.mkdir()
    note.write_text("mine")
    with pytest.raises(ValueError, match="full is not empty"):
        make_model("oracle", note.parent)
    with pytest.raises(ValueError, match=r"note\.txt is a file"):
        make_model("oracle", note)
    assert note.read_text() == "mine"
    assert sorted(tmp_path.rglob("*")) == [note.parent, note]


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(ValueError, match="is a mount point"):
        make_model("oracle", tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_halfway_leaves_nothing_behind(error: BaseException, tmp_path: Path) -> None:
    def fail_late(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises(type(error)):
        make_model("tiny-mixtral", tmp_path / "new/parents/model", progress=fail_late)
    assert_nothing_left(tmp_path)


def test_a_folder_that_fills_up_in_the_meantime_is_kept(tmp_path: Path) -> None:
    def interfere(done: int, total: int) -> None:
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model/note.txt").write_text("mine")

    with pytest.raises(ValueError, match="was filled while its files were written"):
        make_model("oracle", tmp_path / "model", progress=interfere)
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["note.txt"]
    assert len(list(tmp_path.iterdir())) == 1


def test_too_little_disk_space_is_told_with_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"2,0\d\d,\d{3},\d{3} bytes are needed, 1,000 are free"):
        make_model("qwen3-moe-1b", tmp_path / "model")
    assert_nothing_left(tmp_path)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    plan = checkpoint.TensorPlan("same", (1,), lambda: torch.zeros(1))
    with pytest.raises(ValueError, match="same name"):
        checkpoint.write_weights(tmp_path, [plan, plan], torch.float32, shards=1)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_makes_a_model_and_reports_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["oracle", str(tmp_path / "model"), "--seed", "3"]) == 0
    assert " MB in " in capsys.readouterr().out
    assert command.main(["oracle", str(tmp_path / "model")]) == 1
    assert "is not empty" in capsys.readouterr().err
