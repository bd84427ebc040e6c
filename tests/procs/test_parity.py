"""Real model families through the whole system, token for token against transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from tests.procs.deployment import Deployment

pytestmark = pytest.mark.procs

OUTPUT_TOKENS = 12


def greedy(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates, in float32, without a cache trick: one forward pass per token."""
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    tqdm.monitor_interval = 0  # its watcher is a thread that would outlive the test
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    outputs = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(OUTPUT_TOKENS):
                tokens = torch.cat([tokens, reference(tokens).logits[:, -1:].argmax(-1)], dim=1)
        outputs.append(tokens[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "replicas"), [("tiny-mixtral", 3), ("tiny-qwen3-moe", 4)])
def test_greedy_tokens_equal_transformers(
    name: str, replicas: int, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    rng = random.Random(3)
    # Up to 150 tokens in steps of at most 32: prompts are computed in up to five chunks, mixed with others' decoding.
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 5, 31, 32, 33, 64, 100, 150)]
    deployment = deploy(name, replicas=replicas, max_tokens_per_step=32, max_model_len=256)
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
