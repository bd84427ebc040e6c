"""Codes that only the command line has."""

from __future__ import annotations

from elasticmoe.common.error_codes.code import Code

COMMANDS: dict[str, Code] = {
    "bad_argument": Code("An argument is not text in UTF-8", "Write it in UTF-8"),
    "not_running": Code(
        "No deployment runs in the run directory", "`elasticmoe up`, or `--run-dir`", is_retryable=True
    ),
    "unreachable": Code("Nothing answers there", "`elasticmoe status`; see `RUN_DIR/logs`", is_retryable=True),
    "starting": Code("A launcher is just starting there", "Try again in a moment", is_retryable=True),
    "still_stopping": Code("It still stops after the time given", "Wait, then `elasticmoe status`", is_retryable=True),
    "wrong_usage": Code("A flag or argument is missing, unknown, or beyond its bounds", "See the command's `--help`"),
    "no_terminal": Code("`--watch` needs a terminal, and this is none", "`elasticmoe status` without it"),
    "not_permitted": Code("The process is another user's", "Stop it as that user"),
    "output_failed": Code("The output cannot be written", "Look at the disk or the pipe"),
    "bad_url": Code("The URL cannot be used", "Use http:// or https:// with a host"),
    "bad_certificates": Code("The file of `--ca-file` holds no certificates", "Give a PEM file"),
    "bad_key_file": Code("The file of `--api-key-file` cannot be used", "One line with the key"),
    "bad_trace": Code("The trace cannot be read, or a line of it is not right", "Mend the line that the text names"),
    "no_model": Code("The server lists no model", "Name one with `--model`"),
    "bad_answer": Code("The admin listener's answer makes no sense", "See the scaler's log"),
    "bad_stream": Code("The stream's end or a line of it makes no sense", "Look at the server or the proxy"),
    "nothing_measured": Code("A benchmark could not measure", "See the text"),
    "nothing_recorded": Code(
        "A journal has no decision of the policy to make again",
        "Let the policy decide for a while; records of another release are read by that one",
    ),
    "tour_failed": Code(
        "Something that `elasticmoe tour` shows did not happen, or a stream was lost or wrong",
        "See the text; on a busy machine try again, with a longer `--timeout`",
    ),
    "chaos_failed": Code("A promise did not hold under `elasticmoe chaos`", "Report it with its seed"),
}
