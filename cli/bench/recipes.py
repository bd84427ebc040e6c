"""Recipes: deployments that a benchmark compares with one another, each a size and settings under a name."""

from __future__ import annotations

import argparse
import shlex
from typing import NamedTuple

from elasticmoe.cli.arguments import whole
from elasticmoe.common.config import setting_names
from elasticmoe.common.devices.names import DeviceCount

_OF_A_BENCHMARK = frozenset({"model", "port", "admin_port", "run_dir"})  # it gives these itself


class Recipe(NamedTuple):
    """`devices`: as `--devices` takes them. `settings`: names and values, as the environment spells these."""

    name: str
    replicas: int
    tp: int
    devices: str
    settings: tuple[tuple[str, str], ...]


def sized(replicas: int, tp: int, devices: str = "") -> Recipe:
    """A size and nothing else. `devices`: empty for those of the host that it needs."""
    name = f"replicas: {replicas}" if tp == 1 else f"replicas: {replicas} of {tp} ranks"
    return Recipe(name, replicas, tp, devices or str(DeviceCount("host", replicas * tp)), ())


def recipes(text: str) -> tuple[Recipe, ...]:
    """The type of a flag: `NAME: SETTING=VALUE ...; NAME: ...`, where replicas and tp are 1 and devices are those of
    the host that these need, where they are not given."""
    found = tuple(_recipe(part) for part in text.split(";") if part.strip())
    if not found:
        raise argparse.ArgumentTypeError("no recipe is given: 'NAME: SETTING=VALUE ...; NAME: ...'")
    names = [recipe.name for recipe in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise argparse.ArgumentTypeError(f"two recipes are called {twice!r}")
    return found


def _recipe(text: str) -> Recipe:
    name, colon, rest = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError(f"{text.strip()!r} is not of the form 'NAME: SETTING=VALUE ...'")
    settings: dict[str, str] = {}
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text.strip()!r}: {error}") from None
    for word in words:
        setting, equals, value = word.partition("=")
        if not equals or setting in settings:
            raise argparse.ArgumentTypeError(f"{word!r} is no SETTING=VALUE, or gives a setting again")
        if setting in _OF_A_BENCHMARK or setting not in setting_names():
            raise argparse.ArgumentTypeError(f"{setting!r} is no setting that a recipe can have")
        settings[setting] = value
    replicas, tp = (whole(1)(settings.pop(setting, "1")) for setting in ("replicas", "tp"))
    devices = settings.pop("devices", "") or str(DeviceCount("host", replicas * tp))
    try:
        count = DeviceCount.parse(devices).count
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if count < replicas * tp:
        raise argparse.ArgumentTypeError(f"{name.strip()}: {devices} are {count} of the {replicas * tp} devices needed")
    return Recipe(name.strip(), replicas, tp, devices, tuple(settings.items()))
