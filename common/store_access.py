"""Who may do what at the embedded store: its users, the files with their passwords, and what a reader may see. Apart
from store.py, so that the launcher, which names them, needs no client."""

from __future__ import annotations

from typing import Final

# Each with a secret of its own: who only follows layouts can read them and nothing else.
WRITER: Final = "default"
READER: Final = "reader"
PASSWORDS: Final = {WRITER: "store.password", READER: "store-reader.password"}
READER_KEYS: Final = ("layout", "epoch", "layouts")
READER_COMMANDS: Final = ("get", "xread", "ping", "hello", "auth", "client|setname", "client|setinfo")
