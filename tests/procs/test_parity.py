"""Real model families through the whole system, token for token against transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from elasticmoe.cli.models import random_checkpoint
from elasticmoe.cli.models.byte_tokenizer import write_byte_tokenizer
from tests.procs.deployment import Deployment
from tests.procs.greedy import OUTPUT_TOKENS, greedy
from tests.unit import forms
from tests.unit.quantized import dequantized_copy, quantized_copy

pytestmark = [pytest.mark.procs, pytest.mark.timeout(300)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "replicas", "compute"),
    [
        pytest.param("tiny-mixtral", 3, "auto", marks=pytest.mark.slow),
        ("tiny-qwen3-moe", 4, "auto"),
        pytest.param("tiny-qwen3-moe", 2, "torch", marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_equal_transformers(
    name: str, replicas: int, compute: str, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    rng = random.Random(3)
    # Up to 150 tokens in steps of at most 32: prompts are computed in up to five chunks, mixed with others' decoding.
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 5, 31, 32, 33, 64, 100, 150)]
    deployment = deploy(name, replicas=replicas, max_tokens_per_step=32, max_model_len=256, compute=compute)
    with httpx.Client(base_url=deployment.base_url, timeout=60, trust_env=False) as client:
        answer = client.post(
            "/v1/completions",
            json={
                "model": name,
                "prompt": prompts,
                "max_tokens": OUTPUT_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
            },
        )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == OUTPUT_TOKENS * len(prompts)
    report = deployment.stop()
    served = sorted(request.tokens for request in report.requests.values())
    assert served == sorted(greedy(model_folder(name), prompts))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_checkpoint_with_all_oddities_is_served_and_told_of_once(tmp_path: Path) -> None:
    """Fused experts, keys left out or spelled as transformers 5 does, a tied head that differs, a window that limits
    sequences, an index and tensors that are of no use: also after ranks have come in, and read their experts."""
    config = {"num_local_experts": 16, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 160}
    tensors = forms.fused("qwen3")(forms.base_tensors(tmp_path / "base", "qwen3"))
    tensors = forms.beside(lm_head__bias=(260,))(tensors)
    dropped = {"num_experts", "architectures", "rope_theta", "rms_norm_eps", "num_experts_per_tok"}
    model = forms.write(tmp_path / "odd", "qwen3", tensors, drop=dropped, config=config, shards=2)
    forms.change_index(model, lambda weight_map: weight_map.pop("model.norm.weight"))
    write_byte_tokenizer(model)
    rng = random.Random(4)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (3, 40, 140)]
    body = {"prompt": prompts, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    deployment = Deployment(model, replicas=2, devices=3, max_model_len=512)
    try:
        deployment.wait_ready()
        with httpx.Client(base_url=deployment.base_url, timeout=60, trust_env=False) as client:
            assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 160
            assert client.post("/v1/completions", json={"model": "odd", **body}).status_code == 200
            deployment.scale(replicas=3)
            assert client.post("/v1/completions", json={"model": "odd", **body}).status_code == 200
        output, log = deployment.output(), deployment.log("hmm")
        report = deployment.stop()
    finally:
        deployment.discard()
    (told,) = (line for line in output.splitlines() if line.startswith("warning: "))
    (warned,) = (line for line in log.splitlines() if " W " in line and "checkpoint: " in line)
    for part in ("kept apart", "'model.norm.weight'", "'lm_head.bias'"):
        assert part in told
        assert part in warned
    assert "160 tokens of the model's sliding window" in told
    assert sorted(request.tokens for request in report.requests.values()) == sorted(greedy(model, prompts) * 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_checkpoint_in_fp8_is_served_as_its_dequantized_copy(tmp_path: Path) -> None:
    """With blocks of 128 x 128 of which the last are cut off; also when a rank has come in and read its experts."""
    sizes = {"hidden_size": 160, "moe_intermediate_size": 136, "intermediate_size": 264, "num_experts": 9}
    config = forms.QWEN3 | sizes | {"head_dim": 32}
    source = random_checkpoint(tmp_path / "source", config, seed=6, dtype="bfloat16", shards=2, tokenizer=True)
    model = quantized_copy(source, tmp_path / "fp8")
    rng = random.Random(5)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 33, 100)]
    body = {"model": "fp8", "prompt": prompts, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    deployment = Deployment(model, replicas=2, devices=3, max_model_len=256)
    try:
        deployment.wait_ready()
        with httpx.Client(base_url=deployment.base_url, timeout=60, trust_env=False) as client:
            assert client.post("/v1/completions", json=body).status_code == 200
            deployment.scale(replicas=3)
            assert client.post("/v1/completions", json=body).status_code == 200
        output = deployment.output()
        report = deployment.stop()
    finally:
        deployment.discard()
    assert "warning" not in output
    wanted = greedy(dequantized_copy(model, tmp_path / "plain"), prompts)
    assert sorted(request.tokens for request in report.requests.values()) == sorted(wanted * 2)
