"""Keys of config.json that are no family's own: what transformers' common code makes of them.

transformers keeps any further key as an attribute and its common code (masks, caches, loading) reads some of those,
whatever the family. Those that would change the computation are refused unless they have the value that changes
nothing. Others are known to be harmless. What remains is read by nobody: it is named in a warning, not refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from elasticmoe.common.families.config import refuse_value

# Key -> the values that change nothing; any other is refused.
_ONLY: Final[dict[str, tuple[Any, ...]]] = {
    "is_causal": (True,),  # null, too, makes transformers' masks bidirectional
    "is_encoder_decoder": (False,),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    "dual_chunk_attention_config": (None, {}),  # of long contexts: other positions beyond a chunk
    **dict.fromkeys(("index_topk", "index_n_heads", "index_head_dim"), (None,)),  # attention to some tokens only
    "per_layer_config": (None, {}),  # other sizes or windows for some layers
    "fusion_config": (None, {}),
    "distributed_config": (None,),
    "attribute_map": (None, {}),  # transformers reads keys under other names then
    "transformers_weights": (None, "model.safetensors"),  # another file to take the weights from
    # A model within a model: transformers takes the inner one for the text.
    **dict.fromkeys(("text_config", "decoder", "generator", "text_encoder"), (None,)),
}

_NAMES_AND_VERSIONS: Final = """
    architectures model_type transformers_version _name_or_path name_or_path _commit_hash tokenizer_class
    processor_class unsloth_version unsloth_fixed
"""
_DTYPES: Final = "dtype torch_dtype use_bfloat16"  # the one that is served is a setting of the deployment
_PYTHON: Final = """
    output_hidden_states output_attentions return_dict use_return_dict torchscript tf_legacy_loss attn_implementation
    _attn_implementation _attn_implementation_autoset experts_implementation _experts_implementation
    gradient_checkpointing keys_to_ignore_at_inference tie_last_hidden_states
"""  # how its code is called, and what it returns beside the logits
# Of other kinds of models and heads, and of earlier versions (`max_window_layers`: now all layers of a model have a
# window, or none)
_OTHERS: Final = """
    chunk_size_feed_forward id2label label2id num_labels problem_type finetuning_task task_specific_params prefix
    add_cross_attention cross_attention_hidden_size is_decoder tie_encoder_decoder decoder_start_token_id sep_token_id
    classifier_dropout max_window_layers
"""
_SAMPLING: Final = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    target_lookbehind temperature top_k top_p typical_p
"""  # defaults that old versions wrote here; transformers 5 drops them
_READ_ELSEWHERE: Final = """
    rope_parameters rope_scaling rope_theta partial_rotary_factor original_max_position_embeddings layer_types
    quantization_config compression_config auto_map scoring_func topk_method norm_topk_prob moe_layer_freq
    sliding_window
"""  # by the code for all families
# DeepSeek's and GLM's own training and serving code
_DEEPSEEK: Final = "aux_loss_alpha seq_aux ep_size num_nextn_predict_layers pretraining_tp"
_NEUTRAL: Final = frozenset(
    " ".join((_NAMES_AND_VERSIONS, _DTYPES, _PYTHON, _OTHERS, _SAMPLING, _READ_ELSEWHERE, _DEEPSEEK)).split()
)


def check_shared_keys(fields: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a key of any config whose value changes the computation."""
    for name, allowed in _ONLY.items():
        if name in fields and not any(_same(fields[name], each) for each in allowed):
            refuse_value(name, fields[name], allowed)


def unread_keys(fields: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Keys that neither transformers nor the family, which knows `known`, reads, in alphabetical order."""
    return sorted(name for name in fields if name not in known and name not in _NEUTRAL and name not in _ONLY)


def _same(value: Any, allowed: Any) -> bool:
    """Equal, where true is not 1."""
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed
