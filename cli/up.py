"""`elasticmoe up`: check, start, supervise and stop a deployment on this machine."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import sys
import time
from pathlib import Path
from typing import get_args

import msgspec

from elasticmoe.cli import checks, resume, settings
from elasticmoe.cli.arguments import whole
from elasticmoe.cli.children import ChildSpec
from elasticmoe.cli.console import Console, PipeConsole, make_console
from elasticmoe.cli.detach import start_detached
from elasticmoe.cli.embedded_store import is_answering
from elasticmoe.cli.exposure import check_api_key, is_loopback
from elasticmoe.cli.keeping import is_kept, take_up
from elasticmoe.cli.launcher import Launcher, Plan, State, StopRequested
from elasticmoe.cli.listeners import ADMIN, ROUTER, Listeners
from elasticmoe.cli.logs import Logs
from elasticmoe.cli.probes import Probe
from elasticmoe.cli.processes import process_specs
from elasticmoe.cli.resolve import resolve_model
from elasticmoe.cli.rundir import RunDir
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.layout import Activations, Compute, ExchangeKind
from elasticmoe.common.private import read_secret
from elasticmoe.common.protocol.errors import ConfigError, ElasticMoEError, InvalidRequest
from elasticmoe.common.record import (
    DAMAGED,
    STATE_FORMAT,
    DeploymentRecord,
    DownRecord,
    ProcessRecord,
    read_record,
    start_ticks,
    write_record,
)
from elasticmoe.common.record import FILE_NAME as RECORD
from elasticmoe.common.store_access import PASSWORDS, WRITER
from elasticmoe.common.tracing.opening import check_tracing
from elasticmoe.common.transport import describe

HELP = "start a deployment on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `up`. Those without a default take it from the configuration file, the environment or the service."""
    add, default = parser.add_argument, settings.DEFAULTS
    add(
        "--model",
        metavar="MODEL",
        help="a name of `model list`, a folder, or org/name of a hub (demo, unless a setting says otherwise)",
    )
    add("--served-name", metavar="NAME", help="the name that clients use (default: the model's)")
    devices = "the devices that the deployment may use (default: room for twice the replicas, where memory allows)"
    add("--devices", metavar="host:N", help=devices)
    add("--replicas", type=whole(), metavar="N", help=f"replicas to start with (default {default['replicas']})")
    add("--tp", type=whole(), metavar="N", help="devices per replica, at most 8: tensor parallelism within each")
    add("--dtype", choices=("bfloat16", "float32"), help=f"dtype of weights and KV (default {default['dtype']})")
    add(
        "--compute",
        choices=("auto", *get_args(Compute)),
        help=f"what computes the steps (default {default['compute']})",
    )
    activations = f"what bfloat16 weights are multiplied by (default {default['activations']})"
    add("--activations", choices=get_args(Activations), help=activations)
    add(
        "--exchange",
        choices=("auto", *get_args(ExchangeKind)),
        help=f"how ranks exchange tokens (default {default['exchange']})",
    )
    mode = f"settings for speed on one machine, where no other is given (default {default['performance_mode']})"
    add("--performance-mode", choices=("balanced", "throughput"), help=mode)
    add("--host", help=f"address of the OpenAI-compatible listener (default {default['host']})")
    add("--api-key-file", metavar="FILE", help="a file with the key that clients have to send as a bearer token")
    add("--no-api-key", action="store_true", help="serve other machines without a key: everybody may use it")
    add("--port", type=whole(), metavar="N", help=f"its port (default {default['port']}; 0: a free one)")
    add(
        "--admin-port",
        type=whole(),
        metavar="N",
        help=f"port of the admin listener on {default['admin_host']} (default {default['admin_port']}; 0: a free one)",
    )
    add("--run-dir", metavar="DIR", help="sockets, secrets, state and logs of this deployment")
    add("--store", metavar="URL", help="a Valkey or Redis server (default: an embedded one)")
    size = settings.parse_size
    add("--device-memory", type=size, metavar="SIZE", help="budget of each device (default: 80%% of what it has)")
    kv = f"most KV memory of each device (default {default['kv_bytes'] >> 20}MiB)"
    add("--kv-memory", type=size, metavar="SIZE", help=kv)
    length = f"longest sequence in tokens (default {default['max_model_len']})"
    add("--max-model-len", type=whole(), metavar="N", help=length)
    sequences = f"most sequences of a replica at once (default {default['max_sequences']})"
    add("--max-sequences", type=whole(), metavar="N", help=sequences)
    add(
        "--generation-config",
        choices=("auto", "none"),
        help="defaults of sampling: the checkpoint's generation_config.json, or none of it (default auto)",
    )
    settings.add_policy_flags(parser)
    add("--log-format", choices=("text", "json"), help=f"form of all logs (default {default['log_format']})")
    add("--otlp-endpoint", metavar="URL", help="a collector of OpenTelemetry, for traces (default: there are none)")
    seconds = settings.parse_seconds
    add("--ready-timeout", type=seconds, default=600.0, metavar="S", help="give up when it is not ready by then (600)")
    add(
        "--fresh",
        action="store_true",
        help="begin anew: drop the layout and the journal that an earlier run has left there",
    )
    keep = "keep layout, policy, journal and token when it is stopped, for the next `up`; as `down --keep-state` does"
    add("--keep-state", action="store_true", help=keep)
    add("--keep-logs", action="store_true", help="keep the logs also after a clean end")
    add("--detach", action="store_true", help="return when it is ready and leave it running")
    add("--report-fd", type=whole(), help=argparse.SUPPRESS)  # how `--detach` calls itself


