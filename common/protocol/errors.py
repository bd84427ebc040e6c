"""The system's errors: one base, few families, each with a stable `code`, `retryable` and an HTTP status.

Texts are for users: they give the limit and the value, never a path of this machine's memory, a repr or a stack.
"""

from __future__ import annotations

from typing import ClassVar

# Exit status of a process that another one has taken over from (sysexits.h: EX_TEMPFAIL). Nothing is wrong with it.
EXIT_SUPERSEDED = 75


class ElasticMoEError(Exception):
    """Base of all errors that may cross a process boundary.

    `code` is stable and machine-readable; `retryable` says whether the same call may succeed later unchanged.
    """

    code: str = "internal_error"
    retryable: bool = False
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, code: str | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        if retryable is not None:
            self.retryable = retryable


class InvalidRequest(ElasticMoEError):
    """The caller's input breaks a stated bound; nothing happened."""

    code = "invalid_request"
    http_status = 400

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message, code=code)
        self.param = param

    def rename(self, message: str, param: str | None) -> None:
        """Say it in the words of whoever asked, where what found the fault has words of its own."""
        self.args = (message,)
        self.message, self.param = message, param


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output do not fit into the context. The words are OpenAI's: clients look for them and read the
    figures, to shorten what they send."""

    code = "context_length_exceeded"

    def __init__(
        self, limit: int, num_prompt: int, num_output: int = 0, *, what: str = "prompt", param: str | None = None
    ) -> None:
        """`limit`: tokens of the context. `num_output`: as asked for; 0 where it was not said. `what`: what the text
        calls the prompt."""
        self.what = what
        if num_output:
            asked = (
                f"you requested {num_prompt + num_output} tokens ({num_prompt} in the {what}, {num_output} in the "
                f"completion). Please reduce the length of the {what} or completion."
            )
        else:
            asked = (
                f"your {what} resulted in {num_prompt} tokens, and one more has to fit. Please reduce the length of "
                f"the {what}."
            )
        super().__init__(f"This model's maximum context length is {limit} tokens. However, {asked}", param=param)


class Unauthorized(ElasticMoEError):
    """The credential is missing or wrong."""

    code = "invalid_api_key"
    http_status = 401


class Forbidden(ElasticMoEError):
    """Whoever asks may not, whatever the credential: a host or an origin that is not known."""

    code = "forbidden"
    http_status = 403


class NotFound(ElasticMoEError):
    """The thing that the caller names does not exist."""

    code = "not_found"
    http_status = 404


class Conflict(ElasticMoEError):
    """The state does not allow the operation now."""

    code = "conflict"
    http_status = 409


class PayloadTooLarge(ElasticMoEError):
    """A body or message exceeds its limit."""

    code = "payload_too_large"
    http_status = 413


class DoesNotFit(ElasticMoEError):
    """An operation would exceed a byte budget; the text gives the figures."""

    code = "does_not_fit"
    http_status = 422


class Overloaded(ElasticMoEError):
    """A bounded queue is full; retry after a pause."""

    code = "overloaded"
    retryable = True
    http_status = 429


class Unavailable(ElasticMoEError):
    """A part that is needed is down or not ready yet."""

    code = "unavailable"
    retryable = True
    http_status = 503


class Unready(Unavailable):
    """What is asked does not serve yet, or not at the moment. The text is why, and the way out."""

    code = "not_ready"

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}: try again in a moment (`elasticmoe status` shows how far it is)")


class DeadlineExceeded(ElasticMoEError):
    """The request's own deadline passed."""

    code = "deadline_exceeded"
    retryable = True
    http_status = 504


class RequestFailed(ElasticMoEError):
    """The engine cannot compute this one request; nobody else's is affected. The text is for its client. The same
    request would fail again."""

    code = "request_failed"


class Fenced(ElasticMoEError):
    """The sender acts under an epoch that has been superseded; it must stop."""

    code = "stale_epoch"
    http_status = 409


class ProtocolError(ElasticMoEError):
    """A message that cannot be decoded, or one of another protocol version."""

    code = "protocol_error"
    http_status = 400


class CheckpointError(ElasticMoEError):
    """A checkpoint that must not be served: header, names, shapes, dtypes or lengths are wrong."""

    code = "bad_checkpoint"
    http_status = 422


class ConfigError(ElasticMoEError):
    """A configuration that stops the start."""

    code = "bad_config"
    http_status = 400


class DeviceError(ElasticMoEError):
    """A device call failed, or a rule of device memory would be broken."""

    code = "device_error"
    http_status = 500
