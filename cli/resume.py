"""What `up` makes of what a deployment has left in its run directory: go on with it, begin anew, or refuse. Pure.

What the flags contradict is told before anything is started; devices that the layout uses, as soon as the store that
has it answers, and before anything else is started. What only the scaler can tell, it refuses
(services/scaler/store/resume.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from elasticmoe.cli.settings import Settings
from elasticmoe.common.layout import Layout, lacking
from elasticmoe.common.protocol.errors import Conflict
from elasticmoe.common.record import STATE_FORMAT, DeploymentRecord

CODE = "state_differs"


@dataclass(frozen=True, slots=True)
class Resumed:
    """What the scaler says that it goes on with: the layout's epoch and replicas, in place of `wanted` replicas, and
    the operation `op_id`, empty for none."""

    epoch: int
    replicas: int
    wanted: int
    op_id: str = ""


def check_resumable(record: DeploymentRecord, settings: Settings) -> None:
    """Raises Conflict `state_differs`, with all that differs and both ways out, where these settings cannot go on with
    what the deployment of `record` has left."""
    _refuse(differences(record, settings), settings)


def check_devices(layout: Layout | None, settings: Settings) -> None:
    """The same for the layout that was committed last, None where it cannot be told which that is."""
    text = lacking(layout, settings.scaler.device_count) if layout else ""
    _refuse([text] * bool(text), settings)


def _refuse(found: list[str], settings: Settings) -> None:
    if found:
        raise Conflict(
            f"{settings.scaler.run_path} holds what is left of a deployment, and it differs: "
            f"{'; '.join(found)}. Start with its settings to resume it, or with --fresh to begin anew without its "
            f"layout and its journal",
            code=CODE,
        )


def differences(record: DeploymentRecord, settings: Settings) -> list[str]:
    """One text for each setting that cannot be another one."""
    if record.state_format != STATE_FORMAT:
        return [f"its state has the format {record.state_format} of another version, and this one has {STATE_FORMAT}"]
    scaler = settings.scaler
    pairs = {
        "--model": (record.model, scaler.model),
        "--dtype": (record.dtype, scaler.dtype),
        "--compute": (record.compute, scaler.compute_backend),
        "--activations": (record.activations, scaler.activations),
        "--tp": (str(record.tp), str(scaler.tp)),
        "--store": (record.store or "the embedded one", store_name(scaler.store_url) or "the embedded one"),
    }
    return [f"{flag} was {before}, and is {now} now" for flag, (before, now) in pairs.items() if before != now]


def store_name(url: str) -> str:
    """A store's URL as it may be shown and compared: without user, password, and options but the database."""
    parts = urlsplit(url)
    host, db = parts.netloc.rpartition("@")[2], parse_qs(parts.query).get("db", [""])[0]
    return f"{parts.scheme}://{host}{parts.path}{f'?db={db}' if db else ''}" if url else ""


def explain(resumed: Resumed) -> list[str]:
    """What `up` says of a deployment that was resumed, one line each."""
    lines = [f"resumed: layout {resumed.epoch} with {_replicas(resumed.replicas)}, as it was committed last"]
    if resumed.replicas != resumed.wanted:
        lines.append(
            f"--replicas {resumed.wanted} is ignored because of that: `elasticmoe scale --replicas {resumed.wanted}` "
            f"changes it now, `elasticmoe up --fresh` begins anew"
        )
    if resumed.op_id:
        lines.append(f"operation {resumed.op_id}, which was in progress, goes on")
    return lines


def _replicas(number: int) -> str:
    return f"{number} replica{'s' if number != 1 else ''}"
