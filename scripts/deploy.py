"""Deploy VAEs to Hugging Face Inference Endpoints: `make deploy MODEL=flux`.

It needs no torch. `docs/deploying.md` is the guide, and `deployment/` has the parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Annotated

# By default the client of the storage retries for minutes without a word. Here it gives up within half a minute.
os.environ.setdefault("HF_XET_CLIENT_RETRY_BASE_DELAY", "1s")
os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_DURATION", "30s")

import typer

from handlers import MODELS
from remote_vae.check import check
from scripts.console import FAILURES, DeployError, describe, if_stopped, note, out, reports_failures, say, show_table
from scripts.deployment.account import PERMISSIONS, Account, open_account
from scripts.deployment.endpoint import READY, Endpoint, find_endpoint, find_endpoints
from scripts.deployment.hardware import choose_hardware
from scripts.deployment.plan import CALLERS, Plan
from scripts.deployment.repository import Repository, describe_files
from scripts.deployment.texts import render
from scripts.instances import describe_price, dollars
from scripts.models import published_models
from scripts.snippets import calling_code

Model = Annotated[str | None, typer.Option(help=f"Key of the model, or several as a,b,c: {', '.join(MODELS)}.")]
Namespace = Annotated[str | None, typer.Option(help="User or organization; default: the token's user.")]
Name = Annotated[str | None, typer.Option(help="Name of the endpoint and the repository; default: remote-vae-MODEL.")]
Timeout = Annotated[float, typer.Option(help="Minutes to wait for the endpoint.")]
Url = Annotated[str | None, typer.Option(help="URL of any endpoint or server, instead of a model.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and change nothing; needs no token or network.")
]
Repo = Annotated[bool, typer.Option("--delete-repo", help="Also delete the repository on the Hub.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]
EveryModel = Annotated[bool, typer.Option("--all", help="Deploy every published model.")]
EveryEndpoint = Annotated[bool, typer.Option("--all", help="Pause every endpoint of this project.")]
Keep = Annotated[bool, typer.Option("--keep", help="Leave a failed endpoint running instead of pausing it.")]

app = typer.Typer(
    help="Deploy VAEs to Hugging Face Inference Endpoints.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a subcommand."""
    return app.command()(reports_failures(function))


