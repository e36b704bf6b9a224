"""Test the real platform for a few cents: `make canary` deploys `tiny` under its own name, and leaves nothing.

It measures the cold start, sends latents through both clients, pauses, resumes and deletes. It records every response
of Hugging Face's APIs without token and names, so the tests can compare the local platform with them.
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
from typing import Annotated, Any

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
from scripts.deploy import Namespace, Timeout, command, deploy_plan, smoke_test
from scripts.deployment.account import PERMISSIONS, Account, open_account
from scripts.deployment.endpoint import Endpoint
from scripts.deployment.plan import Plan
from scripts.deployment.repository import Repository
from scripts.instances import dollars

NAME = "remote-vae-canary"
PERSONAL = re.compile(r"email|fullname|avatar|displayName|orgs|^_?id$|periodEnd", re.IGNORECASE)
"""Keys of a response whose values are personal."""
APIS = re.compile(r"^/(api|v2)/")


class Recorder:
    """The responses of the APIs: method, path, status, headers of rate limits, JSON."""

    def __init__(self) -> None:
        self.responses: list[dict[str, Any]] = []
        self.names: list[str] = []
        """The token and the namespace, which `X` replaces everywhere."""

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
        record = {"method": request.method, "path": request.url.path, "status": response.status_code}
        self.responses.append({**record, "headers": limits, "body": body})

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the requests of huggingface_hub inside the block."""
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
        text = json.dumps(self.responses, indent=1)
        for name in self.names:
            text = text.replace(name, "X")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


def without_names(value: Any, key: str = "") -> Any:
    """Return `value` with personal strings replaced, and with personal lists empty."""
    if isinstance(value, dict):
        return {name: without_names(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [] if PERSONAL.search(key) else [without_names(item, key) for item in value]
    return "X" if isinstance(value, str) and PERSONAL.search(key) else value


@contextmanager
def proxied(client: Client) -> Iterator[str]:
    """Run `remote-vae proxy` and yield its URL. The client in diffusers sends no token."""
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
    """Check that `RemoteVAE` and diffusers' `remote_decode` decode the same latents to the same pixels."""
    latents = torch.randn(1, MODELS["tiny"].latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    ours = RemoteVAE(url, token).decode(latents).sample
    with proxied(Client(url, token)) as local:
        theirs = remote_decode(local, latents, do_scaling=False, output_type="pt", return_type="pt")
    if not torch.allclose(ours, theirs, atol=1e-3):
        raise DeployError(f"the two clients differ by {(ours - theirs).abs().max():.3f}")
    say("  RemoteVAE and remote_decode got the same pixels")


def timed(what: str, function: Callable[[], Any]) -> Any:
    """Call a function and print the time that it took."""
    start = time.monotonic()
    result = function()
    say(f"{what}: {timedelta(seconds=int(time.monotonic() - start))}")
    return result


@command
def canary(
    namespace: Namespace = None,
    timeout: Timeout = 30,
    record: Annotated[Path, typer.Option(help="File for the responses of the APIs.")] = Path("out/canary.json"),
) -> None:
    """Deploy `tiny`, test it, pause, resume and delete it, and print its cost."""
    recorder = Recorder()
    with recorder.recording(), if_stopped("the endpoint and the repository of the canary are deleted"):
        account = open_account(namespace, PERMISSIONS)
        recorder.names = [account.token, account.namespace, account.api.whoami()["name"]]
        plan = Plan.create("tiny", namespace=namespace, name=NAME, region="auto")
        start = time.monotonic()
        try:
            _, endpoint = timed("cold start", lambda: deploy_plan(account, plan, timeout, keep=False))
            try_clients(endpoint.info.url, account.token)
            timed("pause", endpoint.pause)
            endpoint.resume()
            timed("resume", lambda: endpoint.wait(timeout))
            smoke_test(endpoint.addresses.values(), account.token)
            price = endpoint.price or plan.price
            say(f"it cost {dollars(price * (time.monotonic() - start) / 3600)} at most")
        finally:
            clean_up(account, plan)
            recorder.save(record)
            say(f"{len(recorder.responses)} responses are in {record}")


def clean_up(account: Account, plan: Plan) -> None:
    """Delete the endpoint and the repository. Raise `DeployError` if one of them remains."""
    endpoint, repository = (kind(account, plan.name, plan.models) for kind in (Endpoint, Repository))
    if endpoint.info:
        timed("delete", endpoint.delete)
    repository.delete()
    if Endpoint(account, plan.name, plan.models).info or Repository(account, plan.name, plan.models).commit:
        raise DeployError(f"{plan.name} still exists and MAY COST: look at {endpoint.page}")
    say("nothing remains")


if __name__ == "__main__":
    typer.run(canary)
