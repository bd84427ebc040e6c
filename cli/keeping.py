"""What a run of a deployment leaves in its run directory, and the next one takes up there.

Who asks a deployment that serves to stop ends it: nothing stays. With `--keep-state`, of `up` or of `down`, all stays
that the next `up` goes on with. What fails, or never came to serve, ends nobody's layout in either case. A plain `down`
removes all that the launcher has left.
"""

from __future__ import annotations

from elasticmoe.cli import checks, resume
from elasticmoe.cli.console import Console
from elasticmoe.cli.rundir import RunDir
from elasticmoe.cli.settings import Settings
from elasticmoe.common.fence import Fence
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.record import DAMAGED, STATE_FORMAT, DeploymentRecord, read_record


def take_up(resolved: Settings, run_dir: RunDir, console: Console, *, is_fresh: bool) -> bool:
    """Prepare the run directory to go on with what an earlier run has left there, if there is anything, or to begin
    anew. Whether there is. Raises Conflict `state_differs`, and ConfigError where nobody can tell."""
    is_damaged = False
    try:
        left = read_record(run_dir.path)
    except ConfigError as error:
        if error.code != DAMAGED:
            raise
        if not is_fresh:
            ways = "begin anew with --fresh, or clear it away with `elasticmoe down`"
            raise ConfigError(f"{error.message}; {ways}", code=DAMAGED) from None
        left, is_damaged = None, True
    # One that ended before its first layout was committed has left nothing to go on with.
    has_layout = Fence(resolved.scaler.state_dir, "layout").epoch > 0
    is_left = is_damaged or has_layout or (left is not None and left.state_format != STATE_FORMAT)
    if is_left and not is_fresh:
        if left is not None:
            resume.check_resumable(left, resolved)
        if resolved.scaler.store_url:  # an embedded one has to be started first
            resume.check_devices(checks.layout_left(resolved), resolved)
        how = "stopped" if left is not None and _ended_in_order(left) else "cut off"
        console.line(f"resuming the deployment that was {how} in {run_dir.path}")
    run_dir.prepare(resolved.scaler)
    if is_fresh:
        run_dir.begin_anew(resolved.scaler)
        if is_left:
            console.line(f"beginning anew: layout and journal of the deployment in {run_dir.path} are dropped")
    return is_left


def _ended_in_order(left: DeploymentRecord) -> bool:
    """Whether its launcher has written that none of its processes runs: it did so as the last thing of all."""
    return left.state == "stopping" and not left.processes


def is_kept(*, is_wanted: bool, has_failed: bool, has_served: bool, is_left: bool) -> bool:
    """Whether what the next `up` goes on with stays. `is_wanted`: whoever ended it asked for that; `is_left`: it went
    on with what an earlier run had left."""
    if has_failed or not has_served:
        return has_served or is_left or (is_wanted and not has_failed)
    return is_wanted