@command
def deploy(
    context: typer.Context,
    model: Model = None,
    namespace: Namespace = None,
    name: Name = None,
    instance: Annotated[str | None, typer.Option(help="Instance type; default: the model's own.")] = None,
    size: Annotated[str, typer.Option(help="Instance size.")] = Plan.size,
    vendor: Annotated[str, typer.Option(help="Cloud.")] = Plan.vendor,
    region: Annotated[str, typer.Option(help='Region, or "auto" for one that has the instance.')] = Plan.region,
    access: Annotated[str, typer.Option(help=f"Who may call it: {', '.join(CALLERS)}.")] = Plan.access,
    min_replica: Annotated[int, typer.Option(help="Least replicas; 0 scales to zero.")] = Plan.min_replica,
    max_replica: Annotated[int, typer.Option(help="Most replicas.")] = Plan.max_replica,
    scale_to_zero: Annotated[int, typer.Option(help="Idle minutes before it scales to zero.")] = Plan.scale_to_zero,
    weights: Annotated[
        str | None,
        typer.Option(help="Folder, .safetensors file or org/repo[:subfolder][@revision]; default: the checkpoint."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the checkpoint; default: the deployed one.")] = None,
    image: Annotated[
        str | None, typer.Option(help="Container image of this project, with its tag; default: the stock toolkit.")
    ] = None,
    timeout: Timeout = 30,
    keep: Keep = False,
    dry_run: DryRun = False,
    every: EveryModel = False,
) -> None:
    """Create or update an endpoint, wait until it runs, and test it."""
    names = {field.name for field in fields(Plan)}
    options = {key: value for key, value in context.params.items() if key in names}
    plans = [Plan.create(key, **options) for key in (published_models(image) if every else [model])]
    if every:
        prices = [plan.price for plan in plans]
        total = None if None in prices else sum(prices)
        say(f"{len(plans)} endpoints: {describe_price(total)} while a replica of each starts or runs")
    if dry_run:
        for plan in plans:
            say(render("plan.txt", plan, sizes=describe_files(plan)))
        return
    # Anyone may call a public endpoint, so its test needs no permission.
    needed = [name for name in PERMISSIONS if access != "public" or not name.endswith("infer.write")]
    account = open_account(namespace, needed)
    if every:
        return deploy_all(account, plans, timeout, keep)
    plan, endpoint = deploy_plan(account, plans[0], timeout, keep)
    say("\n".join(["", *endpoint.addresses.values(), render("cost.txt", plan).strip()]))
    say(f"`make pause {endpoint.variables}` stops the cost; `make undeploy {endpoint.variables}` removes it\n")
    say(f"ACCESS={plan.access}: {CALLERS[plan.access]}.\n\n{calling_code(endpoint.addresses)}")


def deploy_all(account: Account, plans: list[Plan], timeout: float, keep: bool) -> None:
    """Deploy one plan after another, and end with a table even after an error."""
    rows = {plan.model: ("not reached", "", "") for plan in plans}
    try:
        for plan in plans:
            try:
                _, endpoint = deploy_plan(account, plan, timeout, keep)
                rows[plan.model] = endpoint.info.status, f"{dollars(endpoint.price)}/h", endpoint.info.url
            except FAILURES as error:
                rows[plan.model] = "failed", "", describe(error)
                note(f"error: {describe(error)}")
            except KeyboardInterrupt as stop:
                rows[plan.model] = "stopped", "", describe(stop)
                stop.add_note("endpoints that the table lists as running continue, and cost")
                raise
    finally:
        columns = ("model", "state", "per replica", "URL or error")
        show_table(columns, ([model, *row] for model, row in rows.items()))
    if failed := sum(row[0] == "failed" for row in rows.values()):
        raise DeployError(f"{failed} of {len(plans)} models failed; run `make deploy-all` again to continue")


def deploy_plan(account: Account, plan: Plan, timeout: float, keep: bool) -> tuple[Plan, Endpoint]:
    """Deploy one plan. All checks come before the first change, and a second run changes nothing."""
    say(f"Deploying {plan.model} as {account.namespace}/{plan.name}")
    endpoint = Endpoint(account, plan.name, plan.models)
    with endpoint.pause_on_failure(keep):
        repository = Repository(account, plan.name, plan.models)
        checkpoints = repository.find_checkpoints(plan)
        if endpoint.info:
            endpoint.check_immutable(plan)
            plan = replace(plan, region=endpoint.placement[1])
        if endpoint.is_in_quota(plan):
            plan = replace(plan, price=endpoint.price)
        else:
            plan = choose_hardware(plan, account.hardware, is_new=not endpoint.info)
        cost = f"{describe_price(plan.price)} while it runs"
        say(f"{plan.instance} {plan.size} in {plan.vendor} {plan.region}: {cost}")
        say(f"Repository {repository.page}" + ("" if repository.commit else ", new and private"))
        revision = repository.upload(plan, checkpoints)
        say(f"Endpoint {endpoint.page}")
        endpoint.deploy(plan, repository.id, revision)
        endpoint.wait(timeout)
        endpoint.check_immutable(plan)
        say("Smoke test")
        smoke_test(endpoint.addresses.values(), account.token)
    return plan, endpoint


def smoke_test(urls: Iterable[str], token: str | None) -> None:
    """Encode and decode a small image at each URL."""
    for url in urls:
        with out.status("encoding and decoding an image"):
            result = check(url, token, lambda line: note(f"  {line}"))
        say(f"  {url}: {result}")


@command
def endpoints(namespace: Namespace = None) -> None:
    """List this project's endpoints and their cost."""
    account = open_account(namespace)
    if rows := [endpoint.row() for endpoint in find_endpoints(account)]:
        columns = ("name", "model", "state", "instance", "replicas", "access", "an hour", "up at most", "URL")
        show_table(columns, rows)
        return say("paused and scaledToZero cost nothing; `make pause-all` pauses all. Up: since the last change")
    say(f"{account.namespace} has no endpoint of this project; `make deploy MODEL=tiny` creates a first one")


@command
def smoke(model: Model = None, namespace: Namespace = None, name: Name = None, url: Url = None) -> None:
    """Encode and decode a small image on a running endpoint."""
    if url:
        return smoke_test([url], None)
    endpoint = find_endpoint(model, namespace, name)
    if endpoint.info.status not in READY or not endpoint.info.url:
        advice = endpoint.message or f"`make deploy {endpoint.variables}` starts it"
        raise DeployError(f"{endpoint} is {endpoint.info.status} and does not respond: {advice} ({endpoint.page})")
    smoke_test(endpoint.addresses.values(), endpoint.account.token)


@command
def pause(model: Model = None, namespace: Namespace = None, name: Name = None, every: EveryEndpoint = False) -> None:
    """Pause an endpoint, which stops its cost until `resume`."""
    if not every:
        return pause_each([find_endpoint(model, namespace, name)])
    if model or name:
        raise DeployError("--all pauses every endpoint of this project: name no model and no endpoint")
    account = open_account(namespace)
    pause_each(find_endpoints(account))
    say(f"no endpoint of this project in {account.namespace} costs anything now")


def pause_each(endpoints: list[Endpoint]) -> None:
    """Pause every endpoint, also after an error. Raise `DeployError` for those that may still run."""
    failed = []
    for endpoint in endpoints:
        try:
            endpoint.pause()
            say(endpoint.cost_note)
        except DeployError as error:
            note(f"error: {error}")
            failed.append(f"{endpoint.name} ({endpoint.page})")
    if failed:
        raise DeployError(f"MAY BE RUNNING, and cost: {', '.join(failed)}")


@command
def resume(
    model: Model = None, namespace: Namespace = None, name: Name = None, timeout: Timeout = 30, keep: Keep = False
) -> None:
    """Start a paused endpoint again, and wait until it runs."""
    endpoint = find_endpoint(model, namespace, name)
    with endpoint.pause_on_failure(keep):
        endpoint.resume()
        endpoint.wait(timeout)
        say(f"{endpoint} is {endpoint.info.status}: {endpoint.info.url}, {describe_price(endpoint.price)}")


@command
def undeploy(
    model: Model = None, namespace: Namespace = None, name: Name = None, delete_repo: Repo = False, yes: Yes = False
) -> None:
    """Delete an endpoint and wait until it is gone. With --delete-repo, delete its repository too."""
    endpoint = find_endpoint(model, namespace, name, required=False)
    doomed: list[Endpoint | Repository] = [endpoint] if endpoint.info else []
    if delete_repo:
        repository = Repository(endpoint.account, endpoint.name, endpoint.models)
        doomed += [repository] if repository.commit else []
    if not doomed:
        return say(f"there is no {endpoint.name} in {endpoint.account.namespace}: nothing to delete")
    names = " and ".join(map(str, doomed))
    if not yes and not confirm(f"Delete {names}?"):
        raise DeployError("nothing was deleted; YES=1 deletes without asking")
    with if_stopped(f"{names} may still exist, and cost; `make endpoints` shows it"):
        for resource in doomed:
            resource.delete()
    say(f"deleted {names}" + ("" if delete_repo else "; its repository stays, at no cost, without DELETE_REPO=1"))


def confirm(question: str) -> bool:
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:  # standard input has ended
        note("")
        return False


if __name__ == "__main__":
    app()
