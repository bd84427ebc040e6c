"""`elasticmoe chat`: talk to a deployment, or to any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from cli.paths import home_dir, run_dir_of
from cli.record import living_record
from common.protocol.errors import ElasticMoEError, InvalidRequest, Unavailable

HELP = "chat with a deployment"

_DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_SECONDS_MAX = 5.0
_TOKEN_SECONDS_MAX = 300.0  # between two tokens; the first may wait in a queue
_HISTORY_LINES_MAX = 1_000
_INTRO = "Ctrl-C stops an answer, /reset starts anew, /quit or Ctrl-D leaves."

Message = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `chat`."""
    add = parser.add_argument
    add("--url", help=f"the server (default: the deployment of --run-dir, else {_DEFAULT_URL})")
    add("--run-dir", metavar="DIR", help="the deployment's run directory")
    add("--model", metavar="NAME", help="the model (default: the server's first)")
    add("--system", metavar="TEXT", help="a system message")
    add("--once", metavar="TEXT", help="send this one message, print the answer, and end")
    add("--max-tokens", type=int, default=512, metavar="N", help="longest answer in tokens (default 512)")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: the server's)")
    add("--api-key-file", metavar="FILE", help="a file that holds the server's API key")


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the user leaves. Raises ElasticMoEError, such as Unavailable when the server is not there."""
    url = base_url(args)
    timeout = httpx.Timeout(_TOKEN_SECONDS_MAX, connect=_CONNECT_SECONDS_MAX)
    with httpx.Client(base_url=url, timeout=timeout, headers=_headers(args)) as client:
        session = Session(client, args.model or first_model(client), _options(args), args.system)
        if args.once is not None:
            for text in session.answer(args.once):
                _write(text)
            _write("\n")
            return 0
        print(f"{session.model} at {url}. {_INTRO}")
        with _line_editing():
            return _converse(session)


def base_url(args: argparse.Namespace) -> str:
    """The server's address without `/v1`."""
    if args.url:
        return str(args.url).rstrip("/").removesuffix("/v1")
    record = living_record(run_dir_of(args.run_dir))
    return record.url if record is not None else _DEFAULT_URL


def _headers(args: argparse.Namespace) -> dict[str, str]:
    if not args.api_key_file:
        return {}
    try:
        with open(args.api_key_file, encoding="utf-8") as file:
            return {"Authorization": f"Bearer {file.read().strip()}"}
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"API key file {args.api_key_file}: {error}", code="bad_key_file") from None


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    return {name: value for name, value in options.items() if value is not None}


class Session:
    """One conversation: what was said so far is sent along each time."""

    def __init__(self, client: httpx.Client, model: str, options: dict[str, Any], system: str | None) -> None:
        self.model = model
        self._client = client
        self._options = options
        self._system = system
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, not the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def answer(self, text: str) -> Iterator[str]:
        """Send `text` and yield the answer as it comes. A question without any answer is forgotten.

        An answer that is cut off (by the user or an error) stays in the conversation as far as it came; closing the
        stream is what tells the server to stop. Raises ElasticMoEError.
        """
        self.messages.append({"role": "user", "content": text})
        parts: list[str] = []
        try:
            for part in self._stream():
                parts.append(part)
                yield part
        finally:
            if parts:
                self.messages.append({"role": "assistant", "content": "".join(parts)})
            else:
                self.messages.pop()

    def _stream(self) -> Iterator[str]:
        body = {"model": self.model, "messages": self.messages, "stream": True, **self._options}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise error_of(response)
                yield from deltas(response.iter_lines())
        except httpx.HTTPError as error:
            raise unreachable(self._client, error) from None


def deltas(lines: Iterator[str]) -> Iterator[str]:
    """The texts in a stream of server-sent events. Raises ElasticMoEError for an error event and a stream cut short."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise ElasticMoEError("the server sent an event that is not JSON", code="bad_stream") from None
        if "error" in event:
            detail = event["error"]
            raise ElasticMoEError(str(detail.get("message")), code=str(detail.get("code") or "server_error"))
        for choice in event.get("choices", ()):
            if text := (choice.get("delta") or {}).get("content"):
                yield text
    raise ElasticMoEError("the server ended the stream before the answer's end", code="bad_stream")


def first_model(client: httpx.Client) -> str:
    """The first model that the server lists. Raises ElasticMoEError."""
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise unreachable(client, error) from None
    if response.status_code != 200:
        raise error_of(response)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ElasticMoEError("the server lists no model; name one with --model", code="no_model") from None


def error_of(response: httpx.Response) -> ElasticMoEError:
    """The server's own error, by its code and text."""
    try:
        detail = response.json()["error"]
        return ElasticMoEError(str(detail["message"]), code=str(detail.get("code") or f"http_{response.status_code}"))
    except (ValueError, LookupError, TypeError):
        return ElasticMoEError(f"the server answered {response.status_code}", code=f"http_{response.status_code}")


def unreachable(client: httpx.Client, error: httpx.HTTPError) -> Unavailable:
    """The server does not answer."""
    url = str(client.base_url).rstrip("/")
    if isinstance(error, httpx.ConnectError):
        return Unavailable(f"nothing answers at {url}; start a deployment with `elasticmoe up`", code="unreachable")
    return Unavailable(f"{url} stopped answering: {type(error).__name__}", code="unreachable")


def _converse(session: Session) -> int:
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()  # an empty line: nothing is lost by it
            continue
        if text in ("/quit", "/exit"):
            return 0
        if text == "/reset":
            session.reset()
        elif text.startswith("/"):
            print(_INTRO)
        elif text:
            _show_answer(session, text)


def _show_answer(session: Session, text: str) -> None:
    answer = session.answer(text)
    try:
        for part in answer:
            _write(part)
    except KeyboardInterrupt:
        _write(" [stopped]")
    except ElasticMoEError as error:
        _write(f"[{error.code}: {error.message}]")
    finally:
        answer.close()  # type: ignore[attr-defined]  # closes the stream now, so that the server stops now
    _write("\n")


def _write(text: str) -> None:
    # What a model says may hold control characters; a terminal must not act on them.
    sys.stdout.write("".join(char for char in text if char in "\n\t" or char.isprintable()))
    sys.stdout.flush()


class _line_editing:
    """readline with a history file in the user's home of this program. Without either, plain input works too."""

    def __init__(self) -> None:
        self._save: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        try:
            import readline
        except ImportError:
            return
        path = home_dir() / "chat_history"
        try:
            readline.read_history_file(path)
        except OSError:
            pass  # the first time
        readline.set_history_length(_HISTORY_LINES_MAX)

        def save() -> None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(path)
                path.chmod(0o600)
            except OSError:
                pass  # a history is a convenience

        self._save = save

    def __exit__(self, *_: object) -> None:
        self._save()
