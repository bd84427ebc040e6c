"""Zero copy, shown: what ranks hold privately, what is stored how often, what is read from disk, what a kill leaves."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from elasticmoe.cli.doctor import can_collapse
from elasticmoe.cli.models import random_checkpoint
from elasticmoe.cli.status import collect
from elasticmoe.common.families import load_spec, records
from elasticmoe.common.protocol.hmm import GetHmmStatus
from elasticmoe.common.protocol.scaler import HmmStatus
from elasticmoe.native import kernels
from tests.procs.clients import check_against_oracle, closed_loop
from tests.procs.deployment import Deployment
from tests.procs.integrity import ask, check_integrity
from tests.procs.waiting import processes_of, wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow]

MIB = 1 << 20
LARGE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 30,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "vocab_size": 260,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "eos_token_id": 257,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of about 190 MB: much more than what a process holds anyway."""
    return random_checkpoint(
        tmp_path_factory.mktemp("models") / "large", LARGE, seed=1, dtype="bfloat16", shards=3, tokenizer=True
    )


def smaps(pid: int) -> dict[str, dict[str, int]]:
    """Bytes by mapping name and field, summed, from /proc/PID/smaps."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = re.match(r"[0-9a-f]+-[0-9a-f]+ (\S+) \S+ \S+ \S+\s*(.*)", line)
        if head:
            name = head[2] or "anonymous"
            found.setdefault(name, {}).setdefault(f"perms {head[1]}", 1)
            continue
        fact = re.match(r"(\w+):\s+(\d+) kB", line)
        if fact:
            found[name][fact[1]] = found[name].get(fact[1], 0) + int(fact[2]) * 1024
    return found


def weight_lines(pid: int) -> list[str]:
    """Lines of /proc/PID/maps: parts of files that hold weights."""
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "weights" in line]


def private_bytes(maps: dict[str, dict[str, int]]) -> int:
    """Memory that belongs to no file: the process's own, and what it shares with the process it was forked from."""
    return sum(fields.get("Anonymous", 0) for fields in maps.values())


