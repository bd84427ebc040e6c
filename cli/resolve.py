"""From what the user calls a model to a checkpoint folder: a named model made here, a folder, or a download."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from elasticmoe.cli.console import Console
from elasticmoe.cli.maker import make_elsewhere
from elasticmoe.cli.paths import absolute, home_dir, package_root
from elasticmoe.common.protocol.errors import CheckpointError, DeadlineExceeded, NotFound, Unavailable
from elasticmoe.common.weights import check_no_adapter, no_weights

DEFAULT = "demo"  # where nothing names a model
ALIASES = {"tiny": "tiny-mixtral"}
NAMES = (
    "tiny-mixtral",
    "tiny-qwen2-moe",
    "tiny-qwen3-moe",
    "tiny-olmoe",
    "tiny-granitemoe",
    "tiny-glm4-moe",
    "tiny-glm4-moe-lite",
    "tiny-deepseek-v2",
    "tiny-deepseek-v3",
    "oracle",
    "oracle-latent",
    "oracle-paced",
    "qwen3-moe-1b",
    "qwen3-moe-1b-fp8",
    "deepseek-v2-lite-cut",
    "demo",
)  # elasticmoe.cli.models knows them, and loads torch
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_HUB_FILES = [
    *("config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.index.json"),
    *("tokenizer*", "chat_template*", "added_tokens.json", "special_tokens_map.json"),
]
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_MAKE_SECONDS_MAX = 1_800.0
_LOCK_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Resolved:
    """A checkpoint folder and the name under which it is served unless the user gives another."""

    path: Path
    name: str


def resolve_model(model: str, console: Console) -> Resolved:
    """Find, make or download `model`; DEFAULT for an empty name. Blocks while it does, with progress on `console`.

    A bare name of NAMES is always the named model: a folder that is called the same is meant by `./name`. Raises an
    ElasticMoEError with one clear text.
    """
    model = model or DEFAULT
    name = ALIASES.get(model, model)
    if name in NAMES:
        return Resolved(make_named(name, home_dir() / "models" / name, console), model)
    path = absolute(model, "--model")
    if os.path.exists(path):  # which is false, too, for a name that no file can have
        return Resolved(_checked_folder(path.resolve()), path.resolve().name)
    if _HUB_NAME.fullmatch(model):
        return Resolved(_checked_folder(_download(model, console)), model)
    raise NotFound(
        f"model {model!r} is neither a folder nor one of {', '.join((*ALIASES, *NAMES))} nor a hub's organisation/name",
        code="model_not_found",
    )


def make_named(name: str, directory: Path, console: Console) -> Path:
    """Make a named model in `directory`, once: a later call finds it, another process waits for the first.

    Raises CheckpointError when it cannot be made, DeadlineExceeded when another process takes too long.
    """
    recipe = directory.with_name(f"{name}.recipe")
    with _lock(directory.with_name(f"{name}.lock"), name, console):
        if (directory / "config.json").is_file() and recipe.is_file() and recipe.read_text() == models_recipe():
            return directory
        # Absent, or made by an earlier version of the recipe.
        shutil.rmtree(directory, ignore_errors=True)
        for partial in directory.parent.glob(f".{name}.partial-*"):  # of a process that was killed: ours is the lock
            shutil.rmtree(partial, ignore_errors=True)
        phase = f"making model {name}"
        console.progress(phase)
        try:
            make_elsewhere(name, directory, lambda done, total: console.progress(phase, done, total))
            recipe.write_text(models_recipe())
        except OSError as error:
            raise CheckpointError(f"model {name} cannot be made: {error.strerror}", code="model_failed") from None
        finally:
            console.close()
    return directory


def models_recipe() -> str:
    """Hash of the code that makes named models: a cached one of another version is not used."""
    digest = hashlib.sha256()
    for path in sorted((package_root() / "cli" / "models").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _lock(path: Path, name: str, console: Console) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CheckpointError(f"{path.parent}: {error.strerror}", code="model_failed") from None
    try:
        deadline = time.monotonic() + _MAKE_SECONDS_MAX
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                console.progress(f"waiting for another process that makes model {name}")
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"another process makes model {name} for over {_MAKE_SECONDS_MAX:g} s")
            time.sleep(_LOCK_POLL_S)
        console.close()
        yield
    finally:
        os.close(fd)


def _checked_folder(path: Path) -> Path:
    if not path.is_dir():
        form = f"a {path.suffix} file" if path.suffix in _WEIGHT_SUFFIXES else "not a folder"
        raise CheckpointError(f"model {path} is {form}; give a folder with config.json and .safetensors files")
    check_no_adapter(path)
    if not any(path.glob("*.safetensors")):
        raise no_weights(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"model {path} has no config.json")
    return path


def _download(name: str, console: Console) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise Unavailable(
            f"model {name} is no folder here, and to download it the package huggingface_hub is needed",
            code="model_unavailable",
        ) from None
    console.line(f"downloading {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the library raises its own, its HTTP client's, OSError and ValueError
        raise Unavailable(
            f"model {name} is no folder here and cannot be downloaded: {_one_line(error)}", code="model_unavailable"
        ) from None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
