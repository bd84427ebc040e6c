"""The scaler's metrics, by name."""

from __future__ import annotations

from elasticmoe.common.measures import Measure

OPERATIONS = Measure(
    "elasticmoe:scale_operations",
    "counter",
    "Operations that ended",
    ("kind", "outcome"),
    'increase(elasticmoe:scale_operations_total{outcome="aborted"}[15m]) > 0',
    "An operation was undone: `GET /v1/operations` says why.",
    "scaler",
)
PHASES = Measure("elasticmoe:scale_phase_seconds", "histogram", "Time of each phase", ("phase",), source="scaler")
PAUSES = Measure(
    "elasticmoe:scale_pause_seconds",
    "histogram",
    "From a commit until all ranks flipped: an upper bound of a stream's pause",
    (),
    "histogram_quantile(0.99, rate(elasticmoe:scale_pause_seconds_bucket[1h])) > 1",
    "Scaling is felt by clients: steps are long (`max_tokens_per_step`) or the machine is busy.",
    "scaler",
)
BYTES_MOVED = Measure("elasticmoe:scale_bytes_moved", "counter", "Bytes copied between devices", source="scaler")
REFUSED = Measure(
    "elasticmoe:requests_refused",
    "counter",
    "Requests that were answered with an error, by HTTP status",
    ("status",),
    'rate(elasticmoe:requests_refused_total{status=~"401|403"}[5m]) > 0',
    "Somebody reaches the admin listener without the token.",
    "scaler",
)
EPOCH = Measure("elasticmoe:epoch", "gauge", "Epoch of the layout", source="scaler")
FENCE = Measure(
    "elasticmoe:fence",
    "gauge",
    "Fencing epoch of this scaler",
    (),
    "changes(elasticmoe:fence[15m]) > 2",
    "The scaler restarts again and again, or two take the lease from one another.",
    "scaler",
)
SERVING = Measure(
    "elasticmoe:serving",
    "gauge",
    "1 while all ranks of the layout step",
    (),
    "max_over_time(elasticmoe:serving[30s]) == 0",
    "Nobody is served: wake somebody. `elasticmoe status` says what is missing.",
    "scaler",
)
BUSY = Measure(
    "elasticmoe:scale_in_progress",
    "gauge",
    "1 while an operation is in progress",
    (),
    "min_over_time(elasticmoe:scale_in_progress[15m]) == 1",
    "An operation does not come to its end: `elasticmoe status` says what it waits for.",
    "scaler",
)
EXPERTS = Measure(
    "elasticmoe:experts_per_rank", "gauge", "Expert records of a rank's device", ("rank",), source="scaler"
)
DEVICE_BYTES = Measure("elasticmoe:device_bytes", "gauge", "Device memory", ("device", "state"), source="scaler")
KV_BLOCKS = Measure(
    "elasticmoe:kv_blocks",
    "gauge",
    "KV blocks of the ranks that tell them",
    ("state",),
    'sum(elasticmoe:kv_blocks{state="free"}) / sum(elasticmoe:kv_blocks) < 0.1',
    "For five minutes: KV is nearly full. Add a replica or raise `kv_bytes`.",
    "scaler",
)
STANDBY = Measure(
    "elasticmoe:standby_ranks",
    "gauge",
    "Processes that wait for a seat",
    (),
    "max_over_time(elasticmoe:standby_ranks[2m]) == 0",
    "The next rank that dies is replaced in seconds instead of milliseconds: see the pool's log.",
    "scaler",
)
REPLICAS = Measure("elasticmoe:replicas", "gauge", "Replicas of the layout in force", source="scaler")
DESIRED = Measure(
    "elasticmoe:desired_replicas",
    "gauge",
    "Replicas that there should be: what an operation in progress leads to, else what the policy wants, in the mode "
    "`advise` too",
    (),
    "min_over_time((elasticmoe:desired_replicas - elasticmoe:replicas)[10m:]) > 0",
    "For ten minutes there has been too little: let the policy act, or scale. `elasticmoe policy explain` says why.",
    "scaler",
)
SATURATION = Measure(
    "elasticmoe:saturation",
    "gauge",
    "How near an objective is to being broken, by what limits it; 1: at the objective",
    ("component",),
    source="scaler",
)
ATTAINMENT = Measure(
    "elasticmoe:attainment",
    "gauge",
    "Share of the requests of the last minutes that kept both objectives; those refused or failed did not",
    (),
    source="scaler",
)
BURN = Measure(
    "elasticmoe:error_budget_burn",
    "gauge",
    "How many times faster than the objective allows requests miss it; 1: exactly at the objective",
    (),
    "avg_over_time(elasticmoe:error_budget_burn[5m]) > 10",
    "Objectives are missed ten times as often as they may be: `elasticmoe policy explain`.",
    "scaler",
)
BLIND = Measure(
    "elasticmoe:policy_unknown",
    "gauge",
    "Routers and ranks that do not tell of their load",
    (),
    "min_over_time(elasticmoe:policy_unknown[1m]) > 0",
    "Somebody is silent, so the policy takes nothing away, and soon does nothing: `elasticmoe policy show` names them.",
    "scaler",
)
PREDICTED_S = Measure(
    "elasticmoe:scale_predicted_seconds", "gauge", "What the last operation was to take", source="scaler"
)
ACTUAL_S = Measure("elasticmoe:scale_actual_seconds", "gauge", "What it has taken", source="scaler")
DECISIONS = Measure(
    "elasticmoe:policy_decisions",
    "counter",
    "Decisions of the policy, each time it decided otherwise than before or gave an order",
    ("reason",),
    'increase(elasticmoe:policy_decisions_total{reason="cancel_stuck"}[1h]) > 0',
    "An operation did not come to its commit, and was cancelled: see the events.",
    "scaler",
)

# Counters that live as long as the process, and gauges of the newest snapshot.
COUNTED: tuple[Measure, ...] = (OPERATIONS, PHASES, PAUSES, BYTES_MOVED, REFUSED, DECISIONS)
SEEN: tuple[Measure, ...] = (EPOCH, FENCE, SERVING, BUSY, EXPERTS, DEVICE_BYTES, KV_BLOCKS, STANDBY)
OF_LOAD: tuple[Measure, ...] = (
    REPLICAS,
    DESIRED,
    SATURATION,
    ATTAINMENT,
    BURN,
    BLIND,
    PREDICTED_S,
    ACTUAL_S,
)
MEASURES = (*COUNTED, *SEEN, *OF_LOAD)
