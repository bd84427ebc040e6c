"""Clients that people have, against both listeners: Java's HttpClient (which offers HTTP/2 to every new server), Node's
fetch and http, curl, wget, and Python's requests, urllib and httpx. Each is skipped, with the reason, where its runtime
is not there."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.procs.router_fakes import Reply
from tests.procs.router_harness import RouterProcess, serving
from tests.procs.scaler_harness import TOKEN, ScalerProcess

pytestmark = pytest.mark.procs

SOURCES = Path(__file__).parent / "http_clients"
CLIENT_SECONDS_MAX = 60.0


@dataclass(frozen=True)
class Target:
    """A listener and a request whose answer depends on the end of its body; `proof` is in the answer."""

    url: str
    fields: dict[str, str]
    body: str
    status: int
    proof: str

    @property
    def health(self) -> str:
        return self.url.replace(self.url.split("/", 3)[3], "health")


@pytest.fixture(params=["whole", "stream", "admin"])
def target(request: pytest.FixtureRequest, router: RouterProcess, scaler: ScalerProcess) -> Iterator[Target]:
    if request.param == "admin":
        fields = {"content-type": "application/json", "authorization": f"Bearer {TOKEN}"}
        body = json.dumps({"reason": "x" * 300, "replicas": 99_999})
        yield Target(f"{scaler.url}/v1/scale", fields, body, 400, "it is 99999")
        return
    is_stream = request.param == "stream"
    body = json.dumps({"stream": is_stream, "max_tokens": 20, "prompt": "x" * 300 + "answer"})
    proof = "[DONE]" if is_stream else '"text":"answer"'
    with serving(router) as rank:
        rank.answer = lambda submit: Reply(bytes(submit.prompt)[-6:], per_step=3)
        yield Target(f"{router.url}/v1/completions", {"content-type": "application/json"}, body, 200, proof)


def program(name: str) -> str:
    """Its path; the test is skipped where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*argv: str, stdin: str | None = None, expected: int = 0) -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=CLIENT_SECONDS_MAX)
    assert done.returncode == expected, done.stderr
    return done.stdout


def arguments(target: Target) -> list[str]:
    return [target.url, target.body, *(part for field in target.fields.items() for part in field)]


def check(lines: list[list[str]], target: Target, expected: dict[str, int]) -> None:
    """Rows of (what, ..., status, text): each as often as expected, and its answer whole."""
    counts = {what: sum(row[0] == what for row in lines) for what in {row[0] for row in lines}}
    assert counts == expected
    for what, *_, status, text in lines:
        if "head" in what:
            assert status == "200"
        else:
            assert (status, target.proof in text) == (str(target.status), True), (what, status, text)


def test_java(target: Target) -> None:
    program("javac")  # a runtime alone does not run sources
    output = run(program("java"), "-XX:TieredStopAtLevel=1", str(SOURCES / "Client.java"), *arguments(target))
    rows = [line.split("\t") for line in output.splitlines()]
    check(rows, target, {"whole": 3, "chunks": 1, "expect": 1, "parallel": 8, "lines": 1, "head": 1})
    assert {row[1] for row in rows} == {"HTTP_1_1"}


def test_node(target: Target) -> None:
    rows = [
        line.split("\t") for line in run(program("node"), str(SOURCES / "client.mjs"), *arguments(target)).splitlines()
    ]
    once = ("fetch in chunks", "fetch head", "agent in packets", "agent in chunks", "agent expects", "agent offers")
    check(rows, target, {"fetch": 3, "fetch in parallel": 8, "agent": 2, "agent head": 1, **dict.fromkeys(once, 1)})


CURL = {
    "an offer of HTTP/2": ["--http2", "--data-binary", "@-"],
    "HTTP/1.1": ["--http1.1", "--data-binary", "@-"],
    "HTTP/1.0": ["--http1.0", "--data-binary", "@-"],
    "chunks": ["--header", "Transfer-Encoding: chunked", "--data-binary", "@-"],
    "an offer and chunks": ["--http2", "--header", "Transfer-Encoding: chunked", "--data-binary", "@-"],
    "an expectation": ["--header", "Expect: 100-continue", "--data-binary", "@-"],
    "an offer and an expectation": ["--http2", "--header", "Expect: 100-continue", "--data-binary", "@-"],
    "a file": ["--request", "POST", "--upload-file", "-"],
}


@pytest.mark.parametrize("how", CURL.values(), ids=CURL)
def test_curl(target: Target, how: list[str]) -> None:
    fields = [part for name, value in target.fields.items() for part in ("--header", f"{name}: {value}")]
    common = ["--silent", "--show-error", "--noproxy", "*", "--max-time", "20"]
    report = ["--write-out", "\t%{http_version}\t%{http_code}"]
    output = run(program("curl"), *common, *report, *fields, *how, target.url, stdin=target.body)
    text, version, status = output.rsplit("\t", 2)
    assert (version, int(status)) == ("1.1", target.status)
    assert target.proof in text


def test_curl_that_takes_http_2_for_granted_is_told(target: Target) -> None:
    common = ["--silent", "--noproxy", "*", "--max-time", "20", "--http2-prior-knowledge"]
    done = subprocess.run([program("curl"), *common, target.health], capture_output=True, timeout=CLIENT_SECONDS_MAX)
    assert done.returncode not in (0, 28), "it ends at once with an error"


def test_curl_and_wget_ask_for_heads(target: Target) -> None:
    output = run(program("curl"), "--silent", "--noproxy", "*", "--head", "--max-time", "20", target.health)
    assert output.startswith("HTTP/1.1 200 OK")
    assert "content-length: 15" in output
    run(program("wget"), "--no-proxy", "--quiet", "--spider", "--tries=1", "--timeout=20", target.health)


def test_python(target: Target) -> None:
    raw = target.body.encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(target.url, raw, target.fields)
    try:
        with opener.open(request, timeout=20) as heard:
            status, text = heard.status, heard.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            status, text = error.code, error.read().decode()
    assert (status, target.proof in text) == (target.status, True)
    with httpx.Client(trust_env=False, timeout=20) as client:
        for content in (raw, iter([raw[:7], raw[7:]])):
            answer = client.post(target.url, content=content, headers=target.fields)
            assert (answer.status_code, target.proof in answer.text) == (target.status, True)
        assert client.head(target.health).headers["content-length"] == "15"


def test_python_requests(target: Target) -> None:
    requests = pytest.importorskip("requests")
    raw = target.body.encode()
    with requests.Session() as session:
        session.trust_env = False
        for data in (raw, iter([raw[:7], raw[7:]])):
            for _ in range(2 if data is raw else 1):
                answer = session.post(target.url, data=data, headers=target.fields, timeout=20)
                assert (answer.status_code, target.proof in answer.text) == (target.status, True)
        assert session.head(target.health, timeout=20).headers["content-length"] == "15"
