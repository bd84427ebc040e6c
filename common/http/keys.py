"""The API key: the only content of a file, as it can stand in a header."""

from __future__ import annotations

import re

from elasticmoe.common.protocol.errors import ConfigError

KEY_BYTES_MAX = 4096
_KEY = re.compile(rb"[!-~]+")  # what can stand in a header


def read_key(path: str) -> bytes:
    """The key in the file at `path`, without white space around it. Raises ConfigError (`bad_key_file`)."""
    try:
        with open(path, "rb") as file:
            key = file.read(KEY_BYTES_MAX + 1).strip()
    except OSError as error:
        raise ConfigError(f"API key file {path} cannot be read: {error.strerror}", code="bad_key_file") from None
    if len(key) > KEY_BYTES_MAX or _KEY.fullmatch(key) is None:
        text = f"API key file {path} holds no key: it needs 1 to {KEY_BYTES_MAX} visible ASCII characters in one line"
        raise ConfigError(text, code="bad_key_file")
    return key
