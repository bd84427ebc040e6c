"""The settings of a deployment: flags over the environment over the configuration file, resolved once by `up`.

The children get the result through the environment, so that all of them see the same values.
"""

from __future__ import annotations

import argparse
import hashlib
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elasticmoe.cli.arguments import duration, number, whole
from elasticmoe.cli.paths import absolute, package_root, run_dir_of
from elasticmoe.common import config
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.protocol.limits import RANKS_MAX

DEFAULTS = config.defaults()
TEMPORARY = "tmp"  # in the run directory

# Flags of `up` whose name is not the setting's.
_FLAGS = {
    "device_bytes": "--device-memory",
    "kv_bytes": "--kv-memory",
    "store_url": "--store",
    "ttft_s": "--ttft",
    "itl_s": "--itl",
}
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SECONDS_MAX = 30 * 24 * 3600
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True)
class Settings:
    """What `up` starts. `values`: every setting that is not a service's own default, by its name in common.config.
    `is_roomy`: nobody named the devices; there may be fewer of them where memory is short."""

    scaler: config.ScalerConfig
    router: config.RouterConfig
    hmm: config.HmmConfig
    values: Mapping[str, Any]
    is_roomy: bool = False

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the router."""
        return f"http://{_reachable(self.router.host)}:{self.router.port}"

    @property
    def admin_url(self) -> str:
        """Where an operator on this machine reaches the scaler."""
        return f"http://{_reachable(self.scaler.admin_host)}:{self.scaler.admin_port}"

    def replace(self, **values: Any) -> Settings:
        """The same settings with other values. Raises ConfigError."""
        return resolve({**self.values, **values}, is_roomy=self.is_roomy)


def parse_size(text: str) -> int:
    """Bytes of `4GiB`, `256 MiB` or `1048576`. Raises argparse.ArgumentTypeError: it is the type of flags."""
    match = _SIZE.fullmatch(text)
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: use a number with KiB, MiB, GiB or TiB")
    return int(float(match.group(1)) * _UNITS[unit])


def parse_seconds(text: str) -> float:
    """A finite time above 0. Raises argparse.ArgumentTypeError: it is the type of flags."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: give seconds above 0, {_SECONDS_MAX} at most")
    return seconds


