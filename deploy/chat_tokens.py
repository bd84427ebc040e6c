"""Reads a streamed chat answer with logprobs on stdin; prints its tokens on stdout and what it looks like on stderr.

Exit status 1 unless the stream was whole: chunks with tokens, one finish reason, then [DONE].
"""

import json
import sys
from typing import Any


def main() -> int:
    """One line a token: its bytes and its logprob, so that equal output means an equal computation."""
    tokens: list[dict[str, Any]] = []
    text, num_chunks, reasons, is_done = "", 0, [], False
    for line in sys.stdin:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            is_done = True
            continue
        for choice in json.loads(data).get("choices", []):
            num_chunks += 1
            text += choice["delta"].get("content") or ""
            tokens += (choice.get("logprobs") or {}).get("content") or []
            reasons += [choice["finish_reason"]] if choice.get("finish_reason") else []
    for token in tokens:
        print(*token["bytes"], token["logprob"])
    summary = f"{len(tokens)} tokens in {num_chunks} chunks, finished by {reasons}"
    print(f"{summary}: {json.dumps(text)[:80]}", file=sys.stderr)
    return 0 if tokens and is_done and reasons in (["stop"], ["length"]) else 1


if __name__ == "__main__":
    sys.exit(main())
