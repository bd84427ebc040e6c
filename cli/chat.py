"""`elasticmoe chat`: talk to a deployment, or to any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx

from elasticmoe.cli.admin import not_running
from elasticmoe.cli.arguments import number, refuse_beside, whole
from elasticmoe.cli.http import check_url, speaks_tls, speaks_tls_text, tls_trouble, why
from elasticmoe.cli.http import client as http_client
from elasticmoe.cli.paths import home_dir, run_dir_of
from elasticmoe.cli.settings import DEFAULTS
from elasticmoe.cli.sse import ServerEvent, events_of
from elasticmoe.cli.terminal import OUTPUT_FAILED, say, say_answer, typed
from elasticmoe.common.http.keys import read_key
from elasticmoe.common.protocol.errors import ElasticMoEError, Unavailable
from elasticmoe.common.record import living_record

HELP = "chat with a deployment"

_DEFAULT_URL = f"http://{DEFAULTS['host']}:{DEFAULTS['port']}"
_CONNECT_SECONDS_MAX = 5.0
_TOKEN_SECONDS_MAX = 300.0  # between two tokens; the first may wait in a queue
_HISTORY_LINES_MAX = 1_000
_INTRO = "Ctrl-C stops an answer, /reset starts anew, /quit or Ctrl-D leaves."

Message = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `chat`."""
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help=f"the server (default: the deployment that runs here, else {_DEFAULT_URL})")
    where.add_argument("--run-dir", metavar="DIR", help="the deployment's run directory")
    add("--model", metavar="NAME", help="the model (default: the server's first)")
    add("--system", metavar="TEXT", help="a system message")
    add("--once", metavar="TEXT", help="send this one message, print the answer, and end")
    add("--max-tokens", type=whole(1), default=512, metavar="N", help="longest answer in tokens (default 512)")
    add("--temperature", type=number(), metavar="T", help="0 is greedy (default: the server's)")
    add("--api-key-file", metavar="FILE", help="a file that holds the server's API key")
    add("--ca-file", metavar="FILE", help="certificates to trust beside the usual ones, for an https URL")


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the user leaves. Raises ElasticMoEError, such as Unavailable when the server is not there, and
    WrongUsage."""
    url = base_url(args)
    if not url.startswith("https:"):
        refuse_beside(args, "ca_file", f"{url}, which is not https")
    timeout = httpx.Timeout(_TOKEN_SECONDS_MAX, connect=_CONNECT_SECONDS_MAX)
    with http_client(url, ca_file=args.ca_file, timeout=timeout, headers=headers_of(args)) as client:
        session = Session(client, args.model or first_model(client), _options(args), args.system)
        if args.once is not None:
            for text in session.answer(args.once):
                say_answer(text)
            say()
            return 0
        say(f"{session.model} at {url}. {_INTRO}")
        with _line_editing():
            return _converse(session)


def base_url(args: argparse.Namespace) -> str:
    """The server's address without `/v1`. Raises ElasticMoEError for a URL that is none, and where nothing runs in a
    run directory that was named."""
    if args.url:
        check_url(args.url)
        return str(args.url).rstrip("/").removesuffix("/v1")
    run_dir = run_dir_of(args.run_dir)
    record = living_record(run_dir)
    if record is None and args.run_dir:
        raise not_running(run_dir)
    return record.url if record is not None else _DEFAULT_URL


def headers_of(args: argparse.Namespace) -> dict[str, str]:
    """What `--api-key-file` adds to each request. Raises ElasticMoEError."""
    if not args.api_key_file:
        return {}
    return {"Authorization": f"Bearer {read_key(args.api_key_file).decode()}"}


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
                self.messages.append({"role": "assistant", "content": _joined(parts)})
            else:
                self.messages.pop()

    def _stream(self) -> Iterator[str]:
        # What the model thinks is shown as it comes, like the rest: whoever waits wants to see why.
        fixed = {"stream": True, "separate_reasoning": False}
        body = {"model": self.model, "messages": self.messages, **fixed, **self._options}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise error_of(response)
                yield from deltas(events_of(response.iter_bytes()))
        except httpx.HTTPError as error:
            raise unreachable(self._client, error) from None


def _joined(parts: list[str]) -> str:
    """The answer as it can be sent back: halves of a character that came in two events meet, lone ones are replaced."""
    return "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def deltas(events: Iterable[ServerEvent]) -> Iterator[str]:
    """The texts in a stream of server-sent events. Raises ElasticMoEError for an error event and a stream cut short."""
    for told in events:
        data = told.data.strip()
        if data == b"[DONE]":
            return
        if told.comment is not None:
            continue
        try:
            event = json.loads(data)
            if "error" in event:
                raise _server_error(event["error"], "server_error")
            for choice in event.get("choices") or ():
                if text := (choice.get("delta") or {}).get("content"):
                    yield str(text)
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ElasticMoEError("the server sent an event that is not OpenAI's", code="bad_stream") from None
    raise ElasticMoEError("the server ended the stream before the answer's end", code="bad_stream")


def _server_error(detail: Any, code: str) -> ElasticMoEError:
    """The error that the server describes, by its own code where it has one."""
    detail = detail if isinstance(detail, dict) else {"message": detail}
    return ElasticMoEError(str(detail.get("message")), code=str(detail.get("code") or code))


def first_model(client: httpx.Client) -> str:
    """The first model that the server lists. Raises ElasticMoEError."""
    return str(listed_models(client)[0]["id"])


def listed_models(client: httpx.Client) -> list[dict[str, Any]]:
    """The models that the server lists, one at least, each with an `id`. Raises ElasticMoEError."""
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise unreachable(client, error) from None
    if response.status_code != 200:
        raise error_of(response)
    try:
        models = [dict(model) | {"id": str(model["id"])} for model in response.json()["data"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        models = []
    if not models:
        raise ElasticMoEError("the server lists no model; name one with --model", code="no_model")
    return models


def error_of(response: httpx.Response) -> ElasticMoEError:
    """The server's own error, by its code and text."""
    code = f"http_{response.status_code}"
    try:
        return _server_error(response.json()["error"], code)
    except (ValueError, LookupError, TypeError, RecursionError):
        url = str(response.request.url.copy_with(raw_path=b"/")).rstrip("/")
        if response.status_code == 400 and speaks_tls(url):  # which servers tell in a page of their own
            return Unavailable(speaks_tls_text(url), code="unreachable")
        return ElasticMoEError(f"the server answered {response.status_code}", code=code)


