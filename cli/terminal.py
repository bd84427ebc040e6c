"""What commands print: every text on its way to the user passes here, and is cleaned of what a terminal would act on.

Names, reasons and answers come from models, clients and other processes. A terminal takes control characters for
commands (moving the cursor, setting its title, answering as if the user had typed), and bidirectional overrides let a
text look like another one. `tests/test_tidy.py` sees to it that no other module of the command line prints.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from typing import IO, TYPE_CHECKING, Any, NoReturn

from elasticmoe.cli.arguments import plainly
from elasticmoe.common.protocol.errors import ElasticMoEError

if TYPE_CHECKING:  # rich takes longer to import than what prints no table lives
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

# Control characters (C0, DEL, C1), line and paragraph separators, bidirectional embeddings, overrides and isolates, and
# halves of surrogate pairs, which no encoding takes. The marks U+200E, U+200F and joiners stay: scripts need them.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_IN_LINES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = re.compile("[\v\f\x85]")
_UNSAFE_IN_ANSWERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


OUTPUT_FAILED = "output_failed"
WRONG_USAGE = 2
_PIPE_WIDTH = 4_096


def clean(text: str) -> str:
    """`text` as one line: what a terminal would act on is shown by its number, such as `\\x1b`."""
    return _UNSAFE.sub(_escaped, text)


def clean_lines(text: str) -> str:
    """The same with line ends and tabs as they are: for text whose lines are ours."""
    return _UNSAFE_IN_LINES.sub(_escaped, text)


def clean_answer(text: str) -> str:
    """A model's answer, or a part of it: its other line ends become line ends, what else would act is left out."""
    return _UNSAFE_IN_ANSWERS.sub("", _BREAKS.sub("\n", text))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def say(text: str = "", *, end: str = "\n") -> None:
    """Print lines at once. Raises BrokenPipeError when the reader has left, ElasticMoEError (`output_failed`) when
    they cannot be written."""
    _write(clean_lines(text) + end)


def say_answer(text: str) -> None:
    """Print a part of a model's answer at once. Raises as `say` does."""
    _write(clean_answer(text))


def say_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a JSON document; characters beyond ASCII are escaped. Raises as `say` does."""
    _write(json.dumps(value, indent=indent).replace("\x7f", "\\u007f") + "\n")


def show(renderable: RenderableType) -> None:
    """Print tables. Raises as `say` does."""
    with _telling():
        table_console().print(Cleaned(renderable))
        sys.stdout.flush()


def table_console(file: IO[str] | None = None) -> Console:
    """A rich console that takes texts as they are: no markup, no emoji names, no colours of its own choice; and no
    line ends where nobody's terminal is that narrow."""
    from rich.console import Console

    class Plain(Console):
        """rich's own answer to a reader that left is to end the process with status 1."""

        def on_broken_pipe(self) -> None:
            """Called while the error is handled."""
            raise BrokenPipeError

    # The library would take FORCE_COLOR, and others, for a terminal that can be filled and asks for keys.
    is_terminal = (sys.stdout if file is None else file).isatty()
    console = Plain(
        file=file,
        force_terminal=is_terminal,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=file is not None,
    )
    if file is None and not is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH  # programs read lines, and no path in them may be cut
    return console


class Cleaned:
    """A renderable without characters that a terminal would act on; rich's own commands to it stay."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The segments of the renderable, cleaned."""
        from rich.segment import Segment

        for segment in console.render(self._renderable, options):
            yield segment if segment.control else Segment(clean_lines(segment.text), segment.style)


def complain(text: str) -> None:
    """One line on stderr. Never raises: nobody may be there to read it."""
    _complain_lines(clean(text) + "\n")


def complain_of_usage(text: str, command: str) -> None:
    """The line for a wrong command line; `command`: whose help says how."""
    complain(f"elasticmoe: wrong_usage: {text}; see `{command} --help`")


def _complain_lines(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)  # the exit status tells


def _write(text: str) -> None:
    with _telling():
        sys.stdout.write(text)
        sys.stdout.flush()


class _telling:
    """Turns a full disk behind stdout into an error with a code. A reader that left stays a BrokenPipeError."""

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise output_failed(error) from None


def output_failed(error: OSError) -> ElasticMoEError:
    """Stdout takes nothing."""
    return ElasticMoEError(f"the output cannot be written: {error.strerror}", code=OUTPUT_FAILED)


def prepare_streams() -> None:
    """Make stdin, stdout and stderr usable, whatever they are: closed (then as if they were /dev/null), or of an
    encoding that cannot hold every text (then what it cannot hold is escaped)."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # else the next file that is opened would get the number, and our output
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # for the process's life
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def discard(stream: IO[str]) -> None:
    """Let what a stream still holds, and what comes, go nowhere: the interpreter's own flush at its end must not
    fail."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):
        pass  # no file at all


class Parser(argparse.ArgumentParser):
    """A parser of command lines whose help and complaints take the same way as all other output. A complaint is one
    line with the code `wrong_usage`; the exit status is 2."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end."""
        flags = [option for action in self._actions for option in action.option_strings]
        arguments = [action for action in self._actions if not action.option_strings and action.choices]
        choices = {str(action.metavar or action.dest): list(action.choices or ()) for action in arguments}
        complain_of_usage(plainly(message, flags, choices), self.prog)
        raise SystemExit(WRONG_USAGE)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; a command tells what it does not know itself, because it knows what comes near."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout:
            say(message, end="")
        else:
            _complain_lines(clean_lines(message))


def is_text(text: str) -> bool:
    """Whether `text` can be sent: arguments and lines that were no text of their encoding hold surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def typed(text: str) -> str | None:
    """A line from stdin as text, None for bytes that are none. In a locale that knows ASCII only it may be UTF-8."""
    if is_text(text):
        return text
    try:
        return text.encode(sys.stdin.encoding, "surrogateescape").decode()
    except UnicodeError:
        return None
