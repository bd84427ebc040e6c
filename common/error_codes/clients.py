"""Codes that clients of the OpenAI-compatible API meet, and those of HTTP itself, which both listeners share."""

from __future__ import annotations

from elasticmoe.common.error_codes.code import Code

CLIENTS: dict[str, Code] = {
    "invalid_request": Code("The input breaks a stated bound; nothing happened", "Correct what the text names", (400,)),
    "invalid_json": Code("The body is not JSON", "Send JSON in UTF-8", (400,)),
    "unsupported": Code(
        "A word that would change the answer and is not supported; `param` names it", "Leave it out: api.md", (400,)
    ),
    "context_length_exceeded": Code(
        "Prompt and answer are longer than the model's context", "Shorten the prompt or `max_tokens`", (400,)
    ),
    "answer_too_large": Code(
        "What the answer could become exceeds `answer_bytes_max`",
        "Ask for fewer choices, tokens or log probabilities",
        (400,),
    ),
    "body_too_complex": Code("The body has too many parts", "Split the request", (400,)),
    "prompt_too_expensive": Code(
        "Rendering or tokenizing the prompt took more than its share of time or memory", "Shorten the prompt", (400,)
    ),
    "token_without_embedding": Code(
        "The prompt has a token that the model has no embedding for", "Take the special token out of the text", (400,)
    ),
    "invalid_grammar": Code(
        "What the answer has to look like cannot be read, or nothing looks so", "Correct what the text names", (400,)
    ),
    "unsupported_schema": Code(
        "A schema, pattern or grammar asks for what is not supported; the text names it",
        "Leave it out: tools-and-schemas.md",
        (400,),
    ),
    "grammar_too_large": Code(
        "A schema, pattern or grammar exceeds a limit of its size", "Shorten it: tools-and-schemas.md", (400,)
    ),
    "grammar_too_complex": Code(
        "A schema, pattern or grammar takes more than its share of time or memory", "Simplify it", (400,)
    ),
    "grammar_failed": Code(
        "What the answer has to look like could not be followed any further, within its limits",
        "Simplify the schema, pattern or grammar",
        (400,),
    ),
    "parameters_too_large": Code(
        "Sampling parameters take more room than a rank keeps for a request",
        "Use fewer `logit_bias` entries, or a shorter schema",
        (400,),
    ),
    "invalid_api_key": Code("The API key is missing or wrong", "Send `Authorization: Bearer KEY`", (401,)),
    "forbidden": Code("Whoever asks may not", "See the text", (403,)),
    "host_refused": Code(
        "`Host` is no name of this listener, and there is no API key, or what is asked for is the scaler's web page",
        "The router: set `allowed_hosts`, or a key; the page: use localhost or the listener's address: http.md",
        (403,),
    ),
    "origin_refused": Code(
        "The request comes from a page of an origin that is not known",
        "The router: set `cors_origins`; the scaler answers its own page alone: http.md",
        (403,),
    ),
    "not_found": Code("There is no such path or thing", "Look at /openapi.json", (404,)),
    "model_not_found": Code("No such model", "`GET /v1/models`, or `elasticmoe model list`", (404,)),
    "method_not_allowed": Code("The path has no such method", "`Allow` names those that it has", (405,)),
    "request_timeout": Code("Head or body did not arrive in time", "Send faster, or in smaller requests", (408,)),
    "payload_too_large": Code("The body, or a message, exceeds its limit", "Send less: `body_bytes_max`", (413,)),
    "too_many_chunks": Code("The body has more chunks than its limit", "Send larger chunks", (413,)),
    "uri_too_long": Code("The target of the request is too long", "Shorten it", (414,)),
    "unsupported_media_type": Code("The body is not JSON by its type", "Send `Content-Type: application/json`", (415,)),
    "unsupported_content_encoding": Code("The body is compressed", "Send it as it is", (415,)),
    "headers_too_large": Code("The head exceeds 64 KiB or 128 fields", "Send less of it", (431,)),
    "duplicate_header": Code("A field that may come once came twice", "Send it once", (400,)),
    "bad_http": Code("The request is not valid HTTP", "Look at the client or the proxy", (400,)),
    "method_not_implemented": Code("No such method is known", "Use GET, POST or DELETE", (501,)),
    "transfer_coding_not_implemented": Code("A transfer coding other than chunked", "Use chunked, or a length", (501,)),
    "http_version_not_supported": Code("Another version of HTTP than 1.0 and 1.1", "Use HTTP/1.1", (505,)),
    "overloaded": Code(
        "A bounded queue is full: `requests_max`, or orders that wait", "Try again; add a replica", (429,), True
    ),
    "queue_full": Code("A queue of the router or of a rank is full", "Try again; add a replica", (429,), True),
    "kv_exhausted": Code(
        "A replica has not enough free KV for the request", "Try again; add a replica or raise `kv_bytes`", (429,), True
    ),
    "rows_exhausted": Code(
        "A replica serves `max_sequences` already", "Try again; add a replica or raise it", (429,), True
    ),
    "request_failed": Code(
        "The engine cannot compute this request; no other is affected",
        "Do not send it again; report it with the rank's log",
        (500,),
    ),
    "bad_logits": Code(
        "The model gave no finite numbers for this request", "Try `float32`; check the checkpoint", (500,)
    ),
    "internal_error": Code("A fault of ours, with its reason in the log", "Report it with the log", (500,)),
    "unavailable": Code("A part that is needed is down", "Try again after `Retry-After`", (503,), True),
    "rank_lost": Code(
        "The rank that computed the request is gone, and no other could take it", "Send it again", (503,), True
    ),
    "shutting_down": Code("The process is ending", "Try again, or another deployment", (503,), True),
    "too_many_connections": Code(
        "All places for connections are taken", "Try again; keep fewer connections open", (503,), True
    ),
    "deadline_exceeded": Code(
        "Not answered, or not done, within its time: `request_seconds_max`, `deadline_s`",
        "Try again; ask for less",
        (504,),
        True,
    ),
}
