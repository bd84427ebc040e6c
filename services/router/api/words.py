"""Words of OpenAI's, vLLM's and other servers' requests that would change the answer and are not supported: refused.

Those of `/v1/responses` and `/v1/messages`, too. A word that is silently ignored gives a wrong answer, so each is
either honoured (then it is a field of the request's struct), or it changes nothing (docs/api.md lists those and says
why), or it stands here. A value that asks for nothing passes: null, an empty list, object or string, and what the
word's row names, which is the default elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

VALUE_BYTES_MAX = 256  # a longer value asks for something
_VALUE_CHARS_MAX = 40
_NOTHING: tuple[object, ...] = ([], {}, "")


class Word(NamedTuple):
    """Why it is refused, and which values ask for nothing. `is_asking`: also an empty value asks for something.
    `instead`: fields of the request that the reason leads to."""

    reason: str
    neutral: tuple[object, ...] = ()
    is_asking: bool = False
    instead: tuple[str, ...] = ()


def _use(*fields: str, neutral: tuple[object, ...] = ()) -> Word:
    """Another name of what these fields ask for."""
    return Word(f"use {' or '.join(fields)}", neutral, instead=fields)


_STRUCTURED = ("response_format", "structured_outputs")
_KWARGS = ("chat_template_kwargs",)
_SAMPLER = "there is no such sampler"
_OTHER_SHAPE = "the answer has no place for it"
_TEXT_ONLY = "the model reads and writes text only"
_TRANSFER = "there is no transfer of caches between deployments"
_TEMPLATE = "a template comes with the model only"

WORDS: dict[str, Word] = {
    # Structured answers by other names: older vLLM, SGLang, TGI, llama.cpp.
    "guided_json": _use(*_STRUCTURED),
    "guided_regex": _use(*_STRUCTURED),
    "guided_choice": _use(*_STRUCTURED),
    "guided_grammar": _use(*_STRUCTURED),
    "guided_json_object": _use(*_STRUCTURED, neutral=(False,)),
    "structural_tag": _use(*_STRUCTURED),
    "json_schema": _use(*_STRUCTURED),
    "response_schema": _use(*_STRUCTURED),
    "json_mode": _use(*_STRUCTURED, neutral=(False,)),
    "format": _use(*_STRUCTURED),
    "regex": _use(*_STRUCTURED),
    "ebnf": _use(*_STRUCTURED),
    "grammar": _use(*_STRUCTURED),
    "allowed_token_ids": _use("logit_bias"),
    "bad_words": _use("logit_bias"),
    "logits_processors": Word("no code of a request is run"),
    "custom_logit_processor": Word("no code of a request is run"),
    "vllm_xargs": Word("there are no extensions"),
    # Calls. In chat, tools and functions are fields.
    "tools": Word("only chat knows tools"),
    "tool_choice": Word("only chat knows tools", ("none", "auto")),
    "functions": Word("only chat knows functions"),
    "function_call": Word("only chat knows functions", ("none", "auto")),
    "web_search_options": Word("there is no search", is_asking=True),
    # More than text.
    "audio": Word(_TEXT_ONLY),
    "modalities": Word(_TEXT_ONLY, (["text"],)),
    "prompt_embeds": Word(_TEXT_ONLY),
    # How much and how the model thinks and writes.
    "reasoning_effort": Word("only chat has a template that reads it"),
    "enable_thinking": Word("pass it in chat_template_kwargs", instead=_KWARGS),
    "thinking": Word("pass what the model's template knows in chat_template_kwargs", instead=_KWARGS),
    "thinking_budget": Word("the model's thinking has no budget of its own", (-1,)),
    "reasoning": _use("reasoning_effort", *_KWARGS),
    "thinking_token_budget": Word("the model's thinking has no budget of its own", (-1,)),
    "include_reasoning": Word("in completions thinking is a part of the answer", (True,)),
    "separate_reasoning": Word("in completions thinking is a part of the answer", (False,)),
    "verbosity": Word("say it in a message", ("medium",)),
    # What the prompt is made of.
    "chat_template": Word(_TEMPLATE),
    "system": Word("write a system message"),
    "instructions": Word("write a system message"),
    "documents": Word("only chat has a template that reads them"),
    "truncate_prompt_tokens": Word("send the tokens that are to be read"),
    "suffix": Word("the model only continues texts"),
    "echo": Word("only completions repeat their prompt", (False,)),
    "lora_path": Word("there are no adapters"),
    # How tokens are searched and sampled.
    "use_beam_search": Word("there is no beam search", (False,)),
    "num_beams": Word("there is no beam search", (1,)),
    "beam_width": Word("there is no beam search", (1,)),
    "do_sample": Word("use temperature 0", (True,)),
    "sampling_params": Word("write them beside the prompt"),
    "options": Word("write them beside the prompt"),
    "best_of": _use("n", neutral=(1,)),
    "min_new_tokens": _use("min_tokens", neutral=(0,)),
    "max_new_tokens": _use("max_tokens"),
    "max_output_tokens": _use("max_tokens"),
    "max_tokens_to_sample": _use("max_tokens"),
    "num_predict": _use("max_tokens", neutral=(-1,)),
    "min_length": _use("min_tokens", neutral=(0,)),
    "max_length": _use("max_tokens"),
    "stop_sequences": _use("stop"),
    "stop_words": _use("stop"),
    "eos_token_id": _use("stop_token_ids"),
    "suppress_tokens": _use("logit_bias"),
    "bad_words_ids": _use("logit_bias"),
    "negative_prompt": Word(_SAMPLER),
    "guidance_scale": Word(_SAMPLER, (1,)),
    "cfg_scale": Word(_SAMPLER, (1,)),
    "penalty_alpha": Word(_SAMPLER, (0,)),
    "encoder_repetition_penalty": Word(_SAMPLER, (1,)),
    "top_n_sigma": Word(_SAMPLER, (-1,)),
    "n_predict": _use("max_tokens", neutral=(-1,)),
    "repeat_penalty": _use("repetition_penalty", neutral=(1,)),
    "watermarking": Word("there is no watermark", (False,)),
    "repetition_detection": _use("repetition_penalty"),
    "no_repeat_ngram_size": Word(_SAMPLER, (0,)),
    "typical_p": Word(_SAMPLER, (1,)),
    "top_a": Word(_SAMPLER, (0,)),
    "tfs": Word(_SAMPLER, (1,)),
    "tfs_z": Word(_SAMPLER, (1,)),
    "epsilon_cutoff": Word(_SAMPLER, (0,)),
    "eta_cutoff": Word(_SAMPLER, (0,)),
    "mirostat": Word(_SAMPLER, (0,)),
    "mirostat_mode": Word(_SAMPLER, (0,)),
    "dynatemp_range": Word(_SAMPLER, (0,)),
    "smoothing_factor": Word(_SAMPLER, (0,)),
    "dry_multiplier": Word(_SAMPLER, (0,)),
    "xtc_probability": Word(_SAMPLER, (0,)),
    # When the text ends, and which parts of it are told.
    "include_stop_str_in_output": Word("the text ends before a stop string", (False,), instead=("stop",)),
    "no_stop_trim": Word("the text ends before a stop string", (False,), instead=("stop",)),
    "stop_regex": _use("stop"),
    "detokenize": Word("the answer is text", (True,)),
    # What else the answer tells.
    "prompt_logprobs": Word("use echo with logprobs in completions", instead=("echo", "logprobs")),
    "logprob_token_ids": Word(_OTHER_SHAPE),
    "return_token_ids": Word(_OTHER_SHAPE, (False,)),
    "return_prompt_text": Word(_OTHER_SHAPE, (False,)),
    "return_hidden_states": Word(_OTHER_SHAPE, (False,)),
    "moderation": Word("there is no moderation", is_asking=True),
    # Caches. A prefix cache is shared by all requests.
    "cache_salt": Word("the prefix cache is one for all requests"),
    "kv_transfer_params": Word(_TRANSFER),
    "ec_transfer_params": Word(_TRANSFER),
    # The other endpoint's names.
    "max_completion_tokens": Word("here it is called max_tokens", instead=("max_tokens",)),
    "top_logprobs": Word("here it is called logprobs", instead=("logprobs",)),
}

_NOT_HERE = "there is nothing of the kind here"
_CHAT_ONLY = "only chat has it"

# What chat has and the newer interfaces do not, or call otherwise; see RESPONSES_WORDS and ANTHROPIC_WORDS.
_OF_CHAT: dict[str, Word] = {
    "n": Word("there is one answer", (1,)),
    "seed": Word(_CHAT_ONLY),
    "stop": Word(_CHAT_ONLY),
    "stop_token_ids": Word(_CHAT_ONLY),
    "ignore_eos": Word(_CHAT_ONLY, (False,)),
    "min_tokens": Word(_CHAT_ONLY, (0,)),
    "top_k": Word(_CHAT_ONLY, (0, -1)),
    "min_p": Word(_CHAT_ONLY, (0,)),
    "presence_penalty": Word(_CHAT_ONLY, (0,)),
    "frequency_penalty": Word(_CHAT_ONLY, (0,)),
    "repetition_penalty": Word(_CHAT_ONLY, (1,)),
    "logit_bias": Word(_CHAT_ONLY),
    "logprobs": Word(_CHAT_ONLY, (False,)),
    "skip_special_tokens": Word(_CHAT_ONLY, (True,)),
    "return_tokens_as_token_ids": Word(_CHAT_ONLY, (False,)),
    "priority": Word(_CHAT_ONLY, (0,)),
    "chat_template_kwargs": Word(_CHAT_ONLY),
    "documents": Word(_CHAT_ONLY),
    "add_generation_prompt": Word(_CHAT_ONLY, (True,)),
    "continue_final_message": Word(_CHAT_ONLY, (False,)),
    "add_special_tokens": Word(_CHAT_ONLY, (False,)),
    "include_reasoning": Word("thinking comes as parts of its own", (True,)),
    "separate_reasoning": Word("thinking comes as parts of its own", (True,)),
}


def _of_newer(own: Mapping[str, Word]) -> dict[str, Word]:
    """All words, with the reasons of `own`; none leads to a field that is refused here."""
    words = {**WORDS, **_OF_CHAT, **own}
    return {
        name: word._replace(reason=_NOT_HERE) if words.keys() & word.instead else word for name, word in words.items()
    }


RESPONSES_WORDS: dict[str, Word] = _of_newer(
    {
        "messages": Word("here it is called input"),
        "max_tokens": Word("here it is called max_output_tokens"),
        "max_completion_tokens": Word("here it is called max_output_tokens"),
        "max_new_tokens": Word("use max_output_tokens"),
        "response_format": Word("here it is text.format"),
        "structured_outputs": Word("use text.format"),
        "reasoning_effort": Word("here it is reasoning.effort"),
        "system": Word("here it is called instructions"),
        "image": Word(_TEXT_ONLY),
        "background_options": Word("no answer is kept"),
        "access_programs": Word("there are none"),
        "context_management": Word("the conversation is taken as it comes"),
    }
)

ANTHROPIC_WORDS: dict[str, Word] = _of_newer(
    {
        "stop": Word("here it is called stop_sequences"),
        "max_completion_tokens": Word("here it is called max_tokens"),
        "response_format": Word("here it is output_config.format"),
        "structured_outputs": Word("use output_config.format"),
        "parallel_tool_calls": Word("here it is tool_choice.disable_parallel_tool_use", (True,)),
        "reasoning_effort": Word("use thinking"),
        "mcp_servers": Word("no server is called"),
        "container": Word("no code is run"),
    }
)

# Of a message. Contents that are no text are refused where the messages are read.
MESSAGE_WORDS: dict[str, Word] = {
    "function_call": Word("there are no functions"),
    "audio": Word(_TEXT_ONLY),
    "refusal": Word("write it into content"),
    "prefix": Word("use continue_final_message", (False,)),
    "partial": Word("use continue_final_message", (False,)),
}

# Of a tool, in the newer interfaces.
TOOL_WORDS: dict[str, Word] = {
    "allowed_callers": Word("no code is run that could call it", (["direct"],)),
    "async": Word("the conversation goes on with its result", (False,)),
    "defer_loading": Word("the model is told all tools at once", (False,)),
    "input_examples": Word("write them into the description"),
    "output_schema": Word("write it into the description"),
}

if TYPE_CHECKING:

    class UnsupportedWords(msgspec.Struct, frozen=True, kw_only=True):
        """A field for each of WORDS, UNSET unless the request has it. A struct that supports one declares it anew."""

    class UnsupportedMessageWords(msgspec.Struct, frozen=True, kw_only=True):
        """The same for MESSAGE_WORDS."""

    class UnsupportedResponsesWords(msgspec.Struct, frozen=True, kw_only=True):
        """The same for RESPONSES_WORDS."""

    class UnsupportedAnthropicWords(msgspec.Struct, frozen=True, kw_only=True):
        """The same for ANTHROPIC_WORDS."""

    class UnsupportedToolWords(msgspec.Struct, frozen=True, kw_only=True):
        """The same for TOOL_WORDS."""
else:

    def _fields_of(name, words):
        fields = [(word, Raw | UnsetType, UNSET) for word in words]
        return msgspec.defstruct(name, fields, frozen=True, kw_only=True)

    UnsupportedWords = _fields_of("UnsupportedWords", WORDS)
    UnsupportedMessageWords = _fields_of("UnsupportedMessageWords", MESSAGE_WORDS)
    UnsupportedResponsesWords = _fields_of("UnsupportedResponsesWords", RESPONSES_WORDS)
    UnsupportedAnthropicWords = _fields_of("UnsupportedAnthropicWords", ANTHROPIC_WORDS)
    UnsupportedToolWords = _fields_of("UnsupportedToolWords", TOOL_WORDS)


def asked_for(struct: msgspec.Struct, words: Mapping[str, Word]) -> Iterator[tuple[str, Word, str]]:
    """Those of `words` that `struct` has with a value that asks for something: name, row, and the value's text."""
    for name, word in words.items():
        value = getattr(struct, name)
        if type(value) is Raw and _asks(word, raw := bytes(value)):  # else it is absent, or supported here
            yield name, word, raw[:_VALUE_CHARS_MAX].decode(errors="replace")


def _asks(word: Word, raw: bytes) -> bool:
    if len(raw) > VALUE_BYTES_MAX:
        return True
    try:
        given = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):  # what is skipped over is not looked at closely
        return True
    if given is None or (given in _NOTHING and not word.is_asking):
        return False
    return not any(given == neutral and (type(given) is bool) == (type(neutral) is bool) for neutral in word.neutral)
