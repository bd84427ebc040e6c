"""docs/picture.svg: what `elasticmoe status --watch` shows while a deployment grows. `make picture` records it.

Everything is real: a deployment is started, clients stream from it, the command runs in a terminal of its own (a pty),
and what it writes is drawn by a terminal emulator (pyte). Each screen that differs from the one before becomes a frame.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import pyte

from scripts.running import command, load

TARGET = Path(__file__).resolve().parent.parent / "docs" / "picture.svg"
COLUMNS, ROWS = 92, 42
FRAMES_MAX = 14
LAST_S = 4.0  # how long the last frame stays
_WIDTH, _HEIGHT, _MARGIN = 8.43, 18, 12  # of a character at 14 px, of a line, around all
_COLORS = {"red": "#f85149", "green": "#3fb950", "brown": "#d29922", "blue": "#58a6ff", "magenta": "#bc8cff"}
_COLORS |= {"cyan": "#39c5cf", "white": "#f0f6fc", "brightblack": "#8b949e"}


class Frame(NamedTuple):
    """A screen: for each line its runs of (text, colour, is bold), and when it came."""

    at: float
    lines: tuple[tuple[tuple[str, str, bool], ...], ...]


def main() -> None:
    """Record, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ELASTICMOE_RUN_DIR"] = f"{folder}/run"
        command("up", "--model", args.model, "--devices", "host:3", "--port", "0", "--admin-port", "0", "--detach")
        try:
            frames = record()
        finally:
            command("down")
    TARGET.write_text(svg(chosen(frames)), encoding="utf-8")
    print(f"{TARGET}: {TARGET.stat().st_size // 1024} KiB")


def record() -> list[Frame]:
    """The screens of `status --watch` before, while and after a replica comes in."""
    url = json.loads(command("status", "--json"))["deployment"]["url"]
    stop = threading.Event()
    clients = [threading.Thread(target=load, args=(url, stop)) for _ in range(6)]
    for client in clients:
        client.start()
    pid, fd = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        os.execv(sys.executable, [sys.executable, "-m", "elasticmoe.cli.main", "status", "--watch"])
    try:
        screen = pyte.Screen(COLUMNS, ROWS)
        stream = pyte.ByteStream(screen)
        frames = watch(fd, screen, stream, lambda now: now > 4)
        scaling = subprocess.Popen([sys.executable, "-m", "elasticmoe.cli.main", "scale", "--replicas", "3", "--wait"])
        frames += watch(fd, screen, stream, lambda _: scaling.poll() is not None)
        frames += watch(fd, screen, stream, lambda now: now > 3)
        return frames
    finally:
        stop.set()
        os.kill(pid, signal.SIGINT)
        watch(fd, pyte.Screen(COLUMNS, ROWS), pyte.ByteStream(pyte.Screen(COLUMNS, ROWS)), lambda now: now > 1)
        os.waitpid(pid, 0)
        for client in clients:
            client.join()


def watch(fd: int, screen: pyte.Screen, stream: pyte.ByteStream, is_over: Any) -> list[Frame]:
    """Let the emulator draw what comes until `is_over(seconds)`. The screens, each when nothing more came."""
    started, frames = time.monotonic(), []
    while not is_over(time.monotonic() - started):
        if select.select([fd], [], [], 0.05)[0]:
            try:
                stream.feed(os.read(fd, 65_536))
            except OSError:  # the command has ended
                return frames
        else:
            frames.append(Frame(time.monotonic(), lines_of(screen)))
    return frames


def lines_of(screen: pyte.Screen) -> tuple[tuple[tuple[str, str, bool], ...], ...]:
    """The screen as runs of characters that look alike; empty lines at its end are left out."""
    lines = []
    for row in range(ROWS):
        cells = [screen.buffer[row][column] for column in range(COLUMNS)]
        runs = [
            ("".join(cell.data for cell in group), color, is_bold)
            for (color, is_bold), group in itertools.groupby(cells, lambda cell: (cell.fg, cell.bold))
        ]
        lines.append(tuple(runs))
    while lines and not "".join(text for text, _, _ in lines[-1]).strip():
        lines.pop()
    return tuple(lines)


def chosen(frames: list[Frame]) -> list[Frame]:
    """The screens that differ from the one before, at most FRAMES_MAX of them, the first and the last among them."""
    changed = [
        frame
        for before, frame in zip([None, *frames], frames, strict=False)
        if before is None or before.lines != frame.lines
    ]
    step = max(1, -(-len(changed) // (FRAMES_MAX - 1)))
    return [*changed[:-1:step], changed[-1]]


def svg(frames: list[Frame]) -> str:
    """An animation of the frames. A line that several have is there once."""
    lines: dict[tuple[tuple[str, str, bool], ...], str] = {}
    groups, rules = [], []
    began, total = frames[0].at, frames[-1].at - frames[0].at + LAST_S
    for number, frame in enumerate(frames):
        uses = []
        for row, line in enumerate(frame.lines):
            if not "".join(text for text, _, _ in line).strip():
                continue
            name = lines.setdefault(line, f"l{len(lines)}")
            uses.append(f'<use href="#{name}" y="{row * _HEIGHT}"/>')
        groups.append(f'<g class="f f{number}">{"".join(uses)}</g>')
        start = (frame.at - began) / total * 100
        end = (frames[number + 1].at - began) / total * 100 if number + 1 < len(frames) else 100.0
        before = "0%{visibility:hidden}" if number else ""
        after = f"{end:.2f}%{{visibility:hidden}}" if end < 100 else ""
        rules.append(
            f".f{number}{{animation:k{number} {total:.1f}s step-end infinite}}"
            f"@keyframes k{number}{{{before}{start:.2f}%{{visibility:visible}}{after}}}"
        )
    width = COLUMNS * _WIDTH + 2 * _MARGIN
    height = max(len(frame.lines) for frame in frames) * _HEIGHT + 2 * _MARGIN
    drawn = "\n".join(f'<text id="{name}" xml:space="preserve">{spans(line)}</text>' for line, name in lines.items())
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img">
<title>elasticmoe status --watch while a third replica comes in under load</title>
<style>text{{font:14px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#c9d1d9}}.b{{font-weight:bold}}
.f{{visibility:hidden}}.f{len(frames) - 1}{{visibility:visible}}{"".join(rules)}</style>
<defs>
{drawn}
</defs>
<rect width="100%" height="100%" rx="8" fill="#0d1117"/>
<g transform="translate({_MARGIN} {_MARGIN + 13})">
{chr(10).join(groups)}
</g>
</svg>
"""


def spans(line: tuple[tuple[str, str, bool], ...]) -> str:
    """The runs of a line, each in its place, so that no font can move the next."""
    found, column = [], 0
    for text, color, is_bold in line:
        if text.strip():
            end = len(text.rstrip())
            style = (
                f' fill="{_COLORS.get(color, color if color.startswith("#") else "#" + color)}"'
                if color != "default"
                else ""
            )
            style += ' class="b"' if is_bold else ""
            place = f'x="{column * _WIDTH:.1f}" textLength="{end * _WIDTH:.1f}"'
            found.append(f"<tspan {place}{style}>{escape(text[:end])}</tspan>")
        column += len(text)
    return "".join(found)


if __name__ == "__main__":
    main()
