"""Requests to Hugging Face: tried again where that helps, and their failures in one line each."""

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
"""Words of a refusal that is about them."""
LONGEST_WAIT = 330
"""Seconds: rate limits are counted over windows of 300."""

# huggingface_hub tries some requests again by itself; how long it waits is to be seen, too.
waits = logging.getLogger("huggingface_hub.utils._http")
waits.addFilter(lambda record: "etry" in record.getMessage())
waits.addHandler(logging.lastResort)
waits.setLevel(logging.WARNING)
waits.propagate = False


class HubError(DeployError):
    """Hugging Face refused, or could not be reached."""

    def __init__(self, task: str, error: BaseException) -> None:
        self.status, self.reason = _status(error), _reason(error)
        super().__init__(f"could not {task}: {self.reason}{_advice(self.status, self.reason.lower())}")


def call(task: str, function: Callable, /, *args: Any, attempts: int = 5, missing: tuple = (), **kwargs: Any) -> Any:
    """Calls a function of huggingface_hub. 429, 5xx and lost connections are tried again, with longer and longer waits.

    Raises `HubError`, which says "could not `task`", where it was refused or failed to the last attempt; returns None
    where the answer is one of the statuses `missing`.
    """
    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, HTTPError) and passes(_status(error))),
        wait=_wait,
        stop=stop_after_attempt(attempts),
        before_sleep=_tell,
        reraise=True,
    )
    try:
        return retrying(function, *args, **kwargs)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # all that huggingface_hub raises
        if _status(error) in missing:
            return None
        wrapped = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        raise HubError(task, wrapped or error) from error


def _tell(state: RetryCallState) -> None:
    note(f"  {_reason(state.outcome.exception())}; trying again in {state.upcoming_sleep:.0f} s")


def passes(status: int | None) -> bool:
    """Whether what was answered with this status, or not at all, may be answered otherwise a little later."""
    return status is None or status == 429 or status >= 500


def _status(error: BaseException) -> int | None:
    """Of the answer; None where none came; 0 where huggingface_hub itself refused."""
    if (response := getattr(error, "response", None)) is not None:
        return response.status_code
    return None if isinstance(error, (HTTPError, ConnectionError)) else 0


def _wait(state: RetryCallState) -> float:
    """Seconds: what the answer's `RateLimit` or `Retry-After` asks for, else twice as long every time."""
    headers = getattr(getattr(state.outcome.exception(), "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers)
    if limit and not limit.remaining:
        return min(limit.reset_in_seconds + 1, LONGEST_WAIT)
    asked = headers.get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdecimal() else wait_exponential(multiplier=2, max=30)(state)


def _reason(error: BaseException) -> str:
    """What Hugging Face answered, or why it did not, in one line. The Endpoints API has its words as `message`, too."""
    status, said = _status(error), getattr(error, "server_message", None)
    if status:
        with suppress(ValueError, AttributeError):
            body = error.response.json()
            said = body.get("error") or body.get("message") or said
        reason = f"Hugging Face answered {status}: {said or responses.get(status, 'no reason')}"
    elif status == 0:
        reason = str(error)
    elif type(error) is ConnectionError:  # of Xet, which has the status in its text
        reason = f"the storage of Hugging Face did not take it ({error})"
    else:
        reason = f"the connection to Hugging Face was lost ({type(error).__name__})"
    return " ".join(reason.split())


def _advice(status: int | None, reason: str) -> str:
    """What a user can do about it."""
    if passes(status):
        return "; run the same command again later, it continues where it stopped"
    if "quota" in reason:
        return f"; ask for more at {QUOTA_PAGE}, or choose another INSTANCE=..."
    if status == 402 or any(word in reason for word in MONEY):
        return f"; credits and payment methods are at {BILLING_PAGE}"
    return f"; is the token expired, or may it not? See {TOKENS_PAGE}" if status in (401, 403) else ""
