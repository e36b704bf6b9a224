"""Puts VAEs onto Hugging Face Inference Endpoints: `make deploy MODEL=flux`.

Needs no torch. `docs/deploying.md` tells what it does and what it costs; the parts are in `deployment/`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Annotated

# The storage's client tries for minutes without a word by default: here it gives up within half a minute.
os.environ.setdefault("HF_XET_CLIENT_RETRY_BASE_DELAY", "1s")
os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_DURATION", "30s")

import typer

from handlers import MODELS
from remote_vae.check import check
from scripts.console import FAILURES, DeployError, describe, ends_in_one_line, if_stopped, note, out, say, show_table
from scripts.deployment.account import PERMISSIONS, Account, open_account
from scripts.deployment.endpoint import READY, Endpoint, find_endpoint, find_endpoints
from scripts.deployment.hardware import place
from scripts.deployment.plan import CALLERS, Plan
from scripts.deployment.repository import Repository, describe_files
from scripts.deployment.texts import text
from scripts.instances import describe_price, dollars
from scripts.models import published_models
from scripts.snippets import calling

Model = Annotated[str | None, typer.Option(help=f"Key of the model, or a,b,c: {', '.join(MODELS)}.")]
Namespace = Annotated[str | None, typer.Option(help="User or organization; default: the token's user.")]
Name = Annotated[str | None, typer.Option(help="Name of endpoint and repository; default: remote-vae-MODEL.")]
Timeout = Annotated[float, typer.Option(help="Minutes to wait for the endpoint.")]
Url = Annotated[str | None, typer.Option(help="Address of any endpoint or server, instead of a model.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; no token, no network.")]
Repo = Annotated[bool, typer.Option("--delete-repo", help="Delete the repository on the Hub too.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
All = Annotated[bool, typer.Option("--all", help="Every published model; every endpoint of this project.")]
Keep = Annotated[bool, typer.Option("--keep", help="Leave an endpoint running that failed; else it is paused.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Registers a subcommand."""
    return app.command()(ends_in_one_line(function))


@command
def deploy(
    context: typer.Context,
    model: Model = None,
    namespace: Namespace = None,
    name: Name = None,
    instance: Annotated[str | None, typer.Option(help="Instance type; default: the model's own.")] = None,
    size: Annotated[str, typer.Option(help="Instance size.")] = Plan.size,
    vendor: Annotated[str, typer.Option(help="Cloud.")] = Plan.vendor,
    region: Annotated[str, typer.Option(help='Region; "auto": the nearest that has one.')] = Plan.region,
    access: Annotated[str, typer.Option(help=f"Who may call it: {', '.join(CALLERS)}.")] = Plan.access,
    min_replica: Annotated[int, typer.Option(help="Replicas that always run; 0: scale to zero.")] = Plan.min_replica,
    max_replica: Annotated[int, typer.Option(help="Replicas at most.")] = Plan.max_replica,
    scale_to_zero: Annotated[int, typer.Option(help="Idle minutes before it scales to zero.")] = Plan.scale_to_zero,
    weights: Annotated[str | None, typer.Option(help='Folder of the weights, or "hub" to upload none.')] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the checkpoint; default: what is deployed.")] = None,
    timeout: Timeout = 30,
    keep: Keep = False,
    dry_run: DryRun = False,
    every: All = False,
) -> None:
    """Create or update the endpoint of one model, or of several, wait for it, try it."""
    asked = {key: value for key, value in context.params.items() if key in Plan.__dataclass_fields__}
    plans = [Plan.of(one, **asked) for one in (published_models() if every else [model])]
    if every:
        total = None if None in (prices := [plan.price for plan in plans]) else sum(prices)
        say(f"{len(plans)} endpoints: {describe_price(total)} while a replica of each starts or runs")
    if dry_run:
        for plan in plans:
            say(text("plan.txt", plan, sizes=describe_files(plan)))
        return
    needed = [one for one in PERMISSIONS if access != "public" or not one.endswith("infer.write")]  # anyone may call it
    account = open_account(namespace, needed)
    if every:
        return deploy_all(account, plans, timeout, keep)
    plan, endpoint = deploy_plan(account, plans[0], timeout, keep)
    say("\n".join(["", *endpoint.addresses.values(), text("cost.txt", plan).strip()]))
    say(f"`make pause {endpoint.variables}` stops the cost; `make undeploy {endpoint.variables}` removes it\n")
    say(f"ACCESS={plan.access}: {CALLERS[plan.access]}.\n\n{calling(endpoint.addresses)}")


def deploy_all(account: Account, plans: list[Plan], timeout: float, keep: bool) -> None:
    """One by one. Ends with a table, whatever happens."""
    rows = {plan.model: ("not reached", "", "") for plan in plans}
    try:
        for plan in plans:
            try:
                _, endpoint = deploy_plan(account, plan, timeout, keep)
                rows[plan.model] = endpoint.there.status, f"{dollars(endpoint.price)}/h", endpoint.there.url
            except FAILURES as error:
                rows[plan.model] = "failed", "", describe(error)
                note(f"error: {describe(error)}")
            except KeyboardInterrupt as stop:
                rows[plan.model] = "stopped", "", describe(stop)
                stop.add_note("what the table lists as running goes on, and costs")
                raise
    finally:
        columns = ("model", "state", "per replica", "URL, or what went wrong")
        show_table(columns, ([model, *row] for model, row in rows.items()))
    if failed := sum(row[0] == "failed" for row in rows.values()):
        raise DeployError(f"{failed} of {len(plans)} models failed; `make deploy-all` again goes on with them")


