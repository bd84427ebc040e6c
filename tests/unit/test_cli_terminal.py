"""What reaches a terminal."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.table import Table
from rich.text import Text

from elasticmoe.cli import chat, events, terminal
from elasticmoe.cli.admin import Admin
from elasticmoe.cli.console import PipeConsole, PlainConsole, TerminalConsole
from elasticmoe.cli.main import main
from elasticmoe.cli.sse import ServerEvent
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.sse import escape_separators

# Everything that `str.splitlines` takes for the end of a line, but for the two that are one.
SEPARATORS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"
HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\r\b\x7f\u202egnp.exe\u2066\x00"
UNSAFE = [chr(code) for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))]


def is_safe(text: str, kept: str = "\n\t") -> bool:
    return not any(char in text for char in UNSAFE if char not in kept)


def test_every_unsafe_character_is_shown_by_its_number() -> None:
    for char in [*UNSAFE, "\u2028", "\u2029", "\ud800", "\udfff"]:
        number = f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
        assert terminal.clean(f"a{char}b") == f"a{number}b"
        assert terminal.clean_lines(f"a{char}b") == (f"a{char}b" if char in "\n\t" else f"a{number}b")
        assert is_safe(terminal.clean_answer(f"a{char}b"))


@pytest.mark.parametrize(
    "text", ["plain", "naïve 模型", "\u200fعربي\u200c", "👩\u200d👩", "10\u00a0000", "a\u00adb", "\ue000"]
)
def test_scripts_and_emoji_stay_as_they_are(text: str) -> None:
    assert terminal.clean(text) == terminal.clean_lines(text) == terminal.clean_answer(text) == text


def test_an_answers_other_line_ends_become_line_ends() -> None:
    assert terminal.clean_answer("a\vb\fc\x85d\r\ne\u2028f") == "a\nb\nc\nd\ne\u2028f"


def test_tables_bars_and_lines_are_cleaned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table(title=f"t{HOSTILE}")
    table.add_column(f"c{HOSTILE}")
    table.add_row(Text(f"x{HOSTILE}", style="red"))
    table.add_row(f"[bold]{HOSTILE} :smile:")
    terminal.show(table)
    terminal.say(HOSTILE)
    terminal.say_answer(HOSTILE)
    terminal.say_json({HOSTILE: HOSTILE})
    terminal.complain(HOSTILE)
    PlainConsole(sys.stdout).line(HOSTILE)
    PlainConsole(sys.stdout).progress(HOSTILE)
    out, err = capsys.readouterr()
    assert is_safe(out)
    assert is_safe(err)
    assert "[bold]" in out
    assert ":smile:" in out
    file = io.StringIO()
    with TerminalConsole(file) as console:
        console.progress(f"[/red]{HOSTILE}", 1, 2)
        console.line(f"{HOSTILE} :smile: [/b]")
    assert "\x1b]0;" not in file.getvalue()
    assert "\u202e" not in file.getvalue()
    assert ":smile: [/b]" in file.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_secret_is_shown_on_a_terminal_and_kept_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    shown, kept, log = Terminal(), io.StringIO(), io.StringIO()
    address = "http://127.0.0.1:8100/#token=" + 64 * "a"  # longer than a line, and to be copied as one
    TerminalConsole(shown).private_line(address, "without")
    PlainConsole(kept).private_line(address, "without")
    assert (shown.getvalue(), kept.getvalue()) == (f"{address}\n", "without\n")
    reader, writer = os.pipe()
    PipeConsole(writer, log).private_line(address, "without")
    entry = json.loads(os.read(reader, 4_096))
    os.close(reader)
    os.close(writer)
    assert log.getvalue() == "without\n"
    assert entry == {"private": address, "otherwise": "without"}  # for the parent, which knows what it writes to


def test_errors_and_events_are_cleaned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Any) -> int:
        raise ElasticMoEError(HOSTILE, code=HOSTILE)

    monkeypatch.setattr("elasticmoe.cli.version.run", fail)
    assert main(["version"]) == 1
    event = {"kind": HOSTILE, "reason": f"{HOSTILE}\nforged line", "epoch": 1, "time_unix": 0, "facts": {"a": HOSTILE}}
    monkeypatch.setattr(Admin, "events", lambda *_: iter([ServerEvent(json.dumps(event).encode())]))
    monkeypatch.setattr("elasticmoe.cli.events.admin_of", lambda _: Admin(httpx.Client(trust_env=False), "t", "x"))
    assert main(["events", "--run-dir", "/nowhere"]) == 0
    out, err = capsys.readouterr()
    assert is_safe(out)
    assert is_safe(err)
    assert len(out.splitlines()) == 1


# ---- lines -----------------------------------------------------------------------------------------------------------


def test_an_answer_with_every_separator_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    raw = {"choices": [{"delta": {"content": f"A{SEPARATORS}B"}}]}
    body = f"data: {json.dumps(raw, ensure_ascii=False)}\n\ndata: [DONE]\n\n".encode()
    client = httpx.Client(
        base_url="http://s", transport=httpx.MockTransport(lambda _: httpx.Response(200, content=body))
    )
    assert "".join(chat.Session(client, "m", {}, None).answer("x")) == f"A{SEPARATORS}B"


def test_events_of_the_scaler_are_read_whole() -> None:
    body = 'data: {"reason": "a\x85\u2028\u2029b"}\n\n'.encode()
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=body))
    admin = Admin(httpx.Client(base_url="http://s", transport=transport), "t", "s")
    assert [event["reason"] for event in events.parse(admin.events("/v1/events"))] == ["a\x85\u2028\u2029b"]


def test_the_servers_events_have_no_separator_of_unicode() -> None:
    value = {"a": f"–’“A{SEPARATORS}\u2027\u202a\u0084é"}
    raw = json.dumps(value, ensure_ascii=False).encode()
    escaped = escape_separators(raw)
    assert json.loads(escaped) == value
    assert len(escaped.decode().splitlines()) == 1
    assert escape_separators(b"data: plain") is not None
    untouched = "data: –’“é\u2027".encode()
    assert escape_separators(untouched) is untouched


# ---- answers of servers that are not ours ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        "[]",
        "3",
        "null",
        '"error"',
        '{"choices": 5}',
        '{"choices": [3]}',
        '{"choices": [{"delta": 3}]}',
        '{"error": "gone"}',
        '{"error": null}',
        '{"error": {"message": {"a": 1}, "code": 3}}',
        "[" * 100_000,
        "1" * 10_000,
    ],
)
def test_strange_events_are_an_error_with_a_code(data: str) -> None:
    with pytest.raises(ElasticMoEError) as failed:
        list(chat.deltas([ServerEvent(data.encode())]))
    assert failed.value.code in ("bad_stream", "server_error", "3")


def test_halves_of_characters_can_be_sent_back() -> None:
    sent: list[bytes] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(request.content)
        parts = ["\\ud83d", "\\ude00", "\\ud83d"]
        events = "".join(f'data: {{"choices": [{{"delta": {{"content": "{part}"}}}}]}}\n\n' for part in parts)
        return httpx.Response(200, content=events.encode() + b"data: [DONE]\n\n")

    client = httpx.Client(base_url="http://s", transport=httpx.MockTransport(handler))
    talk = chat.Session(client, "m", {}, None)
    for _ in range(2):
        list(talk.answer("x"))
    assert json.loads(sent[1])["messages"][1]["content"] == "😀\ufffd"


@pytest.mark.parametrize(
    "url", ["ftp://x", "x", "http://", "http://[bad", "http://a:b:c", "http://\x7f", "/v1", "http://x:99999"]
)
def test_a_url_that_is_none_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", url, "--once", "x"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("elasticmoe: bad_url: ")
    assert is_safe(line)


@pytest.mark.parametrize("key", [b"", b"a b", b"a\nb", "é".encode(), b"\xff", b"x" * 5_000])
def test_a_key_that_fits_in_no_header_is_refused(
    key: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "key"
    path.write_bytes(key)
    assert main(["chat", "--url", "http://127.0.0.1:1", "--api-key-file", str(path), "--once", "x"]) == 1
    assert "bad_key_file" in capsys.readouterr().err