def run(args: argparse.Namespace) -> int:
    """Exit status 0 after a clean end (`--detach`: when it is ready), 1 when it failed. Raises ElasticMoEError."""
    if args.report_fd is not None:
        return _run_detached(args)
    if args.model == "":
        raise InvalidRequest("--model is empty: leave it out for the demo, or name one of `elasticmoe model list`")
    resolved = settings.from_flags(args)
    with make_console(log_format=resolved.scaler.log_format) as console:
        run_dir = RunDir(settings.require_run_dir(resolved))  # first: a deployment that runs here has its ports
        try:
            check_tracing(resolved.router.otlp_endpoint)
            checks.check_hardware(resolved)
            checks.check_ports(resolved)
            check_api_key(resolved, may_lack=args.no_api_key)
            checks.check_store(resolved)
            resolved = _with_model(resolved, console)
            if args.detach:
                run_dir.prepare(resolved.scaler)
                run_dir.clear_logs()
                run_dir.release()  # the detached process claims it again
                return start_detached(args, resolved, console)
            return _serve(args, resolved, run_dir, console)
        finally:
            run_dir.release()


def _run_detached(args: argparse.Namespace) -> int:
    """The detached process: everything is in its environment; the parent hears how it went."""
    console = PipeConsole(args.report_fd, sys.stdout)
    try:
        resolved = settings.from_flags(args)
        console.log_to(make_console(log_format=resolved.scaler.log_format))
        status = _serve(args, resolved, RunDir(settings.require_run_dir(resolved)), console)
        console.finish("stopped: it was asked to stop before it was ready")
        return status
    except ElasticMoEError as error:
        console.finish(describe(error))
        console.line(f"elasticmoe: {describe(error)}")  # for the log: the parent has been told
        return 1


def _with_model(resolved: settings.Settings, console: Console) -> settings.Settings:
    """The settings with the model's folder, served name and every value that the children need; checked to fit."""
    checks.check_disk(resolved.scaler.run_path)
    model = resolve_model(resolved.scaler.model, console)
    resolved = resolved.replace(
        model=str(model.path),
        served_name=resolved.scaler.served_name or model.name,
        run_dir=str(resolved.scaler.run_path),
    )
    if resolved.is_roomy:
        resolved = resolved.replace(devices=_devices(resolved, model.path))
    if remarks := checks.check_checkpoint(resolved, model.path):
        console.line("warning: " + "; ".join(remarks))
    for remark in checks.check_memory(resolved, model.path):
        console.line(f"warning: {remark}")
    return resolved


