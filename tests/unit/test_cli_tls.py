"""`chat` where TLS is meant and not spoken, spoken and not meant, or where the server cannot prove who it is."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from elasticmoe.cli.main import main
from tests.certificate import make_certificate
from tests.wording import faults_of


class Model(BaseHTTPRequestHandler):
    """One model, and one answer."""

    def do_GET(self) -> None:
        self._say("application/json", json.dumps({"data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        event = json.dumps({"choices": [{"delta": {"content": "Hello."}}]})
        self._say("text/event-stream", f"data: {event}\n\ndata: [DONE]\n\n".encode())

    def _say(self, kind: str, body: bytes) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Telling(Model):
    """As nginx and others answer plain HTTP on a port of TLS: with a page of their own."""

    def do_GET(self) -> None:
        self.send_error(400, "The plain HTTP request was sent to HTTPS port")

    do_POST = do_GET


class Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Handshakes fail here as they should."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def serving(server: ThreadingHTTPServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def plain() -> Iterator[int]:
    yield from serving(Quiet(("127.0.0.1", 0), Model))


@pytest.fixture
def tls(certificate: tuple[Path, Path]) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = Quiet(("127.0.0.1", 0), Model)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    yield from serving(server)


@pytest.fixture
def both(certificate: tuple[Path, Path]) -> Iterator[int]:
    """A port of TLS that answers plain HTTP with a page."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    class Both(Quiet):
        def finish_request(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
            if request.recv(1, 2) == b"\x16":  # MSG_PEEK: a handshake begins with it
                request = context.wrap_socket(request, server_side=True)
                request.close()
            else:
                Telling(request, client_address, self)

    yield from serving(Both(("127.0.0.1", 0), Telling))


def told(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What a chat that fails is told."""
    assert main(["chat", "--once", "Hi", *flags]) == 1
    code, _, text = capsys.readouterr().err.removeprefix("elasticmoe: ").strip().partition(": ")
    assert (code, faults_of(code, text)) == ("unreachable", [])
    return text


@pytest.mark.parametrize("flags", [(), ("--model", "m")], ids=["the list of models", "an answer"])
def test_https_where_plain_http_is_spoken(
    plain: int, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(capsys, "--url", f"https://127.0.0.1:{plain}", *flags)
    assert text == f"https://127.0.0.1:{plain} does not speak TLS as we do: for a server without it write http://"


@pytest.mark.parametrize("flags", [(), ("--model", "m")], ids=["the list of models", "an answer"])
@pytest.mark.parametrize("server", ["tls", "both"])
def test_http_where_tls_is_spoken(
    server: str, flags: tuple[str, ...], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{request.getfixturevalue(server)}"
    assert told(capsys, "--url", f"{url}/v1", *flags) == f"{url} speaks TLS: write https://"


def test_who_cannot_prove_who_it_is_and_who_can(
    tls: int, certificate: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"https://127.0.0.1:{tls}"
    text = told(capsys, "--url", url)
    assert text.startswith(f"{url} cannot prove who it is (self-signed certificate")
    assert text.endswith("--ca-file")
    assert main(["chat", "--url", url, "--ca-file", str(certificate[0]), "--once", "Hi"]) == 0
    assert capsys.readouterr().out == "Hello.\n"


def test_certificates_for_a_url_without_tls_are_refused(plain: int, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{plain}"
    assert main(["chat", "--url", url, "--ca-file", "/nonexistent", "--once", "Hi"]) == 2
    line = capsys.readouterr().err
    assert line == (
        f"elasticmoe: wrong_usage: --ca-file: it has no effect beside {url}, which is not https; "
        f"see `elasticmoe chat --help`\n"
    )
