"""The oracle model in plain Python integers: which tokens must come, computed without any of the project's code.

The definition is in docs/oracle.md. Nothing but the standard library; the checkpoint is read here, in a few lines.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path

BASE = 17
FIRST_PRINTABLE, NUM_PRINTABLE = 32, 95

Row = list[int]


class Oracle:
    """One checkpoint. `embed[token]`, `head`, `salt[layer]` and (mul, add) = `experts[layer][expert]` are rows of H."""

    def __init__(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        self.p: int = config["oracle_modulus"]
        self.hidden: int = config["hidden_size"]
        self.dim: int = config["head_dim"]
        self.layers: int = config["num_hidden_layers"]
        self.num_experts: int = config["num_local_experts"]
        self.top_k: int = config["num_experts_per_tok"]
        tensors = read_integers(directory)
        self.sums_of_experts: dict[tuple[int, ...], tuple[Row, Row]] = {}
        self.embed = split(tensors["model.embed.weight"], self.hidden)
        self.head = tensors["model.head.salt"]
        self.salt = [tensors[f"model.layers.{n}.attn.salt"] for n in range(self.layers)]
        self.experts = [
            [
                (tensors[f"model.layers.{n}.experts.{e}.mul"], tensors[f"model.layers.{n}.experts.{e}.add"])
                for e in range(self.num_experts)
            ]
            for n in range(self.layers)
        ]

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that follow `prompt`."""
        # By layer: the sums over all positions so far of key (and of value) * BASE^(distance), modulo p.
        sums = [([0] * self.dim, [0] * self.dim) for _ in range(self.layers)]
        out: list[int] = []
        tokens = list(prompt)
        position = 0
        while len(out) < count:
            token = self.advance(tokens[position], position, sums)
            position += 1
            if position == len(tokens):
                tokens.append(token)
                out.append(token)
        return out

    def advance(self, token: int, position: int, sums: list[tuple[Row, Row]]) -> int:
        """Take in one token; returns the next one."""
        x = self.embed[token]
        for layer in range(self.layers):
            x = self.attend(layer, x, position, sums[layer])
            x = self.compute_experts(layer, x)
        value = sum(a * b for a, b in zip(x, self.head, strict=True)) % self.p
        vocab = len(self.embed)
        if vocab >= FIRST_PRINTABLE + NUM_PRINTABLE:
            return FIRST_PRINTABLE + value % NUM_PRINTABLE
        return value % vocab

    def attend(self, layer: int, x: Row, position: int, sums: tuple[Row, Row]) -> Row:
        """Add this position's key and value to the sums; mix the sums into x."""
        p, dim, hidden, salt = self.p, self.dim, self.hidden, self.salt[layer]
        keys, values = sums
        for d in range(dim):
            i, j = d % hidden, (d + dim) % hidden
            keys[d] = (keys[d] * BASE + x[i] * salt[i] + position + 1) % p
            values[d] = (values[d] * BASE + x[j] + salt[j] * (position + 1)) % p
        return [(x[i] + keys[i % dim] + values[i % dim] * salt[i]) % p for i in range(hidden)]

    def compute_experts(self, layer: int, x: Row) -> Row:
        """Add the results of the top k experts."""
        p = self.p
        mark = sum(value * (i + 1) for i, value in enumerate(x)) % p
        scores = [(mark * (2 * e + 1) + (e + 1) ** 2 * 7919) % p for e in range(self.num_experts)]
        best = sorted(range(self.num_experts), key=lambda e: (-scores[e], e))[: self.top_k]
        muls, adds = self.sum_of_experts(layer, tuple(best))
        return [(value * (1 + mul) + add) % p for value, mul, add in zip(x, muls, adds, strict=True)]

    def sum_of_experts(self, layer: int, experts: tuple[int, ...]) -> tuple[Row, Row]:
        """Sums of the experts' factors and summands: modulo p it is all one where the remainder is taken."""
        key = (layer, *sorted(experts))
        if key not in self.sums_of_experts:
            pairs = [self.experts[layer][e] for e in experts]
            muls, adds = ([sum(column) for column in zip(*rows, strict=True)] for rows in zip(*pairs, strict=True))
            self.sums_of_experts[key] = muls, adds
        return self.sums_of_experts[key]


def read_integers(directory: Path) -> dict[str, Row]:
    """All tensors of the checkpoint: whole numbers in float32, flat."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                assert entry["dtype"] == "F32", f"{name} is {entry['dtype']}"
                begin, end = entry["data_offsets"]
                values = struct.unpack_from(f"<{(end - begin) // 4}f", data, 8 + length + begin)
                tensors[name] = [int(value) for value in values]
    return tensors


def split(flat: Row, width: int) -> list[Row]:
    """Rows of `width`."""
    return [flat[at : at + width] for at in range(0, len(flat), width)]


@cache
def load(directory: Path) -> Oracle:
    """The oracle of a checkpoint; read once."""
    return Oracle(directory)


def next_tokens(model_dir: Path, prompt_ids: Sequence[int], n: int) -> list[int]:
    """The `n` tokens that the model in `model_dir` must generate after `prompt_ids`."""
    return load(Path(model_dir)).generate(prompt_ids, n)
