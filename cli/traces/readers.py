"""Published traces of LLM requests, read from a file. The form is known by its content, not by its name.

- Azure LLM inference traces (2023, 2024; CC-BY, Microsoft): CSV `TIMESTAMP,ContextTokens,GeneratedTokens`, ISO times.
  https://github.com/Azure/AzurePublicDataset
- BurstGPT (arXiv:2401.17644): CSV with `Timestamp` in seconds, `Request tokens`, `Response tokens` and others.
- Mooncake (arXiv:2407.00079): a JSON object per line, `timestamp` in ms, `input_length`, `output_length`, `hash_ids`.

Other columns and fields are let be. One bad line refuses the file: a trace with holes is another trace.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import msgspec

from elasticmoe.cli.traces.arrival import Arrival, Trace
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.wording import read

BAD_TRACE = "bad_trace"
LINE_BYTES_MAX = 1 << 20
ARRIVALS_MAX = 20_000_000
TOKENS_MAX = 10_000_000  # of one prompt, and of one answer
TIMESTAMP_S_MAX = 1e10
_PREFIX_ID_MAX = (1 << 63) - 1
_SHOWN_CHARS = 60
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURST_GPT = ("Timestamp", "Request tokens", "Response tokens")
_FORMS = (
    f"Azure (a CSV header with {','.join(_AZURE)}), BurstGPT (one with {','.join(_BURST_GPT)}) "
    f"or Mooncake (a JSON object per line with timestamp, input_length, output_length)"
)

_Lines = Iterator[tuple[int, str]]


class _Bad(ConfigError):
    """What is wrong with a line, without its number."""

    code = "bad_trace"


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


_mooncake_decoder = msgspec.json.Decoder(_MooncakeLine)


def read_trace(path: Path) -> Trace:
    """The trace in the file at `path`; its first arrival is at 0.

    Raises ConfigError (`bad_trace`) with the file, the line, the value and the limit; also for one that cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise ConfigError(f"trace {path}: {error.strerror or error}", code=BAD_TRACE) from None


def _read(path: Path, file: BinaryIO) -> Trace:
    lines = _lines(path, file)
    number, first = next(lines, (0, ""))
    if not first:
        raise ConfigError(f"trace {path}: it is empty; it has to be {_FORMS}", code=BAD_TRACE)
    parse: Callable[[str], Arrival]
    if first.startswith("{"):
        form, parse, rows = "Mooncake", _parse_mooncake, _and_then((number, first), lines)
    else:
        form, parse, rows = _csv_form(path, number, first, lines)
    found: list[Arrival] = []
    num_without_output = 0
    for number, line in rows:
        try:
            arrival = parse(line)
        except _Bad as error:
            raise ConfigError(f"trace {path}, line {number}: {error.message}", code=BAD_TRACE) from None
        if arrival.output_tokens == 0:
            num_without_output += 1
        elif len(found) == ARRIVALS_MAX:
            raise ConfigError(f"trace {path}, line {number}: more than {ARRIVALS_MAX} requests", code=BAD_TRACE)
        else:
            found.append(arrival)
    if not found:
        raise ConfigError(f"trace {path}: it holds no request that wants a token", code=BAD_TRACE)
    found.sort(key=lambda arrival: arrival.at_s)
    begin = found[0].at_s
    return Trace(form, [msgspec.structs.replace(one, at_s=one.at_s - begin) for one in found], num_without_output)


def _lines(path: Path, file: BinaryIO) -> _Lines:
    """The lines that are not blank, each with its number."""
    number = 0
    while raw := file.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(raw) > LINE_BYTES_MAX:
            raise ConfigError(f"trace {path}, line {number}: over {LINE_BYTES_MAX} bytes long", code=BAD_TRACE)
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"trace {path}, line {number}: byte {error.start + 1} is not UTF-8; a packed trace has to be unpacked",
                code=BAD_TRACE,
            ) from None
        if text:
            yield number, text


def _and_then(first: tuple[int, str], rest: _Lines) -> _Lines:
    yield first
    yield from rest


def _csv_form(path: Path, number: int, first: str, lines: _Lines) -> tuple[str, Callable[[str], Arrival], _Lines]:
    header = [column.strip() for column in next(csv.reader([first]))]
    for form, columns, time_of in (("Azure", _AZURE, _iso_s), ("BurstGPT", _BURST_GPT, _seconds)):
        if all(column in header for column in columns):
            return form, _csv_parser(header, columns, time_of), lines
    raise ConfigError(f"trace {path}, line {number}: {_shown(first)} begins none of {_FORMS}", code=BAD_TRACE)


def _csv_parser(
    header: list[str], columns: tuple[str, ...], time_of: Callable[[str], float]
) -> Callable[[str], Arrival]:
    places = [header.index(column) for column in columns]

    def parse(line: str) -> Arrival:
        try:
            fields = next(csv.reader([line], strict=True))
        except csv.Error:
            raise _Bad(f"{_shown(line)} is not CSV") from None
        if len(fields) != len(header):
            raise _Bad(f"{len(fields)} fields; the header has {len(header)}")
        when, prompt, answer = (fields[place].strip() for place in places)
        return Arrival(
            _checked_time(columns[0], time_of(when), when),
            _whole(columns[1], prompt, 1),
            _whole(columns[2], answer, 0),
        )

    return parse


def _iso_s(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return math.nan
    # Without a zone any one will do: a trace has only one, and the process's own may skip an hour.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _parse_mooncake(line: str) -> Arrival:
    try:
        raw = _mooncake_decoder.decode(line)
    except msgspec.ValidationError as error:
        raise _Bad(f"{_shown(line)}: {read(error, _MooncakeLine).told()}") from None
    except (msgspec.DecodeError, RecursionError):
        raise _Bad(f"{_shown(line)} is not a JSON object") from None
    for prefix in raw.hash_ids:
        _check("hash_ids", prefix, 0, _PREFIX_ID_MAX)
    return Arrival(
        _checked_time("timestamp", raw.timestamp / 1e3, str(raw.timestamp)),
        _check("input_length", raw.input_length, 1, TOKENS_MAX),
        _check("output_length", raw.output_length, 0, TOKENS_MAX),
        tuple(raw.hash_ids),
    )


def _checked_time(what: str, at_s: float, text: str) -> float:
    if not 0 <= at_s <= TIMESTAMP_S_MAX:
        raise _Bad(f"{what} is {_shown(text)}; it has to be a time from 0 to {TIMESTAMP_S_MAX:g} seconds")
    return at_s


def _whole(what: str, text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise _Bad(f"{what} is {_shown(text)}; it has to be a whole number from {least} to {TOKENS_MAX}")
    return _check(what, int(text), least, TOKENS_MAX)


def _check(what: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise _Bad(f"{what} is {_shown(str(value))}; it has to be from {least} to {most}")
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…")
