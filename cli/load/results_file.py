"""The file of results: a line of JSON for each request, in order of their ends."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec

from elasticmoe.cli.load.result import Result
from elasticmoe.cli.terminal import OUTPUT_FAILED
from elasticmoe.common.protocol.errors import ElasticMoEError


class ResultsFile:
    """Replaces what is at `path`; None: results go nowhere. A context manager. Methods raise ElasticMoEError
    (`output_failed`) when the file cannot be written."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._encoder = msgspec.json.Encoder()

    def __enter__(self) -> Self:
        if self._path is not None:
            try:
                self._file = self._path.open("wb")
            except OSError as error:
                raise self._failed(error) from None
        return self

    def write(self, result: Result) -> None:
        """Add a line."""
        if self._file is not None:
            try:
                self._file.write(self._encoder.encode(result) + b"\n")
                self._file.flush()  # who watches the file sees each line at once
            except OSError as error:
                raise self._failed(error) from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as failure:
                raise self._failed(failure) from None

    def _failed(self, error: OSError) -> ElasticMoEError:
        text = f"the results cannot be written to {self._path}: {error.strerror}"
        return ElasticMoEError(text, code=OUTPUT_FAILED)
