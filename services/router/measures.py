"""The router's metrics, by name: vLLM's where vLLM has one, so that its dashboards and autoscalers work."""

from __future__ import annotations

from elasticmoe.common.measures import OF_DEPLOYMENT, OF_LISTENER, Alert, Measure, measures_in

_MODEL = ("model_name",)
_ENGINE = ("model_name", "engine")
# Of metrics that the scaler has by the same name, the router's.
_ROUTERS = "model_name!=''"

PROMPT_TOKENS = Measure("vllm:prompt_tokens", "counter", "Prompt tokens of accepted requests", _MODEL)
GENERATION_TOKENS = Measure(
    "vllm:generation_tokens",
    "counter",
    "Tokens generated",
    _MODEL,
    (
        Alert(
            f"sum by ({OF_LISTENER}) (rate(vllm:generation_tokens_total[1m])) == 0 "
            f"and sum by ({OF_LISTENER}) (vllm:num_requests_running) > 0",
            "Requests run and no token comes: look at `elasticmoe status`.",
            "critical",
            held="1m",
        ),
    ),
)
TTFT = Measure(
    "vllm:time_to_first_token_seconds",
    "histogram",
    "From acceptance to the first token",
    _MODEL,
    (
        Alert(
            f"histogram_quantile(0.99, sum by (le, {OF_LISTENER}) "
            "(rate(vllm:time_to_first_token_seconds_bucket[5m]))) > 10",
            "Prompts wait: add a replica, or lower `requests_max`.",
        ),
    ),
)
GAP = Measure(
    "vllm:inter_token_latency_seconds",
    "histogram",
    "Between two tokens of a request",
    _MODEL,
    (
        Alert(
            f"histogram_quantile(0.99, sum by (le, {OF_LISTENER}) "
            "(rate(vllm:inter_token_latency_seconds_bucket[5m]))) > 1",
            "Streams stutter: too many sequences a replica, or a machine that is busy with something else.",
        ),
    ),
)
E2E = Measure("vllm:e2e_request_latency_seconds", "histogram", "From acceptance to the end", _MODEL)
PROMPT_SIZE = Measure("vllm:request_prompt_tokens", "histogram", "Prompt tokens of a request", _MODEL)
OUTPUT_SIZE = Measure("vllm:request_generation_tokens", "histogram", "Tokens generated for a request", _MODEL)
SUCCESS = Measure(
    "vllm:request_success",
    "counter",
    "Requests that ended with a finish reason",
    ("model_name", "finished_reason"),
)
FAILED = Measure(
    "elasticmoe:requests_failed",
    "counter",
    "Accepted requests that ended with an error, by its code, or because the client left",
    ("model_name", "code"),
    (
        Alert(
            f"sum by (code, {OF_LISTENER}) (rate(elasticmoe:requests_failed_total{{code!='cancelled'}}[5m])) > 0",
            "Accepted requests fail: errors.md has the code. (`cancelled`: the client left.)",
        ),
    ),
)
REFUSED = Measure(
    "elasticmoe:requests_refused",
    "counter",
    "Requests that were answered with an error, by HTTP status",
    ("model_name", "status"),
    (
        Alert(
            f"sum by ({OF_LISTENER}) (rate(elasticmoe:requests_refused_total{{status=~'429|503',{_ROUTERS}}}[5m])) > 1",
            "More is asked for than is served: add a replica.",
        ),
        Alert(
            f"sum by (status, {OF_LISTENER}) "
            f"(increase(elasticmoe:requests_refused_total{{status=~'401|403',{_ROUTERS}}}[5m])) > 10",
            "By status 401: somebody tries keys, or a client has an old one. By 403: clients use a name of the router "
            "that it does not know, or come from such pages: `allowed_hosts`, `cors_origins`.",
            name="Access",
        ),
    ),
)
RESUBMITTED = Measure(
    "elasticmoe:requests_resubmitted",
    "counter",
    "Requests given to another replica",
    _MODEL,
    (
        Alert(
            "increase(elasticmoe:requests_resubmitted_total[15m]) > 10",
            "Ranks were lost with what they had: see the events.",
        ),
    ),
)
MOVED = Measure("elasticmoe:moved_requests", "counter", "Requests that another rank went on with", _MODEL)
RECOMPUTED = Measure(
    "elasticmoe:recomputed_tokens",
    "counter",
    "Tokens that ranks had to compute once more",
    _MODEL,
    (
        Alert(
            "rate(elasticmoe:recomputed_tokens_total[15m]) > 0.1 * rate(vllm:prompt_tokens_total[15m])",
            "Work is thrown away: KV is short (raise `kv_bytes` or add a replica), or ranks die.",
        ),
    ),
)
BAD_MESSAGES = Measure(
    "elasticmoe:bad_messages",
    "counter",
    "Messages of ranks that made no sense",
    _MODEL,
    (
        Alert(
            "increase(elasticmoe:bad_messages_total[15m]) > 0",
            "Processes of different versions, or a fault: report it with the router's log.",
        ),
    ),
)
SPANS_LOST = Measure(
    "elasticmoe:spans_lost",
    "counter",
    "Spans of traces that the collector did not take",
    _MODEL,
    (
        Alert(
            f"increase(elasticmoe:spans_lost_total{{{_ROUTERS}}}[15m]) > 0",
            "Traces have holes: see the router's log, and `otlp_endpoint`. Requests are served all the same.",
        ),
    ),
)
RUNNING = Measure("vllm:num_requests_running", "gauge", "Requests that compute", _ENGINE, source="ranks")
WAITING = Measure(
    "vllm:num_requests_waiting",
    "gauge",
    "Requests that wait",
    _ENGINE,
    (
        Alert(
            f"min_over_time((sum by ({OF_LISTENER}) (vllm:num_requests_waiting))[5m:]) > 0",
            "Replicas have had more than they can take for five minutes: add one.",
        ),
    ),
    source="ranks",
)
KV_USAGE = Measure(
    "vllm:kv_cache_usage_perc",
    "gauge",
    "Share of KV blocks in use, 0 to 1",
    _ENGINE,
    (
        Alert(
            "avg_over_time(vllm:kv_cache_usage_perc[5m]) > 0.9",
            "KV is nearly full, and requests are about to be recomputed: add a replica or raise `kv_bytes`.",
        ),
    ),
    source="ranks",
)
QUEUED = Measure("elasticmoe:prompt_tokens_queued", "gauge", "Prompt tokens to be computed", _ENGINE, source="ranks")
SILENT = Measure(
    "elasticmoe:rank_silent_seconds",
    "gauge",
    "Since a rank's last message",
    _ENGINE,
    (
        Alert(
            "elasticmoe:rank_silent_seconds > 10",
            "A rank has stopped: it should have been replaced after `rank_stall_s`. See `elasticmoe status`.",
            "critical",
        ),
    ),
    source="ranks",
)
KV_BLOCKS = Measure("elasticmoe:kv_blocks", "gauge", "KV blocks of a rank", (*_ENGINE, "state"), source="ranks")
STEP_SHARE = Measure(
    "elasticmoe:step_share",
    "gauge",
    "Share of a step that is not tensor math",
    (*_ENGINE, "rank", "part"),
    source="ranks",
)
EPOCH = Measure(
    "elasticmoe:epoch",
    "gauge",
    "Epoch of the layout that requests are sent by",
    (),
    (
        Alert(
            f"max by ({OF_DEPLOYMENT}) (elasticmoe:epoch) - min by ({OF_DEPLOYMENT}) (elasticmoe:epoch) > 0",
            "The router follows another layout than the scaler has (both have this metric). See the store.",
            "critical",
            held="1m",
        ),
    ),
)
EXPERTS = Measure("elasticmoe:experts_per_rank", "gauge", "Expert records of a rank's device", ("rank",))

MEASURES = measures_in(globals())
