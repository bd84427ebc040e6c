"""From what the user calls a model to a folder: named, made once, given, downloaded, or refused in one line."""

from __future__ import annotations

import io
import json
import sys
import threading
import types
from pathlib import Path

import pytest

from elasticmoe.cli import resolve
from elasticmoe.cli.console import PlainConsole
from elasticmoe.cli.main import main
from elasticmoe.cli.models import model_names
from elasticmoe.common.protocol.errors import CheckpointError, ElasticMoEError, NotFound, Unavailable


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELASTICMOE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(output: io.StringIO) -> PlainConsole:
    return PlainConsole(output)


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({}))
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_the_names_are_those_that_can_be_made() -> None:
    assert set(resolve.NAMES) == set(model_names())
    assert set(resolve.ALIASES.values()) <= set(resolve.NAMES)


def test_a_named_model_is_made_once(home: Path, console: PlainConsole, output: io.StringIO) -> None:
    first = resolve.resolve_model("tiny", console)
    assert (first.path, first.name) == (home / "models/tiny-mixtral", "tiny")
    assert "making model tiny-mixtral" in output.getvalue()
    made = (first.path / "config.json").stat().st_mtime_ns
    assert resolve.resolve_model("tiny-mixtral", console).path == first.path
    assert (first.path / "config.json").stat().st_mtime_ns == made
    (home / "models/tiny-mixtral.recipe").write_text("of an earlier version")
    resolve.resolve_model("tiny", console)
    assert (first.path / "config.json").stat().st_mtime_ns > made


def test_two_at_once_make_one(home: Path, console: PlainConsole, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    def make(name: str, directory: Path, progress: object) -> None:
        made.append(name)
        inside.set()
        assert go_on.wait(60)
        make_folder(directory)

    monkeypatch.setattr(resolve, "make_elsewhere", make)
    waiting = threading.Event()
    second_output = types.SimpleNamespace(write=lambda text: "waiting" in text and waiting.set(), flush=lambda: None)
    threads = [
        threading.Thread(target=resolve.resolve_model, args=("oracle", PlainConsole(file)))
        for file in (io.StringIO(), second_output)  # type: ignore[list-item]
    ]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    assert waiting.wait(60)
    go_on.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert made == ["oracle"]


def test_parts_that_a_killed_making_left_go_with_the_next_one(
    home: Path, console: PlainConsole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "make_elsewhere", lambda _, directory, __: make_folder(directory))
    left, others = (home / "models" / name for name in (".oracle.partial-01ab", ".demo.partial-01ab"))
    for folder in (left, others):
        (folder / "x").mkdir(parents=True)
    resolve.resolve_model("oracle", console)
    assert (left.exists(), others.exists()) == (False, True)


def test_a_failed_making_is_one_line_and_tried_again(
    home: Path, console: PlainConsole, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models/tiny-mixtral").write_text("a file is in the way")
    with pytest.raises(CheckpointError, match="model tiny-mixtral cannot be made: ") as refused:
        resolve.resolve_model("tiny", console)
    assert refused.value.code == "model_failed"
    assert "\n" not in refused.value.message
    (home / "models/tiny-mixtral").unlink()
    resolve.resolve_model("tiny", console)


def test_a_folder_is_checked(tmp_path: Path, console: PlainConsole) -> None:
    folder = make_folder(tmp_path / "given")
    found = resolve.resolve_model(str(folder), console)
    assert (found.path, found.name) == (folder, "given")
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resolve.resolve_model(str(folder), console)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        resolve.resolve_model(str(folder), console)
    with pytest.raises(CheckpointError, match=r"is not a folder; give a folder with config\.json and \.safetensors"):
        resolve.resolve_model(__file__, console)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("pytorch_model.bin", "x", "weights only in PyTorch's format"),
        ("model.gguf", "GGUF", "is in GGUF format"),
        ("adapter_config.json", "{}", "this is an adapter, which is not applied"),
    ],
)
def test_a_folder_of_another_form_is_named(
    name: str, content: str, text: str, tmp_path: Path, console: PlainConsole
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text(content)
    with pytest.raises(CheckpointError, match=text):
        resolve.resolve_model(str(tmp_path / "model"), console)


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path, console: PlainConsole) -> None:
    path = tmp_path / "model-Q4_K_M.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"is a \.gguf file; give a folder"):
        resolve.resolve_model(str(path), console)


def test_a_folder_named_like_a_model_needs_a_slash(
    tmp_path: Path, console: PlainConsole, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "oracle")
    assert resolve.resolve_model("./oracle", console).path == folder
    assert resolve.resolve_model("oracle", console).path == home / "models/oracle"


def test_what_is_nothing_is_refused_with_the_choices(console: PlainConsole) -> None:
    with pytest.raises(NotFound, match=r"neither a folder nor one of tiny, .*demo.* nor"):
        resolve.resolve_model("nonsense", console)


def test_without_a_name_it_is_the_demo(console: PlainConsole, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(resolve, "make_named", lambda _, directory, __: directory)
    assert resolve.resolve_model("", console) == resolve.Resolved(home / "models/demo", "demo")


def fake_hub(monkeypatch: pytest.MonkeyPatch, download: object) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download))


def test_a_hub_name_is_downloaded_without_code(
    tmp_path: Path, console: PlainConsole, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(make_folder(tmp_path / "snapshot"))

    fake_hub(monkeypatch, download)
    assert resolve.resolve_model("org/Some-Model", console).name == "org/Some-Model"
    assert asked[0][0] == "org/Some-Model"
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in asked[0][1])


def test_a_hub_that_cannot_be_reached_is_one_line(console: PlainConsole, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        raise OSError("no route\nto host")

    fake_hub(monkeypatch, download)
    with pytest.raises(Unavailable, match="cannot be downloaded: no route to host"):
        resolve.resolve_model("org/model", console)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Unavailable, match="the package huggingface_hub is needed"):
        resolve.resolve_model("org/model", console)


@pytest.mark.parametrize("name", ["../etc/model", "a/b/c", "org/", "/org", "org/mo del", "-x/y"])
def test_what_is_no_hub_name_is_not_asked_for(
    name: str, console: PlainConsole, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub(monkeypatch, lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ElasticMoEError):
        resolve.resolve_model(name, console)


def test_the_model_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "list"]) == 0
    assert capsys.readouterr().out.startswith("tiny-mixtral")
    assert main(["model", "make", "oracle", str(tmp_path / "made")]) == 0
    assert (tmp_path / "made/config.json").is_file()
    capsys.readouterr()
    assert main(["model", "make", "nothing", str(tmp_path / "other")]) == 1
    assert capsys.readouterr().err.startswith("elasticmoe: model_failed: unknown model 'nothing'; known: ")
