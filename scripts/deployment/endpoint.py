"""The endpoint: create, update, wait, pause, resume, delete."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from typing import Any

from huggingface_hub import InferenceEndpoint, constants
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, parse_datetime

from handlers import MODELS
from scripts.deployment.account import Account
from scripts.deployment.calls import ATTEMPTS, HubError, call, passes
from scripts.deployment.console import DeployError, elapsed, note, out, say
from scripts.deployment.hardware import QUOTA_PAGE, describe_price, dollars, table_price
from scripts.deployment.plan import FRAMEWORK, TAG, TASK, Plan, tag_of

BILLING_PAGE = "https://huggingface.co/settings/billing"
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
PENDING_PER_REPLICA = 1.5
TOKEN_OF = "HF_TOKEN_SHA256"
"""Environment variable with the beginning of the hash of the token in the secrets, whose values nobody can read."""


AGAIN = "the same command again goes on from there"


class Interrupted(Exception):
    """Ctrl-C; the text says what stays and how to go on."""


class Endpoint:
    """An endpoint of the account, which may not exist yet. `raw` is the API's description of it."""

    def __init__(self, account: Account, name: str, raw: dict[str, Any] | None = None) -> None:
        self.account = account
        self.name = name
        self.raw = raw
        self.touched = False
        """Whether this command asked for something that lets it run."""
        self.left_state: str | None = None
        """The state that an update or a resume is to end."""

    @classmethod
    def find(cls, account: Account, name: str) -> Endpoint:
        endpoint = cls(account, name)
        endpoint.look()
        return endpoint

    @classmethod
    def find_all(cls, account: Account) -> list[Endpoint]:
        """This project's endpoints in the account's namespace."""
        found = _ask(account, "list the endpoints", account.api.list_inference_endpoints, account.namespace)
        return [cls(account, one.name, one.raw) for one in found if TAG in (one.raw.get("tags") or [])]

    def look(self, attempts: int = ATTEMPTS) -> None:
        """Asks for its description; there is none where it does not exist."""
        try:
            self._call("look up the endpoint", self.account.api.get_inference_endpoint, attempts=attempts)
        except HubError as error:
            if error.status != 404:
                raise
            self.raw = None

    @property
    def exists(self) -> bool:
        return self.raw is not None

    @property
    def models(self) -> tuple[str, ...]:
        """Keys of its models, from the tags; others, which a user has added, are no matter."""
        keys = {tag_of(model): model for model in MODELS}
        return tuple(keys[tag] for tag in self.raw.get("tags") or [] if tag in keys)

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
    def region(self) -> str:
        return self.raw["provider"]["region"]

    @property
    def instance(self) -> tuple[str, str]:
        return self.raw["compute"]["instanceType"], self.raw["compute"]["instanceSize"]

    @property
    def price(self) -> float | None:
        """USD an hour for one replica: the platform's, or that of the table."""
        vendor = self.raw["provider"]["vendor"]
        wanted = (vendor, self.region, *self.instance)
        for one in self.account.hardware:
            if wanted == (one.vendor, one.region, one.instance_type, one.instance_size):
                return one.price_per_hour
        return table_price(vendor, *self.instance)

    @property
    def replicas(self) -> str:
        """`1 of 0-2` while one runs of at least none and at most two."""
        scaling = self.raw["compute"]["scaling"]
        return f"{self.raw['status'].get('readyReplica', 0)} of {scaling['minReplica']}-{scaling['maxReplica']}"

    @property
    def spent(self) -> str:
        """For how long it has run since it was last started, and what that came to.

        The API tells of the last change alone. It may have slept and woken since: then both are less.
        """
        if self.state in FREE:
            return "-"
        status = self.raw["status"]
        since = parse_datetime(status.get("updatedAt") or status["createdAt"])
        hours = max((datetime.now(UTC) - since).total_seconds(), 0) / 3600
        cost = dollars(self.price * hours * max(status.get("readyReplica", 1), 1)) if self.price is not None else "?"
        return f"{elapsed(hours * 3600)}, {cost}"

    @property
    def page(self) -> str:
        return f"https://endpoints.huggingface.co/{self.account.namespace}/endpoints/{self.name}"

    def check_ours(self, models: tuple[str, ...]) -> None:
        """Raises `DeployError` where it is something else than a deployment of these models."""
        if not self.exists:
            return
        if TAG not in (self.raw.get("tags") or []):
            raise DeployError(f"{self.page} was not made by this script: choose another NAME=...")
        if set(self.models) != set(models):
            raise DeployError(
                f"the endpoint {self.name} is a deployment of {','.join(self.models)}: choose another NAME=..."
            )

    def check_fixed(self, plan: Plan) -> None:
        """Raises `DeployError` where the plan differs in what an endpoint keeps for life."""
        if not self.exists:
            return
        wanted = {"ACCESS": plan.access, "VENDOR": plan.vendor, "REGION": plan.region}
        fixed = {"ACCESS": self.access, "VENDOR": self.raw["provider"]["vendor"], "REGION": self.region}
        for variable, value in fixed.items():
            if wanted[variable] not in (value, "auto"):
                raise DeployError(
                    f"the endpoint {self.name} has {variable}={value}, which never changes: choose another NAME=..., "
                    "or `make undeploy` it first"
                )

    def check_type(self, plan: Plan) -> None:
        """Raises `DeployError` where the platform made it another type than was asked for."""
        if self.access != plan.access:
            raise DeployError(
                f"ATTENTION: {plan.access} was asked for and the endpoint {self.name} is {self.access}. Nothing was "
                f"sent to it and nothing was deleted; look at {self.page}"
            )

    def holds(self, plan: Plan) -> bool:
        """Whether it runs, or may wake up, on the plan's instance: then it is in the quota already."""
        return self.exists and self.state != "paused" and self.instance == (plan.instance, plan.size)

    def deploy(self, plan: Plan, repository: str, revision: str, token: str | None) -> None:
        """Creates it, or updates what differs, or does nothing. `token` is for a container that fetches gated weights.

        Creating is not idempotent: where an answer was lost, the same request again is refused with 409 while the
        endpoint of the first one starts. Then that one is taken, if it is ours.
        """
        wanted = {
            "repository": repository,
            "revision": revision,
            "instance_type": plan.instance,
            "instance_size": plan.size,
            "min_replica": plan.min_replica,
            "max_replica": plan.max_replica,
        }
        fixed = {
            "accelerator": plan.accelerator,
            "framework": FRAMEWORK,
            "task": TASK,
            "scaling_metric": "pendingRequests",
            "scaling_threshold": PENDING_PER_REPLICA,
        }
        if not self.exists:
            say(f"  creating {self.name} on {plan.instance} {plan.size} in {plan.vendor} {plan.region}")
            settings = wanted | fixed | {"tags": plan.tags, "scale_to_zero_timeout": plan.scale_to_zero}
            if token:
                settings |= {"secrets": {"HF_TOKEN": token}, "env": {TOKEN_OF: _fingerprint(token)}}
            self._create(plan, settings)
        self.check_type(plan)
        changes = {key: value for key, value in wanted.items() if value != self._settings[key]}
        said = [f"{key} {self._settings[key]} -> {value}" for key, value in changes.items()]
        slept = self.raw["compute"]["scaling"].get("scaleToZeroTimeout")
        if plan.scale_to_zero is None and slept:
            self._sleep_never(plan)
            changes = {key: value for key, value in wanted.items() if value != self._settings[key]}
            said = [one for one in said if one.split()[0] in changes]
        elif plan.scale_to_zero not in (None, slept):
            said.append(f"scale_to_zero {slept} -> {plan.scale_to_zero}")
            changes["scale_to_zero_timeout"] = plan.scale_to_zero
        restart = ["starting it again"] if self.state in BROKEN and not said else []
        if said or restart:
            say(f"  updating {self.name}: {', '.join(said + restart)}")
            settings = wanted | fixed | changes
            self._change("update the endpoint", self.account.api.update_inference_endpoint, **settings)
        self._keep_token(token)
        if not self.touched:
            say(f"  {self.name} is as planned: nothing to update")
        if self.state == "paused":
            say("  it was paused: resuming it")
            self.resume()

    @property
    def _settings(self) -> dict[str, Any]:
        """What `deploy` compares, by the names of huggingface_hub's parameters."""
        compute, model = self.raw["compute"], self.raw["model"]
        return {
            "repository": model["repository"],
            "revision": model.get("revision"),
            "instance_type": compute["instanceType"],
            "instance_size": compute["instanceSize"],
            "min_replica": compute["scaling"]["minReplica"],
            "max_replica": compute["scaling"]["maxReplica"],
        }

    def _create(self, plan: Plan, settings: dict[str, Any]) -> None:
        create, deadline = self.account.api.create_inference_endpoint, time.monotonic() + GONE_WITHIN
        provider = {"vendor": plan.vendor, "region": plan.region, "type": plan.access}
        while not self.exists:
            try:
                self._change("create the endpoint", create, **provider, **settings)
            except HubError as error:
                if error.status != 409 or time.monotonic() > deadline:
                    raise
                self.look()
                if self.exists:
                    self.check_ours(plan.models)
                    self.check_fixed(plan)
                    say("  it was made already: an answer was lost on the way")
                else:  # one of this name is being deleted
                    time.sleep(LOOK_EVERY)

    def _sleep_never(self, plan: Plan) -> None:
        """Takes the scale to zero out and sets the replicas, which the API takes together alone.

        huggingface_hub's update sends no null, and no public source tells what the API takes for "never": a null, which
        it takes when one is created, or 0. Both are tried; where it takes neither, nothing has changed.
        """
        replicas = {"minReplica": plan.min_replica, "maxReplica": plan.max_replica}
        url = f"{constants.INFERENCE_ENDPOINTS_ENDPOINT}/endpoint/{self.account.namespace}/{self.name}"
        headers = build_hf_headers(token=self.account.token)
        say(f"  updating {self.name}: it never scales to zero, min_replica {plan.min_replica}")
        for never in (None, 0):

            def put(never: int | None = never, **_: Any) -> InferenceEndpoint:
                scaling = {**replicas, "scaleToZeroTimeout": never}
                answer = get_session().put(url, headers=headers, json={"compute": {"scaling": scaling}})
                hf_raise_for_status(answer)
                return InferenceEndpoint.from_raw(answer.json(), namespace=self.account.namespace)

            try:
                self._change("update the endpoint", put)
                return
            except HubError as error:
                if error.status not in (400, 422):
                    raise
                refusal = error.reason
        raise DeployError(
            f"the API does not take the scale to zero out of an endpoint that has it ({refusal}): choose Never under "
            f"Settings, Autoscaling on {self.page}, or `make undeploy` it and deploy it again"
        )

    def _keep_token(self, token: str | None) -> None:
        """Has the secret HF_TOKEN be this token, or not be there.

        Whether an update replaces the secrets that it does not name is not known, so others are never put at risk.
        """
        model = self.raw["model"]
        env, secrets = dict(model.get("env") or {}), model.get("secrets") or {}
        known = env.pop(TOKEN_OF, None)
        wanted = _fingerprint(token) if token else None
        if known == wanted and ("HF_TOKEN" in secrets) == bool(token):
            return
        if others := sorted(secrets.keys() - {"HF_TOKEN"}):
            task = "has to be this token" if token else "is needed no more"
            note(
                f"  the secret HF_TOKEN {task}; beside {', '.join(others)} only you can change it: {self.page}/settings"
            )
            return
        say(f"  {'renewing' if token and known else 'setting' if token else 'removing'} the secret HF_TOKEN")
        if token:
            env[TOKEN_OF] = wanted
        for value in [{"HF_TOKEN": token}] if token else [{}, {"HF_TOKEN": None}]:
            self._change("update the endpoint", self.account.api.update_inference_endpoint, secrets=value, env=env)
            if bool(token) == ("HF_TOKEN" in (self.raw["model"].get("secrets") or {})):
                return
        note(f"  the secret HF_TOKEN is still there, though it is needed no more: remove it on {self.page}/settings")

    def wait(self, minutes: float, variables: str) -> None:
        """Waits until it serves, or sleeps until a request wakes it, and shows each change of state.

        A network that is lost meanwhile, or an API that answers nothing of use, ends no wait before its time.

        Args:
            variables: name the endpoint to the Makefile, for the hints.

        Raises:
            DeployError: it failed, or did not come up in time.
        """
        start = time.monotonic()
        shown = lost = None
        with out.status("waiting for the endpoint"):
            for look in count():
                waited = time.monotonic() - start
                if shown != (self.state, self.message):
                    shown = (self.state, self.message)
                    say(f"  {elapsed(waited):>5}  {self.state:<13} {self.message}")
                if self.state != self.left_state or look >= SETTLING:
                    if self.state in READY and self.url:
                        return
                    self._check_alive(variables)
                if waited > minutes * 60:
                    raise DeployError(
                        f"the endpoint {self.name} is still {self.state} after {elapsed(waited)} (TIMEOUT={minutes:g})"
                        + (f", and {lost}" if lost else "")
                    )
                time.sleep(LOOK_EVERY)
                try:
                    self.look(attempts=1)
                    lost = None
                except HubError as error:
                    if not passes(error.status):
                        raise
                    if not lost:
                        note(f"  {error.reason}; it goes on without us, still waiting")
                    lost = error.reason
                if not self.exists:
                    raise DeployError(f"the endpoint {self.name} was deleted meanwhile")

    def _check_alive(self, variables: str) -> None:
        """Raises `DeployError` where it has failed or was paused."""
        if self.state in BROKEN:
            reason = self.message or "it gives no reason"
            raise DeployError(f"the endpoint {self.name} failed: {reason}; its logs: {self.page}/logs")
        if self.state == "paused":
            raise DeployError(f"the endpoint {self.name} was paused meanwhile; `make resume {variables}` starts it")

    @contextmanager
    def nothing_bills_unseen(self, variables: str, keep: bool, left: list[str]) -> Iterator[None]:
        """Whatever fails inside says what is left of the endpoint and what that costs; what was started is paused.

        Args:
            keep: leave it running.
            left: what else stays, to be said after Ctrl-C.
        """
        try:
            yield
        except DeployError as error:
            raise DeployError("; ".join([str(error), *self.leave(variables, keep)])) from None
        except KeyboardInterrupt:
            raise Interrupted("; ".join([*left, *self.leave(variables, keep), AGAIN])) from None
        except Exception:  # a fault of ours
            note("; ".join(["error", *self.leave(variables, keep)]))
            raise

    def leave(self, variables: str, keep: bool) -> list[str]:
        """Pauses it unless it is to be kept, or is as it was before this command. Returns what is left, in a line."""
        stop = f"`make pause {variables}` stops it"
        price = describe_price(self.price) if self.exists else "what its instance costs"
        try:
            if self.touched:
                self.look(attempts=2)
            if not self.exists:
                return [f"there is no endpoint {self.name}, and nothing that costs"] if self.touched else []
            price = describe_price(self.price)
            if self.touched and not keep and self.state != "paused":
                self.pause()
        except (DeployError, KeyboardInterrupt) as error:
            why = str(error) or "stopped"
            return [f"the endpoint {self.name} MAY BE RUNNING, at {price}: {stop}, or {self.page} ({why})"]
        if self.state == "paused":
            resume = f"; `make resume {variables}` starts it" if self.touched else ""
            return [f"the endpoint {self.name} is paused and costs nothing{resume}"]
        if self.state == "scaledToZero":
            return [f"the endpoint {self.name} sleeps and costs nothing until a request wakes it"]
        return [f"the endpoint {self.name} is {self.state} and costs {price} for each replica; {stop}"]

    def pause(self) -> None:
        self._call("pause the endpoint", self.account.api.pause_inference_endpoint)

    def resume(self) -> None:
        self._change("resume the endpoint", self.account.api.resume_inference_endpoint)

    def delete(self) -> None:
        """Deletes it and waits until it is gone, which takes a moment after the API said yes."""
        api, where = self.account.api, {"namespace": self.account.namespace}
        deadline = time.monotonic() + GONE_WITHIN
        try:
            _ask(self.account, "delete the endpoint", api.delete_inference_endpoint, self.name, **where)
        except HubError as error:
            if error.status != 404:  # an answer that was lost
                raise
        with out.status("waiting until the endpoint is gone"):
            self.look()
            while self.exists:
                if time.monotonic() > deadline:
                    raise DeployError(
                        f"the endpoint {self.name} was to be deleted and is still {self.state} after "
                        f"{elapsed(GONE_WITHIN)}: look at {self.page}"
                    )
                time.sleep(LOOK_EVERY)
                self.look()

    def _change(self, task: str, function: Callable[..., InferenceEndpoint], /, **settings: Any) -> None:
        """A call after which it may run. One that exists and that refused the call is as it was."""
        before, self.touched = self.touched, True
        self.left_state = self.left_state or (self.raw and self.state)
        try:
            self._call(task, function, **settings)
        except HubError as error:
            if self.exists and error.status in (400, 422):
                self.touched = before
            raise

    def _call(
        self, task: str, function: Callable[..., InferenceEndpoint], /, attempts: int = ATTEMPTS, **settings: Any
    ) -> None:
        where = {"name": self.name, "namespace": self.account.namespace}
        self.raw = _ask(self.account, task, function, attempts=attempts, **where, **settings).raw


def _fingerprint(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()[:12]


def _ask(
    account: Account, task: str, function: Callable[..., Any], /, *args: Any, attempts: int = ATTEMPTS, **kwargs: Any
) -> Any:
    """A call of the Endpoints API, with what a refusal means to a user."""
    try:
        return call(task, function, *args, attempts=attempts, **kwargs)
    except HubError as error:
        said = error.reason.lower()
        if "quota" in said:
            raise DeployError(f"{error.reason}; ask for more at {QUOTA_PAGE}, or choose another INSTANCE=...") from None
        if error.status == 402 or any(word in said for word in ("payment", "billing", "credit", "subscription")):
            raise DeployError(f"{error.reason}; credits and payment methods are at {BILLING_PAGE}") from None
        if error.status in (401, 403):
            raise DeployError(f"this token may not {task} in {account.namespace}: {error.reason}") from None
        raise
