"""Values of flags, and what is wrong with a command line, in plain words. The types raise argparse's own error."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Mapping

from elasticmoe.common.wording import nearest

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_WHOLE_MAX = 10**18
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ms|s|m|h|)")
_UNITS_S = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_S_MAX = 3.2e9
_ARGUMENT = re.compile(r"^argument ([^:]+): (.*)$", re.DOTALL)
_CHOICE = re.compile(r"^invalid choice: '?(.*?)'? \(choose from (.*)\)$", re.DOTALL)
_GIVEN = re.compile(r"^ignored explicit argument (.*)$", re.DOTALL)
_MISSING = "the following arguments are required: "
_UNKNOWN = "unrecognized arguments: "
_ONE_OF = re.compile(r"^one of the arguments (.*) is required$")
_AMBIGUOUS = re.compile(r"^ambiguous option: (\S+) could match (.*)$", re.DOTALL)


class WrongUsage(Exception):
    """Flags that do not go together: as wrong as one that is unknown, and told alike."""


def refuse_beside(args: argparse.Namespace, name: str, other: str) -> None:
    """Raises WrongUsage where the flag `name` is given beside `other`, which would leave it without effect."""
    if getattr(args, name) not in (None, False):
        raise WrongUsage(f"--{name.replace('_', '-')}: it has no effect beside {other}")


def whole(least: int = -_WHOLE_MAX, most: int = _WHOLE_MAX) -> Callable[[str], int]:
    """The type of a flag: a whole number in [`least`, `most`]."""

    def parse(text: str) -> int:
        if _WHOLE.fullmatch(text) is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
        value = int(text)
        _check(value, least, most)
        return value

    return parse


def wholes(text: str) -> tuple[int, ...]:
    """The type of a flag: whole numbers from 1 on with commas between."""
    return tuple(whole(1)(part.strip()) for part in text.split(","))


def number(least: float = 0.0, most: float = math.inf) -> Callable[[str], float]:
    """The type of a flag: a finite number in [`least`, `most`]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        _check(value, least, most)
        return value

    return parse


def duration(text: str) -> float:
    """The type of a flag: a time above 0 in seconds, written 2, 2s, 100ms, 5m or 1h; a hundred years at most."""
    match = _DURATION.fullmatch(text)
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if not 0 < seconds <= _DURATION_S_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time above 0, such as 2s, 100ms, 5m or 1h")
    return seconds


def _check(value: float, least: float, most: float) -> None:
    if value < least:
        raise argparse.ArgumentTypeError(f"{value:g} is less than {least:g}, the least that it may be")
    if value > most:
        raise argparse.ArgumentTypeError(f"{value:g} is more than {most:g}, the most that it may be")


def plainly(message: str, flags: Iterable[str], choices: Mapping[str, Iterable[str]]) -> str:
    """argparse's complaint, for people. `flags`: that the command has; `choices`: what an argument without a flag may
    be, by its name."""
    if message.startswith(_UNKNOWN):
        first = message.removeprefix(_UNKNOWN).split()[0]
        return f"{first!r} is not known{nearest(first.partition('=')[0], flags)}"
    if message.startswith(_MISSING):
        return "; ".join(_missing(name, choices.get(name, ())) for name in message.removeprefix(_MISSING).split(", "))
    if one_of := _ONE_OF.match(message):
        return f"one of {', '.join(one_of[1].split())} is needed"
    if ambiguous := _AMBIGUOUS.match(message):
        return f"{ambiguous[1]} may mean {ambiguous[2].replace(', ', ' or ')}"
    argument = _ARGUMENT.match(message)
    return f"{argument[1]}: {_of_argument(argument[2])}" if argument else message


def _missing(name: str, choices: Iterable[str]) -> str:
    allowed = ", ".join(choices)
    return f"{name if name.startswith('-') else name.upper()} is missing" + (
        f": give one of {allowed}" if allowed else ""
    )


def _of_argument(rest: str) -> str:
    if choice := _CHOICE.match(rest):
        choices = [part.strip("' ") for part in choice[2].split(",")]
        return f"{choice[1]!r} is none of {', '.join(choices)}{nearest(choice[1], choices)}"
    if given := _GIVEN.match(rest):
        return f"it takes no value, and is given {given[1]}"
    if rest.startswith("not allowed with argument "):
        return f"it cannot stand beside {rest.removeprefix('not allowed with argument ')}"
    if rest == "expected at least one argument":
        return "it needs one value or more"
    return "it needs a value" if rest.startswith("expected ") else rest