def check_large_pages(deployment: Deployment) -> None:
    """What is told to lie in large pages does, by the kernel's count of what the HMM has mapped."""

    lines = r"large pages\s.*\bbytes=(\d+) bytes_refused=(\d+)"

    def told() -> list[int]:
        return [device["large_pages"] for device in deployment.admin("/v1/devices")["devices"]]

    def is_told() -> bool:
        """The scaler tells what it last heard: it asks the HMM again within a second."""
        made = re.findall(lines, deployment.log("hmm"))
        return bool(made) and sum(told()) == int(made[-1][0])

    wait_until(is_told, "all have been tried, and the scaler tells what was made")
    _, refused = re.findall(lines, deployment.log("hmm"))[-1]
    each = told()
    large = sum(each)
    if can_collapse() and refused == "0":
        assert all(nbytes > 40 * MIB for nbytes in each), each
    by_kernel = sum(fields.get("ShmemPmdMapped", 0) for fields in smaps(deployment.pids["hmm"]).values())
    assert large <= by_kernel
    key = {"Authorization": f"Bearer {deployment.token}"}
    metrics = httpx.get(f"{deployment.admin_url}/metrics", headers=key, timeout=60, trust_env=False).text
    figures = re.findall(r"^elasticmoe:device_large_page_bytes\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert sum(map(float, figures)) == large

    def is_mapped_told() -> bool:
        """Ranks may touch more between two looks."""
        ranks = collect(deployment.run_dir)["layout"].get("ranks", ())  # none where the scaler answers late
        by_kernel = [sum(each.get("ShmemPmdMapped", 0) for each in smaps(rank["pid"]).values()) for rank in ranks]
        return bool(ranks) and [rank["mapped_large"] for rank in ranks] == by_kernel

    wait_until(is_mapped_told, "`status` tells what ranks have mapped large")
    (by,) = deployment.admin("/v1/layout")["computes_by"]
    assert by.startswith(f"host {kernels.instruction_sets()[0]}, ")


def answered(deployment: Deployment, model: str) -> Any:
    """What it makes of a prompt of more than one block: tokens and their log probabilities."""
    body = {"model": model, "prompt": list(range(100)), "max_tokens": 40, "ignore_eos": True, "logprobs": 3}
    url = f"{deployment.base_url}/v1/completions"
    answer = httpx.post(url, json=body | {"temperature": 0}, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def standby_pids(deployment: Deployment) -> set[int]:
    """The pool's processes that have no seat: forked from the same one as the ranks, which is among them."""
    commands = processes_of(deployment.run_dir)
    forked = {pid for pid, command in commands.items() if "elasticmoe.services.worker.pool.template" in command}
    return forked - set(deployment.rank_pids().values())


def memory_files(pid: int) -> dict[str, Path]:
    """The memfds that a process has open, by name: paths under /proc that read their content."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue  # closed meanwhile
        if target.startswith("/memfd:"):
            found[target.removeprefix("/memfd:").removesuffix(" (deleted)")] = entry
    return found


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def test_ranks_hold_no_private_copy_and_experts_exist_once(large: Path) -> None:
    deployment = Deployment(large, replicas=3, dtype="bfloat16", kv_bytes=8 * MIB, device_bytes=400 * MIB).wait_ready()
    try:
        before = answered(deployment, large.name)
        spec = load_spec(large, "bfloat16")
        experts = sum(r.nbytes for r in records(spec) if r.key.kind == "expert")
        others = sum(r.nbytes for r in records(spec) if r.key.kind != "expert")
        status = ask(deployment, "hmm", GetHmmStatus())
        assert isinstance(status, HmmStatus)
        stored = sum(device.weights for device in status.devices)
        # Each expert once, everything else once per replica; padding of records to pages is below 1 %.
        assert experts + 3 * others <= stored <= 1.01 * (experts + 3 * others)
        real = sum(
            os.stat(path).st_blocks * 512
            for name, path in memory_files(deployment.pids["hmm"]).items()
            if "weights" in name
        )
        assert real == stored
        files = memory_files(deployment.pids["hmm"])
        inodes = {os.stat(path).st_ino for name, path in files.items() if "weights" in name}
        standby = min(private_bytes(smaps(pid)) for pid in standby_pids(deployment))
        for name, pid in deployment.rank_pids().items():
            maps = smaps(pid)
            weights = {key: value for key, value in maps.items() if "weights" in key}
            assert weights, f"{name} maps no weights: {sorted(maps)}"
            for fields in weights.values():
                assert "perms r--s" in fields
                assert fields["Anonymous"] == 0
            # Its pages are those of the HMM's own files: what is dirty there the HMM has written.
            assert {int(line.split()[4]) for line in weight_lines(pid)} <= inodes
            # What it has beyond a standby: buffers of a step. A copy of its third of the experts would be 60 MiB more.
            assert private_bytes(maps) - standby < 40 * MIB, f"{name} holds {private_bytes(maps)}, a standby {standby}"
        assert deployment.admin("/v1/layout")["ranks"][0]["experts"] == 4 * 10
        check_large_pages(deployment)
        assert answered(deployment, large.name) == before
    finally:
        deployment.stop()
    small = Deployment(
        large, replicas=2, dtype="bfloat16", kv_bytes=8 * MIB, device_bytes=400 * MIB, large_pages=False
    ).wait_ready()
    try:
        assert answered(small, large.name) == before
        assert all(device["large_pages"] == 0 for device in small.admin("/v1/devices")["devices"])
    finally:
        small.stop()


def test_loading_reads_each_byte_once_and_peaks_below_checkpoint_plus_15_percent(large: Path) -> None:
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    deployment = Deployment(
        large, replicas=1, dtype="bfloat16", kv_bytes=2 * MIB, device_bytes=400 * MIB, max_model_len=256
    ).wait_ready()
    try:
        pid = deployment.pids["hmm"]
        io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        # rchar counts everything that read() returned, Python's own start included.
        assert size <= int(io["rchar"]) < size + 16 * MIB
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) * 1024
        base = 64 * MIB  # an HMM that has loaded nothing: interpreter, numpy, zmq
        assert peak - base <= 1.15 * size, f"peak {peak / MIB:.0f} MiB for {size / MIB:.0f} MiB"
    finally:
        deployment.stop()


async def test_kill_of_a_rank_leaves_weights_and_kv_and_a_standby_maps_them(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=2)
    streams = await closed_loop(deployment.base_url, clients=4, requests=12, seed=1)
    check_against_oracle(streams, model_folder("oracle"))
    before = check_integrity(deployment, checksums=True)
    files = memory_files(deployment.pids["hmm"])
    kv = {name: digest(path) for name, path in files.items() if name.endswith(".kv")}
    assert len(kv) == 2
    ranks = deployment.rank_pids()
    deployment.kill("r0t0")
    wait_until(lambda: deployment.rank_pids().get("r0t0") not in (None, ranks["r0t0"]), "a standby took the seat")
    assert check_integrity(deployment, checksums=True) == before
    assert {name: digest(path) for name, path in files.items() if name.endswith(".kv")} == kv
    assert deployment.rank_pids()["r1t0"] == ranks["r1t0"]
    deployment.wait_serving()
    again = await closed_loop(deployment.base_url, clients=8, requests=24, seed=2)
    assert check_against_oracle(again, model_folder("oracle")) > 200


async def test_kill_of_the_hmm_leaves_ranks_serving_and_the_catalog_comes_back(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=2)
    before = check_integrity(deployment, checksums=True)
    ranks = deployment.rank_pids()
    pid = deployment.kill("hmm")
    during = await closed_loop(deployment.base_url, clients=8, requests=40, seed=3)
    assert check_against_oracle(during, model_folder("oracle")) > 300
    deployment.wait_restarted("hmm", pid)
    wait_until(lambda: deployment.log("hmm").count("resumed=True") == 2, "both ranks introduced themselves")
    deployment.wait_serving()
    assert check_integrity(deployment, checksums=True) == before
    assert deployment.rank_pids() == ranks
    assert deployment.log("hmm").count("load done") == 1
    # The new HMM watches the old ranks: it notices when one dies.
    deployment.kill("r1t0")
    wait_until(lambda: deployment.rank_pids().get("r1t0") not in (None, ranks["r1t0"]), "a standby took the seat")
    again = await closed_loop(deployment.base_url, clients=4, requests=8, seed=4)
    check_against_oracle(again, model_folder("oracle"))
