"""Every setting of every service: its type, bounds, default, unit and meaning, each in this one place.

A service's struct has the settings that it reads. What several of them read under one name is one type here, so that it
means the same everywhere. `docs/reference/configuration.md` is made from these. How values come in: common/config.py.

Longer than others, since each setting stands once and in one place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final, get_args

import msgspec
from msgspec import Meta

from elasticmoe.common.devices.names import COUNT_PATTERN, DeviceCount
from elasticmoe.common.layout import COMPUTES, Activations, Compute, ExchangeKind, check_activations
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.protocol.limits import RANKS_MAX, SOCKET_PATH_BYTES_MAX

_BYTES_MAX = 1 << 50
_HOST_COPY_BYTES_PER_S: Final = 200 * 1024 * 1024


def _is(text: str, unit: str = "", form: str = "") -> Meta:
    """What a setting means, the unit that its number is in, and in words which texts it may be."""
    return Meta(description=text, extra={"unit": unit, "form": form})


Port = Annotated[int, Meta(ge=0, le=65_535)]
Names = Annotated[str, Meta(pattern=r"^[\x21-\x7e ]{0,4096}$")]  # with commas between
Bytes = Annotated[int, Meta(ge=1, le=_BYTES_MAX)]
# What people and messages call a model: anything that can be printed, also quotes and spaces.
Name = Annotated[str, Meta(max_length=256, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]

# Settings that more than one service reads.
Model = Annotated[
    str,
    _is("The checkpoint's folder. `elasticmoe up` also takes names (`elasticmoe model list`) and org/name of a hub"),
]
ServedName = Annotated[
    Name,
    _is("The name that clients use for the model; empty: the model's own", form="at most 256 printable characters"),
]
Devices = Annotated[
    str,
    Meta(pattern=COUNT_PATTERN),
    _is(
        "The devices that the deployment may use: N slices of this machine, or accelerators by their numbers. "
        "`elasticmoe up` without it takes twice as many as the replicas need, where memory allows",
        form=f"`host:N`, N from 1 to {RANKS_MAX}; `npu:0-7`; `cuda:0,cuda:2`; `cuda:0/4`, four on one GPU",
    ),
]
PoolName = Annotated[
    str,
    Meta(pattern=r"^[a-z0-9-]{1,32}\Z"),
    _is("The worker pool's name; pools of one deployment differ in it", form="1 to 32 of `a-z 0-9 -`"),
]
Standbys = Annotated[
    int,
    Meta(ge=0, le=64),
    _is("Processes kept ready beyond the running ranks; with 0 each rank starts from nothing, which takes seconds"),
]
OtlpEndpoint = Annotated[
    str,
    Meta(pattern=r"^(https?://[^\s/?#@]+(/[^\s?#]*)?)?\Z"),
    _is("A collector for traces, before `/v1/traces`; empty: there are none", form="`http://…` or `https://…`"),
]
PerformanceMode = Annotated[
    str,
    Meta(pattern=r"^(balanced|throughput)\Z"),
    _is(
        "What settings are that nobody sets. `throughput`: `max_tokens_per_step` 512, and on `host:N` `replicas` 1, "
        "`share_cores`, and `activations` bfloat16 where processors multiply it and `compute` can",
        form="`balanced`, `throughput`",
    ),
]
ShareCores = Annotated[
    bool,
    _is(
        "Divide the usable cores by the ranks that run instead of by `devices` (`host:N`): none is idle, and a growth "
        "brings no cores but those that `threads_max` leaves"
    ),
]
KeepAlive = Annotated[
    float,
    Meta(gt=0, le=3_600),
    _is("An idle connection is closed then; let it exceed what a proxy in front keeps its own (60 s for most)", "s"),
]


class Common(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every process knows."""

    run_dir: Annotated[str, _is("Folder (mode 0700) of one deployment: its sockets, secrets, state and logs")]
    store_url: Annotated[
        str, _is("A Valkey or Redis server, `redis://…` or `rediss://…`; empty: the embedded one of the run directory")
    ] = ""
    deployment: Annotated[
        str,
        Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}\Z"),
        _is("This deployment's name in a store that others use too", form="1 to 64 of `A-Z a-z 0-9 _ . -`"),
    ] = "default"
    log_level: Annotated[
        str,
        Meta(pattern=r"^(debug|info|warning|error)\Z"),
        _is("The least level of what is logged", form="`debug`, `info`, `warning`, `error`"),
    ] = "info"
    log_format: Annotated[
        str,
        Meta(pattern=r"^(text|json)\Z"),
        _is("Logs for people, or one JSON object a line", form="`text`, `json`"),
    ] = "text"
    log_bytes_max: Annotated[
        int,
        Meta(ge=64 * 1024, le=1 << 40),
        _is("Most of each log file; the last one that was full is kept beside it", "bytes"),
    ] = 16 * 1024 * 1024
    failpoint_dir: Annotated[
        str, _is("Empty but in tests that make processes fail (`common/failpoint.py`): leave it")
    ] = ""

    @property
    def run_path(self) -> Path:
        """`run_dir` as an absolute path."""
        return Path(self.run_dir).absolute()

    def socket(self, name: str) -> Path:
        """Path of the Unix socket called `name`. Raises ConfigError when it exceeds what the kernel takes."""
        path = self.run_path / "sockets" / f"{name}.sock"
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            raise ConfigError(
                f"socket path of {len(os.fsencode(path))} bytes exceeds the limit of {SOCKET_PATH_BYTES_MAX}: "
                f"choose a shorter run directory"
            )
        return path

    @property
    def state_dir(self) -> Path:
        """Durable small files: fencing epochs and journals."""
        return self.run_path / "state"

    @property
    def fresh_mark(self) -> Path:
        """A file that lets the next scaler begin anew, whatever earlier runs have left."""
        return self.state_dir / "fresh"

    def secret(self, name: str) -> Path:
        """Path of a secret's file."""
        return self.run_path / "secrets" / name


