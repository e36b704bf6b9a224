"""Tries the real platform for a few cents: `make canary` deploys `tiny` under a name of its own, and leaves nothing.

It measures the cold start, sends pictures through both clients, pauses, resumes and deletes, and writes every answer of
Hugging Face's APIs, without token and names, where the tests can compare the local platform with them.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import torch
import typer
import uvicorn
from diffusers.utils.remote_utils import remote_decode
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

from handlers import MODELS
from remote_vae import Client, RemoteVAE
from remote_vae.proxy import LOOPBACK, build_proxy
from scripts.console import DeployError, if_stopped, say
from scripts.deploy import command, deploy_plan, try_models
from scripts.deployment.account import PERMISSIONS, open_account
from scripts.deployment.endpoint import Endpoint
from scripts.deployment.plan import Plan
from scripts.deployment.repository import Repository
from scripts.instances import dollars

NAME = "remote-vae-canary"
PERSONAL = re.compile(r"email|fullname|avatar|displayName|orgs|^_?id$|periodEnd", re.IGNORECASE)
"""Keys of an answer whose values are of the user, and not of the platform."""
APIS = re.compile(r"^/(api|v2)/")


class Recorder:
    """Every answer of the APIs: method, path, status, headers of rate limits, JSON."""

    def __init__(self) -> None:
        self.answers: list[dict[str, Any]] = []
        self.names: list[str] = []
        """What is replaced by `X` wherever it stands: the token, the namespace."""

    def __call__(self, response: httpx2.Response) -> None:
        request = response.request
        if not APIS.search(request.url.path):
            return
        response.read()
        try:
            body = without_names(response.json())
        except ValueError:
            body = None
        limits = {name: value for name, value in response.headers.items() if "ratelimit" in name.lower()}
        answer = {"method": request.method, "path": request.url.path, "status": response.status_code}
        self.answers.append({**answer, "headers": limits, "body": body})

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While huggingface_hub's requests come by here."""
        set_client_factory(self.client)
        try:
            yield
        finally:
            set_client_factory(default_client_factory)

    def client(self) -> httpx2.Client:
        client = default_client_factory()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [*hooks["response"], self]}
        return client

    def save(self, file: Path) -> None:
        text = json.dumps(self.answers, indent=1)
        for name in self.names:
            text = text.replace(name, "X")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


def without_names(value: Any, key: str = "") -> Any:
    """The same with every string of the user's own replaced, and lists of them empty."""
    if isinstance(value, dict):
        return {name: without_names(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [] if PERSONAL.search(key) else [without_names(one, key) for one in value]
    return "X" if isinstance(value, str) and PERSONAL.search(key) else value


@contextmanager
def proxied(client: Client) -> Iterator[str]:
    """The address of `remote-vae proxy`: the released client sends no token."""
    server = uvicorn.Server(uvicorn.Config(build_proxy(client, LOOPBACK), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def try_clients(url: str, token: str) -> None:
    """The same latents through `RemoteVAE` and through the released `remote_decode`: the same pixels."""
    latents = torch.randn(1, MODELS["tiny"].latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    ours = RemoteVAE(url, token).decode(latents).sample
    with proxied(Client(url, token)) as local:
        theirs = remote_decode(local, latents, do_scaling=False, output_type="pt", return_type="pt")
    if not torch.allclose(ours, theirs, atol=1e-3):
        raise DeployError(f"the two clients differ by {(ours - theirs).abs().max():.3f}")
    say("  RemoteVAE and remote_decode got the same pixels")


def timed(what: str, function: Callable[[], Any]) -> Any:
    start = time.monotonic()
    result = function()
    say(f"{what}: {timedelta(seconds=int(time.monotonic() - start))}")
    return result


@command
def canary(namespace: str | None = None, timeout: float = 30, record: Path = Path("out/canary.json")) -> None:
    """Deploy `tiny`, try it, pause, resume, delete it, and say what it cost."""
    recorder = Recorder()
    with recorder.recording(), if_stopped("what the canary had made is deleted"):
        account = open_account(namespace, PERMISSIONS)
        recorder.names = [account.token, account.namespace, account.api.whoami()["name"]]
        plan = Plan.of("tiny", namespace=namespace, name=NAME, region="auto")
        start = time.monotonic()
        try:
            _, endpoint = timed("cold start", lambda: deploy_plan(account, plan, timeout, keep=False))
            try_clients(endpoint.there.url, account.token)
            timed("pause", endpoint.pause)
            endpoint.resume()
            timed("resume", lambda: endpoint.wait(timeout))
            try_models(endpoint.addresses.values(), account.token)
            price = endpoint.price or plan.price
            say(f"it cost {dollars(price * (time.monotonic() - start) / 3600)} at most")
        finally:
            clear(account, plan)
            recorder.save(record)
            say(f"{len(recorder.answers)} answers are in {record}")


def clear(account: Any, plan: Plan) -> None:
    """Deletes what the canary made. Raises `DeployError` where something is left."""
    endpoint, repository = (kind(account, plan.name, plan.models) for kind in (Endpoint, Repository))
    if endpoint.there:
        timed("delete", endpoint.delete)
    repository.delete()
    if Endpoint(account, plan.name, plan.models).there or Repository(account, plan.name, plan.models).commit:
        raise DeployError(f"{plan.name} is still there and MAY COST: look at {endpoint.page}")
    say("nothing is left")


if __name__ == "__main__":
    typer.run(canary)
