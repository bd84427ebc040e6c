"""The only reader of the environment: one frozen struct per service, composed of shared sections.

Values come from a file (`$ELASTICMOE_CONFIG`, TOML), are overridden by the environment (`ELASTICMOE_<FIELD>`), and
those by flags that a command passes as `overrides`. An unknown key in the file or the environment stops the start.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from common.protocol.errors import ConfigError
from common.protocol.limits import SOCKET_PATH_BYTES_MAX

PREFIX = "ELASTICMOE_"
RESERVED = {"CONFIG", "HOME"}  # this file's path, and the command line's cache: not fields

Port = Annotated[int, Meta(ge=0, le=65_535)]
Bytes = Annotated[int, Meta(ge=1)]
KeepAlive = Annotated[float, Meta(gt=0, le=3_600)]
Names = Annotated[str, Meta(pattern=r"^[\x21-\x7e ]{0,4096}$")]  # with commas between


class Common(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every process knows. `run_dir` (mode 0700) holds sockets, secrets, state and logs of one deployment;
    `store_url` is empty for the embedded server's socket in it; `deployment` names this one in the store.
    `failpoint_dir`: empty but in tests that make processes fail; see common/failpoint.py."""

    run_dir: str
    store_url: str = ""
    deployment: Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]{1,64}$")] = "default"
    log_level: Annotated[str, Meta(pattern="^(debug|info|warning|error)$")] = "info"
    log_json: bool = False
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
    served_name: str = ""
    dtype: Annotated[str, Meta(pattern="^(bfloat16|float32)$")] = "bfloat16"
    devices: Annotated[str, Meta(pattern=r"^host:[1-9][0-9]{0,2}$")] = "host:2"
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

    devices: Annotated[str, Meta(pattern=r"^host:[1-9][0-9]{0,2}$")] = "host:2"
    device_bytes: Annotated[int, Meta(ge=0)] = 0
    granularity: Annotated[int, Meta(ge=4096, le=1 << 30)] = 4096


class KeeperConfig(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keeper needs nothing but the run directory."""


class PoolConfig(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`standbys`: processes kept ready beyond the running ranks; with 0 each rank is started from nothing, which takes
    seconds. `pool_name`: pools of one deployment differ in it.
    `pin_cores`: the rank of device `host:i` runs on core i only (modulo their number), as on a slice of the machine.
    `zero_copy` False: ranks copy their weights instead of mapping them, to measure what that costs."""

    pool_name: Annotated[str, Meta(pattern="^[a-z0-9-]{1,32}$")] = "pool"
    standbys: Annotated[int, Meta(ge=0, le=64)] = 2
    pin_cores: bool = False
    zero_copy: bool = True


class ScalerConfig(ModelConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scaler owns the layout, so it knows the model. A rank that died is replaced at most `rank_restarts_max` times
    in `rank_restarts_window_s`. `copy_bytes_per_s`: of experts that move between replicas that serve, all copies of one
    host together; 0 for no limit. `operation_deadline_s`: a scale operation that is not committed by then is undone.
    `rank_stall_s`: a rank that lives and makes no progress for so long, while others do or while it is stopped or
    sleeps, is killed and replaced; it must exceed what the mathematics of one layer takes for `max_tokens_per_step`
    tokens. For comparisons: `copy_from_disk` reads from the checkpoint what devices could copy from one another;
    `scale_legs` 1 lets a new replica wait for its experts; `expert_slots` False lets the HMM do the copies, and hold
    the memory, that experts without slots of their own would take."""

    admin_host: str = "127.0.0.1"
    admin_port: Port = 8100
    pool_name: Annotated[str, Meta(pattern="^[a-z0-9-]{1,32}$")] = "pool"
    lease_ms: Annotated[int, Meta(ge=100, le=600_000)] = 5_000
    rank_restarts_max: Annotated[int, Meta(ge=0, le=1_000)] = 5
    rank_restarts_window_s: Annotated[float, Meta(gt=0, le=86_400)] = 60.0
    copy_bytes_per_s: Annotated[int, Meta(ge=0)] = 200 * 1024 * 1024
    operation_deadline_s: Annotated[float, Meta(gt=0, le=86_400)] = 600.0
    copy_from_disk: bool = False
    scale_legs: Annotated[int, Meta(ge=1, le=2)] = 2
    expert_slots: bool = True
    rank_stall_s: Annotated[float, Meta(gt=0, le=86_400)] = 2.4
    keep_alive_seconds: KeepAlive = 75.0


class RouterConfig(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The front door. `requests_max`: accepted at once; one more is answered 429. `api_key_file`: empty for none.
    `generation_config` auto: the checkpoint's generation_config.json gives the defaults of sampling; none: OpenAI's.
    `stream_keepalive_s`: a stream that has sent nothing for so long sends a comment, which keeps proxies from cutting
    it; 0 for none.
    `keep_alive_seconds`: an idle connection is closed then; longer than a proxy in front keeps it (60 s for most).
    Without a key only requests for this machine's loopback names, `host`, the address that they came to and
    `allowed_hosts` are answered: names with commas between, `*.name` for those below one, `*` for all. `cors_origins`:
    of the pages that may ask and read the answers, such as `https://chat.example.org`, `*` for all."""

    model: str = ""
    served_name: str = ""
    host: str = "127.0.0.1"
    port: Port = 8000
    api_key_file: str = ""
    requests_max: Annotated[int, Meta(ge=1, le=100_000)] = 256
    body_bytes_max: Annotated[int, Meta(ge=1024, le=1 << 30)] = 8 * 1024 * 1024
    body_seconds_max: Annotated[float, Meta(gt=0, le=3_600)] = 30.0
    request_seconds_max: Annotated[float, Meta(gt=0, le=86_400)] = 600.0
    stream_keepalive_s: Annotated[float, Meta(ge=0, le=3_600)] = 10.0
    generation_config: Annotated[str, Meta(pattern="^(auto|none)$")] = "auto"
    keep_alive_seconds: KeepAlive = 75.0
    allowed_hosts: Names = ""
    cors_origins: Names = ""
    history: bool = False


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
    environment = {
        key[len(PREFIX) :].lower(): value
        for key, value in os.environ.items()
        if key.startswith(PREFIX) and key[len(PREFIX) :] not in RESERVED
    }
    values.update(_known(environment, every_field, "environment"))
    values.update({key: value for key, value in (overrides or {}).items() if value is not None})
    if not values.get("run_dir"):
        raise ConfigError(f"run_dir is not set: pass --run-dir or set {PREFIX}RUN_DIR")
    try:
        return msgspec.convert({k: v for k, v in values.items() if k in fields}, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"configuration of {kind.__name__}: {error}") from None


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
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration file {path}: {error}") from None


def environment_of(values: Mapping[str, Any]) -> dict[str, str]:
    """The environment variables that give a child process these settings."""
    return {PREFIX + key.upper(): str(value) for key, value in values.items() if value is not None}


CONFIGS: tuple[type[Common], ...] = (HmmConfig, KeeperConfig, PoolConfig, ScalerConfig, RouterConfig)


def make_run_dirs(config: Common) -> None:
    """Create the run directory and its parts, mode 0700, owned by this user.

    Raises ConfigError when it belongs to somebody else or cannot be made.
    """
    try:
        for path in (config.run_path, *(config.run_path / name for name in ("sockets", "state", "secrets", "logs"))):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.stat()
            if status.st_uid != os.geteuid():
                raise ConfigError(f"run directory {path} belongs to uid {status.st_uid}, not to {os.geteuid()}")
            if status.st_mode & 0o077:
                path.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"run directory {config.run_path}: {error.strerror}") from None
