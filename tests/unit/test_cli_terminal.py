"""What reaches a terminal, and what a command does where a stream is closed, full, or of another encoding."""

from __future__ import annotations

import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.table import Table
from rich.text import Text

from elasticmoe.cli import chat, events, terminal
from elasticmoe.cli.admin import Admin
from elasticmoe.cli.console import PlainConsole, TerminalConsole
from elasticmoe.cli.http import LINE_BYTES_MAX, lines_of
from elasticmoe.cli.main import main
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.sse import escape_separators

ROOT = Path(__file__).parent.parent.parent
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


def test_errors_and_events_are_cleaned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Any) -> int:
        raise ElasticMoEError(HOSTILE, code=HOSTILE)

    monkeypatch.setattr("elasticmoe.cli.version.run", fail)
    assert main(["version"]) == 1
    event = {"kind": HOSTILE, "reason": f"{HOSTILE}\nforged line", "epoch": 1, "time_unix": 0, "facts": {"a": HOSTILE}}
    monkeypatch.setattr(Admin, "lines", lambda *_: iter([f"data: {json.dumps(event)}"]))
    monkeypatch.setattr("elasticmoe.cli.events.admin_of", lambda _: Admin(httpx.Client(trust_env=False), "t", "x"))
    assert main(["events", "--run-dir", "/nowhere"]) == 0
    out, err = capsys.readouterr()
    assert is_safe(out)
    assert is_safe(err)
    assert len(out.splitlines()) == 1


# ---- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_lines_end_at_line_feeds_alone_wherever_chunks_end(size: int) -> None:
    text = f"data: A{SEPARATORS}é👩D\r\n\ndata: next\nno end{SEPARATORS}"
    raw = text.encode()
    chunks = [raw[at : at + size] for at in range(0, len(raw), size)]
    assert list(lines_of(chunks)) == [f"data: A{SEPARATORS}é👩D", "", "data: next", f"no end{SEPARATORS}"]


def test_a_line_without_an_end_has_a_bound() -> None:
    with pytest.raises(ElasticMoEError, match=str(LINE_BYTES_MAX)):
        list(lines_of(b"x" * (1 << 20) for _ in range(100)))


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
    assert [event["reason"] for event in events.parse(admin.lines("/v1/events"))] == ["a\x85\u2028\u2029b"]


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
        list(chat.deltas([f"data: {data}"]))
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


# ---- the environment, and streams that are closed or of another encoding ---------------------------------------------


