"""The scaler's metrics, by name."""

from __future__ import annotations

from functools import partial

from elasticmoe.common.measures import OF_LISTENER, Alert, Measure, measures_in

_measure = partial(Measure, source="scaler")
# Of metrics that the router has by the same name, the scaler's.
_SCALERS = "model_name=''"

OPERATIONS = _measure(
    "elasticmoe:scale_operations",
    "counter",
    "Operations that ended",
    ("kind", "outcome"),
    (
        Alert(
            'increase(elasticmoe:scale_operations_total{outcome="aborted"}[15m]) > 0',
            "An operation was undone: `GET /v1/operations` says why.",
        ),
    ),
)
PHASES = _measure("elasticmoe:scale_phase_seconds", "histogram", "Time of each phase", ("phase",))
PAUSES = _measure(
    "elasticmoe:scale_pause_seconds",
    "histogram",
    "From a commit until all ranks flipped: an upper bound of a stream's pause",
    (),
    (
        Alert(
            "histogram_quantile(0.99, rate(elasticmoe:scale_pause_seconds_bucket[1h])) > 1",
            "Scaling is felt by clients: steps are long (`max_tokens_per_step`) or the machine is busy.",
        ),
    ),
)
BYTES_MOVED = _measure("elasticmoe:scale_bytes_moved", "counter", "Bytes copied between devices")
REFUSED = _measure(
    "elasticmoe:requests_refused",
    "counter",
    "Requests that were answered with an error, by HTTP status",
    ("status",),
    (
        Alert(
            f"rate(elasticmoe:requests_refused_total{{status=~'401|403',{_SCALERS}}}[5m]) > 0",
            "Somebody reaches the admin listener without the token.",
        ),
    ),
)
DECISIONS = _measure(
    "elasticmoe:policy_decisions",
    "counter",
    "Decisions of the policy, each time it decided otherwise than before or gave an order",
    ("reason",),
    (
        Alert(
            'increase(elasticmoe:policy_decisions_total{reason="cancel_stuck"}[1h]) > 0',
            "An operation did not come to its commit, and was cancelled: see the events.",
        ),
    ),
)
SPANS_LOST = _measure(
    "elasticmoe:spans_lost",
    "counter",
    "Spans of traces that the collector did not take",
    (),
    (
        Alert(
            f"increase(elasticmoe:spans_lost_total{{{_SCALERS}}}[15m]) > 0",
            "Traces of operations have holes: see the scaler's log, and `otlp_endpoint`.",
        ),
    ),
)
EPOCH = _measure("elasticmoe:epoch", "gauge", "Epoch of the layout")
FENCE = _measure(
    "elasticmoe:fence",
    "gauge",
    "Fencing epoch of this scaler",
    (),
    (
        Alert(
            "changes(elasticmoe:fence[15m]) > 2",
            "The scaler restarts again and again, or two take the lease from one another.",
        ),
    ),
)
SERVING = _measure(
    "elasticmoe:serving",
    "gauge",
    "1 while all ranks of the layout step",
    (),
    (
        Alert(
            "max_over_time(elasticmoe:serving[30s]) == 0",
            "Nobody is served: wake somebody. `elasticmoe status` says what is missing.",
            "critical",
            "2m",  # a start may load for so long
        ),
    ),
)
BUSY = _measure(
    "elasticmoe:scale_in_progress",
    "gauge",
    "1 while an operation is in progress",
    (),
    (
        Alert(
            "min_over_time(elasticmoe:scale_in_progress[15m]) == 1",
            "An operation does not come to its end: `elasticmoe status` says what it waits for.",
        ),
    ),
)
EXPERTS = _measure("elasticmoe:experts_per_rank", "gauge", "Expert records of a rank's device", ("rank",))
DEVICE_BYTES = _measure("elasticmoe:device_bytes", "gauge", "Device memory", ("device", "state"))
LARGE_PAGES = _measure(
    "elasticmoe:device_large_page_bytes",
    "gauge",
    "Weights and KV that lie in large pages, on devices whose own pages are small",
    ("device",),
)
DEVICE_FAILED = _measure(
    "elasticmoe:device_failed",
    "gauge",
    "1 where the HMM cannot use the device",
    ("device",),
    (
        Alert(
            "elasticmoe:device_failed == 1",
            "A device has failed: what the layout has on it has to be left out. `elasticmoe status` names it, and "
            "runbooks/lost-device.md says what to do.",
            "warning",
        ),
    ),
)
KV_BLOCKS = _measure(
    "elasticmoe:kv_blocks",
    "gauge",
    "KV blocks of the ranks that tell them",
    ("state",),
    (
        Alert(
            f"sum by ({OF_LISTENER}) (elasticmoe:kv_blocks{{state='free',engine=''}}) / "
            f"sum by ({OF_LISTENER}) (elasticmoe:kv_blocks{{engine=''}}) < 0.1",
            "KV is nearly full. Add a replica or raise `kv_bytes`.",
            held="5m",
        ),
    ),
)
STANDBY = _measure(
    "elasticmoe:standby_ranks",
    "gauge",
    "Processes that wait for a seat",
    (),
    (
        Alert(
            "elasticmoe:standby_ranks < elasticmoe:standby_ranks_wanted",
            "Fewer processes wait for a seat than `standbys` says: once there is none, a rank that dies is replaced in "
            "seconds instead of milliseconds. See the pool's log.",
            held="2m",
        ),
    ),
)
STANDBY_WANTED = _measure(
    "elasticmoe:standby_ranks_wanted", "gauge", "Processes that should wait for a seat: `standbys` of each host"
)
REPLICAS = _measure("elasticmoe:replicas", "gauge", "Replicas of the layout in force")
DESIRED = _measure(
    "elasticmoe:desired_replicas",
    "gauge",
    "Replicas that there should be: what an operation in progress leads to, else what the policy wants, in the mode "
    "`advise` too",
    (),
    (
        Alert(
            "min_over_time((elasticmoe:desired_replicas - elasticmoe:replicas)[10m:]) > 0",
            "For ten minutes there has been too little: let the policy act, or scale. `elasticmoe policy explain` "
            "says why.",
        ),
    ),
)
SATURATION = _measure(
    "elasticmoe:saturation",
    "gauge",
    "How near an objective is to being broken, by what limits it; 1: at the objective",
    ("component",),
)
ATTAINMENT = _measure(
    "elasticmoe:attainment",
    "gauge",
    "Share of the requests of the last minutes that kept both objectives; those refused or failed did not",
)
BURN = _measure(
    "elasticmoe:error_budget_burn",
    "gauge",
    "How many times faster than the objective allows requests miss it; 1: exactly at the objective",
    (),
    (
        Alert(
            "avg_over_time(elasticmoe:error_budget_burn[5m]) > 10",
            "Objectives are missed ten times as often as they may be: `elasticmoe policy explain`.",
            "critical",
        ),
    ),
)
BLIND = _measure(
    "elasticmoe:policy_unknown",
    "gauge",
    "Routers and ranks that do not tell of their load",
    (),
    (
        Alert(
            "min_over_time(elasticmoe:policy_unknown[1m]) > 0",
            "Somebody is silent, so the policy takes nothing away, and soon does nothing: `elasticmoe policy show` "
            "names them.",
        ),
    ),
)
PREDICTED_S = _measure("elasticmoe:scale_predicted_seconds", "gauge", "What the last operation was to take")
ACTUAL_S = _measure("elasticmoe:scale_actual_seconds", "gauge", "What it has taken")

# Gauges of the newest snapshot.
SEEN: tuple[Measure, ...] = (
    EPOCH,
    FENCE,
    SERVING,
    BUSY,
    EXPERTS,
    DEVICE_BYTES,
    LARGE_PAGES,
    DEVICE_FAILED,
    KV_BLOCKS,
    STANDBY,
    STANDBY_WANTED,
)
MEASURES = measures_in(globals())
