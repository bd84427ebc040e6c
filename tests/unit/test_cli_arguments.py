"""Flags: their values, and what a wrong command line is told. Every flag of every command says what it is for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe.cli.arguments import number, whole, wholes
from elasticmoe.cli.bench.report import _folder
from elasticmoe.cli.main import main, make_parser

WRONG = [
    ([], "COMMAND is missing: give one of up, down, status, "),
    (["upp"], "COMMAND: 'upp' is none of up, down, "),
    (["upp"], "did you mean 'up'?; see `elasticmoe --help`"),
    (["up", "--modle", "x"], "'--modle' is not known; did you mean '--model'?; see `elasticmoe up --help`"),
    (["up", "--dtype", "bfloat"], "--dtype: 'bfloat' is none of bfloat16, float32; did you mean 'bfloat16'?"),
    (["up", "--port"], "--port: it needs a value"),
    (["up", "--port", "http"], "--port: 'http' is not a whole number"),
    (["up", "--device-memory", "4GB"], "--device-memory: '4GB' is not a size: use a number with KiB, MiB, GiB or TiB"),
    (["up", "--ready-timeout", "soon"], "--ready-timeout: 'soon' is not a time: give seconds above 0, 2592000 at most"),
    (["up", "more"], "'more' is not known"),
    (["scale", "--replicas", "0"], "--replicas: 0 is less than 1, the least that it may be"),
    (["scale", "--replicas", "65"], "--replicas: 65 is more than 64, the most that it may be"),
    (["scale", "--replicas", "2", "--devices", "a"], "--devices: it cannot stand beside --replicas"),
    (["scale", "--re", "2"], "--re may mean --replicas or --remove or --reason"),
    (["scale", "--remove"], "--remove: it needs one value or more"),
    (["plan"], "one of --replicas, --devices, --remove is needed"),
    (["status", "--json=1"], "--json: it takes no value, and is given '1'"),
    (["chat", "--temperature", "nan"], "--temperature: 'nan' is not a finite number"),
    (["chat", "--max-tokens", "0"], "--max-tokens: 0 is less than 1"),
    (["bench"], "NAME is missing: give one of serve, "),
    (["bench", "serve", "--concurrency", "1,x"], "--concurrency: 'x' is not a whole number"),
    (["model", "make", "demo"], "DIR is missing"),
    (["completion", "sh"], "SHELL: 'sh' is none of bash, zsh, fish"),
    (["completion"], "SHELL is missing: give one of bash, zsh, fish; see `elasticmoe completion --help`"),
    (["model", "make"], "NAME is missing; DIR is missing; see"),
    (["scale"], "one of --replicas, --devices, --remove, --cancel is needed"),
    (["scale", "--cancel", "op", "--replicas", "2"], "--replicas: it cannot stand beside --cancel"),
    (["chat", "--url", "http://x", "--run-dir", "y"], "--run-dir: it cannot stand beside --url"),
]


@pytest.mark.parametrize(("argv", "told"), WRONG)
def test_a_wrong_command_line_is_one_line_with_a_code(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("elasticmoe: wrong_usage: ")
    assert line.count("\n") == 1
    assert told in line


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["scale", "--cancel", "op", "--deadline", "3"], "--deadline: it has no effect beside --cancel"),
        (["scale", "--cancel", "op", "--op-id", "x"], "--op-id: it has no effect beside --cancel"),
        (["scale", "--cancel", "op", "--reason", "x"], "--reason: it has no effect beside --cancel"),
        (["scale", "--replicas", "2", "--lost"], "--lost: it says something of the replicas of --remove"),
        (["plan", "--replicas", "2", "--lost"], "--lost: it says something of the replicas of --remove"),
    ],
)
def test_a_flag_that_would_have_no_effect_is_refused(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"elasticmoe: wrong_usage: {told}")
    assert line.endswith(f"; see `elasticmoe {argv[0]} --help`\n")


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def test_every_flag_has_help_and_a_type_of_ours() -> None:
    every = list(parsers(make_parser()))
    assert len(every) >= 20
    actions = [(parser.prog, action) for parser in every for action in parser._actions]
    of_commands = argparse._SubParsersAction
    assert [(prog, act.dest) for prog, act in actions if not act.help and not isinstance(act, of_commands)] == []
    assert [(prog, act.dest) for prog, act in actions if act.type in (int, float)] == [], "see cli/arguments.py"


@pytest.mark.parametrize("text", ["", "x", "1.5", "1_000", "１", " 1", "1e3", "9" * 40])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number"):
        whole()(text)


def test_numbers() -> None:
    assert (whole()("-3"), whole(1)("7"), wholes("1, 2,8"), number()("0"), number()("2.5")) == (
        -3,
        7,
        (1, 2, 8),
        0.0,
        2.5,
    )
    for text in ("-1", "inf", "nan", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            number()(text)


def test_results_go_to_the_checkout_or_the_cache_and_never_to_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ELASTICMOE_HOME", str(tmp_path / "home"))
    assert _folder("") == Path(__file__).parent.parent.parent / "benchmarks/results"
    assert _folder("here") == tmp_path / "here"
    monkeypatch.setattr("elasticmoe.cli.bench.report.package_root", lambda: tmp_path / "site-packages")
    assert _folder("") == tmp_path / "home/benchmarks"
    assert os.listdir(tmp_path) == []


def test_no_text_names_a_package_that_nobody_published() -> None:
    root = Path(__file__).parent.parent.parent
    pages = [*root.glob("*.md"), *(root / "docs").rglob("*.md"), *(root / "benchmarks").glob("*.md")]
    sources = [path for part in ("cli", "common", "services") for path in (root / part).rglob("*.py")]
    assert len(sources) > 200
    assert len(pages) > 50
    assert [path.name for path in (*sources, *pages) if "install 'elasticmoe[" in path.read_text()] == []
