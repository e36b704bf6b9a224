"""Puts VAEs onto Hugging Face Inference Endpoints, one endpoint each: `make deploy MODEL=flux`.

Needs no torch. `docs/deploying.md` tells what it does and what it costs; the parts are in `deployment/`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any, NoReturn

import typer
from huggingface_hub import get_token
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from handlers import MODELS
from scripts.deployment.account import Account, open_account
from scripts.deployment.calls import DeployError
from scripts.deployment.console import WIDTH, megabytes, note, out, say
from scripts.deployment.endpoint import PENDING_PER_REPLICA, READY, Endpoint
from scripts.deployment.files import describe_files, repository_files
from scripts.deployment.plan import CALLERS, FRAMEWORK, TASK, Plan, cannot_run, default_name, find_model, is_shipped
from scripts.deployment.prices import describe_price, dollars
from scripts.deployment.repository import Repository, find_checkpoint
from scripts.deployment.smoke import is_hugging_face, smoke_test
from scripts.deployment.snippets import diffusers_snippet, token_snippet

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

ModelOption = Annotated[str | None, typer.Option(help=f"Key of the model: {', '.join(MODELS)}.")]
NamespaceOption = Annotated[str | None, typer.Option(help="User or organization; default: the token's user.")]
NameOption = Annotated[str | None, typer.Option(help="Name of endpoint and repository; default: remote-vae-MODEL.")]
InstanceOption = Annotated[str | None, typer.Option(help="Instance type; default: the model's own.")]
SizeOption = Annotated[str, typer.Option(help="Instance size.")]
VendorOption = Annotated[str, typer.Option(help="Cloud.")]
RegionOption = Annotated[str, typer.Option(help="The cloud's region.")]
AccessOption = Annotated[str, typer.Option(help=f"Who may call it: {', '.join(CALLERS)}.")]
MinReplicaOption = Annotated[int, typer.Option(help="Replicas that always run; 0 lets it scale to zero.")]
MaxReplicaOption = Annotated[int, typer.Option(help="Replicas at most.")]
ScaleToZeroOption = Annotated[int, typer.Option(help="Minutes without a request before it scales to zero.")]
WeightsOption = Annotated[str | None, typer.Option(help='Folder of the weights, or "hub" to upload none.')]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan; no token, no network, no change.")]
TimeoutOption = Annotated[float, typer.Option(help="Minutes to wait for the endpoint.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


class Interrupted(Exception):
    """Ctrl-C; the text says what stays and how to go on."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Registers a subcommand. Its failures end it with one line on standard error."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            return function(*args, **kwargs)
        except DeployError as error:
            message, status = f"error: {error}", 1
        except Interrupted as stop:
            message, status = f"stopped: {stop}", INTERRUPTED
        except KeyboardInterrupt:
            message, status = "stopped", INTERRUPTED
        gc.collect()  # a progress bar that the failure left open ends its line here
        fail(message, status)

    return app.command()(run)


def fail(message: str, status: int) -> NoReturn:
    token = get_token()
    note(message.replace(token, "***") if token else message)
    raise typer.Exit(status)


