"""Requests to Hugging Face: tried again where that helps, and their failures in one line each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from http.client import responses
from typing import Any, TypeVar

from httpx2 import HTTPError
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import parse_ratelimit_headers
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from scripts.deployment.console import DeployError, note

T = TypeVar("T")

ATTEMPTS = 5
BACKOFF = wait_exponential(multiplier=2, max=30)
LONGEST_WAIT = 330
"""Seconds: rate limits are counted over windows of 300."""


class HubError(DeployError):
    """Hugging Face refused, or could not be reached. `status` is the HTTP status; None where no answer came."""

    def __init__(self, message: str, status: int | None, reason: str, gated: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.gated = gated


class _Waits(logging.Handler):
    """huggingface_hub tries some requests again by itself; how long it waits is to be seen, too."""

    def emit(self, record: logging.LogRecord) -> None:
        if "etry" in record.getMessage():
            note(f"  {record.getMessage()}")


_logger = logging.getLogger("huggingface_hub.utils._http")
_logger.addHandler(_Waits())
_logger.setLevel(logging.WARNING)
_logger.propagate = False


def call(task: str, function: Callable[..., T], /, *args: Any, attempts: int = ATTEMPTS, **kwargs: Any) -> T:
    """Calls a function of huggingface_hub. 429, 5xx and lost connections are tried again, with longer and longer waits.

    Args:
        task: what it does, to complete "could not ...".

    Raises:
        HubError: it was refused, or failed to the last attempt.
    """
    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, HTTPError) and passes(_status(error))),
        wait=_wait,
        stop=stop_after_attempt(attempts),
        before_sleep=lambda state: note(f"  {_reason(_failure(state))}; trying again in {_wait(state):.0f} s"),
        reraise=True,
    )
    try:
        return retrying(function, *args, **kwargs)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # all that huggingface_hub raises
        cause = _http_error(error)
        if cause is None:
            raise DeployError(f"could not {task}: {' '.join(str(error).split())}") from error
        status, reason = _status(cause), _reason(cause)
        again = "; run the same command again later, it continues where it stopped" if passes(status) else ""
        gated = isinstance(cause, GatedRepoError)
        raise HubError(f"could not {task}: {reason}{again}", status, reason, gated) from error


def passes(status: int | None) -> bool:
    """Whether what was answered with this status, or not at all, may be answered otherwise a little later."""
    return status is None or status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR


def _http_error(error: BaseException) -> BaseException | None:
    """The error of HTTP behind `error`, one with an answer if there is any; None where it is none of HTTP.

    huggingface_hub wraps those of downloads in one that tells of its cache; those of Xet are a ConnectionError.
    """
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    of_http = [one for one in chain if isinstance(one, (HTTPError, ConnectionError))]
    return next((one for one in of_http if _status(one)), of_http[-1] if of_http else None)


def _failure(state: RetryCallState) -> BaseException:
    return _http_error(state.outcome.exception())


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _wait(state: RetryCallState) -> float:
    """Seconds: what the answer's `RateLimit` or `Retry-After` asks for, else twice as long every time."""
    response = getattr(_failure(state), "response", None)
    headers = {} if response is None else response.headers
    limit = parse_ratelimit_headers(headers)
    if limit and limit.remaining == 0 and response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
        return min(limit.reset_in_seconds + 1, LONGEST_WAIT)
    asked = headers.get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdecimal() else BACKOFF(state)


def _reason(error: BaseException) -> str:
    """What Hugging Face answered, or why it did not, in one line."""
    status = _status(error)
    if status is None:
        if type(error) is ConnectionError:  # of Xet, which has the status in its text
            return f"the storage of Hugging Face did not take it ({' '.join(str(error).split())})"
        return f"the connection to Hugging Face was lost ({type(error).__name__})"
    said = _body_message(error) or getattr(error, "server_message", None) or responses.get(status, "no reason")
    return f"Hugging Face answered {status}: {' '.join(said.split())}"


def _body_message(error: BaseException) -> str | None:
    """The message in a JSON body. The Endpoints API has it as `error` or `message`; the Hub as `error`."""
    try:
        body = error.response.json()
    except ValueError:
        return None
    said = (body.get("error") or body.get("message")) if isinstance(body, dict) else None
    return said if isinstance(said, str) else None
