"""benchmarks/exchange.md: the exchanges of ranks beside one another, on the same rows.

Ranks are processes of their own, each on its device, as in a deployment; there is no model and nothing is computed: an
expert's answer is the row that it got. *µs* is a dispatch and the combine after it, from the call to the device's end
of it, the median of the slowest rank. All exchanges have to bring the same bits. Where a kind cannot run on the
devices, as nccl between ranks on one GPU, its rows say so.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from elasticmoe.cli.arguments import whole, wholes
from elasticmoe.cli.bench.deployment import add_devices, first_of
from elasticmoe.cli.bench.report import add_output, provenance, table, write_raw
from elasticmoe.cli.children import tied_to_us
from elasticmoe.cli.terminal import say
from elasticmoe.common.devices.base import Device, FdToken, Handle
from elasticmoe.common.devices.factory import granularity_of, open_device
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.layout import COMPUTES
from elasticmoe.common.model_spec import round_up
from elasticmoe.common.protocol.errors import ElasticMoEError

KINDS: Final = ("shm", "mailbox", "torch_dist")
_ANSWER_S: Final = 180.0  # the first answer comes after the imports; groups of torch's take their time
_FAILURES: Final = (ElasticMoEError, OSError, ValueError)
_PACKET_BYTES_MAX: Final = 1 << 16
_HANDED: Final = 3  # the number of the one descriptor that child.py hands on
_FLOAT_BYTES: Final = 4


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit status. Ends with one line where it says what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--exchanges", default=",".join(KINDS), help=f"comma-separated, of {', '.join(KINDS)}")
    add("--ranks", type=whole(2, 16), default=2, help="ranks, each on a device of its own (2)")
    add("--rows", type=wholes, default=(1, 8, 32, 256), help="tokens of each rank, comma-separated")
    add("--hidden", type=wholes, default=(1024, 4096), help="elements of a token's row, comma-separated")
    add("--experts", type=whole(1, 4096), default=64, help="experts, dealt out to the ranks in turn")
    add("--top-k", type=whole(1, 64), default=8, help="experts of each token")
    add("--times", type=whole(1), default=100, help="exchanges of each, of which the median is told")
    add("--compute", default="", help="what computes on the devices (default: what `auto` takes there)")
    add_devices(parser)
    add_output(parser)
    args = parser.parse_args(words)
    try:
        return measure(args, " ".join(["python -m scripts.exchange_cost", *(sys.argv[1:] if words is None else words)]))
    except ValueError as error:
        raise SystemExit(str(error)) from None


def measure(args: argparse.Namespace, command: str) -> int:
    """Measure, print the table, write raw data; the exit status (1: answers differ, or nothing was measured). Raises
    ValueError."""
    kinds = args.exchanges.split(",")
    if unknown := [name for name in kinds if name not in KINDS]:
        raise ValueError(f"unknown exchange {unknown[0]!r}; known: {', '.join(KINDS)}")
    if args.top_k > args.experts:
        raise ValueError(f"--top-k {args.top_k} exceeds --experts {args.experts}")
    devices = DeviceCount.parse(first_of(args.devices, args.ranks))
    if args.compute and args.compute not in COMPUTES[devices.backend]:
        raise ValueError(f"{args.compute} does not compute on {devices}: {' or '.join(COMPUTES[devices.backend])} do")
    rows: list[dict[str, Any]] = []
    for hidden in args.hidden:
        for kind in kinds:
            rows += _measure(args, devices, kind, hidden)
    rows.sort(key=lambda row: (row["hidden"], row["rows"], kinds.index(row["exchange"])))
    wrong = _compare(rows)
    say(table([{name: row[name] for name in _HEADS} for row in rows]))
    data: dict[str, Any] = {"provenance": provenance(command)}
    data["devices"] = str(devices)
    data |= {"ranks": args.ranks, "experts": args.experts, "top_k": args.top_k, "times": args.times, "rows": rows}
    say(f"raw data: {write_raw(args.output, 'exchange', data)}")
    return 1 if wrong or not any(row["digests"] for row in rows) else 0


_HEADS: Final = ("hidden", "rows", "exchange", "µs", "slowest µs", "KiB to others", "bits")


def _compare(rows: Sequence[dict[str, Any]]) -> bool:
    """Say of each whether it brought the bits of the first exchange on its rows; whether any did not."""
    wrong = False
    for row in rows:
        of_same = [r for r in rows if (r["hidden"], r["rows"]) == (row["hidden"], row["rows"]) and r["digests"]]
        if row["digests"]:
            is_same = row["digests"] == of_same[0]["digests"]
            row["bits"] = "the same" if is_same else "others"
            wrong = wrong or not is_same
    return wrong


def _measure(args: argparse.Namespace, devices: DeviceCount, kind: str, hidden: int) -> list[dict[str, Any]]:
    """The rows of an exchange. One that cannot run is told, and the others go on."""
    found: dict[int, dict[str, Any]] = {}
    reason = ""
    try:
        with _ranks(args, devices, kind, hidden) as ranks:
            for rows in args.rows:
                found[rows] = _summed(_all(ranks, "run", rows, args.times))
    except _FAILURES as error:
        reason = f"not measured: {error}"
    missing: dict[str, Any] = {"µs": "", "slowest µs": "", "KiB to others": "", "bits": reason, "digests": []}
    return [{"hidden": hidden, "rows": rows, "exchange": kind, **found.get(rows, missing)} for rows in args.rows]


def _summed(said: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "µs": round(max(one["us"] for one in said), 1),
        "slowest µs": round(max(one["us_max"] for one in said), 1),
        "KiB to others": round(sum(one["bytes"] for one in said) / 1024, 1),
        "digests": [one["digest"] for one in said],
    }


class _Rank:
    """A process of tests/hardware/exchange_rank.py. Owns it; it is killed at the end of the `with` block."""

    def __init__(self, folder: Path, slot: int) -> None:
        """Raises OSError."""
        argv = [sys.executable, "-P", "-m", "tests.hardware.exchange_rank", str(_HANDED)]
        self._slot, self._said = slot, folder / f"rank-{slot}"
        with ExitStack() as opened:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket = opened.enter_context(ours)
            said = opened.enter_context(open(self._said, "wb"))
            with theirs:
                self._process = subprocess.Popen(
                    tied_to_us(argv, [theirs.fileno()]),
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    pass_fds=[theirs.fileno()],
                )
            self._opened = opened.pop_all()
        self._socket.settimeout(_ANSWER_S)

    def __enter__(self) -> _Rank:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._opened.close()

    def order(self, name: str, *args: Any, fds: Sequence[int] = ()) -> None:
        """Tell it to do something. Raises OSError."""
        socket.send_fds(self._socket, [json.dumps([name, *args]).encode()], list(fds))

    def answer(self) -> tuple[Any, list[int]]:
        """To the oldest order that is not answered, with descriptors that are the caller's. Raises ValueError with what
        it said, or for none in time."""
        try:
            packet, fds, _, _ = socket.recv_fds(self._socket, _PACKET_BYTES_MAX, 1)
        except TimeoutError:
            raise ValueError(f"rank {self._slot} did not answer within {_ANSWER_S:g} s") from None
        if not packet:
            lines = self._said.read_text(errors="replace").strip().splitlines()
            raise ValueError(f"rank {self._slot} has ended: {(lines or ['it said nothing'])[-1][:300]}")
        answer = json.loads(packet)
        if "error" in answer:
            raise ValueError(str(answer["error"]))
        return answer["value"], fds


def _all(ranks: Sequence[_Rank], name: str, *args: Any) -> list[Any]:
    """What all of them answer to an order that they carry out together. Raises ValueError."""
    for rank in ranks:
        rank.order(name, *args)
    return [rank.answer()[0] for rank in ranks]


@contextmanager
def _ranks(args: argparse.Namespace, devices: DeviceCount, kind: str, hidden: int) -> Iterator[list[_Rank]]:
    """Ranks that are members of one generation, with mailboxes of which this process is the owner, as an HMM is."""
    shape = (args.ranks, max(args.rows), hidden, args.top_k)
    names, compute = devices.names()[: args.ranks], args.compute or COMPUTES[devices.backend][0]
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="em-exchange-")))
        ranks = [opened.enter_context(_Rank(folder, slot)) for slot in range(args.ranks)]
        ranks[0].order("make_bus", shape)
        nbytes, (bus,) = ranks[0].answer()
        opened.callback(os.close, bus)
        for slot, rank in enumerate(ranks):
            config = (slot, names[slot], kind, compute, shape, args.experts, str(folder / "rendezvous"))
            rank.order("open", config, nbytes, fds=[bus])
        numbers = [rank.answer()[0] for rank in ranks]
        owned = _mailboxes(opened, devices, names, shape) if kind == "mailbox" else []
        for rank in ranks if owned else ():
            _hand_on(rank, owned, numbers)
        ranks[0].order("publish")
        ranks[0].answer()
        _all(ranks, "connect")
        yield ranks


def _mailboxes(
    opened: ExitStack, devices: DeviceCount, names: Sequence[str], shape: tuple[int, int, int, int]
) -> list[tuple[Device, Handle]]:
    """One on each device, until `opened` ends."""
    _, tokens, hidden, top_k = shape
    granularity = granularity_of(devices, 0)
    nbytes = round_up(tokens * (1 + top_k) * hidden * _FLOAT_BYTES, granularity)
    owned = []
    for name in names:
        device = open_device(name, granularity, nbytes)
        opened.callback(device.close)
        owned.append((device, device.create(nbytes, "mailbox")))
    return owned


def _hand_on(rank: _Rank, owned: Sequence[tuple[Device, Handle]], numbers: Sequence[int]) -> None:
    """Have a rank map all mailboxes."""
    tokens, fds = [], []
    for device, handle in owned:
        token = device.export(handle)
        device.admit_to(handle, numbers)
        if isinstance(token, FdToken):
            fds.append(token.fd)
        tokens.append({name: value for name, value in token._asdict().items() if name != "fd"})
    rank.order("follow", tokens, fds=fds)
    rank.answer()


if __name__ == "__main__":
    sys.exit(main())
