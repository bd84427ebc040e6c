"""How `elasticmoe status` looks: what changes comes first, and what matters less is folded where room is short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from elasticmoe.cli.console import size
from elasticmoe.cli.scale import phase_text
from elasticmoe.common.record import DeploymentRecord
from elasticmoe.common.wording import counted

_PHASES = ("prepare", "commit", "migrate", "release")
_BARS_WIDTH_MAX = 100
_WIDTH_MAX = 1_000  # beyond any table

Status = dict[str, Any]
Parts = dict[str, RenderableType]


def render(status: Status) -> RenderableType:
    """Everything that is known, whatever room there is."""
    return Group(*_parts(status).values())


class Fitted:
    """The same in a terminal: as much of it as there are lines, and the operation and the ranks in any case."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines, as many as the terminal has at most."""
        lines = console.render_lines(self._fold(console, options), options, pad=False)
        for number, line in enumerate(lines[: console.height]):
            yield from [Segment.line()] * (number > 0)
            yield from line

    def _fold(self, console: Console, options: ConsoleOptions) -> RenderableType:
        parts = _parts(self._status, is_watched=True)
        for part, shorter in _FOLDS if self._status["running"] else ():
            group = Group(*parts.values())
            if len(console.render_lines(group, options, pad=False)) <= console.height:
                return group
            if part in parts:
                folded = shorter(self._status)
                if folded is None:
                    del parts[part]
                else:
                    parts[part] = folded
        return Group(*parts.values())


def _parts(status: Status, *, is_watched: bool = False) -> Parts:
    """By name, in the order in which they are shown."""
    if not status["running"]:
        text = f"nothing runs in {status['run_dir']}"
        if "failure" in status:
            text += f"\nthe last run failed: {status['failure']}"
        return {"head": Text(text + ("\nq leaves" if is_watched else ""))}
    now, last = _operations(status.get("operations") or {})
    parts: dict[str, RenderableType | None] = {
        "head": _head(status, is_watched=is_watched),
        "operation": now,
        "failing": _failing(status),
        "ranks": _ranks(status["layout"]),
        "last": last,
        "devices": _devices(status["devices"]),
        "processes": _processes(status),
        "policy": _policy(status.get("policy") or {}),
        "load": _load(status["load"]),
    }
    return {name: part for name, part in parts.items() if part is not None}


