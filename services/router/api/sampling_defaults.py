"""The sampling that a model's maker recommends: the defaults of requests that do not say otherwise.

Read from generation_config.json, as vLLM does it; `generation_config` none leaves OpenAI's defaults. A value that no
request could have stops the start: it would be wrong in every answer, without a word. What the file asks for and is not
supported is named in one warning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from elasticmoe.common.checkpoint_files import read_json
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.protocol.limits import CONFIG_JSON_BYTES_MAX
from elasticmoe.common.telemetry import get_logger
from elasticmoe.common.wording import read, shown
from elasticmoe.services.router.api.schemas import GenerateRequest
from elasticmoe.services.router.api.whole import to_integers

log = get_logger("router")

FILE = "generation_config.json"
_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Of transformers' GenerationConfig, what would change answers, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "stop_strings": (),
    "dola_layers": (),
    "token_healing": (False,),
    "diversity_penalty": (0,),
    "forced_decoder_ids": (),
    "renormalize_logits": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}


class SamplingDefaults(msgspec.Struct, frozen=True):
    """None where the model asks for nothing: then it is OpenAI's default. `max_new_tokens` is how long an answer
    becomes where the request does not say; a request may ask for more."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    def given(self) -> dict[str, float]:
        """Those that are not None, by name."""
        values = msgspec.structs.asdict(self)
        return {name: value for name, value in values.items() if value is not None}


OPENAI = SamplingDefaults()


def _file_struct() -> type[msgspec.Struct]:
    """What the file may say: each value in the bounds that a request's has."""
    hints = get_type_hints(GenerateRequest, include_extras=True)
    fields: list[Any] = [(name, hints[name], None) for name in _NAMES]
    fields += [("max_new_tokens", hints["max_tokens"], None), ("do_sample", bool | None, None)]
    return msgspec.defstruct("GenerationConfig", fields)


def read_defaults(directory: Path, setting: str) -> SamplingDefaults:
    """The defaults that the checkpoint in `directory` asks for; OPENAI's for the setting none and without a file.

    `do_sample` false is greedy. Raises CheckpointError for a value out of bounds, naming key, bound and value.
    """
    fields = None if setting == "none" else read_json(directory / FILE, CONFIG_JSON_BYTES_MAX)
    if fields is None:
        return OPENAI
    try:
        found: Any = to_integers(msgspec.convert(fields, _file_struct()))
    except msgspec.ValidationError as error:
        complaint = read(error)
        raise CheckpointError(
            f"{FILE}: {complaint.told(shown(fields.get(complaint.path)))}; "
            f"set generation_config to none (--generation-config none) to serve without its defaults"
        ) from None
    unsupported = [name for name, neutral in _UNSUPPORTED.items() if fields.get(name) not in (None, [], {}, *neutral)]
    if unsupported:
        log.warning("the model's generation_config.json asks for what is not supported", ignored=unsupported)
    temperature = 0.0 if found.do_sample is False else found.temperature
    values = {name: getattr(found, name) for name in (*_NAMES, "max_new_tokens")}
    return SamplingDefaults(**(values | {"temperature": temperature}))
