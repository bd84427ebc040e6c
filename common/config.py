"""The only reader of the environment: one frozen struct per service, composed of shared sections.

Values come from a file (`$ELASTICMOE_CONFIG`, TOML), are overridden by the environment (`ELASTICMOE_<FIELD>`), and
those by flags that a command passes as `overrides`. An unknown key in the file or the environment stops the start,
but for the variables of Kubernetes' service links (`service_links.py`), which are nobody's setting. The defaults stand
here and nowhere else: `tests/unit/test_defaults.py` compares what pages and compose files say with them.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from common.private import make_private
from common.protocol.errors import ConfigError
from common.protocol.limits import RANKS_MAX, SOCKET_PATH_BYTES_MAX, TP_MAX
from common.service_links import is_service_link

PREFIX = "ELASTICMOE_"
RESERVED = {"CONFIG", "HOME"}  # this file's path, and the command line's cache: not fields

_LISTEN_FDS_MAX = 16

Port = Annotated[int, Meta(ge=0, le=65_535)]
KeepAlive = Annotated[float, Meta(gt=0, le=3_600)]
Names = Annotated[str, Meta(pattern=r"^[\x21-\x7e ]{0,4096}$")]  # with commas between
_BYTES_MAX = 1 << 50
Bytes = Annotated[int, Meta(ge=1, le=_BYTES_MAX)]
# What people and messages call a model: anything that can be printed, also quotes and spaces.
Name = Annotated[str, Meta(max_length=256, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]


class Common(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every process knows. `run_dir` (mode 0700) holds sockets, secrets, state and logs of one deployment;
    `store_url` is empty for the embedded server's socket in it; `deployment` names this one in the store.
    `log_bytes_max`: of each log file; the last one that was full is kept beside it.
    `failpoint_dir`: empty but in tests that make processes fail; see common/failpoint.py."""

    run_dir: str
    store_url: str = ""
    deployment: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}\Z")] = "default"
    log_level: Annotated[str, Meta(pattern=r"^(debug|info|warning|error)\Z")] = "info"
    log_json: bool = False
    log_bytes_max: Annotated[int, Meta(ge=64 * 1024, le=1 << 40)] = 16 * 1024 * 1024
    failpoint_dir: str = ""

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

    def secret(self, name: str) -> Path:
        """Path of a secret's file."""
        return self.run_path / "secrets" / name


