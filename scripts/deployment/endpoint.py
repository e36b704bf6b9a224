"""The endpoint: create, update, wait, pause, resume, delete."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from huggingface_hub import InferenceEndpoint, constants

from handlers import MODELS
from scripts.console import DeployError, describe, if_stopped, note, out, say
from scripts.deployment.account import Account, open_account
from scripts.deployment.calls import HubError, call, passes
from scripts.deployment.plan import PENDING, TAG, Plan, addresses, default_name, find_models, tag_of, variables
from scripts.instances import describe_price, dollars, is_cpu, table_price

READY = ("running", "scaledToZero")
BROKEN = ("failed", "updateFailed")
FREE = ("paused", "scaledToZero")
"""States that cost nothing."""
LOOK_EVERY = 5
"""Seconds between two looks at an endpoint that is being built."""
SETTLING = 6
"""Looks at which an endpoint may still show the state that it had before an update."""
GONE_WITHIN = 300
"""Seconds in which an endpoint that was deleted has to be gone."""
ALWAYS = {"framework": "pytorch", "task": "custom", "scaling_metric": "pendingRequests", "scaling_threshold": PENDING}
"""Settings of every endpoint, as huggingface_hub names them."""
TOKEN_OF = "HF_TOKEN_SHA256"
"""Environment variable with the beginning of the hash of the token in the secrets, whose values nobody can read."""


def looks(limit: float) -> Iterator[timedelta]:
    """The time waited, at each look at an endpoint; the last one is when `limit`, in seconds, is over."""
    start, waited = time.monotonic(), 0.0
    yield timedelta()
    while waited <= limit:
        time.sleep(LOOK_EVERY)
        waited = time.monotonic() - start
        yield timedelta(seconds=int(waited))


def find_endpoints(account: Account) -> list[Endpoint]:
    """This project's in the account's namespace."""
    found = call("list the endpoints", account.api.list_inference_endpoints, account.namespace)
    return [Endpoint(account, one.name, models_of(one), one) for one in found if TAG in (one.raw.get("tags") or ())]


def find_endpoint(model: str | None, namespace: str | None, name: str | None, needed: bool = True) -> Endpoint:
    """That of these models by its name or its default one. Raises `DeployError` where there is none but is needed."""
    models = find_models(model)
    endpoint = Endpoint(open_account(namespace), name or default_name(*models), models)
    if needed and not endpoint.there:
        other = f"`make endpoints` lists what there is, `make deploy {endpoint.variables}` makes it"
        raise DeployError(f"there is no endpoint {endpoint.name} in {endpoint.account.namespace}; {other}")
    return endpoint


def models_of(there: InferenceEndpoint) -> tuple[str, ...]:
    """Keys of its models, from the tags; others, which a user has added, are no matter."""
    return tuple(key for tag in there.raw.get("tags") or () for key in MODELS if tag_of(key) == tag)


class Endpoint:
    """A deployment of these models; `there` is what the API says of it, None where it does not exist."""

    def __init__(self, account: Account, name: str, models: Sequence[str], there: InferenceEndpoint | None = None):
        """Raises `DeployError` where it is something else."""
        self.account, self.name, self.models, self.there = account, name, models, there
        self.page = f"https://endpoints.huggingface.co/{account.namespace}/endpoints/{name}"
        self.variables = variables(models, account.asked, name)
        self.touched = False
        """Whether this command asked for something that lets it run."""
        self.left_state: str | None = None
        """The state that an update or a resume is to end."""
        if not there:
            self.look()

    def __str__(self) -> str:
        return f"the endpoint {self.name}"

    def look(self, attempts: int = 5) -> None:
        """Asks what there is."""
        self._call("look up", self.account.api.get_inference_endpoint, missing=(404,), attempts=attempts)
        if self.there and TAG not in (self.there.raw.get("tags") or ()):
            raise DeployError(f"{self.page} was not made by this script: choose another NAME=...")
        if self.there and set(models_of(self.there)) != set(self.models):
            raise DeployError(f"{self} is a deployment of {','.join(models_of(self.there))}: choose another NAME=...")

    @property
    def addresses(self) -> dict[str, str]:
        return addresses(self.there.url, self.models)

    @property
    def message(self) -> str:
        """The endpoint's own words on its state."""
        return " ".join(filter(None, map(self.there.raw["status"].get, ("message", "errorMessage"))))

    @property
    def access(self) -> str:
        """`protected` is the older name of `authenticated`."""
        return "authenticated" if self.there.type == "protected" else self.there.type

    @property
    def machine(self) -> tuple[str, str, str, str]:
        """Vendor, region, instance type and size."""
        provider, compute = self.there.raw["provider"], self.there.raw["compute"]
        return provider["vendor"], provider["region"], compute["instanceType"], compute["instanceSize"]

    @property
    def price(self) -> float | None:
        """USD an hour for one replica: the platform's, or that of the table."""
        for one in self.account.hardware if self.there else ():
            if (one.vendor, one.region, one.instance_type, one.instance_size) == self.machine:
                return one.price_per_hour
        return table_price(self.machine[0], *self.machine[2:]) if self.there else None

    @property
    def scaling(self) -> tuple[int, int, int | None]:
        """Replicas at least and at most, and minutes until it sleeps."""
        scaling = self.there.raw["compute"]["scaling"]
        return scaling["minReplica"], scaling["maxReplica"], scaling.get("scaleToZeroTimeout") or None

    def row(self) -> list[str]:
        """Of the table of endpoints. How long it is up and what that cost, at most: it may have slept meanwhile."""
        ready = self.there.raw["status"].get("readyReplica", 0)
        up = max((datetime.now(UTC) - self.there.updated_at) // timedelta(seconds=1), 0)
        spent = dollars(self.price and self.price * up / 3600 * max(ready, 1))
        since = "-" if self.there.status in FREE else f"{timedelta(seconds=up)}, {spent}"
        replicas, hourly = "{} of {}-{}".format(ready, *self.scaling), f"{dollars(self.price)}/h"
        row = [self.name, ",".join(self.models), self.there.status, " ".join(self.machine[2:]), replicas, self.access]
        return [*row, hourly, since, self.there.url or ""]

    def holds(self, plan: Plan) -> bool:
        """Whether it runs, or may wake up, on the plan's instance: then it is in the quota already."""
        return bool(self.there) and self.there.status != "paused" and self.machine[2:] == (plan.instance, plan.size)

    def check_fixed(self, plan: Plan) -> None:
        """Raises `DeployError` where it differs from the plan for life: the platform may give another access, too."""
        instead = "choose another NAME=..., or `make undeploy` it first. Nothing was sent to it"
        asked = {"ACCESS": plan.access, "VENDOR": plan.vendor, "REGION": plan.region}
        for (variable, value), has in zip(asked.items(), (self.access, *self.machine[:2]), strict=True):
            if value not in (has, "auto"):
                wrong = f"{'ATTENTION: ' * self.touched}{variable}={value} was asked for and {self} has {has}"
                raise DeployError(f"{wrong}, which never changes: {instead}")

    def deploy(self, plan: Plan, repository: str, revision: str, token: str | None) -> None:
        """Creates it, or updates what differs. `token` is for a container that fetches gated weights itself."""
        wanted = {
            "repository": repository,
            "revision": revision,
            "instance_type": plan.instance,
            "instance_size": plan.size,
            "min_replica": plan.min_replica,
            "max_replica": plan.max_replica,
            "scale_to_zero_timeout": plan.scale_to_zero,
        }
        settings = ALWAYS | wanted | {"accelerator": "cpu" if is_cpu(plan.instance) else "gpu"}
        digest = hashlib.sha256((token or "").encode()).hexdigest()[:12]
        secret = {"secrets": {"HF_TOKEN": token}, "env": {TOKEN_OF: digest}} if token else {}
        if not self.there:
            self._create(plan, settings | secret)
        self.check_fixed(plan)
        if plan.scale_to_zero is None and self.scaling[-1]:
            self._sleep_never(plan)
        has = (self.there.repository, self.there.revision, *self.machine[2:], *self.scaling)
        compared = zip(wanted.items(), has, strict=True)
        changes = [f"{name} {old} -> {new}" for (name, new), old in compared if old != new]
        if changes or self.there.status in BROKEN:
            self._update(", ".join(changes) or "starting it again", **settings)
        self._keep_token(secret)
        if not self.touched:
            say(f"  {self.name} is as planned: nothing to update")
        if self.there.status == "paused":
            say("  it was paused: resuming it")
            self.resume()

    def _create(self, plan: Plan, settings: dict[str, Any]) -> None:
        """Creating is not idempotent: where an answer was lost, the same request again is refused with 409, and what
        the first one made is taken. One of this name that is still being deleted is waited for.
        """
        say(f"  creating {self.name} on {plan.instance} {plan.size} in {plan.vendor} {plan.region}")
        new = {"tags": plan.tags, "vendor": plan.vendor, "region": plan.region, "type": plan.access}
        for _ in looks(GONE_WITHIN):
            try:
                return self._change("create", self.account.api.create_inference_endpoint, **settings, **new)
            except HubError as error:
                if error.status != 409:
                    raise
                refusal = error
            self.look()
            if self.there:
                return say("  it was made already: an answer was lost on the way")
        raise refusal

    def _sleep_never(self, plan: Plan) -> None:
        """Takes the scale to zero out and sets the replicas, which the API takes together alone.

        huggingface_hub's update sends no null, and no public source tells what the API takes for "never": a null, which
        it takes when one is created, or 0. Both are tried; where it takes neither, nothing has changed.
        """

        def put(never: int | None, name: str, namespace: str) -> InferenceEndpoint:
            scaling = {"minReplica": plan.min_replica, "maxReplica": plan.max_replica, "scaleToZeroTimeout": never}
            url = f"{constants.INFERENCE_ENDPOINTS_ENDPOINT}/endpoint/{namespace}/{name}"
            answer = self.account.request("PUT", url, json={"compute": {"scaling": scaling}})
            return InferenceEndpoint.from_raw(answer.json(), namespace)

        say(f"  updating {self.name}: it never scales to zero, min_replica {plan.min_replica}")
        for never in (None, 0):
            try:
                return self._change("update", put, never=never)
            except HubError as error:
                if error.status not in (400, 422):
                    raise
                refusal = error.reason
        by_hand = f"choose Never under Settings, Autoscaling on {self.page}, or `make undeploy` it and deploy it again"
        raise DeployError(f"the API does not let {self} never scale to zero once it does ({refusal}): {by_hand}")

    def _keep_token(self, wanted: dict[str, Any]) -> None:
        """Has the secret HF_TOKEN be that of the `wanted` settings, or not be there.

        Whether an update replaces the secrets that it does not name is not known, so others are never put at risk.
        """
        why = f"the secret HF_TOKEN {'has to be this token' if wanted else 'is needed no more'}"
        for change in [wanted] if wanted else [{"secrets": {}}, {"secrets": {"HF_TOKEN": None}}, {}]:
            env, secrets = (self.there.raw["model"].get(name) or {} for name in ("env", "secrets"))
            if ("HF_TOKEN" in secrets) == bool(wanted) and wanted.get("env", {}).items() <= env.items():
                return
            others = sorted(secrets.keys() - {"HF_TOKEN"})
            if others or not change:
                beside = f"beside {', '.join(others)} " if others else ""
                return note(f"  {why}; {beside}only you can change it: {self.page}/settings")
            env = {name: value for name, value in env.items() if name != TOKEN_OF} | wanted.get("env", {})
            self._update(why, **change | {"env": env})

    def wait(self, minutes: float) -> None:
        """Waits until it serves, or sleeps until a request wakes it, and shows each change of state.

        A network that is lost meanwhile, or an API that answers nothing of use, ends no wait before its time.
        """
        shown, lost = None, ""
        with out.status("waiting for the endpoint"):
            for number, waited in enumerate(looks(minutes * 60)):
                try:
                    self.look(attempts=1) if number else None
                    lost = ""
                except HubError as error:
                    if not passes(error.status):
                        raise
                    if not lost:
                        note(f"  {error.reason}; it goes on without us, still waiting")
                    lost = f", and {error.reason}"
                if not self.there:
                    raise DeployError(f"{self} was deleted meanwhile")
                state = self.there.status
                if shown != (state, self.message):
                    shown = (state, self.message)
                    say(f"  {waited}  {state:<13} {self.message}")
                if state == self.left_state and number < SETTLING:
                    continue
                if state in READY and self.there.url:
                    return
                if state in BROKEN:
                    raise DeployError(f"{self} failed: {self.message or 'no reason given'}; its logs: {self.page}/logs")
                if state == "paused":
                    raise DeployError(f"{self} was paused meanwhile; `make resume {self.variables}` starts it")
        raise DeployError(f"{self} is still {self.there.status} after {waited} (TIMEOUT={minutes:g}){lost}")

    @contextmanager
    def nothing_bills_unseen(self, keep: bool) -> Iterator[None]:
        """Whatever fails inside notes what is left of the endpoint, and what that costs.

        What was started is paused, unless it is to be kept; what is as it was before this command is left so.
        """
        if self.there:
            _ = self.account.hardware  # its price, for which a failure has no time
        try:
            yield
        except BaseException as error:
            try:
                if self.touched:
                    self.look(attempts=2)
                    if self.there and not keep:
                        self.pause()
                error.add_note(self.left)
            except BaseException as again:
                stop = f"`make pause {self.variables}` stops it, or {self.page}"
                why = describe(again) or ("stopped" if isinstance(again, KeyboardInterrupt) else type(again).__name__)
                error.add_note(f"{self} MAY BE RUNNING, at {describe_price(self.price)}: {stop} ({why})")
            raise

    @property
    def left(self) -> str:
        """What there is of it, and what that costs."""
        if not self.there:
            return f"there is no endpoint {self.name}, and nothing that costs" if self.touched else ""
        if self.there.status in FREE:
            wake = f"`make resume {self.variables}`" if self.there.status == "paused" else "any request"
            return f"{self} is {self.there.status} and costs nothing; {wake} starts it"
        cost = f"costs {describe_price(self.price)} for each replica; `make pause {self.variables}` stops it"
        return f"{self} is {self.there.status} and {cost}"

    def pause(self) -> None:
        with if_stopped(f"{self} may be running yet, and cost: {self.page}"):
            if self.there.status != "paused":
                self._call("pause", self.account.api.pause_inference_endpoint)

    def resume(self) -> None:
        if self.there.status == "paused":
            self._change("resume", self.account.api.resume_inference_endpoint)

    def delete(self) -> None:
        """Deletes it and waits until it is gone, which takes a moment after the API said yes."""
        self._call("delete", self.account.api.delete_inference_endpoint, missing=(404,))
        with out.status("waiting until the endpoint is gone"):
            for _ in looks(GONE_WITHIN):
                self.look()
                if not self.there:
                    return
        raise DeployError(f"{self} was to be deleted {GONE_WITHIN} s ago and is still {self.there.status}: {self.page}")

    def _update(self, what: str, **settings: Any) -> None:
        say(f"  updating {self.name}: {what}")
        self._change("update", self.account.api.update_inference_endpoint, **settings)

    def _change(self, task: str, function: Callable[..., InferenceEndpoint], /, **settings: Any) -> None:
        """A call after which it may run. One that exists and that refused the call is as it was."""
        before, self.touched = self.touched, True
        self.left_state = self.left_state or (self.there and self.there.status)
        try:
            self._call(task, function, **settings)
        except HubError as error:
            if self.there and error.status in (400, 422):
                self.touched = before
            raise

    def _call(self, task: str, function: Callable[..., InferenceEndpoint | None], /, **settings: Any) -> None:
        where = {"name": self.name, "namespace": self.account.namespace}
        self.there = call(f"{task} {self}", function, **where, **settings)
