"""The only reader of the environment. What can be set stands in `settings.py`: one frozen struct per service.

Values come from a file (`$ELASTICMOE_CONFIG`, TOML), are overridden by the environment (`ELASTICMOE_<FIELD>`), and
those by flags that a command passes as `overrides`; a performance mode fills in what none of them sets. An unknown key
in the file or the environment stops the start, but for the variables of Kubernetes' service links (`service_links.py`),
which are nobody's setting. The defaults stand there and nowhere else: `tests/unit/test_defaults.py` compares what
pages and compose files say with them.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from elasticmoe.common import performance
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.private import make_private
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.protocol.limits import RANKS_MAX, TP_MAX
from elasticmoe.common.service_links import is_service_link
from elasticmoe.common.settings import CONFIGS as CONFIGS
from elasticmoe.common.settings import Common as Common
from elasticmoe.common.settings import HmmConfig as HmmConfig
from elasticmoe.common.settings import KeeperConfig as KeeperConfig
from elasticmoe.common.settings import ModelConfig as ModelConfig
from elasticmoe.common.settings import PoolConfig as PoolConfig
from elasticmoe.common.settings import RouterConfig as RouterConfig
from elasticmoe.common.settings import ScalerConfig as ScalerConfig
from elasticmoe.common.wording import counted, nearest, read, shown

PREFIX = "ELASTICMOE_"
RESERVED = {"CONFIG", "HOME"}  # this file's path, and the command line's cache: not fields

_ENVIRONMENT = "environment"
_NAME_CHARS_MAX = 80
_LIST = "docs/reference/configuration.md"
_LISTEN_FDS_MAX = 16

C = TypeVar("C", bound=Common)


def load(kind: type[C], overrides: Mapping[str, Any] | None = None, flags: Mapping[str, str] | None = None) -> C:
    """Resolve a service's configuration: file < environment < `overrides` (None values are ignored). `flags`: how
    whoever gives an override calls it.

    Raises ConfigError naming the flag, variable or key, the bound and the value.
    """
    fields = set(kind.__struct_fields__)
    values = given(overrides)
    names = {name.lower(): PREFIX + name.upper() for name in _environment()} | dict(flags or {})
    if not values.get("run_dir"):
        raise ConfigError(f"run_dir is not set: pass --run-dir or set {PREFIX}RUN_DIR")
    values = {key: value for key, value in values.items() if key in fields}
    for key, value in values.items():
        _check_text(names.get(key, key), value)
    try:
        config = msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        complaint = read(error)
        told = complaint._replace(path=names.get(complaint.path, complaint.path))
        raise ConfigError(told.told(shown(values.get(complaint.path)))) from None
    _check_topology(config)
    _check_bounds(config, names)
    return config


def setting_names() -> set[str]:
    """The names of all settings."""
    return {name for struct in CONFIGS for name in struct.__struct_fields__}


def given(overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the file, the environment and `overrides` set, as it stands there, by field, and what the performance mode
    sets that they do not. Raises ConfigError for a file that cannot be read and for an unknown name."""
    every_field = setting_names()
    values: dict[str, Any] = {}
    path = os.environ.get(PREFIX + "CONFIG")
    if path:
        values.update(_known(_read_toml(Path(path)), every_field, f"configuration file {path}"))
    values.update(_known(_environment(), every_field, _ENVIRONMENT))
    values |= {key: value for key, value in (overrides or {}).items() if value is not None}
    return performance.defaults_of(values) | values


def _environment() -> dict[str, str]:
    """What the environment sets, by field."""
    ours = {key[len(PREFIX) :]: value for key, value in os.environ.items() if key.startswith(PREFIX)}
    return {
        name.lower(): value for name, value in ours.items() if name not in RESERVED and not is_service_link(name, value)
    }


def _check_text(key: str, value: Any) -> None:
    """Raises ConfigError for a text that fits into no message or path: bytes that are no UTF-8, or a NUL."""
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= char <= "\udfff" for char in value)):
        raise ConfigError(f"{key}: has to be text in UTF-8 without NUL; it is {shown(value)}")


def _check_bounds(config: Common, names: Mapping[str, str]) -> None:
    """Raises ConfigError for bounds of the policy, or settings of cores, that contradict one another."""
    if isinstance(config, PoolConfig) and config.share_cores and config.pin_cores:
        share, pin = (names.get(name, name) for name in ("share_cores", "pin_cores"))
        raise ConfigError(f"{share} and {pin} are both true: a rank that is pinned to one core has no part of others")
    if isinstance(config, ScalerConfig) and config.replicas_min > config.replicas_max:
        least, most = (names.get(name, name) for name in ("replicas_min", "replicas_max"))
        raise ConfigError(f"{least} is {config.replicas_min}, above {most}, which is {config.replicas_max}")


def _check_topology(config: Common) -> None:
    """Raises ConfigError for replicas that cannot be built on the devices, in whichever process asks for them."""
    if not isinstance(config, ModelConfig | HmmConfig):
        return
    try:
        devices = DeviceCount.parse(config.devices)
    except ValueError as error:
        raise ConfigError(f"devices: {error}", code="bad_devices") from None
    if devices.count > RANKS_MAX:
        text = f"devices {config.devices} exceeds the limit of {RANKS_MAX} devices"
        raise ConfigError(text, code="too_many_devices")
    if not isinstance(config, ModelConfig):
        return
    if config.exchange == "torch_dist" and devices.parts:
        raise ConfigError(
            f"exchange torch_dist (--exchange) takes one rank on a device, and devices {devices} has several on one: "
            "name whole ones (--devices), or use exchange mailbox or shm"
        )
    if config.tp > TP_MAX:
        raise ConfigError(f"tp {config.tp} (--tp) exceeds the limit of {TP_MAX}", code="tp_unsupported")
    needed = config.replicas * config.tp
    if needed > devices.count:
        raise ConfigError(
            f"{counted(config.replicas, 'replica')} of tp {config.tp} {'needs' if config.replicas == 1 else 'need'} "
            f"{counted(needed, 'device')}, and devices {devices} has {devices.count}: name "
            f"{DeviceCount(devices.backend, needed)} (--devices) or fewer replicas",
            code="too_few_devices",
        )


def _known(values: Mapping[str, Any], fields: set[str], origin: str) -> Mapping[str, Any]:
    unknown = sorted(set(values) - fields)
    if unknown:
        is_variable = origin == _ENVIRONMENT
        spelt: Callable[[str], str] = _spelt if is_variable else str
        known = fields | {name.lower() for name in RESERVED} if is_variable else fields
        meant = nearest(unknown[0], known, spelt) or f"; {_LIST} has all"
        raise ConfigError(f"{origin}: unknown setting {spelt(unknown[0])[:_NAME_CHARS_MAX]!r}{meant}")
    return values


def _spelt(name: str) -> str:
    """A field as a variable of the environment."""
    return PREFIX + name.upper()


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML
        where = re.search(r"\(at (line \d+, column \d+|end of document)\)", str(error))
        raise ConfigError(f"configuration file {path}: not TOML{f' at {where[1]}' if where else ' in UTF-8'}") from None


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


def keep_torch_alone() -> None:
    """Let torch, which this process is about to import, not import a vendor's package by itself: who has touched an
    accelerator must not fork (ADR 32)."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"


def keep_nccl_from_registering() -> None:
    """Let nccl, of which this process is about to make a group, keep no addresses of what is captured with it: memory
    may be mapped anew there, and a registration of what was there before hangs."""
    os.environ["NCCL_GRAPH_REGISTER"] = "0"


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
