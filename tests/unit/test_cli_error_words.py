"""The command line with wrong flags, settings, files and places: one line each, with a code, in words of ours."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe.cli.main import main
from tests.procs.waiting import free_port
from tests.unit.test_cli_arguments import WRONG
from tests.wording import faults_of

SETTINGS = {
    "PORT": ["x", "-1", "65536", "1.5", "", "１"],
    "REPLICAS": ["0", "65", "many", "1e3"],
    "DEVICES": ["gpu:1", "host:0", "host:", "host:65", "host:1000"],
    "TP": ["0", "9", "65"],
    "DTYPE": ["f16", "float64"],
    "KV_BYTES": ["0", "-5", "4GiB", str(1 << 60)],
    "MAX_MODEL_LEN": ["1", "x"],
    "LOG_LEVEL": ["loud"],
    "LOG_FORMAT": ["perhaps"],
    "DEPLOYMENT": ["", "a b", "x" * 65],
    "SERVED_NAME": ["a\x1bb", "x" * 257],
    "GENERATION_CONFIG": ["always"],
    "RANK_STALL_S": ["0", "nan", "inf", "x"],
    "ALLOWED_HOSTS": ["\u00e4", "x" * 5000],
    "STORE_URL": ["nonsense", "http://x", "redis://:pass@[bad"],
    "API_KEY_FILE": ["/nonexistent/key", "/dev/null", "/"],
    "CONFIG": ["/nonexistent.toml", "/", "/dev/null/x"],
    "PROT": ["1"],
    "RUN_DIR": ["relative/\udcff"],
}
FILES = ["replicas = [", "replicas = 'x'", "[a", "replica = 3", "= 1", "replicas = 99", "\ufeff\x00", "port = 1e99"]
COMMANDS = [
    ["up", "--model", "no such"],
    ["up", "--model", "org/name/more"],
    ["up", "--model", "/dev/null"],
    ["up", "--model", "tiny", "--host", "no such host"],
    ["up", "--model", "tiny", "--host", "192.0.2.1", "--no-api-key"],
    ["up", "--model", "tiny", "--host", "0.0.0.0"],
    ["up", "--model", "tiny", "--api-key-file", "/nonexistent"],
    ["up", "--model", "tiny", "--replicas", "3", "--devices", "host:2"],
    ["up", "--model", "tiny", "--tp", "9"],
    ["up", "--model", "tiny", "--store", "redis://127.0.0.1:1/0"],
    ["up", "--model", "tiny", "--run-dir", "/proc/x"],
    ["up", "--model", "tiny", "--run-dir", "/dev/null/x"],
    ["up", "--model", "tiny", "--run-dir", "/" + "x" * 300],
    ["down", "--run-dir", "/dev/null"],
    ["status", "--run-dir", "/dev/null"],
    ["status", "--watch"],
    ["scale", "--replicas", "2"],
    ["scale"],
    ["scale", "--cancel", "a/b"],
    ["plan", "--devices", "x"],
    ["rebalance"],
    ["events"],
    ["chat", "--url", "nonsense"],
    ["chat", "--url", "http://127.0.0.1:99999"],
    ["chat", "--url", "http://[::1", "--once", "x"],
    ["chat", "--url", "http://127.0.0.1:{port}", "--once", "x"],
    ["chat", "--url", "https://127.0.0.1:{port}", "--ca-file", "/nonexistent", "--once", "x"],
    ["chat", "--url", "https://127.0.0.1:{port}", "--ca-file", "/dev/null", "--once", "x"],
    ["chat", "--run-dir", "/nonexistent", "--once", "x"],
    ["chat", "--api-key-file", "/nonexistent", "--once", "x"],
    ["model", "make", "nonsense", "{folder}/m"],
    ["model", "make", "tiny-mixtral", "/dev/null/m"],
    ["bench", "scaling", "--methods", "magic"],
    ["bench", "scaling", "--set", "x"],
    ["bench", "overload", "--factors", "a,b"],
    ["bench", "recovery", "--faults", "moon"],
    ["chaos", "--devices", "gpu:1"],
    ["tour", "--model", "no such"],
    ["tour", "--timeout", "0"],
]


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("ELASTICMOE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ELASTICMOE_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("ELASTICMOE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "run").exists(), "something stays behind"


def line_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The code and the text of the one line that a command that must fail says."""
    try:
        status = main(argv)
    except SystemExit as ended:
        status = int(ended.code or 0)
    line = capsys.readouterr().err
    assert status in (1, 2), argv
    match = re.fullmatch(r"elasticmoe: (\w+): (.*)\n", line)
    assert match, line
    return match[1], match[2]