class ModelConfig(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is served, and its sizes. `kv_bytes` is the most KV memory of one device."""

    model: str = ""
    served_name: Name = ""
    dtype: Annotated[str, Meta(pattern=r"^(bfloat16|float32)\Z")] = "bfloat16"
    devices: Annotated[str, Meta(pattern=r"^host:[1-9][0-9]{0,2}\Z")] = "host:2"
    replicas: Annotated[int, Meta(ge=1, le=64)] = 2
    tp: Annotated[int, Meta(ge=1, le=64)] = 1
    block_size: Annotated[int, Meta(ge=1, le=1024)] = 16
    kv_bytes: Bytes = 256 * 1024 * 1024
    max_model_len: Annotated[int, Meta(ge=2, le=1_048_576)] = 2048
    max_tokens_per_step: Annotated[int, Meta(ge=1, le=65_536)] = 128
    max_sequences: Annotated[int, Meta(ge=1, le=65_536)] = 64

    @property
    def num_devices(self) -> int:
        """Number of devices that `devices` names."""
        return int(self.devices.split(":")[1])


class HmmConfig(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`device_bytes` 0: an equal share of 80 % of the memory available at start. `granularity`: page handles are
    multiples of it."""

    devices: Annotated[str, Meta(pattern=r"^host:[1-9][0-9]{0,2}\Z")] = "host:2"
    device_bytes: Annotated[int, Meta(ge=0, le=_BYTES_MAX)] = 0
    granularity: Annotated[int, Meta(ge=4096, le=1 << 30)] = 4096


class KeeperConfig(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keeper needs nothing but the run directory."""


class PoolConfig(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`standbys`: processes kept ready beyond the running ranks; with 0 each rank is started from nothing, which takes
    seconds. `pool_name`: pools of one deployment differ in it.
    `pin_cores`: the rank of device `host:i` runs on core i only (modulo their number), as on a slice of the machine."""

    pool_name: Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,32}\Z")] = "pool"
    standbys: Annotated[int, Meta(ge=0, le=64)] = 2
    pin_cores: bool = False


class ScalerConfig(ModelConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scaler owns the layout, so it knows the model. A rank that died is replaced at most `rank_restarts_max` times
    in `rank_restarts_window_s`. `copy_bytes_per_s`: of experts that move between replicas that serve, all copies of one
    host together; 0 for no limit. `operation_deadline_s`: a scale operation that is not committed by then is undone.
    `rank_stall_s`: a rank that lives and makes no progress for so long, while others do or while it is stopped or
    sleeps, is killed and replaced; it must exceed what the mathematics of one layer takes for `max_tokens_per_step`
    tokens."""

    admin_host: str = "127.0.0.1"
    admin_port: Port = 8100
    pool_name: Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,32}\Z")] = "pool"
    lease_ms: Annotated[int, Meta(ge=100, le=600_000)] = 5_000
    rank_restarts_max: Annotated[int, Meta(ge=0, le=1_000)] = 5
    rank_restarts_window_s: Annotated[float, Meta(gt=0, le=86_400)] = 60.0
    copy_bytes_per_s: Annotated[int, Meta(ge=0, le=_BYTES_MAX)] = 200 * 1024 * 1024
    operation_deadline_s: Annotated[float, Meta(gt=0, le=86_400)] = 600.0
    rank_stall_s: Annotated[float, Meta(gt=0, le=86_400)] = 2.4
    keep_alive_seconds: KeepAlive = 75.0


class RouterConfig(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The front door. `requests_max`: accepted at once; one more is answered 429. `api_key_file`: empty for none.
    `answer_bytes_max`: what the answer to one request may become at most, by its prompts, choices, tokens and log
    probabilities; log probabilities of all requests together may take twice as much.
    `generation_config` auto: the checkpoint's generation_config.json gives the defaults of sampling; none: OpenAI's.
    `allow_priority`: requests may name a priority; else all are served in the order in which they come.
    `stream_keepalive_s`: a stream that has sent nothing for so long sends a comment, which keeps proxies from cutting
    it; 0 for none.
    `keep_alive_seconds`: an idle connection is closed then; longer than a proxy in front keeps it (60 s for most).
    Without a key only requests for this machine's loopback names, `host`, the address that they came to and
    `allowed_hosts` are answered: names with commas between, `*.name` for those below one, `*` for all. `cors_origins`:
    of the pages that may ask and read the answers, such as `https://chat.example.org`, `*` for all.
    `history`: record every request in logs/history-router.jsonl, in files of `history_bytes_max`, of which two are
    kept."""

    model: str = ""
    served_name: Name = ""
    host: str = "127.0.0.1"
    port: Port = 8000
    api_key_file: str = ""
    requests_max: Annotated[int, Meta(ge=1, le=100_000)] = 256
    body_bytes_max: Annotated[int, Meta(ge=1024, le=1 << 30)] = 8 * 1024 * 1024
    body_seconds_max: Annotated[float, Meta(gt=0, le=3_600)] = 30.0
    request_seconds_max: Annotated[float, Meta(gt=0, le=86_400)] = 600.0
    answer_bytes_max: Annotated[int, Meta(ge=64 * 1024, le=1 << 40)] = 64 * 1024 * 1024
    stream_keepalive_s: Annotated[float, Meta(ge=0, le=3_600)] = 10.0
    generation_config: Annotated[str, Meta(pattern="^(auto|none)$")] = "auto"
    keep_alive_seconds: KeepAlive = 75.0
    allowed_hosts: Names = ""
    cors_origins: Names = ""
    allow_priority: bool = False
    history: bool = False
    history_bytes_max: Annotated[int, Meta(ge=64 * 1024, le=1 << 40)] = 1024 * 1024 * 1024


C = TypeVar("C", bound=Common)


def load(kind: type[C], overrides: Mapping[str, Any] | None = None) -> C:
    """Resolve a service's configuration: file < environment < `overrides` (None values are ignored).

    Raises ConfigError naming the key, the bound and the value.
    """
    every_field = {name for struct in CONFIGS for name in struct.__struct_fields__}
    fields = set(kind.__struct_fields__)
    values: dict[str, Any] = {}
    path = os.environ.get(PREFIX + "CONFIG")
    if path:
        values.update(_known(_read_toml(Path(path)), every_field, f"configuration file {path}"))
    values.update(_known(_environment(), every_field, "environment"))
    values.update({key: value for key, value in (overrides or {}).items() if value is not None})
    if not values.get("run_dir"):
        raise ConfigError(f"run_dir is not set: pass --run-dir or set {PREFIX}RUN_DIR")
    values = {key: value for key, value in values.items() if key in fields}
    for key, value in values.items():
        _check_text(key, value)
    try:
        config = msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"configuration of {kind.__name__}: {_told(error, values)}") from None
    _check_topology(config)
    return config


def _environment() -> dict[str, str]:
    """What the environment sets, by field."""
    ours = {key[len(PREFIX) :]: value for key, value in os.environ.items() if key.startswith(PREFIX)}
    return {
        name.lower(): value for name, value in ours.items() if name not in RESERVED and not is_service_link(name, value)
    }


def _check_text(key: str, value: Any) -> None:
    """Raises ConfigError for a text that fits into no message or path: bytes that are no UTF-8, or a NUL."""
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= char <= "\udfff" for char in value)):
        raise ConfigError(f"{key}: {value[:100]!r} is not text in UTF-8 without NUL")


