"""What bodies and answers of the admin surface look like, for its OpenAPI document: a growth to three replicas."""

from __future__ import annotations

from typing import Any

import msgspec

from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.demand import Demand
from elasticmoe.services.scaler.policy.saturation import Saturation
from elasticmoe.services.scaler.policy.state import Evidence

_MEMORY = {
    "budget": 6086742016,
    "weights": 747360256,
    "kv": 267386880,
    "other": 1613824,
    "free": 5070381056,
    "total": None,
}
_DEVICE = {
    "experts_in": 60,
    "bytes_in": 159252480,
    "experts_before": 0,
    "experts_after": 60,
    "kv_handles_after": 182,
    "peak_bytes": 1014373376,
}
_PLANNED = {
    "epoch_before": 1,
    "epoch_after": 3,
    "replicas_before": 2,
    "replicas_after": 3,
    "joining": ["r2t0"],
    "leaving": [],
    "experts_moved": 60,
    "bytes_copied": 428867584,
    "peak_bytes": 3049242624,
    "bytes_before": 2040528896,
    "bytes_after": 3049242624,
    "seconds": 3.41,
    "pause_ms": 60.0,
    "devices": {"host:2": _DEVICE},
}
_REQUEST = {
    "replicas": 3,
    "devices": None,
    "remove": None,
    "reason": "more traffic",
    "deadline_s": 600.0,
    "is_lost": False,
}
_OPERATION = {
    "op_id": "grow-monday",
    "kind": "scale_up",
    "phase": "prepare",
    "outcome": None,
    "reason": "the HMM copies",
    "leg": 2,
    "legs": 2,
    "attempt": 1,
    "request": _REQUEST,
    "by": "operator",
    "accepted_unix": 1795668293.2,
    "deadline_s": 600.0,
    "elapsed_s": 1.31,
    "is_late": False,
    "is_cancelled": False,
    "timings": [{"leg": 0, "phase": "prepare", "seconds": 0.41}],
    "progress": {"hmm_phase": "copying", "bytes_done": 104857600, "bytes_total": 428867584, "slots_prepared": [0, 1]},
    "planned": _PLANNED,
    "figures": {
        "capacity_s": 0.62,
        "flip_s_max": 0.14,
        "bytes_copied": 104857600,
        "bytes_planned": 428867584,
        "peak_bytes": {"host:2": 1014373376},
        "peak_bytes_total": 3049242624,
        "peak_bytes_planned": 3049242624,
        "kv_blocks_before": 1456,
        "kv_blocks_after": None,
        "sequences_moved": 5,
    },
    "error": None,
}
_MOVES = {"moves": [["host:0", "host:2", 1, 0, 269615104]], "pairs": 1, "records": 1, "bytes": 269615104}
_RANK = {
    "replica": 0,
    "tp": 0,
    "slot": 0,
    "device": "host:0",
    "state": "used",
    "incarnation": "rank-r0t0:105c73cc0c704e27",
    "pid": 29101,
    "ready": True,
    "attach_ms": 29.8,
    "experts": 120,
    "kv_blocks": 728,
    "kv_blocks_free": 650,
    "memory": _MEMORY,
}

_POLICY = msgspec.to_builtins(PolicyConfig(mode="act", replicas_max=4))
_DECIDED = {
    "time_unix": 1795668293.2,
    "mode": "act",
    "reason": "grow_panic",
    "replicas": 2,
    "target": 3,
    "op_id": "policy-4-81234.117",
    "supersedes": None,
    "acts": True,
    "evidence": msgspec.to_builtins(
        Evidence(
            raw=Saturation(ttft=1.3, itl=0.4, backlog=0.8, queue_age=0.9, kv=0.84),
            smoothed=1.1,
            threshold=0.81,
            demand=Demand(6.2, 540.0, 151.0, 757.0),
            forecast_per_s=6.9,
            of_width=3,
        )
    ),
}