def _devices(resolved: settings.Settings, model: Path) -> str:
    """The devices where the user named none: as many as fit, and no fewer than the same deployment had of which state
    is left here."""
    scaler = resolved.scaler
    left = _record_if_sound(scaler.run_path)
    num_left = 0
    if left is not None and (left.model, left.dtype) == (scaler.model, scaler.dtype):
        num_left = DeviceCount.parse(left.devices).count
    count = max(num_left, checks.num_devices_that_fit(resolved, model))
    return str(DeviceCount(scaler.device_count.backend, count))


def _record_if_sound(run_dir: Path) -> DeploymentRecord | None:
    """The record that is left there; None also for one that is damaged, which `take_up` tells."""
    try:
        return read_record(run_dir)
    except ConfigError as error:
        if error.code != DAMAGED:
            raise
        return None


def _serve(args: argparse.Namespace, resolved: settings.Settings, run_dir: RunDir, console: Console) -> int:
    """Start, supervise, stop, clean up. Raises ElasticMoEError when the deployment could not start or had to end."""
    try:
        listeners = Listeners(resolved)
    except ElasticMoEError:
        if not (run_dir.path / RECORD).exists():  # what an interrupted deployment left is for the next try
            run_dir.remove(keep_logs=False)
        raise
    try:
        resolved = resolved.replace(port=listeners.port(ROUTER), admin_port=listeners.port(ADMIN))
        is_left = take_up(resolved, run_dir, console, is_fresh=args.fresh)
        listeners.add_local(resolved.scaler.socket("admin"))
        _raise_file_limit()
        if args.report_fd is None:
            run_dir.clear_logs()
        return _run_launcher(args, resolved, run_dir, console, listeners, is_left=is_left)
    finally:
        listeners.close()


def _run_launcher(
    args: argparse.Namespace,
    resolved: settings.Settings,
    run_dir: RunDir,
    console: Console,
    listeners: Listeners,
    *,
    is_left: bool,
) -> int:
    probe = Probe(resolved.url, resolved.admin_url)
    plan = _plan(args, resolved, probe, listeners, is_resuming=is_left and not args.fresh)
    launcher = Launcher(plan, console)
    failed: ElasticMoEError | None = None
    with launcher.signals():
        try:
            launcher.start()
            for line in resume.explain(probe.resumed) if probe.resumed is not None else ():
                console.line(line)
            _announce(resolved, console, (probe.resumed or resolved.scaler).replicas)
            launcher.supervise()
        except StopRequested:
            console.close()
        except ElasticMoEError as error:
            console.close()
            failed = error
        finally:
            launcher.stop()
            probe.close()
    if failed is not None:
        run_dir.note_failure(describe(failed))
    keep_logs = args.keep_logs or failed is not None or launcher.num_unclean > 0
    is_wanted = args.keep_state or run_dir.is_keeping_asked()
    has_served, has_failed = launcher.has_served, failed is not None
    if is_kept(is_wanted=is_wanted, has_failed=has_failed, has_served=has_served, is_left=is_left):
        if is_wanted and not has_failed:
            plan.record("stopping", (), ())  # none of its processes is there any more
        run_dir.keep(keep_logs=keep_logs)
        console.line(f"{run_dir.path} keeps its layout and its journal: `elasticmoe up` goes on, `down` drops them")
    else:
        run_dir.remove(keep_logs=keep_logs)
    if keep_logs:
        console.line(f"logs are kept in {run_dir.path / 'logs'}")
    if failed is not None:
        raise failed
    return 0