@pytest.mark.parametrize("name", SETTINGS)
def test_wrong_settings(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for value in SETTINGS[name]:
        monkeypatch.setenv(f"ELASTICMOE_{name}", value)
        code, text = line_of(
            ["up", "--model", "no such", "--port", "0", "--admin-port", "0"][: 3 if name == "PORT" else 7], capsys
        )
        assert faults_of(code, text) == [], (name, value, text)
        assert "model 'no such'" not in text, (name, value, "was taken")


def test_wrong_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.toml"
    monkeypatch.setenv("ELASTICMOE_CONFIG", str(file))
    for content in FILES:
        file.write_text(content)
        code, text = line_of(["up", "--model", "no such"], capsys)
        assert (code, faults_of(code, text)) == ("bad_config", []), (content, text)
    file.write_bytes(b"\xff\xfe")
    assert faults_of(*line_of(["up"], capsys)) == []


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_wrong_commands(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled = [word.format(port=free_port(), folder=tmp_path) for word in argv]
    if argv[0] == "up":
        filled += ["--port", "0", "--admin-port", "0"]
    code, text = line_of(filled, capsys)
    assert faults_of(code, text) == [], text


@pytest.mark.parametrize("argv", [argv for argv, _ in WRONG], ids=" ".join)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, text = line_of(argv, capsys)
    assert (code, faults_of(code, text)) == ("wrong_usage", []), text


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("PROT", "PORT"),
        ("REPLICA", "REPLICAS"),
        ("KV_BYTE", "KV_BYTES"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("CONFIGS", "CONFIG"),
    ],
)
def test_an_unknown_setting_gets_its_nearest(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"ELASTICMOE_{name}", "1")
    code, text = line_of(["up"], capsys)
    told = f"environment: unknown setting 'ELASTICMOE_{name}'; did you mean 'ELASTICMOE_{meant}'?"
    assert (code, text) == ("bad_config", told)


def test_an_unknown_setting_that_is_near_to_none_is_told_where_all_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ELASTICMOE_FOO", "1")
    told = "environment: unknown setting 'ELASTICMOE_FOO'; docs/reference/configuration.md has all"
    assert line_of(["up"], capsys) == ("bad_config", told)
    monkeypatch.delenv("ELASTICMOE_FOO")
    file = tmp_path / "c.toml"
    monkeypatch.setenv("ELASTICMOE_CONFIG", str(file))
    for content, name, rest in (
        ("foo = 1", "foo", "; docs/reference/configuration.md has all"),
        ("prot = 1", "prot", "; did you mean 'port'?"),
        (f"{'x' * 500} = 1", "x" * 80, "; docs/reference/configuration.md has all"),
    ):
        file.write_text(content)
        assert line_of(["up"], capsys)[1] == f"configuration file {file}: unknown setting {name!r}{rest}"


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--kv-memory", "0"], "--kv-memory"),
        (["--device-memory", "2000TiB"], "--device-memory"),
        (["--port", "70000"], "--port"),
        (["--devices", "gpu:1"], "--devices"),
        (["--max-model-len", "1"], "--max-model-len"),
    ],
)
def test_a_wrong_value_is_told_with_its_flag(argv: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = line_of(["up", *argv], capsys)
    assert (code, text.partition(": ")[0]) == ("bad_config", name)


@pytest.mark.parametrize(
    "text",
    [
        "body is not valid: Expected `int` >= 1 - at `$.replicas`",
        "Expected `str` matching regex '^host:[1-9][0-9]{0,2}\\Z' - at `$.devices`",
        "the body is not valid JSON: JSON is malformed: invalid character (byte 0)",
        "the body is not valid JSON: Input data was truncated",
        "argument --replicas: invalid int value: 'x'",
        "invalid choice: 'f' (choose from 'bfloat16', 'float32')",
        "unrecognized arguments: --modle x",
        "[Errno 17] File exists: '/dev/null'",
        "the admin listener does not answer: ConnectError",
        "Expecting value: line 1 column 1 (char 0)",
        "two\nlines",
        "",
    ],
)
def test_what_users_were_told_before_is_seen_as_wrong(text: str) -> None:
    assert faults_of("bad_config", text) != []
    assert faults_of("", "replicas: has to be a whole number") != []
    assert faults_of("bad_config", "replicas: has to be a whole number of at least 1; it is 0") == []