@contextmanager
def interruptible(left: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(left()) from None


@command
def deploy(
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    name: NameOption = None,
    instance: InstanceOption = None,
    size: SizeOption = "x1",
    vendor: VendorOption = "aws",
    region: RegionOption = "us-east-1",
    access: AccessOption = "authenticated",
    min_replica: MinReplicaOption = 0,
    max_replica: MaxReplicaOption = 1,
    scale_to_zero: ScaleToZeroOption = 15,
    weights: WeightsOption = None,
    timeout: TimeoutOption = 30,
    dry_run: DryRunOption = False,
) -> None:
    """Create or update the endpoint of one model, wait for it, try it."""
    plan = Plan.of(
        model,
        namespace=namespace,
        name=name,
        instance=instance,
        size=size,
        vendor=vendor,
        region=region,
        access=access,
        min_replica=min_replica,
        max_replica=max_replica,
        scale_to_zero=scale_to_zero,
        weights=weights,
    )
    if dry_run:
        show_plan(plan)
        return
    account = open_account(namespace)
    endpoint = deploy_plan(account, plan, timeout)
    show_calling(plan, endpoint)


@command
def deploy_all(
    namespace: NamespaceOption = None,
    vendor: VendorOption = "aws",
    region: RegionOption = "us-east-1",
    access: AccessOption = "authenticated",
    min_replica: MinReplicaOption = 0,
    max_replica: MaxReplicaOption = 1,
    scale_to_zero: ScaleToZeroOption = 15,
    timeout: TimeoutOption = 30,
    dry_run: DryRunOption = False,
) -> None:
    """Deploy every published model that an endpoint can run, one by one."""
    for reason in filter(None, map(cannot_run, MODELS)):
        note(reason)
    plans = [
        Plan.of(
            model,
            namespace=namespace,
            vendor=vendor,
            region=region,
            access=access,
            min_replica=min_replica,
            max_replica=max_replica,
            scale_to_zero=scale_to_zero,
        )
        for model, handler in MODELS.items()
        if not is_shipped(handler) and not cannot_run(model)
    ]
    if dry_run:
        for plan in plans:
            show_plan(plan)
    prices = [plan.price for plan in plans]
    if None not in prices:
        say(f"{len(plans)} endpoints: {describe_price(sum(prices))} while a replica of each starts or runs")
    if dry_run:
        return
    account = open_account(namespace)
    rows: dict[str, tuple[str, str, str]] = {plan.model: ("not reached", "", "") for plan in plans}
    failed = 0
    try:
        for plan in plans:
            try:
                endpoint = deploy_plan(account, plan, timeout)
                rows[plan.model] = (endpoint.state, hourly(endpoint.price), endpoint.url or "")
            except DeployError as error:
                rows[plan.model] = ("failed", "", str(error))
            except Interrupted:
                rows[plan.model] = ("stopped", "", "")
                raise
            state, _, what = rows[plan.model]
            if state == "failed":
                failed += 1
                note(f"error: {what}")
    finally:
        table = make_table("model", "state", "per replica", "URL, or what went wrong")
        for key, row in rows.items():
            table.add_row(key, *map(escape, row))
        print_wide(table)
    if failed:
        raise DeployError(f"{failed} of {len(plans)} models failed; `make deploy-all` again goes on with them")


@command
def endpoints(namespace: NamespaceOption = None) -> None:
    """List this project's endpoints."""
    account = open_account(namespace)
    found = Endpoint.find_all(account)
    if not found:
        say(f"{account.namespace} has no endpoint of this project; `make deploy MODEL=tiny` makes a first one")
        return
    table = make_table("name", "model", "state", "instance", "replicas", "access", "per replica", "URL")
    for one in found:
        price = hourly(one.price)
        table.add_row(one.name, one.model, one.state, one.instance, one.replicas, one.access, price, one.url or "")
    print_wide(table)
    say("paused and scaledToZero cost nothing")


@command
def smoke(
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    name: NameOption = None,
    url: Annotated[str | None, typer.Option(help="Address of any endpoint or server, instead of a model.")] = None,
) -> None:
    """Encode and decode a small picture on a live endpoint."""
    if url:
        say(str(smoke_test(url, get_token() if is_hugging_face(url) else None)))
        return
    account, endpoint = find_endpoint(model, namespace, name)
    if endpoint.state == "paused":
        raise DeployError(
            f"the endpoint {endpoint.name} is paused: it answers nothing until `make resume MODEL={model}`"
        )
    if endpoint.state not in READY or not endpoint.url:
        raise DeployError(f"the endpoint {endpoint.name} is {endpoint.state}: {endpoint.message} ({endpoint.page})")
    say(f"{endpoint.url}: {smoke_test(endpoint.url, account.token)}")


@command
def pause(model: ModelOption = None, namespace: NamespaceOption = None, name: NameOption = None) -> None:
    """Stop an endpoint, and with it its cost, until `resume`."""
    _, endpoint = find_endpoint(model, namespace, name)
    if endpoint.state != "paused":
        endpoint.pause()
    say(f"{endpoint.name} is {endpoint.state}: it costs nothing and answers nothing until `make resume`")


@command
def resume(
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    name: NameOption = None,
    timeout: TimeoutOption = 30,
) -> None:
    """Start a paused endpoint again and wait for it."""
    _, endpoint = find_endpoint(model, namespace, name)
    if endpoint.state == "paused":
        endpoint.resume()
    with interruptible(lambda: f"the endpoint {endpoint.name} goes on starting; `make pause` stops it"):
        endpoint.wait(timeout, f"MODEL={model}")
    say(f"{endpoint.name} is {endpoint.state}: {endpoint.url}, {describe_price(endpoint.price)}")


@command
def undeploy(
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    name: NameOption = None,
    delete_repo: Annotated[bool, typer.Option("--delete-repo", help="Delete the repository on the Hub too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete an endpoint, and its repository where asked to."""
    find_model(model)
    account = open_account(namespace)
    name = name or default_name(model)
    endpoint = Endpoint.find(account, name)
    endpoint.check_ours(model)
    repository = Repository(account, name) if delete_repo else None
    if repository:
        repository.check_ours(model)
    doomed = [f"the endpoint {name}"] if endpoint.exists else []
    doomed += [f"the repository {repository.id}"] if repository and repository.exists else []
    if not doomed:
        say(f"there is no {name} in {account.namespace}: nothing to delete")
        return
    if not yes and not confirm(f"Delete {' and '.join(doomed)}?"):
        raise DeployError("nothing was deleted; YES=1 deletes without asking")
    if endpoint.exists:
        endpoint.delete()
    if repository and repository.exists:
        repository.delete()
    say(f"deleted {' and '.join(doomed)}")
    if not delete_repo:
        say(f"the repository {account.namespace}/{name} stays, at no cost; DELETE_REPO=1 deletes it too")


def confirm(question: str) -> bool:
    """Whether the user says yes; no where there is nobody to ask."""
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        note("")
        return False


def find_endpoint(model: str | None, namespace: str | None, name: str | None) -> tuple[Account, Endpoint]:
    find_model(model)
    account = open_account(namespace)
    endpoint = Endpoint.find(account, name or default_name(model))
    if not endpoint.exists:
        raise DeployError(
            f"there is no endpoint {endpoint.name} in {account.namespace}; `make endpoints` lists what there is, "
            f"`make deploy MODEL={model}` makes it"
        )
    endpoint.check_ours(model)
    return account, endpoint


def deploy_plan(account: Account, plan: Plan, timeout: float) -> Endpoint:
    """The whole way. Everything that can refuse is asked before the first change; a second run changes nothing."""
    say(f"Deploying {plan.model} as {account.namespace}/{plan.name}: {describe_price(plan.price)} at work")
    left = "nothing was changed"
    with interruptible(lambda: f"{left}; the same command again goes on from there"):
        checkpoint = find_checkpoint(account, plan)
        repository = Repository(account, plan.name)
        repository.check_ours(plan.model)
        endpoint = Endpoint.find(account, plan.name)
        endpoint.check_ours(plan.model)
        endpoint.check_fixed(plan)
        files = repository_files(plan, checkpoint)

        say(f"Repository {repository.page}" + ("" if repository.exists else ", new and private"))
        left = f"the repository {repository.id} stays, it may be incomplete and costs nothing"
        repository.create()
        revision = repository.upload(plan, files, checkpoint)

        say(f"Endpoint {endpoint.page}")
        left = f"the endpoint {plan.name} goes on starting, and costs; `make pause {plan.variables}` stops it"
        # A container that has to fetch gated weights itself needs the token; the API keeps it as a secret.
        needs_token = plan.weights == "hub" and checkpoint is not None and checkpoint.gated
        endpoint.deploy(plan, repository.id, revision, {"HF_TOKEN": account.token} if needs_token else {})
        if endpoint.state == "paused":
            say("  it was paused: resuming it")
            endpoint.resume()
        endpoint.wait(timeout, plan.variables)

        say("Smoke test")
        left = f"the endpoint {plan.name} is up, and costs; `make pause {plan.variables}` stops it"
        say(f"  {smoke_test(endpoint.url, account.token)}")
    return endpoint


def show_plan(plan: Plan) -> None:
    owner = plan.namespace or "<your account>"
    say(f"Plan for MODEL={plan.model}; nothing is changed, no token is needed\n")
    say(f"1. The private repository https://huggingface.co/{owner}/{plan.name} gets these files")
    table = make_table("file", "size")
    table.columns[1].justify = "right"
    listed = describe_files(plan)
    for path, size in listed:
        table.add_row(path, megabytes(size) if size is not None else "?")
    table.add_row(f"{len(listed)} files", megabytes(sum(size or 0 for _, size in listed)))
    out.print(table)
    if plan.weights == "checkpoint":
        say(f"   The weights are copied from {plan.checkpoint}; their sizes here are about right.")
    if plan.weights == "hub":
        say(f"   No weights: the endpoint fetches them from {plan.checkpoint} at every start.")
    if plan.weights in ("checkpoint", "hub"):
        say(f"   Their licence: {plan.handler.license}, {plan.license_link}")
    say("\n2. The endpoint is created from that commit, or updated where it exists")
    table = make_table("setting", "value", show_header=False)
    replicas = f"{plan.min_replica} to {plan.max_replica}"
    if plan.max_replica > 1:
        replicas += f", one more at {PENDING_PER_REPLICA} pending requests a replica"
    asleep = f"after {plan.scale_to_zero} minutes without a request" if plan.scale_to_zero else "never"
    table.add_row("name", plan.name)
    table.add_row("instance", f"{plan.instance} {plan.size}, {plan.vendor} {plan.region}")
    table.add_row("access", f"{plan.access}: {CALLERS[plan.access]}")
    table.add_row("replicas", replicas)
    table.add_row("scale to zero", asleep)
    table.add_row("container", f"the stock Inference Toolkit, task {TASK}, framework {FRAMEWORK}")
    table.add_row("tags", ", ".join(plan.tags))
    out.print(table)
    say("\n3. What it costs")
    for line in plan.cost:
        say(f"   {line}")
    say("\n4. It waits until the endpoint is up, sends a small picture through it and prints its URL")
    say(f"\n`make pause {plan.variables}` stops the cost; `make undeploy {plan.variables}` removes it.")


def show_calling(plan: Plan, endpoint: Endpoint) -> None:
    say(f"\n{endpoint.url}")
    for line in plan.cost:
        say(f"  {line}")
    say(f"  `make pause {plan.variables}` stops the cost; `make undeploy {plan.variables}` removes it")
    if plan.access == "public":
        say("\nCalling it with diffusers:\n")
        say(diffusers_snippet(plan.handler, endpoint.url))
        return
    say(f"\nACCESS={plan.access}: {CALLERS[plan.access]}.")
    say("`remote_decode` of diffusers sends no token; this does:\n")
    say(token_snippet(plan.handler, endpoint.url))
    say("With ACCESS=public (a new NAME=..., or after `make undeploy`) this works, for anyone who knows the URL:\n")
    say(diffusers_snippet(plan.handler, "URL"))


def hourly(price: float | None) -> str:
    return f"{dollars(price)}/h" if price is not None else "?"


def print_wide(table: Table) -> None:
    """Prints a table whose last column holds URLs: a narrow terminal wraps its rows, and a URL can be copied whole."""
    Console(highlight=False, width=max(out.width, WIDTH)).print(table)


def make_table(*columns: str, show_header: bool = True) -> Table:
    table = Table(box=None, header_style="bold", show_header=show_header, padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


if __name__ == "__main__":
    hub_logging.set_verbosity_error()
    app()
