"""Reads the events of a streamed chat answer on stdin and prints its text as JSON, and how many events carried some.

Exit status 1 unless the stream was whole: chunks, one finish reason, then [DONE].
"""

import json
import sys

text, num_chunks, reasons, is_done = "", 0, [], False
for line in sys.stdin:
    if not line.startswith("data:"):
        continue
    data = line.removeprefix("data:").strip()
    if data == "[DONE]":
        is_done = True
        continue
    for choice in json.loads(data).get("choices", []):
        content = choice["delta"].get("content")
        if content:
            text += content
            num_chunks += 1
        if choice.get("finish_reason"):
            reasons.append(choice["finish_reason"])
print(json.dumps(text))
print(f"{num_chunks} chunks, finish {reasons}, done {is_done}", file=sys.stderr)
sys.exit(0 if text and is_done and len(reasons) == 1 and reasons[0] in ("stop", "length") else 1)
