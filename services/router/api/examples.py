"""What bodies and answers look like, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

_USAGE = {"prompt_tokens": 38, "completion_tokens": 8, "total_tokens": 46}
_CARD = {
    "id": "demo",
    "object": "model",
    "created": 1795668278,
    "owned_by": "elasticmoe",
    "max_model_len": 2048,
    "default_sampling_params": {"temperature": 0.2, "top_p": 0.9},
}
_REPLICA = {
    "rank": "r0t0",
    "requests": 3,
    "prompt_tokens_queued": 0,
    "kv_blocks_free": 650,
    "kv_blocks_total": 728,
    "is_fresh": True,
}

EXAMPLES: dict[str, Any] = {
    "ChatRequest": {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 64},
    "ChatCompletion": {
        "id": "chatcmpl-eac404e0c976dc08a8dae0e1",
        "object": "chat.completion",
        "created": 1795668292,
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The capital of France is Paris."},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": _USAGE,
    },
    "ModelResponse": {
        "id": "resp_2f6d0c1ab0a84b0a",
        "object": "response",
        "created_at": 1795668292,
        "model": "demo",
        "status": "completed",
        "output": [
            {
                "id": "msg_77aa01",
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [
                    {
                        "type": "output_text",
                        "text": "The capital of France is Paris.",
                        "annotations": [],
                        "logprobs": [],
                    }
                ],
            }
        ],
        "usage": {
            "input_tokens": 38,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 8,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 46,
        },
    },
    "ResponsesRequest": {"input": "What is the capital of France?", "max_output_tokens": 64},
    "MessagesRequest": {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 64},
    "MessageAnswer": {
        "id": "msg_2f6d0c1ab0a84b0a",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": "The capital of France is Paris."}],
        "model": "demo",
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 38, "output_tokens": 8},
    },
    "CountRequest": {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
    "CountedTokens": {"input_tokens": 38},
    "CompletionRequest": {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0},
    "Completion": {
        "id": "cmpl-4ca788374d40976767b7099d",
        "object": "text_completion",
        "created": 1795668685,
        "model": "demo",
        "choices": [{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    },
    "TokenizeRequest": {"prompt": "How many tokens?"},
    "Tokenized": {"count": 4, "max_model_len": 2048, "tokens": [2020, 800, 9443, 47], "token_strs": None},
    "DetokenizeRequest": {"tokens": [72, 105]},
    "Detokenized": {"prompt": "Hi"},
    "ModelCard": _CARD,
    "ModelList": {"object": "list", "data": [_CARD]},
    "Health": {"status": "ok"},
    "Ready": {"phase": "serving", "reason": "load 0.00 is the least of 2 fresh replicas"},
    "Version": {"version": "0.1.0"},
    "Load": {"server_load": 3, "limit": 256, "epoch": 1, "replicas": [_REPLICA]},
}
