"""The endpoint: create, update, wait, pause, resume, delete."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from huggingface_hub import InferenceEndpoint, constants

from handlers import MODELS
from scripts.deployment.account import Account
from scripts.deployment.calls import DeployError, HubError, call
from scripts.deployment.console import elapsed, out, say
from scripts.deployment.plan import FRAMEWORK, TAG, TASK, Plan, tag_of
from scripts.deployment.prices import hourly_price

# huggingface_hub has this address fixed; a test, or a company's mirror, has another.
constants.INFERENCE_ENDPOINTS_ENDPOINT = os.environ.get(
    "HF_INFERENCE_ENDPOINTS_ENDPOINT", constants.INFERENCE_ENDPOINTS_ENDPOINT
)

BILLING_PAGE = "https://huggingface.co/settings/billing"
QUOTA_PAGE = "https://endpoints.huggingface.co/contact"
READY = ("running", "scaledToZero")
BROKEN = ("failed", "updateFailed")
LOOK_EVERY = 5
"""Seconds between two looks at an endpoint that is being built."""
SETTLING = 6
"""Looks at which an endpoint may still show the state that it had before an update."""
PENDING_PER_REPLICA = 1.5


class Endpoint:
    """An endpoint of the account, which may not exist yet. `raw` is the API's description of it."""

    def __init__(self, account: Account, name: str, raw: dict[str, Any] | None) -> None:
        self.account = account
        self.name = name
        self.raw = raw
        self.left_state: str | None = None
        """The state that an update or a resume is to end."""

    @classmethod
    def find(cls, account: Account, name: str) -> Endpoint:
        endpoint = cls(account, name, None)
        try:
            endpoint._ask("look up the endpoint", account.api.get_inference_endpoint)
        except HubError as error:
            if error.status != 404:
                raise
        return endpoint

    @classmethod
    def find_all(cls, account: Account) -> list[Endpoint]:
        """This project's endpoints in the account's namespace."""
        found = _allowed(account, "list the endpoints", account.api.list_inference_endpoints, account.namespace)
        return [cls(account, one.name, one.raw) for one in found if TAG in (one.raw.get("tags") or [])]

    @property
    def exists(self) -> bool:
        return self.raw is not None

    @property
    def model(self) -> str:
        """Key of the model, from the tags."""
        tag = next((tag for tag in self.raw.get("tags") or [] if tag != TAG), "?")
        return next((model for model in MODELS if tag_of(model) == tag), tag)

    @property
    def state(self) -> str:
        return self.raw["status"]["state"]

    @property
    def message(self) -> str:
        """The endpoint's own words on its state."""
        status = self.raw["status"]
        return " ".join(filter(None, (status.get("message"), status.get("errorMessage"))))

    @property
    def url(self) -> str | None:
        return self.raw["status"].get("url")

    @property
    def access(self) -> str:
        """`protected` is the older name of `authenticated`."""
        return "authenticated" if self.raw["type"] == "protected" else self.raw["type"]

    @property
    def instance(self) -> str:
        return f"{self.raw['compute']['instanceType']} {self.raw['compute']['instanceSize']}"

    @property
    def price(self) -> float | None:
        """USD an hour for one replica."""
        compute = self.raw["compute"]
        return hourly_price(self.raw["provider"]["vendor"], compute["instanceType"], compute["instanceSize"])

    @property
    def replicas(self) -> str:
        """`1 of 0-2` while one runs of at least none and at most two."""
        scaling = self.raw["compute"]["scaling"]
        return f"{self.raw['status'].get('readyReplica', 0)} of {scaling['minReplica']}-{scaling['maxReplica']}"

    @property
    def page(self) -> str:
        return f"https://endpoints.huggingface.co/{self.account.namespace}/endpoints/{self.name}"

    def check_ours(self, model: str | None = None) -> None:
        """Raises `DeployError` where it is something else than a deployment of this model (None: of any)."""
        if not self.exists:
            return
        if TAG not in (self.raw.get("tags") or []):
            raise DeployError(f"{self.page} was not made by this script: choose another NAME=...")
        if model is not None and self.model != model:
            raise DeployError(f"the endpoint {self.name} is a deployment of {self.model}: choose another NAME=...")

    def check_fixed(self, plan: Plan) -> None:
        """Raises `DeployError` where the plan differs in what an endpoint keeps for life."""
        if not self.exists:
            return
        provider = self.raw["provider"]
        wanted = {"ACCESS": plan.access, "VENDOR": plan.vendor, "REGION": plan.region}
        fixed = {"ACCESS": self.access, "VENDOR": provider["vendor"], "REGION": provider["region"]}
        for variable, value in fixed.items():
            if wanted[variable] != value:
                raise DeployError(
                    f"the endpoint {self.name} has {variable}={value}, which never changes: choose another NAME=..., "
                    "or `make undeploy` it first"
                )

    def deploy(self, plan: Plan, repository: str, revision: str, secrets: dict[str, str]) -> None:
        """Creates it, or updates what differs, or does nothing."""
        wanted = {
            "repository": repository,
            "revision": revision,
            "instance_type": plan.instance,
            "instance_size": plan.size,
            "min_replica": plan.min_replica,
            "max_replica": plan.max_replica,
            "scale_to_zero_timeout": plan.scale_to_zero,
        }
        api = self.account.api
        function = api.update_inference_endpoint if self.exists else api.create_inference_endpoint
        settings = {
            **wanted,
            "accelerator": plan.accelerator,
            "framework": FRAMEWORK,
            "task": TASK,
            "tags": plan.tags,
            **({"secrets": secrets} if secrets else {}),
        }
        if "scaling_metric" in inspect.signature(function).parameters:  # came after huggingface_hub 0.36
            settings |= {"scaling_metric": "pendingRequests", "scaling_threshold": PENDING_PER_REPLICA}
        if not self.exists:
            say(f"  creating {self.name} on {plan.instance} {plan.size}")
            self._ask(
                "create the endpoint",
                function,
                vendor=plan.vendor,
                region=plan.region,
                type=plan.access,
                **settings,
            )
            return
        changes = [
            f"{key} {old} -> {wanted[key]}" for key, old in self._settings().items() if wanted[key] not in (old, None)
        ]
        if not changes and self.state not in BROKEN:
            say(f"  {self.name} is as planned: nothing to update")
            return
        say(f"  updating {self.name}: {', '.join(changes) or 'starting it again'}")
        self.left_state = self.state
        self._ask("update the endpoint", function, **settings)

    def _settings(self) -> dict[str, Any]:
        """What `deploy` compares, by the names of huggingface_hub's parameters."""
        compute, model = self.raw["compute"], self.raw["model"]
        scaling = compute["scaling"]
        return {
            "repository": model["repository"],
            "revision": model["revision"],
            "instance_type": compute["instanceType"],
            "instance_size": compute["instanceSize"],
            "min_replica": scaling["minReplica"],
            "max_replica": scaling["maxReplica"],
            "scale_to_zero_timeout": scaling.get("scaleToZeroTimeout"),
        }

    def wait(self, minutes: float, variables: str) -> None:
        """Waits until it serves, or sleeps until a request wakes it, and shows each change of state.

        Args:
            variables: name the endpoint to the Makefile, for the hints.

        Raises:
            DeployError: it failed, or did not come up in time.
        """
        start = time.monotonic()
        shown = None
        with out.status("waiting for the endpoint"):
            for look in count():
                waited = time.monotonic() - start
                if shown != (self.state, self.message):
                    shown = (self.state, self.message)
                    say(f"  {elapsed(waited):>5}  {self.state:<13} {self.message}")
                if self.state != self.left_state or look >= SETTLING:
                    self.left_state = None
                    if self.state in READY and self.url:
                        return
                    self._check_alive(variables)
                if waited > minutes * 60:
                    raise DeployError(
                        f"the endpoint {self.name} is still {self.state} after {elapsed(waited)}, and goes on without "
                        f"this command: `make endpoints` shows its state, `make smoke {variables}` tries it, "
                        f"`make pause {variables}` stops it; {self.page}"
                    )
                time.sleep(LOOK_EVERY)
                self._ask("look at the endpoint", self.account.api.get_inference_endpoint)

    def _check_alive(self, variables: str) -> None:
        """Raises `DeployError` where it has failed or was paused."""
        if self.state in BROKEN:
            reason = self.message or "it gives no reason"
            raise DeployError(f"the endpoint {self.name} failed: {reason}; its logs: {self.page}/logs")
        if self.state == "paused":
            raise DeployError(f"the endpoint {self.name} was paused meanwhile; `make resume {variables}` starts it")

    def pause(self) -> None:
        self._ask("pause the endpoint", self.account.api.pause_inference_endpoint)

    def resume(self) -> None:
        self.left_state = self.state
        self._ask("resume the endpoint", self.account.api.resume_inference_endpoint)

    def delete(self) -> None:
        _allowed(
            self.account,
            "delete the endpoint",
            self.account.api.delete_inference_endpoint,
            self.name,
            namespace=self.account.namespace,
        )

    def _ask(self, task: str, function: Callable[..., InferenceEndpoint], /, **settings: Any) -> None:
        self.raw = _allowed(
            self.account, task, function, name=self.name, namespace=self.account.namespace, **settings
        ).raw


def _allowed(account: Account, task: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """`call`, with what a refusal of the Endpoints API means to a user."""
    try:
        return call(task, function, *args, **kwargs)
    except HubError as error:
        said = error.reason.lower()
        if "quota" in said:
            raise DeployError(f"{error.reason}; ask for more at {QUOTA_PAGE}, or choose another INSTANCE=...") from None
        if error.status == 402 or any(word in said for word in ("payment", "billing", "credit", "subscription")):
            raise DeployError(f"{error.reason}; credits and payment methods are at {BILLING_PAGE}") from None
        if error.status in (401, 403):
            raise DeployError(f"this token may not {task} in {account.namespace}: {error.reason}") from None
        raise