EXAMPLES: dict[str, Any] = {
    "ScaleBody": {"replicas": 2, "reason": "more traffic"},
    "RebalanceBody": {"reason": "a replica was idle"},
    "Health": {"status": "ok"},
    "Ready": {"phase": "serving", "reason": "nothing to do", "bytes_done": 1384120320, "bytes_total": 1384120320}
    | {"error": None, "resumed": None},
    "Layout": {
        "epoch": 1,
        "fence": 1,
        "phase": "serving",
        "reason": "nothing to do",
        "tp": 1,
        "replicas": 1,
        "operation": None,
        "computes_by": ["host avx512bf16, 1 thread"],
        "ranks": [_RANK],
        "experts": [[[0], [0]], [[0], [0]]],
    },
    "Devices": {
        "standby_processes": 2,
        "devices": [
            {
                "device": "host:0",
                "state": "used",
                "failure": "",
                "attached": "rank-r0t0:105c73cc0c704e27",
                "memory": _MEMORY,
                "pages": 1016360960,
                "large_pages": 1006632960,
            }
        ],
    },
    "Operation": _OPERATION,
    "Operations": {"operations": [_OPERATION]},
    "Plan": {
        "kind": "scale_up",
        "planned": _PLANNED,
        "legs": [
            {
                "epoch": 2,
                "joining": [{"rank": [2, 0], "slot": 2, "device": "host:2"}],
                "leaving": [],
                "bytes_copied": 269615104,
                "peak_bytes": {"host:2": 855120896},
                "kv_handles": {"host:2": 182},
                "kv_handles_after": {"host:2": 182},
                "copies": [["base", "host:0", "host:2"]],
                "moves": _MOVES,
            }
        ],
    },
    "Moves": {"op_id": "grow-monday", "legs": [_MOVES]},
    "Now": {
        "cursor": "scaler:105c73cc0c704e27.40",
        "is_whole": True,
        "phase": "serving",
        "reason": "nothing to do",
        "error": None,
        "instance": "i-9f2c61d04b7e",
        "fence": 1,
        "epoch": 1,
        "replicas": 2,
        "target": 3,
        "tp": 1,
        "operation": "grow-monday",
        "progress": {
            "phase": "prepare",
            "leg": 2,
            "elapsed_s": 1.31,
            "hmm_phase": "copying",
            "bytes_done": 104857600,
            "bytes_total": 428867584,
            "bytes_copied": 374472704,
            "sequences_moved": 5,
        },
        "hmm_answers": True,
        "pool_answers": True,
        "standby_processes": 2,
        "num_devices": 3,
        "devices": [
            ["host:0", "used", 0, "r0t0", True, 120, 6086742016, 747360256, 267386880, 1613824, 5070381056, ""],
            ["host:2", "free", None, None, False, 0, 6086742016, 0, 0, 0, 6086742016, ""],
        ],
        "ranks": [[0, 728, 650, 4, 0, 0]],
    },
    "SeriesView": {
        "cursor": "scaler:105c73cc0c704e27.1.812",
        "step_s": 1,
        "is_whole": False,
        "is_more": False,
        "columns": {
            "at": [1795668293, 1795668294],
            "serving": [1, 1],
            "replicas": [2, 2],
            "target": [2, 3],
            "running": [61, 64],
            "queued": [0, 3],
            "requests_per_s": [6.2, 6.4],
            "refused_per_s": [0, 0],
            "generated_per_s": [912.4, 930.1],
            "prompt_per_s": [3348, 3456],
            "ttft_s": [0.41, 2.61],
            "itl_s": [0.04, 0.04],
            "step_s": [0.038, 0.041],
            "attainment": [1, 0.98],
            "kv_share": [0.71, 0.74],
            "ttft_saturation": [0.21, 1.3],
            "itl_saturation": [0.4, 0.4],
            "backlog_saturation": [0.1, 0.8],
            "queue_age_saturation": [0, 0.9],
            "kv_saturation": [0.84, 0.87],
        },
    },
    "ExpertsView": {
        "epoch": 1,
        "sampled_steps": 412.5,
        "owners": [[0, 1], [0, 1]],
        "load": [[1200, 800], [1000, 1000]],
        "ranks": [
            {"rank": "r0t0", "slot": 0, "device": "host:0", "experts": 2, "rows_per_step": 31.5, "imbalance": 1.05}
        ],
    },
    "Processes": {
        "is_known": True,
        "reason": "",
        "processes": [
            {"name": "hmm", "state": "running", "pid": 4711, "restarts": 0, "reason": None, "starts_unix": None},
            {
                "name": "router",
                "state": "restarting",
                "pid": None,
                "restarts": 1,
                "reason": "router ended with signal SIGKILL; it logged nothing",
                "starts_unix": 1790000000.5,
            },
        ],
    },
    "ScaleStatus": {
        "instance_id": "i-9f2c61d04b7e",
        "operation_id": "grow-monday",
        "effective_size": 2,
        "pending_target": 3,
        "phase": "prepare",
        "participating_ranks": ["r0t0", "r1t0"],
        "joining_ranks": ["r2t0"],
        "safe_to_terminate_ranks": [],
        "topology_generation": 1,
        "last_error": None,
    },
    "PolicyBody": {"version": 1, "policy": {"mode": "act", "ttft_s": 2.0, "itl_s": 0.1, "replicas_max": 4}},
    "PolicyView": {
        "version": 2,
        "policy": _POLICY,
        "replicas": 2,
        "target": 3,
        "decision": _DECIDED,
        "load": {
            "silent": [],
            "requests_per_s": 6.2,
            "refused_per_s": 0.0,
            "queued": 14,
            "running": 61.0,
            "ttft_s": 2.61,
            "itl_s": 0.04,
            "kv_share": 0.71,
            "attainment": 0.98,
        },
    },
    "DecisionsView": {"decisions": [_DECIDED]},
    "Config": {"model": "/models/demo", "devices": "host:3", "replicas": 2},
}
