"""`llama_cpp_convert.py SOURCES FOLDER ARGUMENT...`, in llama.cpp's environment: its own converter of checkpoints.

The converter knows pre-tokenizers by a hash of what they make of a text, and refuses those of models that it has never
seen. They get that of Qwen2 here, which changes how the server would split text and nothing else: the benchmark sends
token ids. The server ends a stream with an error where its text is no UTF-8, as that of a random model often is: tokens
that are parts of characters get other names.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

OTHERWISE = "qwen2"


def tolerate(kind: Any) -> None:
    """Let a class of models go on where it does not know the pre-tokenizer."""
    known = kind.get_vocab_base_pre

    def name_of(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return OTHERWISE

    kind.get_vocab_base_pre = name_of


def name_parts(kind: Any) -> None:
    """Let a class of models give other names to tokens whose bytes are no text by themselves."""
    known = kind.get_vocab_base

    def vocabulary(self: Any) -> tuple[list[str], list[int], str]:
        tokens, types, pre_tokenizer = known(self)
        taken = set(tokens)
        return [named(token, taken) for token in tokens], types, pre_tokenizer

    kind.get_vocab_base = vocabulary


def named(token: str, taken: set[str]) -> str:
    """The token's name; another, which is in none of `taken`, where its bytes are no text."""
    if not all(char in BYTES for char in token):
        return token
    data = bytes(BYTES[char] for char in token)
    try:
        data.decode()
    except UnicodeDecodeError:
        name = f"[{data.hex()}]"
        while name in taken:
            name += "]"
        taken.add(name)
        return name
    return token


def byte_level() -> dict[str, int]:
    """The bytes that characters stand for in tokenizers that work on bytes (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + at): byte for at, byte in enumerate(hidden)}


BYTES = byte_level()


def main() -> None:
    """Never returns where the converter does not."""
    sources = Path(sys.argv[1])
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    base = importlib.import_module("conversion.base")
    for kind in [kind for kind in vars(base).values() if isinstance(kind, type)]:
        if "get_vocab_base_pre" in vars(kind):
            tolerate(kind)
            name_parts(kind)
    sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
    runpy.run_path(str(sources / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main()
