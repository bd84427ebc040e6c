"""Every family through the whole system: a stream crosses growth, a kill, a shrink and a shortage of KV, and equals the
undisturbed one."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from elasticmoe.cli.models import configs, random_checkpoint
from elasticmoe.common.families import load_spec
from tests.procs.clients import stream_completion
from tests.procs.deployment import Deployment
from tests.procs.integrity import check_integrity
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow]

BLOCK_SIZE = 16
TRIES = 3
OUTPUT_TOKENS = {"host": 4_000, "torch": 1_500}  # so many that they still come when all has happened
OUTPUT_TOKENS_OF_TWO = 900  # the same, of replicas of two ranks
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": configs.TINY_MIXTRAL,
    "qwen2_moe": configs.TINY_QWEN2_MOE,
    "qwen3_moe": configs.TINY_QWEN3_MOE,
    "olmoe": configs.TINY_OLMOE,
    "granitemoe": configs.TINY_GRANITEMOE,
    "glm4_moe": configs.TINY_GLM4_MOE,
    # With latents so wide that a handle of KV holds few tokens.
    "glm4_moe_lite": configs.TINY_GLM4_MOE_LITE | {"kv_lora_rank": 90},
    "deepseek_v2": configs.TINY_DEEPSEEK_V2 | {"kv_lora_rank": 90},
    "deepseek_v3": configs.TINY_DEEPSEEK_V3 | {"kv_lora_rank": 90},
}
# With heads that two ranks divide, and KV so wide that a handle holds 512 tokens.
OF_TWO: dict[str, dict[str, Any]] = {
    "mixtral": CONFIGS["mixtral"] | {"head_dim": 192},
    "qwen2_moe": CONFIGS["qwen2_moe"] | {"num_key_value_heads": 2, "hidden_size": 1152},
    "qwen3_moe": CONFIGS["qwen3_moe"] | {"num_key_value_heads": 2, "head_dim": 192},
    "olmoe": CONFIGS["olmoe"] | {"hidden_size": 1152},
    "granitemoe": CONFIGS["granitemoe"] | {"hidden_size": 1152},
    "glm4_moe": CONFIGS["glm4_moe"] | {"head_dim": 192},
    "glm4_moe_lite": CONFIGS["glm4_moe_lite"]
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 376},
    "deepseek_v2": CONFIGS["deepseek_v2"] | {"kv_lora_rank": 376},
    "deepseek_v3": CONFIGS["deepseek_v3"] | {"kv_lora_rank": 376},
}
FEW = ("qwen3_moe", "deepseek_v2")  # KV that is cut by heads, latents that each rank has whole


def kill_one(deployment: Deployment, rng: random.Random, index: int) -> None:
    """kill -9 of a rank with that tp index, and wait until another has taken its seat."""
    victim = rng.choice([pid for name, pid in deployment.rank_pids().items() if name.endswith(f"t{index}")])
    os.kill(victim, signal.SIGKILL)

    def is_replaced() -> bool:
        layout = deployment.admin("/v1/layout")
        pids = {rank["pid"] for rank in layout["ranks"] if rank["ready"]}
        return layout["phase"] == "serving" and len(pids) == len(layout["ranks"]) and victim not in pids

    wait_until(is_replaced, "a rank replaced", 30.0)


@pytest.mark.timeout(400)  # 20 s on idle cores
@pytest.mark.parametrize(
    ("name", "compute", "tp"),
    [
        *((name, "host", 1) for name in CONFIGS),
        ("qwen3_moe", "torch", 1),
        ("deepseek_v2", "torch", 1),
        *(pytest.param(name, "host", 2, marks=() if name in FEW else pytest.mark.soak) for name in OF_TWO),
    ],
)
async def test_a_stream_across_all_that_happens_equals_the_undisturbed_one(
    name: str, compute: str, tp: int, tmp_path: Path
) -> None:
    rng = random.Random(name)
    config = CONFIGS[name] if tp == 1 else OF_TWO[name]
    model = random_checkpoint(tmp_path / "model", config, seed=8, dtype="float32", tokenizer=True)
    output = OUTPUT_TOKENS[compute] if tp == 1 else OUTPUT_TOKENS_OF_TWO
    kv_tokens = output * 3 // 2  # of one device
    kv_bytes = kv_tokens // BLOCK_SIZE * load_spec(model, "float32", tp).kv_block_bytes(BLOCK_SIZE)
    settings: dict[str, Any] = {
        "kv_bytes": kv_bytes * 104 // 100,
        "max_model_len": output + 96,
        "standbys": 2 * tp,
        "compute": compute,
        "tp": tp,
    }
    deployment = Deployment(model, replicas=2, devices=3 * tp, block_size=BLOCK_SIZE, **settings)
    prompts = [[rng.randrange(256) for _ in range(40)] for _ in range(2)]
    begun = asyncio.Event()
    try:
        deployment.wait_ready()
        async with httpx.AsyncClient(base_url=deployment.base_url, timeout=120, trust_env=False) as http:

            async def stream(prompt: list[int]) -> str:
                result = await stream_completion(http, "model", prompt, output, on_chunk=begun.set)
                assert (result.error, result.finish) == (None, "length")
                return result.text

            for _ in range(TRIES):
                streams = [asyncio.create_task(stream(prompt)) for prompt in prompts]
                await begun.wait()
                assert (await asyncio.to_thread(deployment.scale, replicas=3))["phase"] == "done"
                for index in range(tp):
                    await asyncio.to_thread(kill_one, deployment, rng, index)
                assert (await asyncio.to_thread(deployment.scale, replicas=1))["phase"] == "done"
                if not any(task.done() for task in streams):
                    break
                await asyncio.gather(*streams)  # a busy machine: they ended before all had happened
                assert (await asyncio.to_thread(deployment.scale, replicas=2))["phase"] == "done"
                begun.clear()
            assert not any(task.done() for task in streams), "the streams ended before all had happened, every time"
            assert deployment.metric("elasticmoe:moved_requests_total") > 0
            ranks = (await asyncio.to_thread(deployment.admin, "/v1/layout"))["ranks"]
            # Both are on this replica now, which must preempt one before they end: they do not fit together.
            assert len(ranks) == tp
            assert all(rank["kv_blocks"] * BLOCK_SIZE < 2 * output for rank in ranks)
            disturbed = await asyncio.gather(*streams)
            await asyncio.to_thread(check_integrity, deployment)
            assert (await asyncio.to_thread(deployment.scale, replicas=2))["phase"] == "done"
            assert await asyncio.gather(*(stream(prompt) for prompt in prompts)) == disturbed
        assert deployment.stop().count("error") == 0
    finally:
        deployment.discard()