def unreachable(client: httpx.Client, error: httpx.HTTPError) -> Unavailable:
    """The server does not answer."""
    url = str(client.base_url).rstrip("/")
    if told := tls_trouble(url, error):
        return Unavailable(told, code="unreachable")
    if isinstance(error, httpx.ConnectError):
        return Unavailable(f"nothing answers at {url}; start a deployment with `elasticmoe up`", code="unreachable")
    return Unavailable(f"{url} stopped answering: {why(error)}", code="unreachable")


def _converse(session: Session) -> int:
    while True:
        try:
            line = typed(input("> "))
        except EOFError:
            say()
            return 0
        except KeyboardInterrupt:
            say()  # an empty line: nothing is lost by it
            continue
        if line is None:
            say("[bad_input: the line is not text in the terminal's encoding; it was not sent]")
            continue
        text = line.strip()
        if text in ("/quit", "/exit"):
            return 0
        if text == "/reset":
            session.reset()
        elif text.startswith("/"):
            say(_INTRO)
        elif text:
            _show_answer(session, text)


def _show_answer(session: Session, text: str) -> None:
    answer = session.answer(text)
    try:
        for part in answer:
            say_answer(part)
    except KeyboardInterrupt:
        say_answer(" [stopped]")
    except ElasticMoEError as error:
        if error.code == OUTPUT_FAILED:
            raise  # there is nobody to tell
        say_answer(f"[{error.code}: {error.message}]")
    finally:
        answer.close()  # type: ignore[attr-defined]  # closes the stream now, so that the server stops now
    say()


class _line_editing:
    """readline with a history file in the user's home of this program. Without either, plain input works too."""

    def __init__(self) -> None:
        self._save: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        try:
            import readline
        except ImportError:
            return
        try:
            path = home_dir() / "chat_history"
            readline.read_history_file(path)
        except ElasticMoEError:
            return  # no home, no history
        except (OSError, ValueError):
            pass  # the first time, or what somebody else left there
        readline.set_history_length(_HISTORY_LINES_MAX)

        def save() -> None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(path)
                path.chmod(0o600)
            except (OSError, ValueError):
                pass  # a history is a convenience

        self._save = save

    def __exit__(self, *_: object) -> None:
        self._save()
