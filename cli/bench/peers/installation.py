"""Engines in the user's cache: environments, and checkpoints in their own forms.

Each is made once: its folder's name has a hash of what it is made from, and it is whole when it has its last file, or
its name. One process at a time works on an engine.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from elasticmoe.cli.bench.peers.engine import Engine
from elasticmoe.cli.bench.peers.environment import Environment

_WHOLE = "whole"


@contextmanager
def made(engine: Engine, home: Path) -> Iterator[Environment]:
    """The engine's environment under `home`, installed if it was not; others are kept out meanwhile. Raises ValueError
    when it cannot be installed, or when another process has it."""
    with ExitStack() as stack:
        with _named(engine):
            home.mkdir(parents=True, exist_ok=True)
            environment = Environment(home / f"{engine.name}-{_recipe_of(engine)}")
            lock = stack.enter_context(open(home / f"{engine.name}.lock", "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process uses {environment.folder}") from None
            if not (environment.folder / _WHOLE).exists():
                _install(engine, environment)
        yield environment


@contextmanager
def _named(engine: Engine) -> Iterator[None]:
    """What goes wrong says with which engine."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{engine.title}: {error}") from None


def _install(engine: Engine, environment: Environment) -> None:
    folder = environment.folder
    if folder.exists():  # of an attempt that failed
        shutil.rmtree(folder)
    folder.mkdir()
    environment.run(sys.executable, "-m", "venv", str(folder))
    if engine.requirements:
        constraints = folder / "constraints.txt"
        constraints.write_text("".join(f"{line}\n" for line in engine.constraints))
        pip = (environment.python, "-m", "pip", "install", "--disable-pip-version-check")
        environment.run(*pip, "--constraint", constraints, *engine.requirements)
    if engine.install is not None:
        engine.install(environment)
    (folder / _WHOLE).touch()


def converted(engine: Engine, environment: Environment, checkpoint: Path) -> Path:
    """The engine's form of a checkpoint: made once, as long as the checkpoint's files stay as they are. Raises
    ValueError."""
    if engine.convert is None:
        return checkpoint
    stamp = [f"{path.name} {path.stat().st_size} {path.stat().st_ino}" for path in sorted(checkpoint.iterdir())]
    folder = environment.folder / "models" / f"{checkpoint.name}-{_recipe(stamp)}"
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}")
        with _named(engine):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            engine.convert(environment, checkpoint, partial)
            partial.rename(folder)
    return folder


def _recipe_of(engine: Engine) -> str:
    """Of the packages, of what the engine's module and the scripts beside it do with them, and of the interpreter."""
    module = Path(inspect.getfile(engine.launch))
    code = [path.read_text() for path in sorted(module.parent.glob(f"{module.stem}*.py"))]
    return _recipe(engine.requirements, engine.constraints, code, [platform.python_version()])


def _recipe(*parts: Sequence[str]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