class _Server(http.server.BaseHTTPRequestHandler):
    """An OpenAI server that answers with the question's length."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """The models."""
        self._answer("application/json", json.dumps({"data": [{"id": f"m{HOSTILE}"}]}))

    def do_POST(self) -> None:
        """An answer with what a terminal must not see."""
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][-1]["content"]
        event = {"choices": [{"delta": {"content": f"{len(asked)} {HOSTILE} 模型\ud83d end"}}]}
        self._answer("text/event-stream", f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")

    def _answer(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listener.server_port}"
        listener.shutdown()
        thread.join()


def cli(shell: str, tmp_path: Path, *arguments: str | bytes, stdin: bytes = b"", **environment: str) -> Any:
    """Run `elasticmoe` where `shell` says ELASTICMOE, in a shell, so that redirections are real."""
    command = shell.replace("ELASTICMOE", f'"{sys.executable}" -m elasticmoe.cli.main')
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command, "bash", *arguments],
        cwd=ROOT,
        env=env | environment,
        input=stdin,
        capture_output=True,
        timeout=60,
    )
    for stream in (done.stdout, done.stderr):
        assert b"Traceback" not in stream
        assert b"internal_error" not in stream
        assert b"Exception ignored" not in stream
        assert is_safe(stream.decode(errors="replace"))
    return done


BAD_ENVIRONMENT = {
    "HTTP_PROXY": "http://127.0.0.1:9",
    "http_proxy": "socks9://x",
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "NO_PROXY": "[[[",
    "SSL_CERT_FILE": "/nowhere/cert.pem",
    "SSL_CERT_DIR": "/nowhere",
    "REQUESTS_CA_BUNDLE": "/dev/full",
    "SSLKEYLOGFILE": "/nowhere/keys",
    "NETRC": "/dev/full",
}


def test_no_command_heeds_proxies_and_certificates_of_the_environment(server: str, tmp_path: Path) -> None:
    done = cli(f"ELASTICMOE chat --url {server} --once hello", tmp_path, **BAD_ENVIRONMENT)
    assert (done.returncode, done.stdout.decode().split()[0], done.stderr) == (0, "5", b"")
    assert done.stdout.decode().strip().endswith("模型 end")
    done = cli("ELASTICMOE status --json", tmp_path, **BAD_ENVIRONMENT)
    assert (done.returncode, json.loads(done.stdout)["running"]) == (1, False)


def test_https_has_its_own_certificates(server: str, tmp_path: Path) -> None:
    url = server.replace("http:", "https:")
    done = cli(f"ELASTICMOE chat --url {url} --ca-file /nowhere/ca.pem --once x", tmp_path)
    assert (done.returncode, done.stderr.split(b": ")[1]) == (1, b"bad_certificates")
    done = cli(f"ELASTICMOE chat --url {url} --once x", tmp_path, SSL_CERT_FILE="/nowhere/cert.pem")
    assert (done.returncode, done.stderr.split(b": ")[1]) == (1, b"unreachable")


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("ELASTICMOE model list >&-", 0),
        ("ELASTICMOE version <&- >&- 2>&-", 0),
        ("ELASTICMOE nonsense 2>&-", 2),
        ("ELASTICMOE down --run-dir /nowhere/x 2>&-", 0),
        ("ELASTICMOE chat --url URL <&-", 0),
        ("ELASTICMOE chat --url URL --once x >&-", 0),
        ("ELASTICMOE version > /dev/full", 1),
        ("ELASTICMOE --help > /dev/full", 1),
        ("ELASTICMOE doctor --help > /dev/full", 1),
        ("ELASTICMOE chat --url URL --once x > /dev/full", 1),
        ("ELASTICMOE chat --url URL --once x 2> /dev/full", 0),
        ("ELASTICMOE status > /dev/full", 1),
        ("ELASTICMOE nonsense 2> /dev/full", 2),
    ],
)
def test_closed_and_full_streams_end_in_order(shell: str, code: int, server: str, tmp_path: Path) -> None:
    done = cli(shell.replace("URL", server), tmp_path)
    assert done.returncode == code, done.stderr
    if "> /dev/full" in shell and "2>" not in shell:
        assert done.stderr.startswith(b"elasticmoe: output_failed: ")


def test_a_closed_stdout_is_no_file_that_is_opened_later(tmp_path: Path) -> None:
    program = (
        "import os, elasticmoe.cli.terminal as t; t.prepare_streams(); "
        "print(os.readlink('/proc/self/fd/1'), file=t.sys.stderr)"
    )
    done = cli(f'"{sys.executable}" -c "$0" >&-'.replace("$0", program), tmp_path)
    assert done.stderr.strip() == b"/dev/null"


@pytest.mark.parametrize("command", ["--help", "version", "model list", "status", "chat --url URL --once x"])
def test_a_reader_that_left_is_the_pipes_own_exit_status(command: str, server: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "elasticmoe.cli.main", *command.replace("URL", server).split()],
        cwd=ROOT,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
        stdout=writer,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_arguments_that_are_no_text_are_a_wrong_command_line(tmp_path: Path) -> None:
    for arguments in ((b"chat", b"--once", b"\xff"), (b"status", b"--run-dir", b"/tmp/\xe9"), (b"\xff\x1b[2J",)):
        done = cli('ELASTICMOE "$@"', tmp_path, *arguments)
        assert (done.returncode, done.stderr[:36]) == (
            2,
            b"elasticmoe: bad_argument: argument " + b"123"[len(arguments) - 1 :][:1],
        )


def test_lines_that_are_no_text_are_not_sent(server: str, tmp_path: Path) -> None:
    done = cli(f"ELASTICMOE chat --url {server}", tmp_path, stdin=b"one\n\xff\xfe\nthree\n")
    assert done.returncode == 0
    assert done.stdout.count(b"bad_input") == 1
    assert b"> 3 " in done.stdout
    assert b"> 5 " in done.stdout


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "latin-1", "TERM": "dumb"},
        {"TERM": "nonsense", "COLUMNS": "0", "NO_COLOR": "1"},
        {"FORCE_COLOR": "", "TTY_COMPATIBLE": "1", "COLUMNS": "wide"},
    ],
)
def test_any_locale_and_terminal_will_do(environment: dict[str, str], server: str, tmp_path: Path) -> None:
    done = cli(f"ELASTICMOE chat --url {server}", tmp_path, stdin="模型\n".encode(), **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b" end" in done.stdout
    done = cli("ELASTICMOE status", tmp_path, **environment)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_user_without_a_home_gets_one_line(tmp_path: Path) -> None:
    for shell in (
        "ELASTICMOE status --run-dir ~nobody-at-all/run",
        "cd $(mktemp -d) && rmdir $PWD && ELASTICMOE status --run-dir relative",
    ):
        done = cli(shell, tmp_path)
        assert (done.returncode, done.stderr.startswith(b"elasticmoe: bad_config: --run-dir: ")) == (1, True), (
            done.stderr
        )
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = cli(f"ELASTICMOE chat --url {url}", tmp_path, ELASTICMOE_HOME="~nobody-at-all/x")
        assert done.stderr.startswith(b"elasticmoe: unreachable: ")