class _Columns:
    """A table that leaves out columns where the terminal is too narrow for all. Texts left, numbers right: all columns
    after the first two are numbers. `spare`: columns in the order in which they go."""

    def __init__(self, title: str, columns: Sequence[str], spare: Sequence[str], caption: str = "") -> None:
        self._title, self._columns, self._spare, self._caption = title, columns, spare, caption
        self._rows: list[tuple[str | Text, ...]] = []

    def add(self, *cells: str | Text) -> None:
        """One row, with a cell for each column."""
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The widest table that fits."""
        left_out: list[str] = []
        without_end = options.update(max_width=_WIDTH_MAX)
        for column in (*self._spare, None):
            table = self._table(left_out)
            if column is None or Measurement.get(console, without_end, table).maximum <= options.max_width:
                yield table
                return
            left_out.append(column)

    def _table(self, left_out: Sequence[str]) -> Table:
        table = Table(title=self._title, title_justify="left", header_style="bold", caption=self._caption or None)
        shown = [index for index, column in enumerate(self._columns) if column not in left_out]
        for index in shown:
            table.add_column(self._columns[index], justify="left" if index < 2 else "right", no_wrap=True)
        for row in self._rows:
            table.add_row(*(row[index] for index in shown))
        return table


def _head(status: Status, *, is_watched: bool) -> Text:
    record = msgspec.convert(status["deployment"], DeploymentRecord)
    text = f"{record.served_name} ({record.dtype})  {record.state} for {_duration(status['uptime_s'])}"
    if is_watched:
        text += "  q leaves"
    return Text(f"{text}\n{record.url}/v1   admin {record.admin_url}   run directory {status['run_dir']}")


def _short_head(status: Status) -> Text:
    record = status["deployment"]
    text = f"{record['served_name']}  {record['state']} for {_duration(status['uptime_s'])}  q leaves"
    return Text(text, no_wrap=True, overflow="ellipsis")


def _operations(operations: dict[str, Any]) -> tuple[RenderableType | None, RenderableType | None]:
    """The operation in progress with its bars, or one line about the last one."""
    if "error" in operations:
        return None, Text(f"Operations: {operations['error']}")
    listed = [
        entry for entry in operations.get("operations") or () if not (entry["kind"] == "none" and entry["outcome"])
    ]
    if not listed:  # or only orders for what was there already
        return None, None
    if listed[0].get("outcome"):
        return None, Text("Last operation: " + operation_line(listed[0]))
    return Group(Text("Operation: " + operation_line(listed[0]), style="bold"), _bars(listed[0])), None


def operation_line(operation: dict[str, Any]) -> str:
    """One operation in one line."""
    text = f"{operation['op_id']} ({operation['kind'].replace('_', ' ')}) "
    if not operation.get("outcome"):
        return text + f"{phase_text(operation)} for {operation['elapsed_s']:.1f} s: {operation['reason']}"
    figures, error = operation.get("figures") or {}, operation.get("error") or {}
    text += f"{operation['outcome']} after {operation['elapsed_s']:.2f} s"
    if error:
        return text + f": {error.get('code')}: {error.get('message')}"
    facts = [
        f"{size(figures.get('bytes_copied', 0))} copied",
        f"{counted(figures.get('sequences_moved', 0), 'sequence')} moved",
    ]
    if figures.get("capacity_s") is not None:
        facts.insert(0, f"capacity after {figures['capacity_s']:.2f} s")
    return text + ", " + ", ".join(facts)


def _bars(operation: dict[str, Any]) -> RenderableType:
    """A bar of the phases, and one of the bytes while some are copied."""
    table = Table.grid(padding=(0, 1))
    for is_bar in (False, True, False):
        table.add_column(no_wrap=not is_bar)
    legs = max(1, operation.get("legs", 1))
    done = (operation.get("leg", 1) - 1) * len(_PHASES) if operation.get("legs") else 0
    done += _PHASES.index(operation["phase"]) if operation["phase"] in _PHASES else 0
    step = f"{operation['phase']} ({operation['leg']} of {legs})" if legs > 1 else str(operation["phase"])
    table.add_row("phase", ProgressBar(legs * len(_PHASES), done), step)
    progress = operation.get("progress")
    if operation["phase"] == "prepare" and progress and progress.get("bytes_total"):
        bar = ProgressBar(progress["bytes_total"], progress["bytes_done"])
        table.add_row("bytes", bar, f"{size(progress['bytes_done'])} of {size(progress['bytes_total'])}")
    return Constrain(table, _BARS_WIDTH_MAX)


def _processes(status: Status) -> RenderableType:
    table = _Columns("Processes", ("name", "state", "pid", "restarts"), ("pid",))
    table.add("launcher", "running", str(status["deployment"]["launcher"]["pid"]), "0")
    for process in status["deployment"]["processes"]:
        state = Text("running") if process["alive"] else Text("ended", style="red")
        table.add(process["name"], state, str(process["pid"]), str(process["restarts"]))
    for down in status["deployment"].get("down", ()):
        state = Text("failing" if down["is_failing"] else "restarting", style="red")
        table.add(down["name"], state, "", str(down["restarts"]))
    return table


def _short_processes(status: Status) -> Text:
    """How many run; the others by name."""
    processes = status["deployment"]["processes"]
    num_running = 1 + sum(process["alive"] for process in processes)
    others = [f"{process['name']} ended" for process in processes if not process["alive"]]
    others += [
        f"{down['name']} {'failing' if down['is_failing'] else 'restarting'}"
        for down in status["deployment"].get("down", ())
    ]
    return Text(", ".join([f"Processes: {num_running} running", *others]))


def _failing(status: Status) -> RenderableType | None:
    """A line for each process that does not stay up, with what goes on without it, and for each device that cannot be
    used; and why."""
    lines = [
        f"{device['device']} cannot be used: {device['failure']}"
        for device in status["devices"].get("devices", ())
        if device.get("failure")
    ]
    lines += [
        f"{down['name']} does not stay up and is tried again; the rest goes on. {down['reason']}"
        for down in status["deployment"].get("down", ())
        if down["is_failing"]
    ]
    return Text("\n".join(lines), style="red") if lines else None


def _devices(devices: dict[str, Any]) -> RenderableType:
    if "error" in devices:
        return Text(f"Devices: {devices['error']}")
    listed = [(device, device.get("memory") or {}) for device in devices.get("devices", ())]
    shown = ["budget", "weights", "kv", "other", "free"]
    if any(memory.get("total") for _, memory in listed):  # an accelerator's own memory, of which the budget is a part
        shown.insert(0, "total")
    has_large = any(device.get("large_pages") for device, _ in listed)  # where a backend's own pages are small
    table = _Columns(
        "Devices",
        ("device", "state", *("KV" if name == "kv" else name for name in shown), *["large pages"] * has_large),
        ("other", "total", "large pages", "budget", "weights"),
        _standbys(devices),
    )
    for device, memory in listed:
        figures = [size(memory.get(name) or 0) for name in shown]
        if has_large:
            figures.append(size(device.get("large_pages") or 0))
        state = Text(str(device.get("state")))
        if device.get("failure"):
            state = Text(state.plain if state.plain == "failed" else f"{state}, failed", style="red")
        table.add(str(device.get("device")), state, *figures)
    return table


def _short_devices(status: Status) -> RenderableType:
    devices = status["devices"]
    if "error" in devices:
        return _devices(devices)
    listed = devices.get("devices", ())
    memory = [device.get("memory") or {} for device in listed]
    free, budget = (sum(entry.get(name, 0) for entry in memory) for name in ("free", "budget"))
    return Text(
        f"Devices: {_counts(str(device.get('state')) for device in listed)}; "
        f"{size(free)} of {size(budget)} free; {_standbys(devices)}"
    )


def _standbys(devices: dict[str, Any]) -> str:
    return counted(devices.get("standby_processes", 0), "standby process", "standby processes")


def _counts(states: Iterable[str]) -> str:
    """`2 used, 1 free`, in the order in which they come."""
    counts: dict[str, int] = {}
    for state in states:
        counts[state] = counts.get(state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items()) or "none"


def _rank_state(rank: dict[str, Any]) -> str:
    if rank.get("state") in ("joining", "leaving"):
        return str(rank["state"])
    return "ready" if rank.get("ready") else "starting" if rank.get("pid") else "empty"


def _ranks(layout: dict[str, Any]) -> RenderableType:
    if "error" in layout:
        return Text(f"Ranks: {layout['error']}")
    ranks = layout.get("ranks", ())
    has_large = any(rank.get("mapped_large") for rank in ranks)
    table = _Columns(
        f"Ranks (epoch {layout.get('epoch')}, {layout.get('phase')})",
        ("rank", "state", "device", "experts", "KV blocks", *["mapped large"] * has_large, "pid", "slot"),
        ("slot", "pid", "mapped large", "KV blocks", "experts"),
        "computes by " + "; ".join(layout["computes_by"]) if layout.get("computes_by") else "",
    )
    for rank in ranks:
        figures = (
            rank.get("device"),
            rank.get("experts"),
            rank.get("kv_blocks"),
            *[size(rank.get("mapped_large") or 0)] * has_large,
            rank.get("pid") or "",
            rank.get("slot"),
        )
        table.add(f"r{rank.get('replica')}t{rank.get('tp')}", _rank_state(rank), *map(str, figures))
    return table


def _short_ranks(status: Status) -> RenderableType:
    """How many there are by state; those that are not ready by name."""
    layout = status["layout"]
    if "error" in layout:
        return _ranks(layout)
    ranks = layout.get("ranks", ())
    others = [f"r{rank.get('replica')}t{rank.get('tp')} {_rank_state(rank)}" for rank in ranks]
    others = [text for text in others if not text.endswith(" ready")]
    counts = _counts(map(_rank_state, ranks))
    head = f"Ranks (epoch {layout.get('epoch')}, {layout.get('phase')}): {counts}"
    return Text("; ".join([head, *(", ".join(others),) * bool(others)]))


def _policy(policy: dict[str, Any]) -> RenderableType | None:
    """Objectives, attainment and target; nothing where the policy is off or has not been read."""
    if "error" in policy:
        return Text(f"Policy: {policy['error']}")
    if "policy" not in policy or policy["policy"]["mode"] == "off":
        return None
    config, load = policy["policy"], policy["load"] or {}
    attained = "nothing has ended lately"
    if load.get("attainment") is not None:
        attained = f"kept by {load['attainment']:.1%} lately, {config['attainment']:.1%} wanted"
    sizes = f"{counted(policy['replicas'], 'replica')}, {policy['target']} wanted"
    wanted = f"first token in {config['ttft_s']:g} s, then one in {config['itl_s']:g} s"
    return Text(f"Policy ({config['mode']}): {sizes}; {wanted}; {attained}")


def _load(load: Any) -> RenderableType:
    if not isinstance(load, dict):
        return Text(f"Requests: {load}")
    if "error" in load:
        return Text(f"Requests: {load['error']}")
    return Text(f"Requests: {load.get('server_load')} in progress, {load.get('limit')} at most")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _nothing(_: Status) -> None:
    """The part goes."""


# What gives way, in this order, until the rest fits.
_FOLDS: tuple[tuple[str, Callable[[Status], RenderableType | None]], ...] = (
    ("processes", _short_processes),
    ("head", _short_head),
    ("devices", _short_devices),
    ("load", _nothing),
    ("policy", _nothing),
    ("last", _nothing),
    ("processes", _nothing),
    ("devices", _nothing),
    ("ranks", _short_ranks),
    ("failing", _nothing),
)
