"""What transformers makes of a checkpoint, for tests of whole deployments."""

from __future__ import annotations

from pathlib import Path

import torch

OUTPUT_TOKENS = 12


def greedy(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates, in float32, without a cache trick: one forward pass per token."""
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    tqdm.monitor_interval = 0  # its watcher is a thread that would outlive the test
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    outputs = []
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would meet after each small operation, and wait there for cores that are taken
    try:
        for prompt in prompts:
            tokens = torch.tensor([prompt])
            with torch.no_grad():
                for _ in range(OUTPUT_TOKENS):
                    tokens = torch.cat([tokens, reference(tokens).logits[:, -1:].argmax(-1)], dim=1)
            outputs.append(tokens[0, len(prompt) :].tolist())
    finally:
        torch.set_num_threads(num_threads)
    return outputs
