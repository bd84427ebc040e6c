"""What a newcomer types first: installation that tells what it does, the version, completion, a line to copy, keys."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from elasticmoe.cli import up
from elasticmoe.cli.completion import SHELLS
from elasticmoe.cli.exposure import check_api_key, is_loopback
from elasticmoe.cli.main import COMMANDS, main, make_parser
from elasticmoe.cli.settings import Settings, from_flags
from elasticmoe.common.http.keys import KEY_BYTES_MAX
from elasticmoe.common.protocol.errors import ConfigError

pytestmark = pytest.mark.usefixtures("no_settings_of_the_caller")

ROOT = Path(__file__).parent.parent.parent


def test_each_stage_of_the_installation_is_told_before_it_begins() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("$(STAMP):")[2].partition("\n\n")[0].splitlines()
    slow = [number for number, line in enumerate(recipe) if "$(PIP_INSTALL)" in line]
    told = [number for number, line in enumerate(recipe) if re.match(r"\t@echo '\[\d/\d\] ", line)]
    assert len(slow) >= 4
    assert [re.findall(r"\[(\d)/(\d)\]", recipe[number])[0] for number in told] == [
        (str(n), str(len(told))) for n in range(1, len(told) + 1)
    ]
    assert all(any(before < number for before in told[index : index + 1]) for index, number in enumerate(slow))
    assert all(line.startswith("\t@") or not line.startswith("\t") or "||" in line for line in recipe), "no command"


def test_the_version_is_a_flag_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    flag = capsys.readouterr().out
    assert main(["version"]) == 0
    assert re.fullmatch(r"elasticmoe \d+\.\d+\S*\n", flag)
    assert capsys.readouterr().out == flag


# ---- completion ------------------------------------------------------------------------------------------------------


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_flag_can_be_completed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    prefix = "" if shell != "fish" else "-l "
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", text)
    for flag in ("--replicas", "--api-key-file", "--run-dir", "--watch", "--version"):
        assert prefix + flag.removeprefix("--" if prefix else "") in text, flag
    if program := shutil.which(shell):
        assert subprocess.run([program, "-n"], input=text, text=True, capture_output=True).stderr == ""


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (("elasticmoe", "sc"), {"scale"}),
        (("elasticmoe", "scale", "--re"), {"--replicas", "--remove", "--reason"}),
        (("elasticmoe", "model", "l"), {"list"}),
        (("elasticmoe", "up", "--dtype", ""), {"bfloat16", "float32"}),
        (("elasticmoe", "up", "--report"), set()),  # nobody's to type
    ],
)
def test_bash_completes(typed: tuple[str, ...], expected: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(f"'{word}'" for word in typed)
    asked = f"""
COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}
_shtab_elasticmoe elasticmoe '{typed[-1]}' '{typed[-2]}'
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    told = subprocess.run(["bash", "-c", script("bash", capsys) + asked], capture_output=True, text=True, check=True)
    assert set(told.stdout.split()) == expected


def test_help_says_how_to_install_completion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "--help"])
    text = capsys.readouterr().out
    assert all(f"elasticmoe completion {shell} > " in text for shell in SHELLS)


# ---- the line to copy ------------------------------------------------------------------------------------------------


def test_the_curl_line_stands_alone_and_fits_a_terminal() -> None:
    lines = up.curl_line("http://127.0.0.1:8000", "demo", "").splitlines()
    assert lines[0].startswith("curl ")
    assert all(len(line) <= 90 for line in lines)
    assert [line.endswith(" \\") for line in lines] == [True, True, False]


# ---- keys ------------------------------------------------------------------------------------------------------------


def resolved(tmp_path: Path, *argv: str) -> Settings:
    args = make_parser().parse_args(["up", "--run-dir", str(tmp_path), *argv])
    return from_flags(args)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("no such host", False),
    ],
)
def test_who_reaches_a_host(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_other_machines_are_served_with_a_key_or_a_word(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    everywhere = ("--host", "0.0.0.0")
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0.*--api-key-file FILE.*--no-api-key") as refused:
        check_api_key(resolved(tmp_path, *everywhere), may_lack=False)
    assert refused.value.code == "no_api_key"
    check_api_key(resolved(tmp_path, *everywhere), may_lack=True)
    check_api_key(resolved(tmp_path), may_lack=False)
    with_key = resolved(tmp_path, *everywhere, "--api-key-file", str(key))
    assert with_key.router.api_key_file == str(key)
    check_api_key(with_key, may_lack=False)
    with pytest.raises(ConfigError, match="leave one of them out"):
        check_api_key(with_key, may_lack=True)


def test_a_refused_start_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    ports = ["--port", "0", "--admin-port", "0"]
    assert main(["up", "--model", "tiny", "--run-dir", str(run_dir), "--host", "0.0.0.0", *ports]) == 1
    assert capsys.readouterr().err.startswith("elasticmoe: no_api_key: other machines reach 0.0.0.0")
    assert not run_dir.exists()


@pytest.mark.parametrize("content", [None, b"", b" \n", b"two words", b"\xff\xfe", b"x" * (KEY_BYTES_MAX + 1)])
def test_a_key_file_is_read_before_anything_starts(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        check_api_key(resolved(tmp_path, "--api-key-file", str(path)), may_lack=False)
    assert refused.value.code == "bad_key_file"
    assert str(path) in refused.value.message