class ModelConfig(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is served, and its sizes."""

    performance_mode: PerformanceMode = "balanced"
    model: Model = ""
    served_name: ServedName = ""
    dtype: Annotated[
        str,
        Meta(pattern=r"^(bfloat16|float32)\Z"),
        _is("Number format of weights and KV", form="`bfloat16`, `float32`"),
    ] = "bfloat16"
    compute: Annotated[
        str,
        Meta(pattern=r"^(auto|host|torch|triton|torch_npu)\Z"),
        _is(
            "What computes the steps: `host`, the kernels of this package, on `host:N` alone; `torch`, plain torch "
            "operations, a slow reference on any device; `triton`, kernels for `cuda`; `torch_npu`, the vendor's "
            "operators for `npu`; `auto`: what is proven on the devices",
            form="`auto`, `host`, `torch`, `triton`, `torch_npu`",
        ),
    ] = "auto"
    activations: Annotated[
        str,
        Meta(pattern=r"^(float32|bfloat16)\Z"),
        _is(
            "What `bfloat16` weights are multiplied by: numbers of float32, or rounded to bfloat16 as in other "
            "engines, which many rows gain by where the processor has AVX512-BF16 or AMX (`compute` `host`)",
            form="`float32`, `bfloat16`",
        ),
    ] = "float32"
    exchange: Annotated[
        str,
        Meta(pattern=r"^(auto|shm|mailbox|torch_dist)\Z"),
        _is(
            "How ranks exchange tokens: `shm`, through memory of the host; `mailbox`, from device to device; "
            "`torch_dist`, by torch.distributed, for comparison; `auto`: what is best for the devices, on `host:N` "
            "`shm`",
            form="`auto`, `shm`, `mailbox`, `torch_dist`",
        ),
    ] = "auto"
    devices: Devices = "host:2"
    replicas: Annotated[int, Meta(ge=1, le=64), _is("Replicas to start with; a running deployment is scaled")] = 2
    tp: Annotated[int, Meta(ge=1, le=64), _is("Devices of one replica, at most 8: tensor parallelism")] = 1
    block_size: Annotated[int, Meta(ge=1, le=1024), _is("Tokens of one KV block", "tokens")] = 16
    kv_bytes: Annotated[Bytes, _is("Most KV memory of one device", "bytes")] = 256 * 1024 * 1024
    max_model_len: Annotated[
        int,
        Meta(ge=2, le=1_048_576),
        _is("Longest sequence, prompt and output; at most what the model knows", "tokens"),
    ] = 2048
    max_tokens_per_step: Annotated[
        int,
        Meta(ge=1, le=65_536),
        _is(
            "Most tokens that a replica computes in one step; beyond 128 how many a step has is chosen by what waits",
            "tokens",
        ),
    ] = 128
    max_sequences: Annotated[int, Meta(ge=1, le=65_536), _is("Most sequences of a replica at once")] = 64

    @property
    def device_count(self) -> DeviceCount:
        """What `devices` names."""
        return DeviceCount.parse(self.devices)

    @property
    def compute_backend(self) -> Compute:
        """The backend that `compute` means on these devices: the same for all ranks, whose results differ otherwise.
        Raises ConfigError no_compute for one that does not compute there, or not with these activations."""
        possible = COMPUTES[self.device_count.backend]
        for name in possible:
            if self.compute in ("auto", name):
                check_activations(name, self.activation_kind)
                return name
        text = f"{self.compute} does not compute on {self.devices}: --compute has to be auto or {' or '.join(possible)}"
        raise ConfigError(text, code="no_compute")

    @property
    def activation_kind(self) -> Activations:
        """The same for all ranks."""
        return next(kind for kind in get_args(Activations) if kind == self.activations)

    @property
    def exchange_kind(self) -> ExchangeKind:
        """The exchange that `exchange` means on these devices."""
        if self.exchange == "auto":
            return "shm" if self.device_count.backend == "host" else "mailbox"
        return next(kind for kind in get_args(ExchangeKind) if kind == self.exchange)


class HmmConfig(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The memory service's."""

    devices: Devices = "host:2"
    device_bytes: Annotated[
        int,
        Meta(ge=0, le=_BYTES_MAX),
        _is("Budget of each device; 0: 80 % of an accelerator's memory, or an equal share of the machine's", "bytes"),
    ] = 0
    granularity: Annotated[
        int,
        Meta(ge=4096, le=1 << 30),
        _is("Page handles are multiples of it, or of the least that the devices have", "bytes"),
    ] = 4096
    large_pages: Annotated[
        bool,
        _is("Put weights and KV of `host` devices into large pages, where the kernel lets it"),
    ] = True


class KeeperConfig(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keeper needs nothing but the run directory."""


class PoolConfig(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker pool's."""

    devices: Devices = "host:2"
    pool_name: PoolName = "pool"
    standbys: Standbys = 2
    pin_cores: Annotated[
        bool,
        _is("Let the rank of device `host:i` run on core i only (modulo their number), as on a slice of the machine"),
    ] = False
    threads_max: Annotated[
        int,
        Meta(ge=1, le=64),
        _is("Most threads that a rank on `host` computes with; it takes the usable cores divided by `devices`"),
    ] = 64
    share_cores: ShareCores = False
    performance_mode: PerformanceMode = "balanced"
    captured_graphs: Annotated[
        bool,
        _is("Let ranks queue a decode step's sections as captured graphs, where `compute` can (`triton`)"),
    ] = True


class ScalerConfig(ModelConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scaler owns the layout, so it knows the model."""

    share_cores: ShareCores = False
    admin_host: Annotated[str, _is("Address of the admin listener; keep it on loopback")] = "127.0.0.1"
    admin_port: Annotated[Port, _is("Its port; 0: a free one")] = 8100
    pool_name: PoolName = "pool"
    standbys: Standbys = 2
    lease_ms: Annotated[
        int, Meta(ge=100, le=600_000), _is("A scaler that was silent for so long may be superseded", "ms")
    ] = 5_000
    rank_restarts_max: Annotated[
        int,
        Meta(ge=0, le=1_000),
        _is("A seat's rank that dies is replaced at most so often in `rank_restarts_window_s`; then `rank_crash_loop`"),
    ] = 10
    rank_restarts_window_s: Annotated[float, Meta(gt=0, le=86_400), _is("The window of `rank_restarts_max`", "s")] = (
        120.0
    )
    copy_bytes_per_s: Annotated[
        int,
        Meta(ge=-1, le=_BYTES_MAX),
        _is(
            "Rate of experts that move between replicas that serve, all copies of one host together; 0: no limit; -1: "
            "200 MiB/s between `host` devices, whose cores make the copies, and no limit between accelerators",
            "bytes/s",
        ),
    ] = -1
    operation_deadline_s: Annotated[
        float, Meta(gt=0, le=86_400), _is("A scale operation that is not committed by then is undone", "s")
    ] = 600.0
    rank_stall_s: Annotated[
        float,
        Meta(gt=0, le=86_400),
        _is(
            "A rank that lives and makes no progress for so long, while others do or while it is stopped or sleeps, is "
            "killed and replaced. Must exceed what one layer takes for `max_tokens_per_step` tokens",
            "s",
        ),
    ] = 2.4
    policy: Annotated[
        str,
        Meta(pattern=r"^(off|advise|act)\Z"),
        _is(
            "What the policy does about the load: nothing, tell what it would do, or do it",
            form="`off`, `advise`, `act`",
        ),
    ] = "advise"
    ttft_s: Annotated[
        float, Meta(ge=0.001, le=86_400), _is("Objective of the policy: the time to a request's first token", "s")
    ] = 2.0
    itl_s: Annotated[
        float, Meta(ge=0.001, le=86_400), _is("Objective of the policy: the mean time between a request's tokens", "s")
    ] = 0.1
    attainment: Annotated[
        float, Meta(ge=0.001, le=1), _is("Objective of the policy: the share of requests that keep both")
    ] = 0.99
    replicas_min: Annotated[int, Meta(ge=1, le=64), _is("The fewest replicas that the policy asks for")] = 1
    replicas_max: Annotated[int, Meta(ge=1, le=64), _is("The most replicas that the policy asks for")] = 64
    otlp_endpoint: OtlpEndpoint = ""
    keep_alive_seconds: KeepAlive = 75.0

    @property
    def copy_limit(self) -> int:
        """What `copy_bytes_per_s` means on these devices; 0: no limit."""
        if self.copy_bytes_per_s >= 0:
            return self.copy_bytes_per_s
        return _HOST_COPY_BYTES_PER_S if self.device_count.backend == "host" else 0

    @property
    def shares_cores(self) -> bool:
        """Whether of twice as many replicas each has half of the cores: only the kernels of `host` have several."""
        return self.share_cores and self.compute_backend == "host"


class RouterConfig(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The front door's."""

    model: Model = ""
    served_name: ServedName = ""
    host: Annotated[str, _is("Address of the OpenAI-compatible listener")] = "127.0.0.1"
    port: Annotated[Port, _is("Its port; 0: a free one")] = 8000
    api_key_file: Annotated[
        str, _is("File whose one line is the key that clients must send; empty: none is asked for")
    ] = ""
    requests_max: Annotated[
        int, Meta(ge=1, le=100_000), _is("Requests that are accepted at once; one more is answered 429")
    ] = 256
    body_bytes_max: Annotated[int, Meta(ge=1024, le=1 << 30), _is("Most of a request's body", "bytes")] = (
        8 * 1024 * 1024
    )
    body_seconds_max: Annotated[float, Meta(gt=0, le=3_600), _is("A body has to have arrived by then", "s")] = 30.0
    drain_seconds: Annotated[
        float, Meta(ge=0, le=3_600), _is("What runs at SIGTERM may end within that; then it is cut off", "s")
    ] = 30.0
    request_seconds_max: Annotated[
        float, Meta(gt=0, le=86_400), _is("A request that is not answered by then is ended", "s")
    ] = 600.0
    answer_bytes_max: Annotated[
        int,
        Meta(ge=64 * 1024, le=1 << 40),
        _is(
            "What one answer may become, by its prompts, choices, tokens and log probabilities; log probabilities of "
            "all requests together may take twice as much",
            "bytes",
        ),
    ] = 64 * 1024 * 1024
    stream_keepalive_s: Annotated[
        float,
        Meta(ge=0, le=3_600),
        _is(
            "A stream that has sent nothing for so long sends a comment, which keeps proxies from cutting it; 0: none",
            "s",
        ),
    ] = 10.0
    tool_call_parser: Annotated[
        str,
        Meta(pattern=r"^(auto|deepseek|glm|granite|hermes|mistral|qwen_coder)\Z"),
        _is(
            "In which form the model writes tool calls; `auto`: as its chat template shows",
            form="`auto`, `deepseek`, `glm`, `granite`, `hermes`, `mistral`, `qwen_coder`",
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        Meta(pattern=r"^(auto|none|think|mistral)\Z"),
        _is(
            "By which marks thinking is told apart from the answer: `think`, `<think>`; `mistral`, `[THINK]`; `auto`: "
            "as the chat template shows; `none`: it is a part of the answer",
            form="`auto`, `none`, `think`, `mistral`",
        ),
    ] = "auto"
    generation_config: Annotated[
        str,
        Meta(pattern="^(auto|none)$"),
        _is(
            "auto: the checkpoint's `generation_config.json` gives the defaults of sampling; none: OpenAI's",
            form="`auto`, `none`",
        ),
    ] = "auto"
    keep_alive_seconds: KeepAlive = 75.0
    allowed_hosts: Annotated[
        Names,
        _is(
            "Without a key, hosts that requests may name beside loopback, `host` and the address that they came to: "
            "names with commas between, `*.name` for those below one, `*` for all",
            form="at most 4,096 printable characters of ASCII",
        ),
    ] = ""
    cors_origins: Annotated[
        Names,
        _is(
            "Origins of pages that may ask and read the answers, `https://chat.example.org,…`; `*` for all",
            form="the same",
        ),
    ] = ""
    allow_priority: Annotated[
        bool, _is("Let requests name a priority; else all are served in the order in which they come")
    ] = False
    otlp_endpoint: OtlpEndpoint = ""
    trace_ratio: Annotated[
        float, Meta(ge=0, le=1), _is("The share of requests that are traced, of those whose callers say nothing of it")
    ] = 1.0
    history: Annotated[bool, _is("Record every request in `logs/history-router.jsonl`")] = False
    history_bytes_max: Annotated[
        int, Meta(ge=64 * 1024, le=1 << 40), _is("Most of one such file, of which two are kept", "bytes")
    ] = 1024 * 1024 * 1024


CONFIGS: tuple[type[Common], ...] = (HmmConfig, KeeperConfig, PoolConfig, ScalerConfig, RouterConfig)
