"""The model that `bench accel` measures, and the settings of deployments that have room for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from elasticmoe.cli.bench.accel_floor import kv_token_bytes
from elasticmoe.cli.console import make_console
from elasticmoe.cli.resolve import resolve_model
from elasticmoe.common.families import load_spec, records
from elasticmoe.common.model_spec import ModelSpec, round_up

PROMPT_TOKENS: Final = 64
_STREAMS: Final = 64  # twice as many as are served at once, whose KV is there until the next ones need it
_KV_BYTES_MIN: Final = 64 << 20
_LENGTH_MIN: Final = 256
_GRANULARITY: Final = 2 << 20  # of both accelerators' handles
_OTHER_BYTES: Final = 256 << 20  # a ledger, a mailbox
_DTYPE: Final = "bfloat16"


class SizedModel(NamedTuple):
    """Its folder and what it is; `settings`: of each deployment of it; `facts`: for the raw data."""

    path: str
    spec: ModelSpec
    settings: dict[str, Any]
    facts: dict[str, Any]


def find_sized(name: str, output_tokens: int, settings: Mapping[str, Any]) -> SizedModel:
    """The model called `name`, made as `elasticmoe model make` does where it is one of those, and not there. Blocks
    for that. `settings`: of all deployments, whose budget of a device grows where it has to. Raises ElasticMoEError."""
    with make_console() as console:
        found = resolve_model(name, console)
    spec = load_spec(found.path, _DTYPE)
    made = list(records(spec))
    kv = max(_KV_BYTES_MIN, round_up(_STREAMS * (PROMPT_TOKENS + output_tokens) * kv_token_bytes(spec), _GRANULARITY))
    needed = sum(round_up(one.nbytes, _GRANULARITY) for one in made) + kv + _OTHER_BYTES
    room = {
        "device_bytes": max(int(settings["device_bytes"]), needed),
        "kv_bytes": kv,
        "max_model_len": min(spec.max_positions, max(_LENGTH_MIN, PROMPT_TOKENS + 2 * output_tokens)),
        "dtype": _DTYPE,
    }
    weights = sum(tensor.nbytes for one in made for tensor in one.tensors)
    facts = {"name": found.name, "family": spec.family, "weight_bytes": weights, "settings": room}
    return SizedModel(str(found.path), spec, dict(settings) | room, facts)
