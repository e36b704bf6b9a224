"""Requests to Hugging Face: tried again where that helps, and their failures in one line each."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from http.client import responses
from typing import ParamSpec, TypeVar

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from scripts.deployment.console import note

P = ParamSpec("P")
T = TypeVar("T")

ATTEMPTS = 5
BACKOFF = wait_exponential(multiplier=2, max=30)
LONGEST_WAIT = 120
"""Seconds: a `Retry-After` above this is not waited for."""

# huggingface_hub speaks HTTP through requests (0.x), httpx (1.x) or httpx2 (2.x). This is the base class of all errors
# of that library, a lost connection included: in each the class just before OSError among the bases of HfHubHTTPError.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__mro__[HfHubHTTPError.__mro__.index(OSError) - 1]


class DeployError(Exception):
    """What went wrong and what to do about it, in one line."""


class HubError(DeployError):
    """Hugging Face refused, or could not be reached. `status` is the HTTP status; None where no answer came."""

    def __init__(self, message: str, status: int | None, reason: str, gated: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.gated = gated


def call(task: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a function of huggingface_hub. 429, 5xx and lost connections are tried again, with longer and longer waits.

    Args:
        task: what it does, to complete "could not ...".

    Raises:
        HubError: it was refused, or failed to the last attempt.
    """
    retrying = Retrying(
        retry=retry_if_exception(_may_pass),
        wait=_wait,
        stop=stop_after_attempt(ATTEMPTS),
        before_sleep=_tell,
        reraise=True,
    )
    try:
        return retrying(function, *args, **kwargs)
    except (TRANSPORT_ERROR, OSError, RuntimeError, ValueError) as error:  # all that huggingface_hub raises
        cause = _http_error(error)
        if cause is None:
            raise DeployError(f"could not {task}: {' '.join(str(error).split())}") from error
        message = f"could not {task}: {_reason(cause)}"
        if _status(cause) is None or _may_pass(cause):
            message += "; run the same command again later, it continues where it stopped"
        raise HubError(message, _status(cause), _reason(cause), isinstance(cause, GatedRepoError)) from error


def _http_error(error: BaseException) -> BaseException | None:
    """The error of the HTTP library behind `error`, one with an answer if there is any; None where it is none of HTTP.

    huggingface_hub wraps those of uploads in a RuntimeError, and those of downloads in one that tells of its cache.
    """
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    of_http = [one for one in chain if isinstance(one, (TRANSPORT_ERROR, ConnectionError))]
    return next((one for one in of_http if _status(one)), of_http[-1] if of_http else None)


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later. An upload was tried again by huggingface_hub itself."""
    if not isinstance(error, TRANSPORT_ERROR):
        return False
    status = _status(_http_error(error))
    return status is None or status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR


def _wait(state: RetryCallState) -> float:
    """Seconds: what the answer's `Retry-After` asks for, else twice as long every time."""
    response = getattr(_http_error(state.outcome.exception()), "response", None)
    asked = "" if response is None else response.headers.get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdecimal() else BACKOFF(state)


def _tell(state: RetryCallState) -> None:
    note(f"  {_reason(_http_error(state.outcome.exception()))}; trying again in {_wait(state):.0f} s")


def _reason(error: BaseException) -> str:
    """What Hugging Face answered, or why it did not, in one line."""
    status = _status(error)
    if status is None:
        return f"the connection to Hugging Face was lost ({type(error).__name__})"
    said = _body_message(error) or getattr(error, "server_message", None) or responses.get(status, "no reason")
    return f"Hugging Face answered {status}: {' '.join(said.split())}"


def _body_message(error: BaseException) -> str | None:
    """The message in a JSON body. The Endpoints API has it as `error` or `message`; the Hub as `error`."""
    try:
        body = error.response.json()
    except ValueError:
        return None
    if not isinstance(body, dict):
        return None
    said = body.get("error") or body.get("message")
    return said if isinstance(said, str) else None
