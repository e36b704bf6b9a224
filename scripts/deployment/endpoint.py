"""The endpoint: create, update, wait, pause, resume, delete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from huggingface_hub import InferenceEndpoint, constants

from handlers import MODELS
from scripts.console import DeployError, describe, if_stopped, note, out, say
from scripts.deployment.account import Account, open_account
from scripts.deployment.calls import HubError, call, is_transient
from scripts.deployment.plan import PENDING, TAG, Plan, addresses, default_name, find_models, make_variables, model_tag
from scripts.instances import describe_price, dollars, is_cpu, table_price

READY = ("running", "scaledToZero")
BROKEN = ("failed", "updateFailed")
FREE = ("paused", "scaledToZero")
"""States that cost nothing."""
POLL_SECONDS = 5
STALE_POLLS = 6
"""Polls that may still show the state from before an update."""
DELETE_SECONDS = 300
"""Seconds in which a deleted endpoint must be gone."""
FIXED_SETTINGS = {
    "framework": "pytorch",
    "task": "custom",
    "scaling_metric": "pendingRequests",
    "scaling_threshold": PENDING,
}
"""Settings of every endpoint, by the names of huggingface_hub."""
IMAGE_SETTINGS = {"port": 8000, "healthRoute": "/health"}
"""Settings of the container image of this project: those of its Dockerfile, by the names of the API."""


def poll(limit: float) -> Iterator[timedelta]:
    """Yield the time waited at each poll of an endpoint. The last poll is after `limit` seconds."""
    start, waited = time.monotonic(), 0.0
    yield timedelta()
    while waited <= limit:
        time.sleep(POLL_SECONDS)
        waited = time.monotonic() - start
        yield timedelta(seconds=int(waited))


def find_endpoints(account: Account) -> list[Endpoint]:
    """Return this project's endpoints in the account's namespace."""
    infos = call("list the endpoints", account.api.list_inference_endpoints, account.namespace)
    return [Endpoint(account, info.name, read_models(info), info) for info in infos if has_tag(info)]


def find_endpoint(model: str | None, namespace: str | None, name: str | None, required: bool = True) -> Endpoint:
    """Return the endpoint of these models, by its name or the default name.

    Raises:
        DeployError: there is no such endpoint and `required` is set.
    """
    models = find_models(model)
    endpoint = Endpoint(open_account(namespace), name or default_name(*models), models)
    if required and not endpoint.info:
        advice = f"`make endpoints` lists yours, `make deploy {endpoint.variables}` creates it"
        raise DeployError(f"there is no endpoint {endpoint.name} in {endpoint.account.namespace}; {advice}")
    return endpoint


def has_tag(info: InferenceEndpoint) -> bool:
    """Return whether this project created the endpoint."""
    return TAG in (info.raw.get("tags") or ())


def read_models(info: InferenceEndpoint) -> tuple[str, ...]:
    """Return the keys of an endpoint's models from its tags, and ignore tags that a user has added."""
    return tuple(key for tag in info.raw.get("tags") or () for key in MODELS if model_tag(key) == tag)


