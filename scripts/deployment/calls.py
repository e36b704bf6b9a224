"""Requests to Hugging Face, with retries of transient errors, and one-line errors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from http.client import responses
from typing import Any

from httpx2 import HTTPError
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import parse_ratelimit_headers
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from scripts.console import DeployError, note
from scripts.deployment.hardware import QUOTA_PAGE

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
BILLING_PAGE = "https://huggingface.co/settings/billing"
MONEY = ("payment", "billing", "credit", "subscription", "storage limit")
"""Words of a refusal that is about money."""
MAX_WAIT = 330
"""Seconds. The windows of rate limits have 300."""

# huggingface_hub retries some requests itself; this shows how long it waits.
hub_log = logging.getLogger("huggingface_hub.utils._http")
hub_log.addFilter(lambda record: "etry" in record.getMessage())
hub_log.addHandler(logging.lastResort)
hub_log.setLevel(logging.WARNING)
hub_log.propagate = False


class HubError(DeployError):
    """Hugging Face refused a request, or could not be reached."""

    def __init__(self, task: str, error: BaseException) -> None:
        self.status, self.reason = _status(error), _reason(error)
        super().__init__(f"could not {task}: {self.reason}{_advice(self.status, self.reason.lower())}")


def call(task: str, function: Callable, /, *args: Any, attempts: int = 5, missing: tuple = (), **kwargs: Any) -> Any:
    """Call a function of huggingface_hub. Retry 429, 5xx and lost connections with longer and longer waits.

    Return None for a response with a status in `missing`. Raise `HubError`, which says "could not `task`", when the
    request is refused or the last attempt fails.
    """
    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, HTTPError) and is_transient(_status(error))),
        wait=_wait,
        stop=stop_after_attempt(attempts),
        before_sleep=_note_retry,
        reraise=True,
    )
    try:
        return retrying(function, *args, **kwargs)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # every kind that huggingface_hub raises
        if _status(error) in missing:
            return None
        wrapped = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        raise HubError(task, wrapped or error) from error


def _note_retry(state: RetryCallState) -> None:
    note(f"  {_reason(state.outcome.exception())}; trying again in {state.upcoming_sleep:.0f} s")


def is_transient(status: int | None) -> bool:
    """Return whether the same request may succeed a little later. The status None stands for no response."""
    return status is None or status == 429 or status >= 500


def _status(error: BaseException) -> int | None:
    """Return the status of the response, None for no response, 0 for a refusal by huggingface_hub itself."""
    if (response := getattr(error, "response", None)) is not None:
        return response.status_code
    return None if isinstance(error, (HTTPError, ConnectionError)) else 0


def _wait(state: RetryCallState) -> float:
    """Return the seconds of `RateLimit` or `Retry-After` in the response, else twice as many each time."""
    headers = getattr(getattr(state.outcome.exception(), "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers)
    if limit and not limit.remaining:
        return min(limit.reset_in_seconds + 1, MAX_WAIT)
    seconds = headers.get("Retry-After", "")
    return min(float(seconds), MAX_WAIT) if seconds.isdecimal() else wait_exponential(multiplier=2, max=30)(state)


def _reason(error: BaseException) -> str:
    """Return the words of Hugging Face, or why there is no response, in one line."""
    status, words = _status(error), getattr(error, "server_message", None)
    if status:
        with suppress(ValueError, AttributeError):
            body = error.response.json()
            words = body.get("error") or body.get("message") or words  # the Endpoints API has `message`
        reason = f"Hugging Face answered {status}: {words or responses.get(status, 'no reason')}"
    elif status == 0:
        reason = str(error)
    elif type(error) is ConnectionError:  # Xet raises it, with the status in its text
        reason = f"the storage of Hugging Face did not take it ({error})"
    else:
        reason = f"the connection to Hugging Face was lost ({type(error).__name__})"
    return " ".join(reason.split())


def _advice(status: int | None, reason: str) -> str:
    """Return what the user can do about an error."""
    if is_transient(status):
        return "; run the same command again later, it continues where it stopped"
    if "quota" in reason:
        return f"; ask for more at {QUOTA_PAGE}, or choose another INSTANCE=..."
    if status == 402 or any(word in reason for word in MONEY):
        return f"; credits and payment methods are at {BILLING_PAGE}"
    if status in (401, 403):
        return f"; the token may be expired or lack a permission, see {TOKENS_PAGE}"
    return ""