def deploy_plan(account: Account, plan: Plan, timeout: float, keep: bool) -> tuple[Plan, Endpoint]:
    """The whole way. Everything that can refuse is asked before the first change; a second run changes nothing."""
    say(f"Deploying {plan.model} as {account.namespace}/{plan.name}")
    endpoint = Endpoint(account, plan.name, plan.models)
    with endpoint.nothing_bills_unseen(keep):
        repository = Repository(account, plan.name, plan.models)
        weights = repository.find_weights(plan)
        if endpoint.there:
            endpoint.check_fixed(plan)
            plan = replace(plan, region=endpoint.machine[1])
        new = not endpoint.there
        plan = replace(plan, price=endpoint.price) if endpoint.holds(plan) else place(plan, account.hardware, new)
        say(f"{plan.instance} {plan.size} in {plan.vendor} {plan.region}: {describe_price(plan.price)} at work")
        say(f"Repository {repository.page}" + ("" if repository.commit else ", new and private"))
        revision = repository.upload(plan, weights)
        say(f"Endpoint {endpoint.page}")
        # A container that has to fetch gated weights itself needs the token; the API keeps it as a secret.
        gated = plan.weights == "hub" and any(info.gated for info in weights.values())
        endpoint.deploy(plan, repository.id, revision, account.token if gated else None)
        endpoint.wait(timeout)
        endpoint.check_fixed(plan)
        say("Smoke test")
        try_models(endpoint.addresses.values(), account.token)
    return plan, endpoint


def try_models(urls: Iterable[str], token: str | None) -> None:
    """A small picture through each of them and back."""
    for url in urls:
        with out.status("encoding and decoding a picture"):
            result = check(url, token, lambda line: note(f"  {line}"))
        say(f"  {url}: {result}")


@command
def endpoints(namespace: Namespace = None) -> None:
    """List this project's endpoints."""
    account = open_account(namespace)
    if found := find_endpoints(account):
        columns = ("name", "model", "state", "instance", "replicas", "access", "an hour", "up at most", "URL")
        show_table(columns, (one.row() for one in found))
        return say("paused and scaledToZero cost nothing; `make pause-all` pauses all. Up: since the last change")
    say(f"{account.namespace} has no endpoint of this project; `make deploy MODEL=tiny` makes a first one")


@command
def smoke(model: Model = None, namespace: Namespace = None, name: Name = None, url: Url = None) -> None:
    """Encode and decode a small picture on a live endpoint."""
    if url:
        return try_models([url], None)
    endpoint = find_endpoint(model, namespace, name)
    if endpoint.there.status not in READY or not endpoint.there.url:
        why = endpoint.message or f"`make deploy {endpoint.variables}` starts it"
        raise DeployError(f"{endpoint} is {endpoint.there.status} and answers nothing: {why} ({endpoint.page})")
    try_models(endpoint.addresses.values(), endpoint.account.token)


@command
def pause(model: Model = None, namespace: Namespace = None, name: Name = None, every: All = False) -> None:
    """Stop an endpoint, and with it its cost, until `resume`."""
    if not every:
        return pause_each([find_endpoint(model, namespace, name)])
    if model or name:
        raise DeployError("--all is every endpoint of this project: name no model, and no endpoint")
    account = open_account(namespace)
    pause_each(find_endpoints(account))
    say(f"nothing of this project in {account.namespace} costs anything now")


def pause_each(found: list[Endpoint]) -> None:
    failed = []
    for endpoint in found:
        try:
            endpoint.pause()
            say(endpoint.left)
        except DeployError as error:
            note(f"error: {error}")
            failed.append(f"{endpoint.name} ({endpoint.page})")
    if failed:
        raise DeployError(f"MAY BE RUNNING, and cost: {', '.join(failed)}")


@command
def resume(
    model: Model = None, namespace: Namespace = None, name: Name = None, timeout: Timeout = 30, keep: Keep = False
) -> None:
    """Start a paused endpoint again and wait for it."""
    endpoint = find_endpoint(model, namespace, name)
    with endpoint.nothing_bills_unseen(keep):
        endpoint.resume()
        endpoint.wait(timeout)
        say(f"{endpoint} is {endpoint.there.status}: {endpoint.there.url}, {describe_price(endpoint.price)}")


@command
def undeploy(
    model: Model = None, namespace: Namespace = None, name: Name = None, delete_repo: Repo = False, yes: Yes = False
) -> None:
    """Delete an endpoint, wait until it is gone, and delete its repository where asked to."""
    endpoint = find_endpoint(model, namespace, name, needed=False)
    doomed: list[Endpoint | Repository] = [endpoint] if endpoint.there else []
    if delete_repo:
        repository = Repository(endpoint.account, endpoint.name, endpoint.models)
        doomed += [repository] if repository.commit else []
    names = " and ".join(map(str, doomed))
    if not doomed:
        return say(f"there is no {endpoint.name} in {endpoint.account.namespace}: nothing to delete")
    try:
        sure = yes or typer.confirm(f"Delete {names}?", err=True)
    except typer.Abort:  # there is nobody to ask
        sure = note("")
    if not sure:
        raise DeployError("nothing was deleted; YES=1 deletes without asking")
    with if_stopped(f"{names} may be there yet, and cost; `make endpoints` shows it"):
        for one in doomed:
            one.delete()
    say(f"deleted {names}" + ("" if delete_repo else "; its repository stays, at no cost, without DELETE_REPO=1"))


if __name__ == "__main__":
    app()
