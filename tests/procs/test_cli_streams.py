"""Commands as processes: what they do where a stream is closed or full, and in odd environments."""

from __future__ import annotations

import http.server
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

import pytest

from tests.unit.test_cli_terminal import HOSTILE, is_safe

pytestmark = pytest.mark.procs
ROOT = Path(__file__).parent.parent.parent


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