def _raise_file_limit() -> None:
    """Open files as far as we may: each record of a model is one descriptor of the HMM and of every rank."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ValueError, OSError):
        pass  # `doctor` tells; small models do not need it


def _plan(
    args: argparse.Namespace, resolved: settings.Settings, probe: Probe, listeners: Listeners, *, is_resuming: bool
) -> Plan:
    scaler, run_path = resolved.scaler, resolved.scaler.run_path
    base = DeploymentRecord(
        state="starting",
        launcher=_own_record(),
        processes=(),
        model=scaler.model,
        served_name=scaler.served_name,
        dtype=scaler.dtype,
        compute=scaler.compute_backend,
        activations=scaler.activations,
        devices=scaler.devices,
        url=resolved.url,
        admin_url=resolved.admin_url,
        port=resolved.router.port,
        admin_port=scaler.admin_port,
        started_at=time.time(),
        tp=scaler.tp,
        store=resume.store_name(scaler.store_url),
        state_format=STATE_FORMAT,
        keeps_state=args.keep_state,
    )
    password = read_secret(scaler.secret(PASSWORDS[WRITER]))

    def answers(spec: ChildSpec) -> bool:
        if spec.awaits is None:
            return True
        if spec.name != "store":
            return spec.awaits.is_socket()
        if not is_answering(spec.awaits, password):
            return False
        if is_resuming:
            resume.check_devices(checks.layout_left(resolved), resolved)
        return True

    def record(state: State, processes: tuple[ProcessRecord, ...], down: tuple[DownRecord, ...]) -> bool:
        try:
            write_record(run_path, msgspec.structs.replace(base, state=state, processes=processes, down=down))
        except OSError:
            return False  # a full disk does not end a deployment; the launcher's own entry was written at the start
        return True

    return Plan(
        specs=process_specs(resolved, is_resuming=is_resuming),
        environment=settings.child_environment(resolved),
        directory=run_path,
        probe=probe,
        answers=answers,
        record=record,
        listeners=listeners.sockets,
        logs=Logs(run_path / "logs", scaler.log_bytes_max),
        ready_seconds_max=args.ready_timeout,
    )


def _own_record() -> ProcessRecord:
    return ProcessRecord("launcher", os.getpid(), start_ticks(os.getpid()) or 0)


def _announce(resolved: settings.Settings, console: Console, replicas: int) -> None:
    name = resolved.router.served_name
    console.line(f"{name} is served at   {resolved.url}/v1")
    token = resolved.scaler.secret("admin.token")
    console.line(f"admin listener      {resolved.admin_url}  (token in {token})")
    page = f"web page            {resolved.admin_url}/"
    console.private_line(f"{page}#token={read_secret(token)}", f"{page}  (asks for the token)")
    console.line(f"run directory       {resolved.scaler.run_path}")
    console.line(f"devices             {_room(resolved.scaler, replicas)}")
    if resolved.router.api_key_file:
        console.line(f"API key in          {resolved.router.api_key_file}")
    elif not is_loopback(resolved.router.host):
        console.line(f"warning: no API key: everybody who reaches {resolved.router.host} may use it")
    console.line("try it:\n\n" + curl_line(resolved.url, name, resolved.router.api_key_file) + "\n")
    if isinstance(console, PipeConsole):
        console.finish()


def _room(scaler: ScalerConfig, replicas: int) -> str:
    used = replicas * scaler.tp
    free = scaler.device_count.count - used
    room = (
        f"{free} to grow into (`elasticmoe scale`)" if free else "none to grow into: start with more --devices for that"
    )
    return f"{scaler.devices}: {used} in use, {room}"


def curl_line(url: str, name: str, key_file: str) -> str:
    """A request to try, as it can be pasted into a POSIX shell whatever the names in it are."""
    body = {"model": name, "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    words = [("curl", "-N", f"{url}/v1/chat/completions"), ("-H", "Content-Type: application/json")]
    words += [("-d", json.dumps(body, ensure_ascii=False, separators=(",", ":")))]
    lines = [shlex.join(line) for line in words]
    if key_file:  # not joined with the others: the shell has to replace it
        lines.append(f'-H "Authorization: Bearer $(cat {shlex.quote(key_file)})"')
    return " \\\n  ".join(lines)