def add_policy_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `up` by which the deployment follows its load."""
    add, default = parser.add_argument, DEFAULTS
    add(
        "--policy",
        choices=("off", "advise", "act"),
        help=f"let the load decide the number of replicas: no, only tell, or do it (default {default['policy']})",
    )
    add(
        "--ttft",
        type=duration,
        metavar="TIME",
        help=f"objective: time to a first token (default {default['ttft_s']:g}s)",
    )
    itl = f"objective: time between tokens (default {default['itl_s'] * 1e3:g}ms)"
    add("--itl", type=duration, metavar="TIME", help=itl)
    share = f"objective: share of requests that keep both (default {default['attainment']:g})"
    add("--attainment", type=number(most=1.0), metavar="SHARE", help=share)
    add(
        "--replicas-min",
        type=whole(),
        metavar="N",
        help=f"the fewest replicas that the policy asks for (default {default['replicas_min']})",
    )
    add(
        "--replicas-max",
        type=whole(),
        metavar="N",
        help=f"the most replicas that it asks for (default {default['replicas_max']})",
    )


def from_flags(args: argparse.Namespace) -> Settings:
    """Resolve the flags of `up`. Raises ConfigError."""
    flags = {
        "run_dir": str(run_dir_of(args.run_dir)),
        "store_url": args.store,
        "model": args.model,
        "served_name": args.served_name,
        "performance_mode": args.performance_mode,
        "devices": args.devices,
        "replicas": args.replicas,
        "tp": args.tp,
        "dtype": args.dtype,
        "compute": args.compute,
        "activations": args.activations,
        "exchange": args.exchange,
        "host": args.host,
        "port": args.port,
        "admin_port": args.admin_port,
        "device_bytes": args.device_memory,
        "kv_bytes": args.kv_memory,
        "max_model_len": args.max_model_len,
        "max_sequences": args.max_sequences,
        "generation_config": args.generation_config,
        "log_format": args.log_format,
        "otlp_endpoint": args.otlp_endpoint,
        "api_key_file": args.api_key_file,
        "policy": args.policy,
        "ttft_s": args.ttft,
        "itl_s": args.itl,
        "attainment": args.attainment,
        "replicas_min": args.replicas_min,
        "replicas_max": args.replicas_max,
    }
    values = {name: value for name, value in flags.items() if value is not None}
    devices = _roomy(values)
    settings = resolve({"devices": devices, **values}, is_roomy=True) if devices else resolve(values)
    if settings.scaler.store_url and settings.scaler.deployment == "default":
        # A server that others use too: the name keeps deployments of other run directories apart in it.
        digest = hashlib.sha256(str(settings.scaler.run_path).encode()).hexdigest()[:12]
        settings = settings.replace(deployment=f"run-{digest}")
    if settings.router.api_key_file:  # children have another working directory
        settings = settings.replace(api_key_file=str(absolute(settings.router.api_key_file, "api_key_file")))
    return settings


def _roomy(values: Mapping[str, Any]) -> str | None:
    """Devices for twice the replicas, so that the deployment can grow; None where the user has named some. Raises
    ConfigError."""
    given = config.given(values)
    if "devices" in given:
        return None
    try:
        used = int(given.get("replicas", DEFAULTS["replicas"])) * int(given.get("tp", DEFAULTS["tp"]))
    except (TypeError, ValueError):
        return None  # told when it is loaded
    return str(DeviceCount("host", min(max(1, 2 * used), RANKS_MAX)))


def resolve(values: Mapping[str, Any], *, is_roomy: bool = False) -> Settings:
    """Every service's configuration with `values` over the environment and the file. Raises ConfigError."""
    flags = {name: _FLAGS.get(name, "--" + name.replace("_", "-")) for name in values}
    scaler = config.load(config.ScalerConfig, values, flags)
    router = config.load(config.RouterConfig, values, flags)
    config.load(
        config.PoolConfig, values, flags
    )  # the pool reads it itself; what is wrong is told before anything starts
    return Settings(scaler, router, config.load(config.HmmConfig, values, flags), dict(values), is_roomy)


def child_environment(settings: Settings) -> dict[str, str]:
    """The environment of every child: ours, with the resolved settings. What libraries put into the temporary folder
    lies in the run directory, and goes with it however the child ends."""
    environment = importing_environment() | config.environment_of(settings.values)
    file = environment.get("ELASTICMOE_CONFIG")
    if file:
        environment["ELASTICMOE_CONFIG"] = str(absolute(file, "ELASTICMOE_CONFIG"))
    environment["PYTHONUNBUFFERED"] = "1"
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # a vendor's package is a rank's alone, after the last fork
    environment["TMPDIR"] = str(settings.scaler.run_path / TEMPORARY)
    return environment


def importing_environment() -> dict[str, str]:
    """Our environment, for a Python process that imports our packages whatever its working directory is."""
    environment = dict(os.environ)
    paths = [str(package_root()), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(str(absolute(path, "PYTHONPATH")) for path in paths))
    return environment


def _reachable(host: str) -> str:
    """The address by which this machine reaches a listener on `host`, as it stands in a URL."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host  # a name
    if address.is_unspecified:  # it listens on all addresses
        return "[::1]" if address.version == 6 else "127.0.0.1"
    return f"[{host}]" if address.version == 6 else host


def require_run_dir(settings: Settings) -> Path:
    """The run directory as a path. Raises ConfigError when its socket paths would be too long for the kernel."""
    settings.scaler.socket("x" * 16)  # services' names are shorter than this
    return settings.scaler.run_path