class Endpoint:
    """A deployment of these models. `info` is the API's description of it, or None while it does not exist."""

    def __init__(self, account: Account, name: str, models: Sequence[str], info: InferenceEndpoint | None = None):
        """Look it up. Raise `DeployError` for an endpoint that is not a deployment of these models."""
        self.account, self.name, self.models, self.info = account, name, models, info
        self.page = f"https://endpoints.huggingface.co/{account.namespace}/endpoints/{name}"
        self.variables = make_variables(models, account.requested_namespace, name)
        self.was_changed = False
        """True if this command sent a request after which it may run."""
        self.previous_state: str | None = None
        """The state before an update or a resume."""
        if not info:
            self.refresh()

    def __str__(self) -> str:
        return f"the endpoint {self.name}"

    def refresh(self, attempts: int = 5) -> None:
        """Ask the API for the state."""
        self._call("look up", self.account.api.get_inference_endpoint, missing=(404,), attempts=attempts)
        if self.info and not has_tag(self.info):
            raise DeployError(f"{self.page} was not made by this script: choose another NAME=...")
        if self.info and set(read_models(self.info)) != set(self.models):
            raise DeployError(f"{self} is a deployment of {','.join(read_models(self.info))}: choose another NAME=...")

    @property
    def addresses(self) -> dict[str, str]:
        return addresses(self.info.url, self.models)

    @property
    def message(self) -> str:
        """The API's message on the state."""
        return " ".join(filter(None, map(self.info.raw["status"].get, ("message", "errorMessage"))))

    @property
    def access(self) -> str:
        """Who may call it. `protected` is the older name of `authenticated`."""
        return "authenticated" if self.info.type == "protected" else self.info.type

    @property
    def placement(self) -> tuple[str, str, str, str]:
        """Vendor, region, instance type and instance size."""
        provider, compute = self.info.raw["provider"], self.info.raw["compute"]
        return provider["vendor"], provider["region"], compute["instanceType"], compute["instanceSize"]

    @property
    def price(self) -> float | None:
        """USD an hour for one replica, from the platform or else from the table."""
        if not self.info:
            return None
        for offer in self.account.hardware:
            if (offer.vendor, offer.region, offer.instance_type, offer.instance_size) == self.placement:
                return offer.price_per_hour
        return table_price(self.placement[0], *self.placement[2:])

    @property
    def image(self) -> str | None:
        """The URL of its container image; None for the stock Inference Toolkit."""
        return ((self.info.raw["model"].get("image") or {}).get("custom") or {}).get("url")

    @property
    def scaling(self) -> tuple[int, int, int | None]:
        """The least and the most replicas, and the idle minutes before it scales to zero."""
        scaling = self.info.raw["compute"]["scaling"]
        return scaling["minReplica"], scaling["maxReplica"], scaling.get("scaleToZeroTimeout") or None

    def row(self) -> list[str]:
        """Return its row in the table of endpoints. Time and cost are upper bounds: it may have scaled to zero."""
        ready = self.info.raw["status"].get("readyReplica", 0)
        up = max((datetime.now(UTC) - self.info.updated_at) // timedelta(seconds=1), 0)
        spent = dollars(self.price and self.price * up / 3600 * max(ready, 1))
        since = "-" if self.info.status in FREE else f"{timedelta(seconds=up)}, {spent}"
        replicas, hourly = "{} of {}-{}".format(ready, *self.scaling), f"{dollars(self.price)}/h"
        instance = " ".join(self.placement[2:])
        row = [self.name, ",".join(self.models), self.info.status, instance, replicas, self.access]
        return [*row, hourly, since, self.info.url or ""]

    def is_in_quota(self, plan: Plan) -> bool:
        """Return whether it runs, or may wake up, on the plan's instance, so the quota counts it already."""
        return bool(self.info) and self.info.status != "paused" and self.placement[2:] == (plan.instance, plan.size)

    def check_immutable(self, plan: Plan) -> None:
        """Raise `DeployError` where an immutable setting differs from the plan. The platform may change the access."""
        advice = "choose another NAME=..., or `make undeploy` it first. Nothing was sent to it"
        wanted = {"ACCESS": plan.access, "VENDOR": plan.vendor, "REGION": plan.region}
        for (variable, value), actual in zip(wanted.items(), (self.access, *self.placement[:2]), strict=True):
            if value not in (actual, "auto"):
                attention = "ATTENTION: " if self.was_changed else ""
                wrong = f"{attention}{variable}={value} was requested and {self} has {actual}"
                raise DeployError(f"{wrong}, which never changes: {advice}")
        if self.image and not plan.image:  # no public source says how an update returns to the stock image
            raise DeployError(f"{self} runs IMAGE={self.image}: name an IMAGE again, or {advice}")

    def deploy(self, plan: Plan, repository: str, revision: str) -> None:
        """Create it, or update the settings that differ."""
        wanted = {
            "repository": repository,
            "revision": revision,
            "instance_type": plan.instance,
            "instance_size": plan.size,
            "min_replica": plan.min_replica,
            "max_replica": plan.max_replica,
            "scale_to_zero_timeout": plan.scale_to_zero,
            "image": plan.image,
        }
        settings = FIXED_SETTINGS | wanted | {"accelerator": "cpu" if is_cpu(plan.instance) else "gpu"}
        if image := settings.pop("image"):
            settings["custom_image"] = {"url": image, **IMAGE_SETTINGS}
        if not self.info:
            self._create(plan, settings)
        self.check_immutable(plan)
        if plan.scale_to_zero is None and self.scaling[-1]:
            self._disable_scale_to_zero(plan)
        actual = (self.info.repository, self.info.revision, *self.placement[2:], *self.scaling, self.image)
        compared = zip(wanted.items(), actual, strict=True)
        changes = [f"{name} {old} -> {new}" for (name, new), old in compared if old != new]
        if changes or self.info.status in BROKEN:
            say(f"  updating {self.name}: {', '.join(changes) or 'starting it again'}")
            self._change("update", self.account.api.update_inference_endpoint, **settings)
        if not self.was_changed:
            say(f"  {self.name} is as planned: nothing to update")
        if self.info.status == "paused":
            say("  it was paused: resuming it")
            self.resume()

    def _create(self, plan: Plan, settings: dict[str, Any]) -> None:
        """Create it, and wait while an endpoint of this name is still being deleted.

        Creating is not idempotent. When the first response was lost, a second request gets 409, and the endpoint of the
        first request is used.
        """
        say(f"  creating {self.name} on {plan.instance} {plan.size} in {plan.vendor} {plan.region}")
        new = {"tags": plan.tags, "vendor": plan.vendor, "region": plan.region, "type": plan.access}
        for _ in poll(DELETE_SECONDS):
            try:
                return self._change("create", self.account.api.create_inference_endpoint, **settings, **new)
            except HubError as error:
                if error.status != 409:
                    raise
                refusal = error
            self.refresh()
            if self.info:
                return say("  it exists already: the response to its creation was lost")
        raise refusal

    def _disable_scale_to_zero(self, plan: Plan) -> None:
        """Set the replicas, and never scale to zero. The API takes these settings only together.

        huggingface_hub's update sends no null. No public source says whether the API takes null or 0 for "never".
        Creation takes null. Both are tried; when the API refuses both, nothing has changed.
        """

        def put(never: int | None, name: str, namespace: str) -> InferenceEndpoint:
            scaling = {"minReplica": plan.min_replica, "maxReplica": plan.max_replica, "scaleToZeroTimeout": never}
            url = f"{constants.INFERENCE_ENDPOINTS_ENDPOINT}/endpoint/{namespace}/{name}"
            response = self.account.request("PUT", url, json={"compute": {"scaling": scaling}})
            return InferenceEndpoint.from_raw(response.json(), namespace)

        say(f"  updating {self.name}: it never scales to zero, min_replica {plan.min_replica}")
        for never in (None, 0):
            try:
                return self._change("update", put, never=never)
            except HubError as error:
                if error.status not in (400, 422):
                    raise
                refusal = error.reason
        by_hand = f"choose Never under Settings, Autoscaling on {self.page}, or `make undeploy` it and deploy it again"
        raise DeployError(f"the API does not let {self} stop scaling to zero ({refusal}): {by_hand}")

    def wait(self, minutes: float) -> None:
        """Wait until it runs or has scaled to zero, and show each change of its state.

        A lost network or a transient error does not end the wait.

        Raises:
            DeployError: it failed, was paused or deleted, or takes longer than `minutes`.
        """
        shown, lost = None, ""
        with out.status("waiting for the endpoint"):
            for number, waited in enumerate(poll(minutes * 60)):
                if number:
                    lost = self._refresh_if_reachable(lost)
                if not self.info:
                    raise DeployError(f"{self} was deleted meanwhile")
                state = self.info.status
                if shown != (state, self.message):
                    shown = (state, self.message)
                    say(f"  {waited}  {state:<13} {self.message}")
                is_stale = state == self.previous_state and number < STALE_POLLS
                if not is_stale and self._is_ready():
                    return
        raise DeployError(f"{self} is still {self.info.status} after {waited} (TIMEOUT={minutes:g}){lost}")

    def _refresh_if_reachable(self, lost: str) -> str:
        """Ask for the state. Return the reason of a transient error, which is noted once, or ""."""
        try:
            self.refresh(attempts=1)
        except HubError as error:
            if not is_transient(error.status):
                raise
            if not lost:
                note(f"  {error.reason}; the endpoint continues to start, still waiting")
            return f", and {error.reason}"
        return ""

    def _is_ready(self) -> bool:
        """Return whether it takes requests. Raise `DeployError` when it never will."""
        state = self.info.status
        if state in BROKEN:
            raise DeployError(f"{self} failed: {self.message or 'no reason given'}; its logs: {self.page}/logs")
        if state == "paused":
            raise DeployError(f"{self} was paused meanwhile; `make resume {self.variables}` starts it")
        return state in READY and bool(self.info.url)

    @contextmanager
    def pause_on_failure(self, keep: bool) -> Iterator[None]:
        """Add the endpoint's state and cost to every failure inside the block.

        An endpoint that the block started is paused unless `keep` is set. Any other endpoint stays as it is.
        """
        if self.info:
            _ = self.account.hardware  # the price, which is not requested during a failure
        try:
            yield
        except BaseException as error:
            try:
                if self.was_changed:
                    self.refresh(attempts=2)
                    if self.info and not keep:
                        self.pause()
                error.add_note(self.cost_note)
            except BaseException as second:
                stop = f"`make pause {self.variables}` stops it, or {self.page}"
                why = describe(second) or (
                    "stopped" if isinstance(second, KeyboardInterrupt) else type(second).__name__
                )
                error.add_note(f"{self} MAY BE RUNNING, at {describe_price(self.price)}: {stop} ({why})")
            raise

    @property
    def cost_note(self) -> str:
        """Its state and its cost; "" if it never existed."""
        if not self.info:
            return f"there is no endpoint {self.name}, and nothing that costs" if self.was_changed else ""
        if self.info.status in FREE:
            start = f"`make resume {self.variables}`" if self.info.status == "paused" else "any request"
            return f"{self} is {self.info.status} and costs nothing; {start} starts it"
        cost = f"costs {describe_price(self.price)} for each replica; `make pause {self.variables}` stops it"
        return f"{self} is {self.info.status} and {cost}"

    def pause(self) -> None:
        with if_stopped(f"{self} may still be running, and cost: {self.page}"):
            if self.info.status != "paused":
                self._call("pause", self.account.api.pause_inference_endpoint)

    def resume(self) -> None:
        if self.info.status == "paused":
            self._change("resume", self.account.api.resume_inference_endpoint)

    def delete(self) -> None:
        """Delete it, and wait until it is gone, which takes a moment after the API's response."""
        self._call("delete", self.account.api.delete_inference_endpoint, missing=(404,))
        with out.status("waiting until the endpoint is gone"):
            for _ in poll(DELETE_SECONDS):
                self.refresh()
                if not self.info:
                    return
        raise DeployError(f"{self} was deleted {DELETE_SECONDS} s ago and is still {self.info.status}: {self.page}")

    def _change(self, task: str, function: Callable[..., InferenceEndpoint], /, **settings: Any) -> None:
        """Send a request after which it may run. A refused request leaves an existing endpoint unchanged."""
        before, self.was_changed = self.was_changed, True
        self.previous_state = self.previous_state or (self.info and self.info.status)
        try:
            self._call(task, function, **settings)
        except HubError as error:
            if self.info and error.status in (400, 422):
                self.was_changed = before
            raise

    def _call(self, task: str, function: Callable[..., InferenceEndpoint | None], /, **settings: Any) -> None:
        key = {"name": self.name, "namespace": self.account.namespace}
        self.info = call(f"{task} {self}", function, **key, **settings)