def _told(error: msgspec.ValidationError, values: Mapping[str, Any]) -> str:
    """msgspec names the bound and the key; the value is added, shortened."""
    text = str(error)
    key = text.rpartition("$.")[2].rstrip("`")
    return f"{text}, and it is {str(values[key])[:100]!r}" if key in values else text


def _check_topology(config: Common) -> None:
    """Raises ConfigError for replicas that cannot be built on the devices, in whichever process asks for them."""
    if not isinstance(config, ModelConfig | HmmConfig):
        return
    num_devices = int(config.devices.split(":")[1])
    if num_devices > RANKS_MAX:
        text = f"devices {config.devices} exceeds the limit of {RANKS_MAX} devices"
        raise ConfigError(text, code="too_many_devices")
    if not isinstance(config, ModelConfig):
        return
    if config.tp > TP_MAX:
        raise ConfigError(f"tp {config.tp} exceeds the limit of {TP_MAX}", code="tp_unsupported")
    needed = config.replicas * config.tp
    if needed > num_devices:
        raise ConfigError(
            f"{config.replicas} replicas of tp {config.tp} need {needed} devices, and devices {config.devices} has "
            f"{num_devices}",
            code="too_few_devices",
        )


def _known(values: Mapping[str, Any], fields: set[str], origin: str) -> Mapping[str, Any]:
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ConfigError(f"{origin}: unknown setting {unknown[0]!r}; known: {', '.join(sorted(fields))}")
    return values


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML
        raise ConfigError(f"configuration file {path}: {error}") from None


def listen_fds() -> dict[str, int]:
    """Descriptors of listening sockets that whoever started this process has handed down, by their names.

    systemd's protocol (sd_listen_fds(3), sd_listen_fds_with_names(3)): the descriptors from 3 on are meant for the
    process that LISTEN_PID names. Raises ConfigError for variables that say nothing sensible.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    text, names = os.environ.get("LISTEN_FDS", ""), os.environ.get("LISTEN_FDNAMES", "").split(":")
    if not text.isdecimal() or int(text) != len(names) or len(names) > _LISTEN_FDS_MAX:
        raise ConfigError(f"LISTEN_FDS is {text[:20]!r}, and LISTEN_FDNAMES has {len(names)} names")
    return {name: 3 + number for number, name in enumerate(names)}


def environment_of(values: Mapping[str, Any]) -> dict[str, str]:
    """The environment variables that give a child process these settings."""
    return {PREFIX + key.upper(): str(value) for key, value in values.items() if value is not None}


CONFIGS: tuple[type[Common], ...] = (HmmConfig, KeeperConfig, PoolConfig, ScalerConfig, RouterConfig)


def defaults() -> dict[str, Any]:
    """The default of every setting that has one, by its name."""
    fields = (field for struct in CONFIGS for field in msgspec.structs.fields(struct))
    return {field.name: field.default for field in fields if field.default is not msgspec.NODEFAULT}


RUN_DIR_PARTS = ("sockets", "state", "secrets", "logs")


def make_run_dirs(config: Common) -> None:
    """Create the run directory and its parts, mode 0700, owned by this user.

    Raises ConfigError when they cannot be made, or somebody else made or could have changed them.
    """
    make_private(config.run_path)
    for name in RUN_DIR_PARTS:
        make_private(config.run_path / name)
